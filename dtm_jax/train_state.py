"""What training changes, how one update changes it, and the keys of one step."""

import hashlib
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from dtm_jax.axes import Stream
from dtm_jax.distributed import to_host

NEVER = -1


@flax.struct.dataclass
class TrainState:
  """All that a checkpoint holds; the teacher is not part of it."""

  step: jax.Array  # int32 [], updates made, and so the step to make next
  params: Any
  opt_state: optax.OptState
  nonfinite_step: jax.Array  # int32 [], first step whose loss or gradient was not finite, or NEVER


def create_train_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
  return TrainState(jnp.int32(0), params, optimizer.init(params), jnp.int32(NEVER))


def apply_gradients(
  state: TrainState, loss: jax.Array, grads: Any, optimizer: optax.GradientTransformation
) -> tuple[TrainState, jax.Array]:
  """One optimiser step, unless the loss or a gradient is not finite.

  From the first such step on the state stays as it was, so that the host may
  look now and then only and still finds the last good state.

  Returns:
    The new state, and the global norm of the gradients before clipping.
  """
  grad_norm = optax.tree.norm(grads)
  is_good = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & (state.nonfinite_step == NEVER)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  updated = state.replace(step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state)
  kept = state.replace(nonfinite_step=jnp.where(state.nonfinite_step == NEVER, state.step, state.nonfinite_step))
  return jax.tree.map(lambda new, old: jnp.where(is_good, new, old), updated, kept), grad_norm


def stream_key(seed: int, stream: Stream, step: jax.typing.ArrayLike) -> jax.Array:
  """The PRNG key of one stream at one step."""
  return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), step)


def image_keys(key: jax.Array, num_images: int) -> jax.Array:
  """One key for each row of the global batch, whatever its layout over devices or micro-batches."""
  return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_images))


def params_sha256(params: Any) -> str:
  """SHA-256 over the float32 bytes of all parameters, in sorted key order; all processes have to ask."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  digest = hashlib.sha256()
  for _, leaf in sorted(leaves, key=lambda item: jax.tree_util.keystr(item[0], simple=True, separator="/")):
    digest.update(to_host(leaf).astype(jnp.float32).tobytes())
  return digest.hexdigest()
