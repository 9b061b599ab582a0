"""AdamW with the recipe's schedule, decay mask and clipping, from optax's parts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dtm_jax.config import OptimConfig

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]

# Not decayed although they have more than one dimension (BEiT's `no_weight_decay`).
_NOT_DECAYED = ("cls_token", "pos_embed")

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


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
  """PyTorch's clipping: gradients times min(1, max_norm / (norm + 1e-6))."""

  def update(updates, state, params=None):
    del params
    factor = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + _CLIP_EPS))
    return jax.tree.map(lambda g: g * factor, updates), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def create_optimizer(config: OptimConfig, schedule: Schedule) -> optax.GradientTransformation:
  """Clipping, then AdamW with decoupled decay, as `torch.optim.AdamW` computes it."""
  clip = optax.identity() if config.clip_norm is None else clip_by_global_norm(config.clip_norm)
  return optax.chain(
    clip,
    optax.scale_by_adam(*config.betas, eps=config.eps),
    optax.add_decayed_weights(config.weight_decay, decay_mask),
    optax.scale_by_learning_rate(schedule),
  )
