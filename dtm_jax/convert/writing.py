"""Our parameter trees -> foreign weights: the release's `.pth`, Hugging Face's folders.

A file is written whole or not at all, and so is a new folder; in a folder that is there already, the three files are
replaced one after the other. Everything is written as float32 and with every table: a complete float32 file comes back
bit for bit, one of another dtype as float32, one with tables absent with zeros in their place.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from dtm_jax.config import DataConfig
from dtm_jax.convert import layouts
from dtm_jax.convert.configs import PREPROCESSOR_FILE, hugging_face_config, hugging_face_preprocessor
from dtm_jax.convert.layouts import Layout
from dtm_jax.convert.state_dict import WEIGHTS_FILES
from dtm_jax.convert.torch_writer import write_torch
from dtm_jax.errors import InputError, some_of
from dtm_jax.files import replacing

HUGGING_FACE_FILES = (WEIGHTS_FILES[0], "config.json", PREPROCESSOR_FILE)


def to_state_dict(kind: str, params: Mapping) -> dict[str, np.ndarray]:
  """A model in the names of the released code, or OpenAI's (`visual.*`) for a CLIP tower.

  Args:
    kind: "student", "classifier" or "clip_vision".
    params: Its parameter tree, of arrays of any framework that numpy takes.

  Returns:
    float32 arrays, and the int64 index buffers of bias tables.

  Raises:
    InputError: another kind of model, a grid that is not square (the layout has no place for it), or values that are
      NaN or infinite.
  """
  if kind not in layouts.RELEASE:
    raise InputError(f"{kind!r} is not a kind of model; there are {', '.join(layouts.RELEASE)}")
  return _rename(layouts.RELEASE[kind], params)[1]


def save_torch(path: str | os.PathLike, kind: str, params: Mapping) -> None:
  """Writes a `.pth` that the released code and `torch.load(weights_only=True)` read: {"model": state dict}.

  A CLIP tower is a state dict without that wrapping, as OpenAI's is.

  Args:
    path: Replaced if it is there.
    kind, params: See `to_state_dict`.

  Raises:
    InputError: see `to_state_dict`; or it cannot be written.
  """
  state = to_state_dict(kind, params)
  with replacing(pathlib.Path(path)) as unfinished:
    write_torch(unfinished, state if kind == "clip_vision" else {"model": state})


def save_hugging_face(
  folder: str | os.PathLike,
  kind: str,
  params: Mapping,
  class_names: Sequence[str] | None = None,
  data: DataConfig | None = None,
) -> None:
  """Writes `model.safetensors`, `config.json` and `preprocessor_config.json` for transformers.

  A student is a `BeitModel`, whose `last_hidden_state` are its features; its
  head goes with it as `lm_head`, which `BeitModel` does not ask for and
  `BeitForMaskedImageModeling.from_pretrained(folder, use_mean_pooling=True)`
  takes. A classifier is a `BeitForImageClassification`.

  Args:
    folder: Made if it is missing; these three files in it are replaced.
    kind: "student" or "classifier".
    params: See `to_state_dict`.
    class_names: Of a classifier's outputs; `LABEL_0` and so on for None.
    data: How the model is shown images (`eval_crop`, `mean`, `std`); by the defaults for None.

  Raises:
    InputError: see `to_state_dict`; or it cannot be written.
  """
  if kind not in layouts.HUGGING_FACE:
    raise InputError(f"a {kind} has no Hugging Face layout here; students and classifiers have")
  model, state = _rename(layouts.HUGGING_FACE[kind], params)
  if not model[layouts.output_field(kind)]:  # without its head it is a `BeitModel`
    state = {name.removeprefix("beit."): array for name, array in state.items()}
  state = {name: array for name, array in state.items() if array.dtype == np.float32 and array.size}
  with replacing(pathlib.Path(folder)) as unfinished:
    unfinished.mkdir()
    weights, config, preprocessor = (unfinished / name for name in HUGGING_FACE_FILES)
    try:
      save_file(state, weights, metadata={"format": "pt"})  # transformers refuses a file that does not say this
    except SafetensorError as error:
      raise OSError(error) from error
    for file, settings in {
      config: hugging_face_config(kind, model, class_names),
      preprocessor: hugging_face_preprocessor(model, data or DataConfig()),
    }.items():
      file.write_text(json.dumps(settings, indent=2) + "\n")
    with contextlib.suppress(OSError):  # some file systems know no modes
      weights.chmod(config.stat().st_mode)  # safetensors writes for its owner alone


def _rename(layout: Layout, params: Mapping) -> tuple[dict, dict[str, np.ndarray]]:
  """Sizes, and arrays by foreign name."""
  kind = layout.kind
  flat = {path: np.asarray(value, np.float32) for path, value in layouts.flatten(params).items()}
  model = sizes_of(kind, params)
  state: dict[str, list[np.ndarray]] = {}
  for leaf in layouts.leaves(layout, layout.rows, model):
    parameter = flat.pop(leaf.path, None) if leaf.path else layouts.relative_position_index(model["grid"])
    if parameter is None or parameter.shape != leaf.shape:
      raise InputError(f"{leaf.path} of shape {list(leaf.shape)} is not among these parameters of a {kind}")
    if not np.isfinite(parameter).all():
      raise InputError(f"{leaf.path} has values that are NaN or infinite; take a checkpoint before they were")
    state.setdefault(leaf.name, []).append(leaf.theirs(parameter))
  if flat:
    raise InputError(f"parameters that no {kind} has: {some_of(flat)}")
  return model, {name: parts[0] if len(parts) == 1 else np.concatenate(parts) for name, parts in state.items()}


def sizes_of(kind: str, params: Mapping) -> dict:
  """Fields of the module that these parameters are of; see `Weights.model`.

  Raises:
    InputError: they are of another module, or of a grid that is not square.
  """
  shapes = {path: np.shape(value) for path, value in layouts.flatten(params).items()}

  def shape(template: str, rank: int) -> tuple[int, ...]:
    found = shapes.get(template.format(0), ())
    if len(found) != rank:
      raise InputError(f"{template.format(0)} with {rank} dimensions is not among these parameters of a {kind}")
    return found

  try:
    return layouts.model_sizes(kind, sum(name.startswith("block_") for name in params), shape)
  except InputError as error:
    raise InputError(f"parameters that no layout of a {kind} has a place for: {error}") from error
