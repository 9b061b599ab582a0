"""Group means, written back to every member: morphing itself."""

import jax
import jax.numpy as jnp

# The released code divides by count + 1e-6.
_COUNT_EPS = 1e-6


def morph(tokens: jax.Array, labels: jax.Array) -> jax.Array:
  """Replaces each token of one image by its group's mean. Differentiable in `tokens`.

  Args:
    tokens: [N, D] float; means are taken in float32.
    labels: int32 [N], the group of each token, in 0..N-1.

  Returns:
    float32 [N, D].
  """
  # [N, N] averaging matrix: a product with it is fast in both directions on
  # every device, and deterministic, where a scatter-add is not.
  same = (labels[:, None] == labels[None, :]).astype(jnp.float32)
  weights = same / (same.sum(axis=-1, keepdims=True) + _COUNT_EPS)
  return jnp.matmul(weights, tokens.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
