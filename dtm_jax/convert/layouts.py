"""Which leaf of our parameter trees has which name in which file."""

import functools

import numpy as np


@functools.lru_cache(maxsize=4)
def relative_position_index(grid: tuple[int, int]) -> np.ndarray:
  """Row of a bias table for each pair of tokens.

  Args:
    grid: Patches (down, across).

  Returns:
    int64 [1 + N, 1 + N], query by key, class token first; read-only.
  """
  down, across = grid
  row, column = np.divmod(np.arange(down * across), across)
  offsets = (2 * down - 1) * (2 * across - 1)
  index = np.empty((1 + down * across,) * 2, np.int64)
  index[1:, 1:] = (row[:, None] - row + down - 1) * (2 * across - 1) + column[:, None] - column + across - 1
  index[0], index[:, 0], index[0, 0] = offsets, offsets + 1, offsets + 2
  index.flags.writeable = False
  return index
