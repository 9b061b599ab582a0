"""Bias tables on transfer: the three variants, and geometric resizing. Measured errors stand beside the tolerances."""

import functools
import pathlib

import numpy as np
import pytest
from scipy.interpolate import RectBivariateSpline

from dtm_jax.convert import load_torch
from dtm_jax.convert.transfer import resize_table, resize_tables, to_classifier
from dtm_jax.errors import InputError

GOLDEN = pathlib.Path(__file__).parent / "golden"


@functools.cache
def golden(name: str) -> dict:
  return load_torch(GOLDEN / name)[2]


def table_of(values: np.ndarray) -> np.ndarray:
  """[rows, columns, heads] -> a bias table with three more rows."""
  special = np.arange(3 * values.shape[-1], dtype=np.float32).reshape(3, -1)
  return np.concatenate([values.reshape(-1, values.shape[-1]), special]).astype(np.float32)


def offsets_of(table: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
  return table[:-3].reshape(2 * grid[0] - 1, 2 * grid[1] - 1, -1)


def random_table(grid: tuple[int, int]) -> np.ndarray:
  return table_of(np.random.default_rng(0).normal(size=(2 * grid[0] - 1, 2 * grid[1] - 1, 2)))


def geometric_positions(old: int, new: int) -> np.ndarray:
  """By bisection, as BEiT finds them: 1, 1 + q, 1 + q + q^2, ... up to new - 1, and their mirror image."""
  low, high = 1e-3, 10.0
  for _ in range(60):
    q = (low + high) / 2
    low, high = (low, q) if sum(q**i for i in range(old - 1)) > new - 1 else (q, high)
  distances = np.cumsum([q**i for i in range(old - 1)])
  return np.concatenate([-distances[::-1], [0], distances])


@pytest.mark.parametrize(
  ("old", "new"), [((8, 8), (14, 14)), ((14, 14), (24, 24)), ((14, 14), (7, 7)), ((5, 8), (9, 6))], ids=str
)
def test_resizing_is_bicubic_at_geometric_positions(old, new):
  table = random_table(old)
  actual = offsets_of(resize_table(table, old, new), new)
  down, across = (geometric_positions(o, n) for o, n in zip(old, new, strict=True))
  for head in range(2):
    spline = RectBivariateSpline(down, across, offsets_of(table, old)[..., head])
    expected = spline(np.arange(1 - new[0], new[0]), np.arange(1 - new[1], new[1]))
    np.testing.assert_allclose(actual[..., head], expected, rtol=0, atol=2e-6)  # measured 2.4e-7 (values up to 5)


@pytest.mark.parametrize("new", [(14, 14), (6, 11)], ids=str)
def test_cubic_polynomials_of_the_distance_are_reproduced(new):
  """A spline through samples of a cubic is that cubic: what lies at 3.7 patches keeps meaning 3.7 patches."""
  old = (8, 8)

  def bias(dy, dx):
    y, x = np.meshgrid(dy / 5, dx / 7, indexing="ij")
    return np.stack([1 + 2 * y - x**2 + 0.5 * y**3, x * y**2 - 3 * x**3], axis=-1)

  table = table_of(bias(geometric_positions(8, new[0]), geometric_positions(8, new[1])))
  actual = offsets_of(resize_table(table, old, new), new)
  expected = bias(np.arange(1 - new[0], new[0]), np.arange(1 - new[1], new[1]))
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)  # measured 1.4e-6 (values up to 19)


@pytest.mark.parametrize(("old", "new"), [((8, 8), (14, 14)), ((14, 14), (5, 9)), ((2, 3), (5, 4)), ((5, 4), (2, 3))])
def test_centre_neighbours_ends_and_special_rows_stay(old, new):
  table = random_table(old)
  resized = resize_table(table, old, new)
  before, after = offsets_of(table, old), offsets_of(resized, new)
  near = np.ix_(*([o - 1, o] if o > 2 else [o - 1] for o in old))  # offsets 0 and 1; two patches are stretched
  same = np.ix_(*([n - 1, n] if o > 2 else [n - 1] for o, n in zip(old, new, strict=True)))
  np.testing.assert_allclose(after[same], before[near], rtol=0, atol=1e-6)  # measured 0; one rounding is 2.4e-7
  if min(new) > 2:
    np.testing.assert_allclose(after[::100, ::100], before[::100, ::100], rtol=0, atol=1e-6)
    np.testing.assert_allclose(after[-1, -1], before[-1, -1], rtol=0, atol=1e-6)
  np.testing.assert_array_equal(resized[-3:], table[-3:])


def test_symmetric_tables_stay_symmetric():
  values = np.random.default_rng(1).normal(size=(15, 15, 2))
  values += values[::-1, ::-1]
  resized = offsets_of(resize_table(table_of(values), (8, 8), (14, 14)), (14, 14))
  np.testing.assert_allclose(resized, resized[::-1, ::-1], rtol=0, atol=1e-6)  # measured 0


def test_rows_and_columns_are_not_swapped():
  """A table that depends on the vertical offset only stays so, for a grid that grows across only."""
  values = np.broadcast_to(np.arange(9.0)[:, None, None], (9, 15, 2))
  resized = offsets_of(resize_table(table_of(values), (5, 8), (5, 11)), (5, 11))
  np.testing.assert_allclose(resized, np.broadcast_to(np.arange(9.0)[:, None, None], (9, 21, 2)), atol=1e-5)


@pytest.mark.parametrize(("old", "new"), [((1, 1), (3, 2)), ((1, 4), (3, 4)), ((4, 4), (1, 1))])
def test_single_patches(old, new):
  table = random_table(old)
  resized = offsets_of(resize_table(table, old, new), new)
  np.testing.assert_allclose(resized[new[0] - 1, new[1] - 1], offsets_of(table, old)[old[0] - 1, old[1] - 1], atol=1e-6)


def test_every_table_of_a_model_is_resized_and_nothing_else():
  params = golden("student_tiny.pth")
  resized = resize_tables(params, (8, 8), (6, 10))
  rows = 11 * 19 + 3
  assert resized["rel_pos_bias"].shape == (rows, 3)
  assert all(resized[f"block_{i}"]["attn"]["rel_pos_bias"].shape == (rows, 3) for i in range(3))
  expected = resize_table(params["block_2"]["attn"]["rel_pos_bias"], (8, 8), (6, 10))
  np.testing.assert_array_equal(resized["block_2"]["attn"]["rel_pos_bias"], expected)
  assert resized["block_1"]["attn"]["q"]["kernel"] is params["block_1"]["attn"]["q"]["kernel"]


def test_the_same_grid_is_the_identity():
  params = golden("student_tiny.pth")
  same = resize_tables(params, (8, 8), (8, 8))
  assert same["rel_pos_bias"] is params["rel_pos_bias"]


def test_another_grid_than_the_table_has_is_refused():
  with pytest.raises(InputError, match="228 rows is not for 7 x 7 patches, which have 172"):
    resize_tables(golden("student_tiny.pth"), (7, 7), (8, 8))


@pytest.mark.parametrize("tables", ["both", "shared", "own"])
def test_tables_of_a_classifier(tables):
  """The recorded fine-tuning model has the sum: what the released code does."""
  student, fine_tuned = golden("student_tiny.pth"), golden("finetune_tiny.pth")
  classifier = to_classifier(student, 7, tables=tables)
  for i in range(3):
    own, actual = (tree[f"block_{i}"]["attn"]["rel_pos_bias"] for tree in (student, classifier))
    expected = {
      "both": fine_tuned[f"block_{i}"]["attn"]["rel_pos_bias"],
      "shared": student["rel_pos_bias"],
      "own": own,
    }
    np.testing.assert_array_equal(actual, expected[tables])


def test_a_classifier_keeps_the_trunk_and_has_a_new_head():
  student, fine_tuned = golden("student_tiny.pth"), golden("finetune_tiny.pth")
  classifier = to_classifier(student, 1000, seed=3)
  assert classifier.keys() == fine_tuned.keys()
  np.testing.assert_array_equal(
    classifier["block_1"]["mlp"]["fc1"]["kernel"], fine_tuned["block_1"]["mlp"]["fc1"]["kernel"]
  )
  np.testing.assert_array_equal(classifier["patch_embed"]["kernel"], student["patch_embed"]["kernel"])
  kernel = classifier["head"]["kernel"]
  assert kernel.shape == (48, 1000) and kernel.dtype == np.float32
  assert kernel.std() == pytest.approx(2e-5, rel=0.02)  # 0.3 % is one standard error of 48,000 draws
  assert not classifier["head"]["bias"].any() and not classifier["fc_norm"]["bias"].any()
  assert (classifier["fc_norm"]["scale"] == 1).all()
  np.testing.assert_array_equal(to_classifier(student, 1000, seed=3)["head"]["kernel"], kernel)
  assert (to_classifier(student, 1000, seed=4)["head"]["kernel"] != kernel).any()


def test_only_students_become_classifiers():
  with pytest.raises(InputError, match="no shared bias table"):
    to_classifier(golden("finetune_tiny.pth"), 7)
  with pytest.raises(InputError, match="not one of both, shared, own"):
    to_classifier(golden("student_tiny.pth"), 7, tables="all")
  with pytest.raises(InputError, match="at least one"):
    to_classifier(golden("student_tiny.pth"), 0)
