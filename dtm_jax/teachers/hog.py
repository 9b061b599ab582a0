"""Histograms of oriented gradients as targets: needs no weights, runs on the device."""

import dataclasses

import jax
import jax.numpy as jnp

from dtm_jax.models.layers import patchify
from dtm_jax.teachers.base import Params

_ORIENTATIONS = 9  # bins of 20 degrees over half a turn: a gradient and its opposite count as one
_EPSILON = 1e-5
_MIN_DIVIDED_PATCH = 8  # pixels; cells below 4 x 4 have too few gradients for nine bins


@dataclasses.dataclass(frozen=True)
class HogTeacher:
  """HOG of each colour channel per patch, contrast-normalised over the patch (Dalal and Triggs 2005).

  A target for masked image modelling as in MaskFeat (Wei et al. 2022): 9 bins,
  three channels, and for 16 px patches 2 x 2 cells, D = 108. Each channel equals
  `skimage.feature.hog(pixels_per_cell=cell, cells_per_block=cells, block_norm="L2")`
  at the blocks that are patches.

  Attributes:
    patch_size: Pixels of the student's patches.
  """

  patch_size: int
  weights_sha256: str = ""

  @property
  def cells(self) -> int:
    """Cells along one side of a patch."""
    return 2 if self.patch_size >= _MIN_DIVIDED_PATCH and self.patch_size % 2 == 0 else 1

  @property
  def out_dim(self) -> int:
    return 3 * self.cells**2 * _ORIENTATIONS

  def apply(self, params: Params, images: jax.Array) -> jax.Array:
    """See `Teacher.apply`. D is (channel, cell row, cell column, orientation)."""
    del params
    histograms = _cell_histograms(images, self.patch_size // self.cells)
    batch, down, across, channels, bins = histograms.shape
    tokens = patchify(histograms.reshape(batch, down, across, -1), self.cells)
    tokens = tokens.reshape(batch, -1, self.cells**2, channels, bins).swapaxes(2, 3)
    norm = jnp.sqrt(jnp.square(tokens).sum(axis=(3, 4), keepdims=True) + _EPSILON**2)
    return (tokens / norm).reshape(batch, -1, self.out_dim)


def _cell_histograms(images: jax.Array, cell: int) -> jax.Array:
  """[B, H, W, C] -> [B, H / cell, W / cell, C, bins]: gradient magnitude by orientation, mean over the cell."""
  batch, height, width, channels = images.shape
  by_row, by_column = _central_difference(images, 1), _central_difference(images, 2)
  magnitude = jnp.hypot(by_row, by_column)
  turns = jnp.mod(jnp.arctan2(by_row, by_column) / jnp.pi, 1.0)  # of half a turn
  # In float32 `mod` may round up to 1, which is the direction 0.
  bins = jnp.floor(turns * _ORIENTATIONS).astype(jnp.int32) % _ORIENTATIONS
  votes = jax.nn.one_hot(bins, _ORIENTATIONS) * magnitude[..., None]
  grouped = votes.reshape(batch, height // cell, cell, width // cell, cell, channels, _ORIENTATIONS)
  return grouped.mean(axis=(2, 4))


def _central_difference(images: jax.Array, axis: int) -> jax.Array:
  """x[i + 1] - x[i - 1] along `axis`, 0 at both ends."""
  size = images.shape[axis]
  inner = jax.lax.slice_in_dim(images, 2, size, axis=axis) - jax.lax.slice_in_dim(images, 0, size - 2, axis=axis)
  padding = [(1, 1) if i == axis else (0, 0) for i in range(images.ndim)]
  return jnp.pad(inner, padding)
