"""How many tokens merge, and over how many iterations: the random schedule of each step."""

import jax
import jax.numpy as jnp


def merges_per_iteration(num_merged: jax.typing.ArrayLike, iterations: jax.typing.ArrayLike, budget: int) -> jax.Array:
  """Spreads `num_merged` merges over `iterations` rounds.

  The share is rounded up, but down where rounding up would merge more than
  `budget` tokens in all (the released code's rule). Works on traced values.

  Args:
    num_merged: int, any shape; tokens to merge, n in the paper, 0..budget.
    iterations: int, same shape; matching rounds, k in the paper, at least 1.
    budget: most tokens that may merge.

  Returns:
    int32, same shape: merges in each round, r. 0 means no morphing.
  """
  num_merged, iterations = jnp.asarray(num_merged, jnp.int32), jnp.asarray(iterations, jnp.int32)
  rounded_up = (num_merged + iterations - 1) // iterations
  return jnp.where(rounded_up * iterations > budget, num_merged // iterations, rounded_up)


def sample_schedule(
  key: jax.Array,
  *,
  draws: int = 2,
  budget: int = 196,
  max_iterations: int = 14,
  fixed_num_merged: int | None = None,
  fixed_iterations: int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Draws n ~ U{0..budget} and k ~ U{1..max_iterations}, independently for each loss (paper, section 3.2).

  Args:
    key: PRNG key.
    draws: number of losses, L.
    budget: most tokens that may merge; the number of tokens N in the paper.
    max_iterations: most matching rounds, K.
    fixed_num_merged: n itself instead of a draw (the paper's ablation).
    fixed_iterations: k itself instead of a draw.

  Returns:
    merges int32 [draws], per round, and iterations int32 [draws].
  """
  key_merged, key_iterations = jax.random.split(key)
  num_merged = jax.random.randint(key_merged, (draws,), 0, budget + 1)
  iterations = jax.random.randint(key_iterations, (draws,), 1, max_iterations + 1)
  if fixed_num_merged is not None:
    num_merged = jnp.full_like(num_merged, fixed_num_merged)
  if fixed_iterations is not None:
    iterations = jnp.full_like(iterations, fixed_iterations)
  return merges_per_iteration(num_merged, iterations, budget), iterations
