"""Weights of other programs, in and out: name maps and file formats, in numpy alone."""

import os

from dtm_jax.convert.reading import Report, Weights, from_state_dict, read_weights
from dtm_jax.convert.writing import save_hugging_face, save_torch, to_state_dict

__all__ = [
  "Report",
  "Weights",
  "from_state_dict",
  "load_torch",
  "read_weights",
  "save_hugging_face",
  "save_torch",
  "to_state_dict",
]


def load_torch(path: str | os.PathLike, *, strict: bool = True) -> tuple[str, dict, dict]:
  """`read_weights` without the report: kind, model and params."""
  return read_weights(path, strict=strict)[:3]
