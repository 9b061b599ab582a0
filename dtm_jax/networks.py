"""The Linen module that a config describes, and its parameters before training."""

from typing import Any

import numpy as np

from dtm_jax.axes import Stream
from dtm_jax.config import Config
from dtm_jax.models.variants import VARIANTS
from dtm_jax.models.vit import Classifier, ViT
from dtm_jax.train_state import stream_key


def create_student(config: Config, out_dim: int) -> ViT:
  """The configured student for targets of width `out_dim`."""
  return ViT(**_fields(config), out_dim=out_dim)


def create_classifier(config: Config, num_classes: int) -> Classifier:
  """The configured fine-tuning model."""
  return Classifier(**_fields(config), num_classes=num_classes)


def _fields(config: Config) -> dict[str, Any]:
  model = config.model
  return {
    **VARIANTS[model.variant]._asdict(),
    "patch_size": model.patch_size,
    "grid": config.grid,
    "drop_path": model.drop_path,
    "dtype": np.dtype(model.dtype),
    "attention": model.attention,
    "scan_layers": model.scan_layers,
    "remat": model.remat,
  }


def init_params(config: Config, model: ViT | Classifier) -> Any:
  """The model's initial parameters, from the run's seed."""
  size = config.data.image_size
  images, mask = np.zeros((1, size, size, 3), np.float32), np.zeros((1, config.num_tokens), bool)
  inputs = (images, mask) if isinstance(model, ViT) else (images,)
  return model.init(stream_key(config.run.seed, Stream.INIT, 0), *inputs)["params"]
