import pathlib

import numpy as np
import pytest

from dtm_jax.data import masking

GOLDEN = pathlib.Path(__file__).parent / "golden"


def draw(grid, num_masked, samples, min_block=16, min_aspect=0.3):
  rng = np.random.default_rng(0)
  return np.stack([masking.block_mask(rng, grid, num_masked, min_block, min_aspect) for _ in range(samples)])


def test_statistics_are_the_recorded_ones():
  recorded = np.load(GOLDEN / "mask_statistics.npz")
  samples = 10_000
  masks = draw((14, 14), int(recorded["num_masked"]), samples, int(recorded["min_block"])).reshape(-1, 14, 14)
  frequency = recorded["frequency"]
  error = np.sqrt(frequency * (1 - frequency) * (1 / samples + 1 / int(recorded["samples"])))
  # Root mean square of 196 correlated normal deviates: 1 if the distributions are equal; measured 0.91.
  assert np.sqrt(np.mean(((masks.mean(0) - frequency) / error) ** 2)) < 1.6
  edges = np.sum(masks[:, 1:] != masks[:, :-1], axis=(1, 2)) + np.sum(masks[:, :, 1:] != masks[:, :, :-1], axis=(1, 2))
  # Standard error 0.08 here and 0.05 in the recording; measured difference 0.03.
  assert abs(edges.mean() - recorded["edges_per_mask"]) < 0.3


@pytest.mark.parametrize("grid", [(1, 1), (4, 4), (8, 5), (2, 7), (14, 14)])
def test_masks_exactly_the_asked_number(grid):
  rng = np.random.default_rng(1)
  for num_masked in range(grid[0] * grid[1] + 1):
    mask = masking.block_mask(rng, grid, num_masked, 16, 0.3)
    assert mask.shape == (grid[0] * grid[1],)
    assert mask.dtype == bool
    assert mask.sum() == num_masked


def test_rows_of_a_rectangular_grid_are_across():
  """Of 16 patches on 5 x 30, many masks are one 4 x 4 block; read as 30 x 5 none would be."""
  masks = draw((5, 30), 16, 300).reshape(-1, 5, 30)
  full_squares = [np.ptp(np.nonzero(mask)[0]) == 3 and np.ptp(np.nonzero(mask)[1]) == 3 for mask in masks]
  assert np.mean(full_squares) > 0.1  # measured 0.42


def test_single_patches_where_no_block_fits():
  """On one row; then all patches are equally likely."""
  frequency = draw((1, 9), 4, 4000).mean(0)
  np.testing.assert_allclose(frequency, 4 / 9, atol=0.03)  # standard error 0.008; measured 0.015


def test_is_a_function_of_the_generator():
  first, again, other = (masking.block_mask(np.random.default_rng(seed), (14, 14), 75, 16, 0.3) for seed in (3, 3, 4))
  np.testing.assert_array_equal(first, again)
  assert np.any(first != other)
