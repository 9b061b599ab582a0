"""Pre-training checkpoints of the released PyTorch code -> parameters of `models.vit.ViT`."""

import math

import numpy as np

from dtm_jax.convert.state_dict import StateDict, dense, layer_norm, patch_kernel
from dtm_jax.errors import InputError

# Index buffers of the bias tables: a function of the grid, which the table's size gives.
_IGNORABLE = (r"(rel_pos_bias|blocks\.\d+\.attn)\.relative_position_index",)


def convert_student(weights: StateDict) -> tuple[dict, dict]:
  """Maps a release student to ours.

  Args:
    weights: Tensors under the release's names (`blocks.0.attn.qkv.weight`).

  Returns:
    Sizes (`patch_size`, `width`, `depth`, `heads`, `grid`, `out_dim`; the release
    trains on square images only), and the parameter tree in float32.

  Raises:
    InputError: names are missing, unknown, or of shapes that do not agree.
  """
  width, _, patch_size, _ = weights.shape("patch_embed.proj.weight", 4)
  rows, heads = weights.shape("rel_pos_bias.relative_position_bias_table", 2)
  out_dim, _ = weights.shape("lm_head.weight", 2)
  depth = weights.count(r"blocks\.(\d+)\.")
  params = {
    "cls_token": weights.take("cls_token", 1, 1, width),
    "mask_token": weights.take("mask_token", 1, 1, width),
    "patch_embed": {
      "kernel": patch_kernel(weights, "patch_embed.proj.weight", patch_size, width),
      "bias": weights.take("patch_embed.proj.bias", width),
    },
    "rel_pos_bias": weights.take("rel_pos_bias.relative_position_bias_table", rows, heads),
    "norm": layer_norm(weights, "norm", width),
    "head": dense(weights, "lm_head", width, out_dim),
  }
  params |= {f"block_{i}": _block(weights, f"blocks.{i}", width, rows, heads) for i in range(depth)}
  weights.check(_IGNORABLE)
  sizes = {"patch_size": patch_size, "width": width, "depth": depth, "heads": heads}
  return sizes | {"grid": _grid(weights, rows), "out_dim": out_dim}, params


def _grid(weights: StateDict, rows: int) -> tuple[int, int]:
  """Patches (G, G) of a bias table with (2G - 1)^2 + 3 rows (three for the class token)."""
  side = math.isqrt(rows - 3) if rows > 3 else 0
  if side % 2 == 0 or side * side != rows - 3:
    raise InputError(f"{weights.path}: a bias table of {rows} rows is not for a square grid of patches")
  return ((side + 1) // 2,) * 2


def _block(weights: StateDict, name: str, width: int, rows: int, heads: int) -> dict:
  q, k, v = np.split(weights.take(f"{name}.attn.qkv.weight", 3 * width, width), 3)
  return {
    "norm1": layer_norm(weights, f"{name}.norm1", width),
    "attn": {
      "q": {"kernel": q.T, "bias": weights.take(f"{name}.attn.q_bias", width)},
      "k": {"kernel": k.T},
      "v": {"kernel": v.T, "bias": weights.take(f"{name}.attn.v_bias", width)},
      "proj": dense(weights, f"{name}.attn.proj", width, width),
      "rel_pos_bias": weights.take(f"{name}.attn.relative_position_bias_table", rows, heads),
    },
    "gamma_1": weights.take(f"{name}.gamma_1", width),
    "norm2": layer_norm(weights, f"{name}.norm2", width),
    "mlp": {
      "fc1": dense(weights, f"{name}.mlp.fc1", width, 4 * width),
      "fc2": dense(weights, f"{name}.mlp.fc2", 4 * width, width),
    },
    "gamma_2": weights.take(f"{name}.gamma_2", width),
  }
