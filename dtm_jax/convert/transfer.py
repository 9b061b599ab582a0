"""From pre-training to fine-tuning: bias tables for a classifier, and for another number of patches."""

from collections.abc import Mapping

import numpy as np

from dtm_jax.convert import layouts
from dtm_jax.errors import InputError

TABLES = ("both", "shared", "own")
_SPECIAL_ROWS = 3  # class to token, token to class, class to class: of no place on the grid
_MAX_CLASSES = 1_000_000
_MAX_PATCHES = 128  # to a side; every block's index has the fourth power of it
_HEAD_STD = 0.02 * 0.001  # BEiT's initial std and its scale of a new head


def to_classifier(params: Mapping, num_classes: int, *, tables: str = "both", seed: int = 0) -> dict:
  """A fine-tuning model that begins as a pre-trained student.

  The mask token, the final norm and the head are left behind. `fc_norm` is new;
  the new head is normal of std 2e-5, so that training begins at equal logits.

  Args:
    params: Of a student.
    num_classes: C.
    tables: Each block's bias table: "both" its own plus the shared one (what
      the released code does), only the "shared", or only its "own".
    seed: Of the head.

  Returns:
    Parameters of `models.vit.Classifier`, float32 numpy.

  Raises:
    InputError: params are not a student's, there is no such variant, or a number is out of range.
  """
  if tables not in TABLES:
    raise InputError(f"tables={tables!r} is not one of {', '.join(TABLES)}")
  flat = {path: np.asarray(value, np.float32) for path, value in layouts.flatten(params).items()}
  if "rel_pos_bias" not in flat or "norm/scale" not in flat:
    raise InputError("only a pre-training student becomes a classifier: these parameters have no shared bias table")
  shared, width = flat["rel_pos_bias"], flat["cls_token"].shape[-1]
  kept = {path: value for path, value in flat.items() if path.startswith(("cls_token", "patch_embed/", "block_"))}
  for path, own in kept.items():
    if path.endswith("/rel_pos_bias"):
      kept[path] = {"both": own + shared, "shared": shared, "own": own}[tables]
  norm = {"fc_norm/scale": np.ones(width, np.float32), "fc_norm/bias": np.zeros(width, np.float32)}
  return with_new_head(layouts.nest(kept | norm), num_classes, seed)


def with_new_head(params: Mapping, num_classes: int, seed: int = 0) -> dict:
  """A classifier with a new head, as `to_classifier` makes it, for other classes.

  Raises:
    InputError: a number is out of range.
  """
  if not 1 <= num_classes <= _MAX_CLASSES:
    raise InputError(f"num_classes={num_classes}: a classifier needs at least one, and at most {_MAX_CLASSES}")
  if seed < 0:
    raise InputError(f"seed={seed} is negative; give 0 or more")
  kernel = np.random.default_rng(seed).standard_normal((params["cls_token"].shape[-1], num_classes))
  head = {"kernel": (kernel * _HEAD_STD).astype(np.float32), "bias": np.zeros(num_classes, np.float32)}
  return {**params, "head": head}


def resize_tables(params: Mapping, grid_from: tuple[int, int], grid_to: tuple[int, int]) -> dict:
  """The same model for another grid of patches: every bias table resized, the rest as it is.

  Args:
    params: Of a student or classifier.
    grid_from, grid_to: Patches (down, across).

  Returns:
    Parameters with every table resized by `resize_table`; the very same arrays for the same grid.

  Raises:
    InputError: the tables are not of `grid_from`, or `grid_to` is out of range.
  """
  if not 1 <= min(grid_to) <= max(grid_to) <= _MAX_PATCHES:
    raise InputError(f"a grid of {grid_to[0]} x {grid_to[1]} patches; there can be 1 to {_MAX_PATCHES} to a side")
  flat = layouts.flatten(params)
  for path, value in flat.items():
    if path.rpartition("/")[2] == "rel_pos_bias":
      flat[path] = resize_table(value, grid_from, grid_to)
  return layouts.nest(flat)


def resize_table(table: np.ndarray, grid_from: tuple[int, int], grid_to: tuple[int, int]) -> np.ndarray:
  """A bias table for another grid, by a cubic spline through offsets in geometric spacing (BEiT).

  Near offsets matter more than far ones and are kept close to where they were:
  the old offsets 0, 1, 2, ... are placed at 0, 1, 1 + q, 1 + q + q^2, ..., with
  q such that the farthest falls on the farthest new one. For a smaller grid q < 1.

  Args:
    table: float32 [(2 down - 1) (2 across - 1) + 3, heads] of `grid_from`.
    grid_from, grid_to: Patches (down, across).

  Returns:
    The table of `grid_to`; `table` itself for the same grid. The last three rows stay as they are.

  Raises:
    InputError: the table is not of `grid_from`.
  """
  (down, across), (new_down, new_across) = grid_from, grid_to
  rows = (2 * down - 1) * (2 * across - 1) + _SPECIAL_ROWS
  if len(table) != rows:
    raise InputError(f"a bias table of {len(table)} rows is not for {down} x {across} patches, which have {rows}")
  if (down, across) == (new_down, new_across):
    return table
  table = np.asarray(table, np.float32)
  offsets = table[:-_SPECIAL_ROWS].reshape(2 * down - 1, 2 * across - 1, -1)
  for axis, (old, new) in enumerate(((down, new_down), (across, new_across))):
    offsets = _resize_axis(offsets, axis, old, new)
  resized = offsets.reshape(-1, table.shape[1]).astype(np.float32)
  return np.concatenate([resized, table[-_SPECIAL_ROWS:]])


def _resize_axis(offsets: np.ndarray, axis: int, old: int, new: int) -> np.ndarray:
  """Resamples one axis of 2 old - 1 offsets at the 2 new - 1 whole numbers. In float64."""
  if old == new:
    return offsets
  if old == 1:
    return np.repeat(offsets, 2 * new - 1, axis)
  from scipy import interpolate  # half a second, which most runs have no use for

  positions = _positions(old, new)
  degree = min(3, len(positions) - 1)
  spline = interpolate.make_interp_spline(positions, offsets.astype(np.float64), k=degree, axis=axis)
  return spline(np.arange(1 - new, new))


def _positions(old: int, new: int) -> np.ndarray:
  """Where 2 old - 1 offsets lie among the new ones, old > 1."""
  half, extent = old - 1, new - 1
  if half == 1:
    distances = np.array([max(extent, 1)])  # a single distance has no ratio: it is stretched
  else:
    from scipy import optimize

    powers = np.arange(half)
    # Up to an extent of 1 the near offsets alone count, and they are knots for any ratio.
    ratio = 1.0 if extent <= 1 else optimize.brentq(lambda q: (q**powers).sum() - extent, 0, extent)
    distances = np.cumsum(ratio**powers)
  return np.concatenate([-distances[::-1], [0], distances])
