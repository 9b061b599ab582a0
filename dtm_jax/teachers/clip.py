"""CLIP's vision tower as the teacher: the paper's choice."""

import dataclasses

import jax

from dtm_jax.augment import normalize
from dtm_jax.convert import load_torch
from dtm_jax.errors import InputError
from dtm_jax.models.clip import ClipVision
from dtm_jax.teachers.base import Params
from dtm_jax.teachers.weights import locate_weights, sha256

# What OpenAI trained CLIP with (its README's preprocessing), of RGB in [0, 1].
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class ClipTeacher:
  """Patch tokens after the last LayerNorm, projected into the space shared with text.

  Attributes:
    tower: The module; its parameters are passed to `apply`.
    mean, std: Of the images it is shown. The release shows it the student's
      (ImageNet's), CLIP itself was trained with `CLIP_MEAN` and `CLIP_STD`.
    weights_sha256: Of the weights file.
  """

  tower: ClipVision
  mean: tuple[float, float, float]
  std: tuple[float, float, float]
  weights_sha256: str

  @property
  def out_dim(self) -> int:
    return self.tower.out_dim

  def apply(self, params: Params, images: jax.Array) -> jax.Array:
    """See `Teacher.apply`."""
    tokens, _ = self.tower.apply({"params": params}, normalize(images, self.mean, self.std))
    return tokens


def load_clip_teacher(
  weights: str,
  *,
  grid: tuple[int, int],
  image_size: int,
  mean: tuple[float, float, float],
  std: tuple[float, float, float],
  **options,
) -> tuple[ClipTeacher, Params]:
  """Reads a tower and checks that it sees an image in the student's patches.

  Args:
    weights: See `locate_weights`.
    grid: The student's patches (down, across).
    image_size: Pixels, square.
    mean, std: See `ClipTeacher`.
    **options: Further fields of `ClipVision`: dtype, attention.

  Raises:
    InputError: no such weights, of something else, or with other patches.
  """
  file = locate_weights(weights)
  kind, model, params = load_torch(file)
  if kind != "clip_vision":
    remedy = "config.teacher.kind='checkpoint' takes it" if kind == "student" else "name other weights"
    raise InputError(f"{file} holds a {kind}, not a CLIP vision tower; {remedy}")
  patch_size = model["patch_size"]
  if (patch_size * grid[0], patch_size * grid[1]) != (image_size, image_size):
    raise InputError(
      f"the teacher's patches have {patch_size} pixels ({file}), the student's {image_size // grid[0]};"
      " tokens must be of the same patches: change config.model.patch_size or the weights"
    )
  return ClipTeacher(ClipVision(**model, **options), mean, std, sha256(file)), params
