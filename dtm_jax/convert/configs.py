"""What config files beside the weights say, and shapes do not show: Hugging Face's and open_clip's."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence

from dtm_jax.config import DataConfig
from dtm_jax.convert.layouts import CLIP_HEAD_WIDTH, MLP_RATIO, RELEASE, Layout
from dtm_jax.errors import InputError

# Beside the weights in folders of Hugging Face and of open_clip.
CONFIG_FILES = ("config.json", "open_clip_config.json")
PREPROCESSOR_FILE = "preprocessor_config.json"  # of Hugging Face
LAYER_NORM_EPS = 1e-6
_DECISIVE = (
  "hidden_act",
  "hidden_size",
  "intermediate_size",
  "layer_norm_eps",
  "num_attention_heads",
  "num_channels",
  "patch_size",
  "use_absolute_position_embeddings",
)


def check(layout: Layout, folder: pathlib.Path, model: dict) -> None:
  """Compares a model with the config files in the folder of its weights, where there are any.

  Args:
    layout: Of the weights.
    folder: Where they lie.
    model: Sizes from `layouts.model_sizes`.

  Raises:
    InputError: the weights would fit, and compute something else.
  """
  if layout.kind == "clip_vision":
    expected = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_attention_heads": model["heads"]}
    expected |= {"head_width": CLIP_HEAD_WIDTH, "quick_gelu": True}
    for file in (folder / name for name in CONFIG_FILES):
      config = _read(file)
      if config is not None:
        _compare(file, _clip_tower(file, config), expected, "towers like OpenAI's")
  elif layout is not RELEASE[layout.kind]:
    _check_beit(layout, folder / "config.json", model)


def _check_beit(layout: Layout, file: pathlib.Path, model: dict) -> None:
  stated = _read(file)
  if stated is None:
    return
  # The weights were trained with 1e-6 (BEiT's own code); transformers writes 1e-12, and both compute the same but for
  # tokens of almost no variance.
  eps = stated.get("layer_norm_eps")
  if isinstance(eps, float) and eps <= LAYER_NORM_EPS:
    stated["layer_norm_eps"] = LAYER_NORM_EPS
  if isinstance(stated.get("image_size"), int):
    stated["image_size"] = [stated["image_size"]] * 2
  ours = hugging_face_config(layout.kind, model)
  expected = {name: ours[name] for name in _DECISIVE} | {"image_size": [ours["image_size"]] * 2}
  # `BeitForMaskedImageModeling` has its one norm after a trunk that it tells to pool; `BeitModel` has it itself.
  expected["use_mean_pooling"] = layout.kind == "classifier" or not layout.prefix
  _compare(file, stated, expected, "models like the released ones")


def _compare(file: pathlib.Path, stated: dict, expected: dict, which: str) -> None:
  for name, value in expected.items():
    if name in stated and stated[name] != value:
      raise InputError(f"{file} says {name} {stated[name]!r}; only {which} ({value!r}) can be read")


def _clip_tower(file: pathlib.Path, config: dict) -> dict:
  """The settings of the vision tower in a config file."""
  try:
    if file.name == "open_clip_config.json":
      # open_clip leaves this out where the activation is the exact GELU.
      return {"quick_gelu": False} | config["model_cfg"] | config["model_cfg"]["vision_cfg"]
    return config.get("vision_config", config)  # a tower saved alone has no section
  except (KeyError, TypeError) as error:
    raise _damaged(file, error) from error


def _read(file: pathlib.Path) -> dict | None:
  """The settings; None where there is no such file."""
  try:
    config = json.loads(file.read_text())
    if not isinstance(config, dict):
      raise ValueError("no settings by name")
    return config
  except FileNotFoundError:
    return None
  except (OSError, ValueError, RecursionError) as error:
    raise _damaged(file, error) from error


def _damaged(file: pathlib.Path, error: Exception) -> InputError:
  return InputError(f"{file} is not the config of a model ({error!r}); download it again, or move it")


def hugging_face_config(kind: str, model: dict, class_names: Sequence[str] | None = None) -> dict:
  """`config.json` of a BEiT in transformers.

  Args:
    kind: "student" or "classifier".
    model: Its sizes; the grid is square.
    class_names: Of a classifier's outputs, where they are known.

  Returns:
    What `BeitConfig` needs, so that `BeitModel` gives a student's features and
    `BeitForImageClassification` a classifier's logits.
  """
  is_student = kind == "student"
  outputs = model["out_dim" if is_student else "num_classes"]
  has_classes = not is_student and outputs
  labels = class_names or [f"LABEL_{i}" for i in range(outputs)] if has_classes else []
  return {
    "architectures": ["BeitForImageClassification" if has_classes else "BeitModel"],
    "model_type": "beit",
    "hidden_size": model["width"],
    "num_hidden_layers": model["depth"],
    "num_attention_heads": model["heads"],
    "intermediate_size": MLP_RATIO * model["width"],
    "image_size": model["grid"][0] * model["patch_size"],
    "patch_size": model["patch_size"],
    "num_channels": 3,
    "hidden_act": "gelu",
    "layer_norm_eps": LAYER_NORM_EPS,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "drop_path_rate": 0.0,
    "layer_scale_init_value": 0.1,  # not 0, which would mean none; the weights have the values
    "use_mask_token": is_student,
    "use_absolute_position_embeddings": False,
    "use_relative_position_bias": True,
    "use_shared_relative_position_bias": is_student,
    "use_mean_pooling": not is_student,  # else the final norm comes after the pooling
    "id2label": dict(enumerate(labels)),
    "label2id": {label: i for i, label in enumerate(labels)},
  } | ({"vocab_size": outputs} if is_student else {})


def hugging_face_preprocessor(model: dict, data: DataConfig) -> dict:
  """`preprocessor_config.json`: what `AutoImageProcessor` needs to show images to a model as evaluation does.

  Args:
    model: Its sizes; the grid is square.
    data: Its `eval_crop`, `mean` and `std` are told.
  """
  size = model["grid"][0] * model["patch_size"]
  return {
    "image_processor_type": "CLIPImageProcessor",  # BEiT's own would squash images to squares
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": round(size / data.eval_crop)},
    "resample": 3,  # bicubic
    "do_center_crop": True,
    "crop_size": {"height": size, "width": size},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [*data.mean],
    "image_std": [*data.std],
  }


def with_preprocessing(data: DataConfig, weights: pathlib.Path) -> DataConfig:
  """`data` as the image processor of a Hugging Face model has it, where the weights are a folder with one.

  Taken are mean and std, and the centre crop where it is one of images whose shorter side was resized.

  Raises:
    InputError: what it names is nothing of the kind.
  """
  file = weights / PREPROCESSOR_FILE
  stated = (_read(file) if weights.is_dir() else None) or {}
  try:
    return dataclasses.replace(data, **_preprocessing(stated))
  except (TypeError, ValueError, KeyError, ZeroDivisionError, InputError) as error:
    raise _damaged(file, error) from error


def _preprocessing(stated: dict) -> dict:
  found = {}
  if {"image_mean", "image_std"} <= stated.keys():
    mean, std = (tuple(float(value) for value in stated[name]) for name in ("image_mean", "image_std"))
    if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
      raise ValueError(f"mean {mean} and std {std} are not those of three colours")
    found |= {"mean": mean, "std": std}
  size = stated.get("size")
  if stated.get("do_center_crop") and isinstance(size, dict) and "shortest_edge" in size:
    found["eval_crop"] = stated["crop_size"]["height"] / size["shortest_edge"]
  return found
