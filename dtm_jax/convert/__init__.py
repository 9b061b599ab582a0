"""Weights from other programs: name maps and file readers, in numpy alone."""

import os
import pathlib
from collections.abc import Iterable

from dtm_jax.convert.clip import check_config, convert_hugging_face, convert_openai
from dtm_jax.convert.state_dict import StateDict, read_state_dict, weights_file
from dtm_jax.convert.student import convert_student
from dtm_jax.errors import InputError


def load_torch(path: str | os.PathLike) -> tuple[str, dict, dict]:
  """Reads weights that a PyTorch program saved; neither PyTorch nor code from the file is run.

  Layouts: the release's pre-training student; CLIP in OpenAI's or open_clip's
  names (`visual.*`, or the tower alone) and in Hugging Face's. A weights file
  does not say which activation it was trained with: QuickGELU, OpenAI's, is
  taken for granted unless a config file beside it says otherwise.

  Args:
    path: A `.pt`, `.pth`, TorchScript or `.safetensors` file, or a model folder
      of Hugging Face or open_clip.

  Returns:
    kind: "student" or "clip_vision".
    model: The module's sizes, fields of `models.vit.ViT` or
      `models.clip.ClipVision`: ints, and `grid` (patches down, across).
    params: Its parameter tree, float32 numpy.

  Raises:
    InputError: the file cannot be read, asks for code, or its names are not
      exactly those of such a model.
  """
  file = weights_file(pathlib.Path(path))
  tensors = read_state_dict(file)
  weights = StateDict(tensors, file)
  if "lm_head.weight" in tensors:
    return "student", *convert_student(weights)
  model, params = _convert_clip(weights, tensors.keys())
  check_config(file.parent, model)
  return "clip_vision", model, params


def _convert_clip(weights: StateDict, names: Iterable[str]) -> tuple[dict, dict]:
  if "vision_model.embeddings.patch_embedding.weight" in names:
    return convert_hugging_face(weights)
  for prefix in ("visual.", ""):
    if prefix + "conv1.weight" in names:
      return convert_openai(weights, prefix)
  first = ", ".join(list(names)[:3])
  raise InputError(f"{weights.path} is neither a pre-training student nor a CLIP vision tower: it begins with {first}")
