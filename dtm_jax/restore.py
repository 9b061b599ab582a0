"""A trained model from where it lies: the checkpoint of a work folder, or a weights file."""

import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from absl import logging

from dtm_jax.checkpoint import BEST_FOLDER, CheckpointStore, saved_steps
from dtm_jax.checkpoint import FOLDER as CHECKPOINT_FOLDER
from dtm_jax.config import Config, DataConfig, from_json
from dtm_jax.convert import read_weights
from dtm_jax.convert.configs import with_preprocessing
from dtm_jax.errors import InputError
from dtm_jax.models.clip import ClipVision
from dtm_jax.models.vit import Classifier, ViT
from dtm_jax.networks import create_classifier, create_student, init_params
from dtm_jax.optim import averaged_params, create_optimizer
from dtm_jax.teachers import CLIP_MEAN, CLIP_STD
from dtm_jax.train_state import TrainState, create_train_state, params_sha256
from dtm_jax.workdir import CONFIG_FILE, SUMMARY_FILE, read_json

# Layer scale is only the initial value of parameters that a weights file has.
_MODULES = {
  "student": functools.partial(ViT, layer_scale=0.0),
  "classifier": functools.partial(Classifier, layer_scale=0.0),
  "clip_vision": ClipVision,
}
# The task of a run decides what its model is, and an entry of its record how wide the head.
_MODELS_OF_RUNS = {
  "pretrain": ("student", "target_dim", create_student),
  "finetune": ("classifier", "num_classes", create_classifier),
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A trained model.

  Attributes:
    path: where it is from.
    kind: "student", "classifier" or "clip_vision".
    step: of training, or 0 for a weights file, which does not say.
    model: the module.
    params: its parameters, numpy.
    averaged: the moving average of its parameters, numpy, or None where none was kept.
    config: of the run, or None for a weights file.
    class_names: of a fine-tuning run, where its data told them, in the order of the head's outputs.
  """

  path: pathlib.Path
  kind: str
  step: int
  model: nn.Module
  params: Any
  averaged: Any | None
  config: Config | None
  class_names: list[str] | None = None

  @functools.cached_property
  def sha256(self) -> str:
    return params_sha256(self.params)

  @property
  def image_size(self) -> int:
    """Pixels of the square images that it is for. Raises InputError where they are not square."""
    down, across = self.model.grid
    if down != across:
      raise InputError(f"{self.path} is for {down} x {across} patches; only models for square images can be used")
    return down * self.model.patch_size


def open_checkpoint(
  path: str | os.PathLike, *, best: bool = False, averaged: bool = False, dtype: str = "float32", **fields
) -> Checkpoint:
  """Reads a checkpoint of a work folder, or weights.

  Args:
    path: a work folder, a weights file, or a Hugging Face model folder.
    best: the best checkpoint of a fine-tuning run, not the newest.
    averaged: `params` are the moving average of the weights that a fine-tuning run keeps.
    dtype: of matrix products, for weights; a run keeps its own.
    **fields: further fields of the module, such as `attention`.

  Raises:
    InputError: it is not there, no model, or without such a checkpoint or average.
  """
  path = pathlib.Path(path).expanduser()
  if not path.exists():
    raise InputError(f"{path} does not exist; name the work folder of a run, or a weights file")
  if path.name in (CHECKPOINT_FOLDER, BEST_FOLDER) and (path.parent / CONFIG_FILE).exists():
    raise InputError(f"{path} is part of a run; name its work folder, {path.parent}")
  if best and not (path / BEST_FOLDER).is_dir():
    raise InputError(f"{path} keeps no best checkpoint, as fine-tuning runs do; take its last one")
  if (path / CHECKPOINT_FOLDER).is_dir():
    found = restore_run(path, BEST_FOLDER if best else CHECKPOINT_FOLDER)
    found = dataclasses.replace(found, model=found.model.clone(**fields))
  else:
    kind, sizes, params, _ = read_weights(path)
    found = Checkpoint(path, kind, 0, _MODULES[kind](**sizes, dtype=np.dtype(dtype), **fields), params, None, None)
  if not averaged:
    if best and (read_json(path / SUMMARY_FILE) or {}).get("best_is_ema"):
      logging.warning("the best accuracy of %s is that of the averaged weights, which are not asked for", path)
    return found
  if found.averaged is None:
    raise InputError(f"{path} keeps no average of its weights (config.optim.ema_decay); take the weights themselves")
  return dataclasses.replace(found, params=found.averaged)


def data_settings(checkpoint: Checkpoint) -> DataConfig:
  """How a model is shown images: as in its run; of weights by the defaults, with CLIP's own mean and std for CLIP, or
  as the image processor in a Hugging Face folder has it.

  Raises:
    InputError: that folder's image processor is damaged.
  """
  if checkpoint.config is not None:
    return checkpoint.config.data
  data = DataConfig(mean=CLIP_MEAN, std=CLIP_STD) if checkpoint.kind == "clip_vision" else DataConfig()
  return with_preprocessing(data, checkpoint.path)


def restore_run(workdir: pathlib.Path, folder: str = CHECKPOINT_FOLDER) -> Checkpoint:
  """Reads the newest checkpoint of a work folder, whatever devices it was saved on.

  Raises:
    InputError: the folder is not that of a run, its record is damaged, or it has no checkpoint.
  """
  record = read_json(workdir / CONFIG_FILE)
  if record is None or not saved_steps(workdir, folder):
    raise InputError(f"{workdir} holds no checkpoint of a run; name its work folder, or a weights file")
  config = from_json(record) if isinstance(record, dict) else None
  kind, width_name, create = _MODELS_OF_RUNS[config.task] if config and config.task in _MODELS_OF_RUNS else (None,) * 3
  if kind is None or not isinstance(record.get(width_name), int) or record[width_name] < 1:
    raise InputError(f"{workdir / CONFIG_FILE} is not the record of a training run; name another work folder")
  model = create(config, record[width_name])
  optimizer = create_optimizer(config.optim, lambda step: 0.0)
  anywhere = model.clone(attention="matmul")  # cuDNN's needs its GPU, if only for shapes
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  like = abstract_state(lambda: create_train_state(init_params(config, anywhere), optimizer), here)
  with contextlib.closing(CheckpointStore(workdir, folder=folder)) as store:
    state = jax.tree.map(np.asarray, store.restore(store.latest_step(), like))
  if folder == CHECKPOINT_FOLDER and int(state.step) < record.get("total_steps", 0):
    logging.warning("%s is at step %d of %d: the run is not complete", workdir, state.step, record["total_steps"])
  averaged = None if config.optim.ema_decay is None else averaged_params(state.opt_state)
  return Checkpoint(workdir, kind, int(state.step), model, state.params, averaged, config, record.get("class_names"))


def restore_tower(workdir: pathlib.Path) -> tuple[ViT | Classifier, Any, DataConfig]:
  """The model of a work folder's newest checkpoint, its parameters, and the data it was trained on; for a teacher.

  Raises:
    InputError: see `restore_run`.
  """
  run = restore_run(workdir)
  return run.model, run.params, run.config.data


def abstract_state(create: Callable[[], TrainState], shardings: Any) -> TrainState:
  """Shapes, dtypes and shardings (one for each leaf, or one for all) of a state, to restore to."""
  shapes = jax.eval_shape(create)
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    *(shapes, jax.tree.broadcast(shardings, shapes)),
  )
