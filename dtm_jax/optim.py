"""AdamW and SGD with the recipe's schedule, decay mask and clipping, from optax's parts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dtm_jax.config import OptimConfig

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]

# Not decayed although they have more than one dimension (BEiT's `no_weight_decay`).
_NOT_DECAYED = ("cls_token", "pos_embed")

_BLOCK = "block_"
_EMBEDDINGS = ("cls_token", "mask_token", "pos_embed", "patch_embed")

# torch.nn.utils.clip_grad_norm_ divides by norm + 1e-6.
_CLIP_EPS = 1e-6


def warmup_cosine(peak: float, final: float, warmup_steps: int, total_steps: int) -> Schedule:
  """Learning rate of each step: linear from 0, reaching `peak` at the last warm-up step, then a cosine to `final`.

  The cosine's end, one step after the last, is `final` (the released code's schedule).
  """
  cosine_steps = max(1, total_steps - warmup_steps)

  def schedule(step):
    step = jnp.asarray(step, jnp.float32)
    warmup = peak * step / max(1, warmup_steps - 1)
    cosine = final + 0.5 * (peak - final) * (1 + jnp.cos(jnp.pi * (step - warmup_steps) / cosine_steps))
    return jnp.where(step < warmup_steps, warmup, cosine)

  return schedule


def decay_mask(params: Any) -> Any:
  """Which parameters are decayed: those of two dimensions or more, but no class token or position embedding."""

  def is_decayed(path, leaf):
    return jnp.ndim(leaf) > 1 and path[-1].key not in _NOT_DECAYED

  return jax.tree_util.tree_map_with_path(is_decayed, params)


def layer_scales(params: Any, decay: float) -> Any:
  """Factor of each parameter's learning rate: `decay` to the power of its distance from the head.

  `decay ** (depth + 1 - layer)`; layer 0 is the tokens and embeddings, i + 1
  block i, depth + 1 the rest (BEiT's layer-wise decay).

  Args:
    params: Tree of a ViT's parameters.
    decay: per layer.

  Returns:
    The same tree of floats.
  """
  depth = sum(name.startswith(_BLOCK) for name in params)

  def layer_of(name):
    if name in _EMBEDDINGS:
      return 0
    return 1 + int(name.removeprefix(_BLOCK)) if name.startswith(_BLOCK) else depth + 1

  return jax.tree_util.tree_map_with_path(lambda path, _: decay ** (depth + 1 - layer_of(path[0].key)), params)


def scale_by_layer(decay: float) -> optax.GradientTransformation:
  """Updates times `layer_scales`."""

  def update(updates, state, params=None):
    del params
    return jax.tree.map(jnp.multiply, updates, layer_scales(updates, decay)), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
  """PyTorch's clipping: gradients times min(1, max_norm / (norm + 1e-6))."""

  def update(updates, state, params=None):
    del params
    factor = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + _CLIP_EPS))
    return jax.tree.map(lambda g: g * factor, updates), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class AverageState(NamedTuple):
  """Of `average_params`."""

  count: jax.Array  # int32 [], updates averaged
  average: Any  # float32, as the parameters


def average_params(decay: float) -> optax.GradientTransformation:
  """Leaves updates alone and keeps an exponential moving average of the parameters after them: the chain's last part.

  It begins with the first parameters. The t-th update, from 0, has the decay
  min(decay, (1 + t) / (10 + t)), by which the average soon forgets them
  (TensorFlow's `ExponentialMovingAverage` with `num_updates`).
  """

  def init(params):
    # Copies, for a state whose buffers are donated must not hold one twice.
    return AverageState(jnp.int32(0), jax.tree.map(lambda p: jnp.array(p, jnp.float32), params))

  def update(updates, state, params):
    # 1 minus the decay, from Python's 1 - decay: in float32, 1 - 0.9999 would be off by 2e-4 of itself.
    new_share = jnp.maximum(1 - decay, 9 / (10 + state.count))
    average = optax.incremental_update(optax.apply_updates(params, updates), state.average, new_share)
    return updates, AverageState(state.count + 1, average)

  return optax.GradientTransformation(init, update)


def averaged_params(opt_state: optax.OptState) -> Any:
  """The average that `average_params` keeps, float32; `opt_state` is that of a chain which has it."""
  return optax.tree_utils.tree_get(opt_state, AverageState.__name__).average


def create_optimizer(config: OptimConfig, schedule: Schedule) -> optax.GradientTransformation:
  """Clipping, the optimizer with decoupled decay, each layer's learning rate, an average.

  "adamw" is `torch.optim.AdamW`, "sgd" is `torch.optim.SGD` but for its decay, which momentum does not gather (as
  in big_vision's recipes).
  """
  is_sgd = config.name == "sgd"
  direction = optax.trace(config.momentum) if is_sgd else optax.scale_by_adam(*config.betas, eps=config.eps)
  clip = optax.identity() if config.clip_norm is None else clip_by_global_norm(config.clip_norm)
  layers = optax.identity() if config.layer_decay == 1 else scale_by_layer(config.layer_decay)
  average = [] if config.ema_decay is None else [average_params(config.ema_decay)]
  return optax.chain(
    clip,
    direction,
    optax.add_decayed_weights(config.weight_decay, decay_mask),
    layers,
    optax.scale_by_learning_rate(schedule),
    *average,
  )
