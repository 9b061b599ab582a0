"""Which patches the student does not see."""

import math

import numpy as np

_TRIES = 10  # per block, as in the release


def block_mask(
  rng: np.random.Generator, grid: tuple[int, int], num_masked: int, min_block: int, min_aspect: float
) -> np.ndarray:
  """Masks rectangles of patches until exactly `num_masked` are masked.

  A block has at least `min_block` and at most as many patches as are still
  missing, and covers something new. Where no block fits any more, single
  patches are added at random. Source: BEiT's block-wise masking (Bao et al.,
  2022, algorithm 1) with the exact count of the DTM release.

  Args:
    rng: draws everything; the mask is a function of its state.
    grid: patches (down, across).
    num_masked: patches to mask, 0 to N.
    min_block: patches of the smallest block, before rounding to a rectangle.
    min_aspect: height over width is log-uniform in [min_aspect, 1 / min_aspect].

  Returns:
    bool [N], True = masked, row-major over the grid.
  """
  mask = np.zeros(grid, dtype=bool)
  missing = num_masked
  while missing > 0:
    block = _draw_block(rng, mask, missing, min_block, math.log(min_aspect))
    if block is None:
      break
    missing -= block.size - int(np.count_nonzero(block))
    block[:] = True
  mask = mask.reshape(-1)
  mask[rng.choice(np.flatnonzero(~mask), size=missing, replace=False)] = True
  return mask


def _draw_block(
  rng: np.random.Generator, mask: np.ndarray, missing: int, min_block: int, log_aspect: float
) -> np.ndarray | None:
  """A view of `mask` with 1 to `missing` patches that are not masked yet, or None after ten tries."""
  height, width = mask.shape
  for area_draw, aspect_draw, top_draw, left_draw in rng.random((_TRIES, 4)).tolist():
    # With less than `min_block` missing the interval is reversed, as in the release: blocks
    # reach over patches that are masked already.
    area = min_block + (missing - min_block) * area_draw
    aspect = math.exp(log_aspect * (2 * aspect_draw - 1))
    block_height, block_width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if block_height >= height or block_width >= width:
      continue
    top = int(top_draw * (height - block_height + 1))
    left = int(left_draw * (width - block_width + 1))
    block = mask[top : top + block_height, left : left + block_width]
    if 0 < block.size - np.count_nonzero(block) <= missing:
      return block
  return None
