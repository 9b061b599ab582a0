"""Milliseconds per image of grouping tokens by both draws of a step: XLA beside PyTorch, and whether they agree.

  python benchmarks/morphing.py [--batch 4 8 32 128] [--rounds=10] [--json=FILE]

N = 196 tokens of width 512, merges and iterations as a step may draw them (7
and 14 iterations). The target is 3 ms. "differ" counts groupings in which a
token got another group: near-ties of about 1e-7 may. The step never compiles
again for another draw, so the schedule is an argument here, too.
"""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
import torch
from common import alternate, argument_parser, median_ratio, report, warn_if_busy, write_json

from dtm_jax.morphing import group_tokens
from dtm_jax.numerics import torch_reference

NUM_TOKENS, WIDTH, BUDGET = 196, 512, 196
SCHEDULES = ((98, 7), (196, 14))  # (tokens to merge, iterations)


def make_tokens(batch: int) -> np.ndarray:
  """float32 [B, N, D] that share a direction, as the tokens of an image do."""
  rng = np.random.default_rng(0)
  tokens = rng.normal(size=(batch, NUM_TOKENS, WIDTH)) + rng.normal(size=(batch, 1, WIDTH))
  return tokens.astype(np.float32)


@jax.jit
def group_by_all(tokens: jax.Array, merges: jax.Array, iterations: jax.Array) -> jax.Array:
  """Labels [L, B, N], in the order that the loss computes them."""
  group_images = jax.vmap(group_tokens, in_axes=(0, None, None))
  return jnp.stack([group_images(tokens, merges[i], iterations[i]) for i in range(len(SCHEDULES))])


def group_by_all_torch(tokens: torch.Tensor, merges: list[int]) -> list[torch.Tensor]:
  """As `group_by_all`; numbered in order of position, not by smallest member."""
  return [torch_reference.group_tokens(tokens, r, k)[0] for r, (_, k) in zip(merges, SCHEDULES, strict=True)]


def compare(batch: int, rounds: int) -> dict[str, float]:
  """One row of the table."""
  tokens = make_tokens(batch)
  merges = [torch_reference.merges_per_iteration(n, k, BUDGET) for n, k in SCHEDULES]
  inputs = jnp.asarray(tokens), jnp.asarray(merges), jnp.asarray([k for _, k in SCHEDULES])
  torch_tokens = torch.from_numpy(tokens)
  seconds = alternate(
    {
      "xla": lambda i: group_by_all(*inputs).block_until_ready(),
      "torch": lambda i: group_by_all_torch(torch_tokens, merges),
    },
    rounds,
  )
  expected = [torch_reference.smallest_member(group).numpy() for group in group_by_all_torch(torch_tokens, merges)]
  differ = (np.asarray(group_by_all(*inputs)) != np.stack(expected)).any(axis=-1)
  return {
    "batch": batch,
    "xla_ms_per_image": 1e3 * statistics.median(seconds["xla"]) / batch,
    "torch_ms_per_image": 1e3 * statistics.median(seconds["torch"]) / batch,
    "ratio": median_ratio(seconds["xla"], seconds["torch"]),
    "differ": int(differ.sum()),
    "groupings": differ.size,
  }


def main() -> None:
  parser = argument_parser(__doc__, rounds=10)
  parser.add_argument("--batch", type=int, nargs="+", default=[4, 8, 32, 128])
  options = parser.parse_args()
  warn_if_busy()
  rows = [compare(batch, options.rounds) for batch in options.batch]
  columns = {
    "batch": ("batch", "d"),
    "XLA ms/image": ("xla_ms_per_image", ".2f"),
    "PyTorch ms/image": ("torch_ms_per_image", ".2f"),
    "ratio": ("ratio", ".2f"),
    "differ": ("differ", "d"),
    "of": ("groupings", "d"),
  }
  report(rows, columns)
  write_json(options.json, rows, ("jax", "jaxlib", "torch", "numpy"))


if __name__ == "__main__":
  main()
