"""Normalised patches as targets: needs no weights."""

import dataclasses

import jax

from dtm_jax.models.layers import patchify
from dtm_jax.teachers.base import Params


@dataclasses.dataclass(frozen=True)
class PixelsTeacher:
  """Each patch minus its mean, over its standard deviation (MAE's normalised pixels, He et al. 2022, section 4.1).

  Attributes:
    patch_size: p, pixels of the student's patches; D = 3 p^2.
  """

  patch_size: int
  weights_sha256: str = ""

  @property
  def out_dim(self) -> int:
    return 3 * self.patch_size**2

  def apply(self, params: Params, images: jax.Array) -> jax.Array:
    """See `Teacher.apply`. D is (row, column, channel) of the patch."""
    del params
    patches = patchify(images, self.patch_size)
    mean = patches.mean(axis=-1, keepdims=True)
    variance = patches.var(axis=-1, keepdims=True, ddof=1)
    return (patches - mean) * jax.lax.rsqrt(variance + 1e-6)
