"""CLIP vision towers of OpenAI, open_clip and Hugging Face -> parameters of `models.clip.ClipVision`."""

import json
import math
import pathlib

import numpy as np

from dtm_jax.convert.state_dict import StateDict, dense, layer_norm, patch_kernel
from dtm_jax.errors import InputError

# Beside the weights in folders of Hugging Face and of open_clip.
CONFIG_FILES = ("config.json", "open_clip_config.json")
HEAD_WIDTH = 64  # of every CLIP vision transformer that OpenAI released
# The text tower and what belongs to neither tower.
_OPENAI_IGNORABLE = (
  r"(transformer|token_embedding|ln_final|text|logit_scale|logit_bias)(\..*)?",
  r"positional_embedding|text_projection|attn_mask|input_resolution|context_length|vocab_size",
)
_HUGGING_FACE_IGNORABLE = (
  r"text_model\..*|text_projection\.weight|logit_scale",
  r"vision_model\.embeddings\.position_ids",
)


def convert_openai(weights: StateDict, prefix: str) -> tuple[dict, dict]:
  """Maps a tower in OpenAI's names, which open_clip keeps.

  Args:
    weights: Tensors by name.
    prefix: "visual." for a whole CLIP model, "" for a tower saved alone.

  Returns:
    Sizes and float32 parameters of `models.clip.ClipVision`.

  Raises:
    InputError: names are missing, unknown, or of shapes that do not agree.
  """
  sizes = _sizes(weights, prefix + "conv1.weight", prefix + "positional_embedding")
  width, out_dim = weights.shape(prefix + "proj", 2)
  blocks = prefix + "transformer.resblocks"
  sizes |= {"depth": weights.count(blocks.replace(".", r"\.") + r"\.(\d+)\."), "out_dim": out_dim}
  params = {
    "class_embedding": weights.take(prefix + "class_embedding", width),
    "patch_embed": {"kernel": patch_kernel(weights, prefix + "conv1.weight", sizes["patch_size"], width)},
    "pos_embed": weights.take(prefix + "positional_embedding", 1 + math.prod(sizes["grid"]), width),
    "ln_pre": layer_norm(weights, prefix + "ln_pre", width),
    "ln_post": layer_norm(weights, prefix + "ln_post", width),
    "proj": weights.take(prefix + "proj", width, out_dim),
  }
  params |= {f"block_{i}": _openai_block(weights, f"{blocks}.{i}", width) for i in range(sizes["depth"])}
  weights.check(_OPENAI_IGNORABLE if prefix else ())
  return sizes, params


def _openai_block(weights: StateDict, name: str, width: int) -> dict:
  kernels = np.split(weights.take(f"{name}.attn.in_proj_weight", 3 * width, width), 3)
  biases = np.split(weights.take(f"{name}.attn.in_proj_bias", 3 * width), 3)
  attention = {part: {"kernel": k.T, "bias": b} for part, k, b in zip("qkv", kernels, biases, strict=True)}
  return {
    "norm1": layer_norm(weights, f"{name}.ln_1", width),
    "attn": attention | {"proj": dense(weights, f"{name}.attn.out_proj", width, width)},
    "norm2": layer_norm(weights, f"{name}.ln_2", width),
    "mlp": {
      "fc1": dense(weights, f"{name}.mlp.c_fc", width, 4 * width),
      "fc2": dense(weights, f"{name}.mlp.c_proj", 4 * width, width),
    },
  }


def convert_hugging_face(weights: StateDict) -> tuple[dict, dict]:
  """Maps `CLIPModel` or `CLIPVisionModelWithProjection` of transformers; see `convert_openai`."""
  embeddings = "vision_model.embeddings"
  patches = f"{embeddings}.patch_embedding.weight"
  sizes = _sizes(weights, patches, f"{embeddings}.position_embedding.weight")
  out_dim, width = weights.shape("visual_projection.weight", 2)
  sizes |= {"depth": weights.count(r"vision_model\.encoder\.layers\.(\d+)\."), "out_dim": out_dim}
  params = {
    "class_embedding": weights.take(f"{embeddings}.class_embedding", width),
    "patch_embed": {"kernel": patch_kernel(weights, patches, sizes["patch_size"], width)},
    "pos_embed": weights.take(f"{embeddings}.position_embedding.weight", 1 + math.prod(sizes["grid"]), width),
    "ln_pre": layer_norm(weights, "vision_model.pre_layrnorm", width),  # sic
    "ln_post": layer_norm(weights, "vision_model.post_layernorm", width),
    "proj": weights.take("visual_projection.weight", out_dim, width).T,
  }
  layers = "vision_model.encoder.layers"
  params |= {f"block_{i}": _hugging_face_block(weights, f"{layers}.{i}", width) for i in range(sizes["depth"])}
  weights.check(_HUGGING_FACE_IGNORABLE)
  return sizes, params


def _hugging_face_block(weights: StateDict, name: str, width: int) -> dict:
  parts = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "proj": "out_proj"}
  return {
    "norm1": layer_norm(weights, f"{name}.layer_norm1", width),
    "attn": {part: dense(weights, f"{name}.self_attn.{source}", width, width) for part, source in parts.items()},
    "norm2": layer_norm(weights, f"{name}.layer_norm2", width),
    "mlp": {
      "fc1": dense(weights, f"{name}.mlp.fc1", width, 4 * width),
      "fc2": dense(weights, f"{name}.mlp.fc2", 4 * width, width),
    },
  }


def check_config(folder: pathlib.Path, sizes: dict) -> None:
  """Compares what shapes do not show with the model's config files, where there are any.

  Args:
    folder: Where the weights lie.
    sizes: What `convert_openai` or `convert_hugging_face` gave.

  Raises:
    InputError: the weights would fit, and compute something else.
  """
  expected = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_attention_heads": sizes["heads"]}
  expected |= {"head_width": HEAD_WIDTH, "quick_gelu": True}
  for file in (folder / name for name in CONFIG_FILES):
    stated = _architecture(file)
    for name, value in expected.items():
      if name in stated and stated[name] != value:
        raise InputError(f"{file} says {name} {stated[name]!r}; only towers like OpenAI's ({value!r}) can be teachers")


def _architecture(file: pathlib.Path) -> dict:
  """The settings of the vision tower in a config file; {} where there is no such file."""
  try:
    config = json.loads(file.read_text())
    if file.name == "open_clip_config.json":
      # open_clip leaves this out where the activation is the exact GELU.
      return {"quick_gelu": False} | config["model_cfg"] | config["model_cfg"]["vision_cfg"]
    return config.get("vision_config", config)  # a tower saved alone has no section
  except FileNotFoundError:
    return {}
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise InputError(f"{file} is not the config of a CLIP model ({error!r}); download it again, or move it") from error


def _sizes(weights: StateDict, patch_name: str, position_name: str) -> dict:
  """`patch_size`, `width`, `heads`, `grid` (down, across), from two shapes."""
  width, _, patch_size, _ = weights.shape(patch_name, 4)
  rows, _ = weights.shape(position_name, 2)
  grid = math.isqrt(rows - 1)
  if grid * grid != rows - 1 or width % HEAD_WIDTH:
    raise InputError(
      f"{weights.path}: {position_name} has shape {[rows, width]}, not the [1 + G * G, 64 * heads] of a CLIP tower"
    )
  return {"patch_size": patch_size, "width": width, "heads": width // HEAD_WIDTH, "grid": (grid, grid)}
