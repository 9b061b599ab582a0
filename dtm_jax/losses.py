"""Distances between tokens, and the DTM loss: the distance between morphed tokens."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dtm_jax.morphing import group_tokens, morph

_SMOOTH_L1_BETA = 2.0
_COSINE_EPS = 1e-6
_VARIANCE_EPS = 1e-6


def smooth_l1(online: jax.Array, target: jax.Array) -> jax.Array:
  """Quadratic below a difference of 2, linear above; mean over D. [..., D] -> [...]."""
  error = jnp.abs(online - target)
  quadratic = 0.5 / _SMOOTH_L1_BETA * jnp.square(error)
  return jnp.where(error < _SMOOTH_L1_BETA, quadratic, error - 0.5 * _SMOOTH_L1_BETA).mean(axis=-1)


def l1(online: jax.Array, target: jax.Array) -> jax.Array:
  """Mean absolute difference over D. [..., D] -> [...]."""
  return jnp.abs(online - target).mean(axis=-1)


def l2(online: jax.Array, target: jax.Array) -> jax.Array:
  """Mean squared difference over D. [..., D] -> [...]."""
  return jnp.square(online - target).mean(axis=-1)


def negative_cosine(online: jax.Array, target: jax.Array) -> jax.Array:
  """1 - cosine over D. [..., D] -> [...]."""

  def norm(x):
    # The clamp is inside the root: the gradient at zero is zero, not NaN.
    return jnp.sqrt(jnp.maximum(jnp.square(x).sum(axis=-1), _COSINE_EPS**2))

  return 1 - (online * target).sum(axis=-1) / (norm(online) * norm(target))


DISTANCES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
  "smooth_l1": smooth_l1,
  "l1": l1,
  "l2": l2,
  "negative_cosine": negative_cosine,
}


def token_loss(
  online: jax.Array, target: jax.Array, *, distance: str = "smooth_l1", mask: jax.Array | None = None
) -> jax.Array:
  """Mean distance over the positions that count: the token-wise baseline.

  Args:
    online: [B, N, D], the student's tokens.
    target: [B, N, D], the teacher's; no gradient flows to it.
    distance: a key of `DISTANCES`.
    mask: bool [B, N], True where a position counts (default: all).

  Returns:
    float32 scalar.
  """
  distances = DISTANCES[distance](online.astype(jnp.float32), jax.lax.stop_gradient(target).astype(jnp.float32))
  if mask is None:
    return distances.mean()
  return jnp.where(mask, distances, 0).sum() / jnp.maximum(mask.sum(), 1)


def normalize_tokens(tokens: jax.Array) -> jax.Array:
  """Each token minus its mean, over the root of its unbiased variance + 1e-6. [..., D] -> [..., D]."""
  centred = tokens - tokens.mean(axis=-1, keepdims=True)
  return centred / jnp.sqrt(tokens.var(axis=-1, ddof=1, keepdims=True) + _VARIANCE_EPS)


def dtm_loss(
  online: jax.Array,
  target: jax.Array,
  merges: jax.Array,
  iterations: jax.Array,
  *,
  distance: str = "smooth_l1",
  mask: jax.Array | None = None,
  protect_first: bool = True,
  split: str = "alternate",
  image_keys: jax.Array | None = None,
  normalize_targets: bool = False,
) -> jax.Array:
  """Distance between morphed online and morphed target tokens, mean over the L draws (paper, equation 4).

  Tokens are grouped by the target's similarities alone.

  Args:
    online: [B, N, D], the student's tokens.
    target: [B, N, D], the teacher's; no gradient flows to it.
    merges: int32, merges per round: [L] for one schedule that all images share, [B, L] for one each.
    iterations: int32, rounds, shaped as `merges`.
    distance: a key of `DISTANCES`.
    mask: bool [B, N], True where a position counts (default: all).
    protect_first: see `group_tokens`.
    split: see `group_tokens`; "random" needs `image_keys`.
    image_keys: PRNG keys [B] for split="random"; each draw folds in its number.
    normalize_targets: normalise target tokens after morphing, see `normalize_tokens`.

  Returns:
    float32 scalar.
  """

  def group(tokens, merges, iterations, key):
    return group_tokens(tokens, merges, iterations, protect_first=protect_first, split=split, key=key)

  schedule_axis = 0 if merges.ndim == 2 else None
  group_images = jax.vmap(group, in_axes=(0, schedule_axis, schedule_axis, None if image_keys is None else 0))

  losses = []
  for draw in range(merges.shape[-1]):
    keys = None if image_keys is None else jax.vmap(jax.random.fold_in, (0, None))(image_keys, draw)
    labels = group_images(target, merges[..., draw], iterations[..., draw], keys)
    morphed_target = jax.vmap(morph)(target, labels)
    if normalize_targets:
      morphed_target = normalize_tokens(morphed_target)
    losses.append(token_loss(jax.vmap(morph)(online, labels), morphed_target, distance=distance, mask=mask))
  return jnp.stack(losses).mean()
