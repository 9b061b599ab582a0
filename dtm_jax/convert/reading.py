"""Foreign weights -> our parameter trees, with an account of every name."""

import dataclasses
import itertools
import os
import pathlib
import re
from collections.abc import Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np

from dtm_jax.convert import configs, layouts
from dtm_jax.convert.layouts import Layout, Leaf
from dtm_jax.convert.state_dict import StateDict, read_state_dict, weights_file
from dtm_jax.errors import InputError, some_of

_FLOATS = tuple(map(np.dtype, (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)))
_REMEDY = "python -m dtm_jax.convert --lenient makes a clean file of it"


@dataclasses.dataclass(frozen=True)
class Report:
  """What became of every name, theirs; sorted as in the model, or in the file.

  Attributes:
    loaded: Became parameters, or are index buffers and agree with ours.
    absent: Missing as a whole set that the model does without: taken as zeros.
    left_out: Known to belong to something else: the text tower, a decoder.
    unexpected: Of no known model, or no tensors. Refused, unless `strict=False`.
    missing: Refused.
    reshaped: Loaded from a shape that differs by axes of length 1 only. Refused, unless `strict=False`.
    misshapen: Of another shape, "name [2] instead of [3]". Refused.
  """

  loaded: tuple[str, ...]
  absent: tuple[str, ...]
  left_out: tuple[str, ...]
  unexpected: tuple[str, ...]
  missing: tuple[str, ...]
  reshaped: tuple[str, ...]
  misshapen: tuple[str, ...]

  def check(self, source: str, *, strict: bool) -> None:
    """Raises InputError for what is refused."""
    for problem, names in {"lacks": self.missing, "has wrong shapes:": self.misshapen}.items():
      if names:
        raise InputError(f"{source} {problem} {some_of(names)}; it holds another model or is damaged")
    for problem, names in {"has other axes of length 1:": self.reshaped, "has unknown": self.unexpected}.items():
      if names and strict:
        raise InputError(f"{source} {problem} {some_of(names)}; it holds another model, or {_REMEDY}")


class Weights(NamedTuple):
  """A model in our terms.

  Attributes:
    kind: "student", "classifier" or "clip_vision".
    model: The module's sizes, fields of `models.vit.ViT`, `models.vit.Classifier`
      or `models.clip.ClipVision`: ints, and `grid` (patches down, across).
    params: Its parameter tree, float32 numpy.
    report: What became of the names.
  """

  kind: str
  model: dict
  params: dict
  report: Report


def read_weights(path: str | os.PathLike, *, strict: bool = True) -> Weights:
  """Reads weights that a PyTorch program saved; neither PyTorch nor code from the file is run.

  Layouts: the released code's student and fine-tuning model, and with the same
  names those of BEiT v1 and v2; transformers' `BeitForMaskedImageModeling`,
  `BeitForImageClassification` and `BeitModel`; CLIP in OpenAI's and open_clip's
  names (`visual.*`, or the tower alone) and in transformers'.

  A `BeitModel` without head is a student with `out_dim` 0, or with mean pooling
  a classifier with `num_classes` 0. A missing set of bias tables (shared, or of
  the blocks) stands for zeros. A classifier's shared table is added to its
  blocks' own. A weights file does not say which activation it was trained
  with: unless a config file beside it says otherwise, a CLIP tower is taken to
  have QuickGELU, OpenAI's.

  Args:
    path: A `.pt`, `.pth`, `.bin`, TorchScript or `.safetensors` file, or a model
      folder of Hugging Face or open_clip.
    strict: False leaves out names that no known model has, and takes tensors
      with axes of length 1 too many or too few.

  Raises:
    InputError: the file cannot be read, asks for code, holds another model, or
      numbers that are no weights.
  """
  file = weights_file(pathlib.Path(path))
  return _convert(read_state_dict(file), str(file), file.parent, strict=strict)


def from_state_dict(tensors: Mapping[str, np.ndarray], *, strict: bool = True) -> Weights:
  """`read_weights` of a state dict in memory: foreign names -> arrays. Gradients have the same names.

  Raises:
    InputError: see `read_weights`.
  """
  return _convert(StateDict(tensors), "the state dict", None, strict=strict)


def _convert(weights: StateDict, source: str, folder: pathlib.Path | None, *, strict: bool) -> Weights:
  layout = _detect(weights.views, source)
  model = _sizes(layout, weights.views, source)
  if folder is not None:
    configs.check(layout, folder, model)
  expected = list(layouts.leaves(layout, layout.rows, model))
  folded = list(layouts.leaves(layout, layout.folded, model))
  report = _account(layout, expected, folded, weights)
  report.check(source, strict=strict)
  params = _read(weights, source, expected, model["grid"])
  found = [leaf for leaf in folded if leaf.name in weights.views]
  for shared in _read(weights, source, found, model["grid"]).values():
    for i in range(model["depth"]):
      params[f"block_{i}/attn/rel_pos_bias"] = params[f"block_{i}/attn/rel_pos_bias"] + shared
  return Weights(layout.kind, model, layouts.nest(params), report)


def _detect(names: Mapping, source: str) -> Layout:
  for layout in layouts.LAYOUTS:
    if all(marker.removeprefix(layout.prefix) in names for marker in layout.markers):
      return layout
  raise InputError(
    f"{source} is neither a BEiT-style student or classifier nor a CLIP vision tower: it begins with {some_of(names)}"
  )


def _sizes(layout: Layout, views: Mapping[str, np.ndarray], source: str) -> dict:
  def shape(template: str, rank: int) -> tuple[int, ...]:
    name, order = layouts.first_place(layout, template)
    if name not in views:
      if template in layout.absent:
        return ()
      raise InputError(f"it lacks {name}")
    theirs = views[name].shape
    if len(theirs) != rank:
      raise InputError(f"{name} has shape {list(theirs)}, not {rank} dimensions")
    return theirs if order is None else tuple(theirs[axis] for axis in order)

  try:
    return layouts.model_sizes(layout.kind, layouts.count_blocks(layout, views), shape)
  except InputError as error:
    raise InputError(f"{source} is not {layout.title}, or is damaged: {error}") from error


def _account(layout: Layout, expected: list[Leaf], folded: list[Leaf], weights: StateDict) -> Report:
  views = weights.views
  names = {field.name: [] for field in dataclasses.fields(Report)}
  found = {leaf.template for leaf in expected if leaf.name in views}
  for leaf in {leaf.name: leaf for leaf in (*expected, *folded)}.values():
    if leaf.name in views:
      shape = views[leaf.name].shape
      verdict = _compare(shape, leaf.their_shape)
      wrong = f" {list(shape)} instead of {list(leaf.their_shape)}" if verdict == "misshapen" else ""
      names[verdict].append(leaf.name + wrong)
    elif leaf.path and leaf not in folded:
      names["absent" if leaf.template in {*layout.absent} - found else "missing"].append(leaf.name)
  elsewhere = re.compile("|".join(layout.left_out) or "(?!)")
  asked = {leaf.name for leaf in (*expected, *folded)}
  for name in (*(name for name in views if name not in asked), *weights.others):
    names["left_out" if elsewhere.fullmatch(name) else "unexpected"].append(name)
  return Report(**{field: tuple(listed) for field, listed in names.items()})


def _compare(actual: tuple[int, ...], expected: tuple[int, ...]) -> str:
  if actual == expected:
    return "loaded"
  same = [n for n in actual if n != 1] == [n for n in expected if n != 1]
  return "reshaped" if same else "misshapen"


def _read(weights: StateDict, source: str, expected: list[Leaf], grid: tuple[int, int]) -> dict[str, np.ndarray]:
  """Parameters by path."""
  params = {}
  for name, group in itertools.groupby(expected, lambda leaf: leaf.name):
    stacked = list(group)
    if stacked[0].path:
      tensor = _float32(weights, source, stacked[0])
      params |= {leaf.path: leaf.ours(tensor) for leaf in stacked}
    elif name in weights.views and not np.array_equal(weights.read(name), layouts.relative_position_index(grid)):
      raise InputError(
        f"{source}: {name} is not the index of a {grid[0]} x {grid[1]} grid; its tables mean another model"
      )
  return params


def _float32(weights: StateDict, source: str, leaf: Leaf) -> np.ndarray:
  """The whole tensor that holds a leaf, or zeros for one that is absent."""
  if leaf.name not in weights.views:
    return np.zeros(leaf.their_shape, np.float32)
  dtype = weights.views[leaf.name].dtype
  if dtype not in _FLOATS:
    raise InputError(f"{source}: {leaf.name} is {dtype}, which weights never are; it is damaged or quantised")
  with np.errstate(over="ignore"):  # of float64; told below
    tensor = weights.read(leaf.name).astype(np.float32, copy=False).reshape(leaf.their_shape)
  if not np.isfinite(tensor).all():
    raise InputError(f"{source}: {leaf.name} has values that are NaN or infinite; take a checkpoint before they were")
  return tensor
