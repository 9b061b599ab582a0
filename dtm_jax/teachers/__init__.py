"""What produces target tokens, behind one protocol (`Teacher`)."""

import pathlib
from collections.abc import Callable

from dtm_jax.config import Config, DataConfig
from dtm_jax.models.layers import Constrain, unconstrained
from dtm_jax.models.vit import Classifier, ViT
from dtm_jax.teachers.base import Params, Teacher
from dtm_jax.teachers.checkpoint import CheckpointTeacher, check_grid, load_tower
from dtm_jax.teachers.clip import CLIP_MEAN, CLIP_STD, ClipTeacher, load_clip_teacher
from dtm_jax.teachers.hog import HogTeacher
from dtm_jax.teachers.pixels import PixelsTeacher

__all__ = ["CheckpointTeacher", "ClipTeacher", "HogTeacher", "PixelsTeacher", "Params", "Teacher", "create_teacher"]


def create_teacher(
  config: Config,
  restore_tower: Callable[[pathlib.Path], tuple[ViT | Classifier, Params, DataConfig]],
  constrain: Constrain = unconstrained,
) -> tuple[Teacher, Params]:
  """Builds the teacher that the config names; `ahead_of_time.plan_teacher` does so where its weights are not there.

  Args:
    config: Of the run.
    restore_tower: Reads a work folder of this program: the model's module,
      parameters and data settings. Called for `teacher.kind="checkpoint"` with a folder only.
    constrain: Of its activations, see `models.layers`.

  Returns:
    The teacher, and its parameters (numpy, {} for hog and pixels) apart, for
    the caller to place on devices and to pass to the jitted step.

  Raises:
    InputError: the weights are missing, damaged, or do not fit the student.
  """
  match config.teacher.kind:
    case "hog":
      return HogTeacher(config.model.patch_size), {}
    case "pixels":
      return PixelsTeacher(config.model.patch_size), {}
    case "clip":
      return _create_clip(config, constrain)
    case "checkpoint":
      return _create_checkpoint(config, restore_tower, constrain)
  raise ValueError(f"no teacher of kind {config.teacher.kind!r}")


def _create_clip(config: Config, constrain: Constrain) -> tuple[ClipTeacher, Params]:
  own = config.teacher.normalization == "clip"
  return load_clip_teacher(
    config.teacher.weights,
    grid=config.grid,
    image_size=config.data.image_size,
    mean=CLIP_MEAN if own else config.data.mean,
    std=CLIP_STD if own else config.data.std,
    dtype=config.teacher.dtype,
    attention=config.model.attention,
    constrain=constrain,
  )


def _create_checkpoint(config: Config, restore_tower, constrain: Constrain) -> tuple[CheckpointTeacher, Params]:
  path, digest, data = pathlib.Path(config.teacher.weights).expanduser(), "", config.data
  options = {"dtype": config.teacher.dtype, "attention": config.model.attention, "constrain": constrain}
  if path.is_dir():
    tower, params, data = restore_tower(path)  # it is shown images as it was in its own run
    tower = tower.clone(**options)
  else:
    tower, params, digest = load_tower(path, **options)
  check_grid(tower, config.grid, config.teacher.weights)
  return CheckpointTeacher(tower, data.mean, data.std, digest), params
