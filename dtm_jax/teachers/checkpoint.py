"""A tower that this program trained as the teacher."""

import dataclasses
import pathlib

import jax

from dtm_jax.augment import normalize
from dtm_jax.convert import load_torch
from dtm_jax.errors import InputError
from dtm_jax.models.vit import Classifier, ViT
from dtm_jax.teachers.base import Params
from dtm_jax.teachers.weights import sha256

_TOWERS = {"student": ViT, "classifier": Classifier}


@dataclasses.dataclass(frozen=True)
class CheckpointTeacher:
  """A student's or classifier's patch tokens after its final norm, with nothing masked; D is its width.

  Attributes:
    tower: The module; its parameters are passed to `apply`.
    mean, std: Of the images it is shown.
    weights_sha256: Of the weights file; "" for parameters of a work folder.
  """

  tower: ViT | Classifier
  mean: tuple[float, float, float]
  std: tuple[float, float, float]
  weights_sha256: str = ""

  @property
  def out_dim(self) -> int:
    return self.tower.width

  def apply(self, params: Params, images: jax.Array) -> jax.Array:
    """See `Teacher.apply`."""
    images = normalize(images, self.mean, self.std)
    return self.tower.apply({"params": params}, images, method="patch_tokens")


def load_tower(file: pathlib.Path, **options) -> tuple[ViT | Classifier, Params, str]:
  """Reads a student or classifier that the released PyTorch code saved.

  Args:
    file: The `.pth` file.
    **options: Further fields of the module: dtype, attention.

  Returns:
    The module, its parameters, and the file's SHA-256.

  Raises:
    InputError: the file cannot be read or holds something else.
  """
  kind, model, params = load_torch(file)
  if kind not in _TOWERS:
    raise InputError(f"{file} holds a {kind}, no model of this method; config.teacher.kind='clip' takes it")
  # Layer scale is only the initial value of parameters that the file has.
  return _TOWERS[kind](**model, layer_scale=0.0, **options), params, sha256(file)


def check_grid(tower: ViT | Classifier, grid: tuple[int, int], weights: str) -> None:
  """Refuses a tower whose bias tables are for other patches than the student's.

  Raises:
    InputError: as said.
  """
  if tower.grid != grid:
    raise InputError(
      f"the teacher of {weights} sees {tower.grid[0]} x {tower.grid[1]} patches, the student {grid[0]} x {grid[1]};"
      " set config.data.image_size and config.model.patch_size as it was trained"
    )
