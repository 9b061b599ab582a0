"""HOG targets against scikit-image's descriptor, channel by channel. Measured errors stand beside the tolerances."""

import jax
import numpy as np
import pytest

from dtm_jax.teachers import HogTeacher

skimage_feature = pytest.importorskip("skimage.feature")


def natural_image(height: int, width: int) -> np.ndarray:
  """uint8 values with flat areas, edges and noise, so that zero gradients and every orientation occur."""
  rng = np.random.default_rng(0)
  rows, columns = np.mgrid[:height, :width]
  image = 128 + 90 * np.sin(rows / 5.0)[..., None] * np.cos(
    columns / np.array([3.0, 4.0, 7.0])[:, None, None]
  ).transpose(1, 2, 0)
  image += rng.normal(scale=8, size=image.shape)
  image[: height // 3, : width // 3] = 77
  return np.clip(image, 0, 255).astype(np.uint8)


def reference(image: np.ndarray, patch_size: int, cells: int) -> np.ndarray:
  """[N, 3, cells, cells, 9] in float64 by scikit-image: the blocks that coincide with patches."""
  cell = patch_size // cells
  channels = [
    skimage_feature.hog(
      image[..., c] / 255,
      orientations=9,
      pixels_per_cell=(cell, cell),
      cells_per_block=(cells, cells),
      block_norm="L2",
      feature_vector=False,
    )[::cells, ::cells]
    for c in range(3)
  ]
  return np.stack(channels, axis=2).reshape(-1, 3, cells, cells, 9)


@pytest.mark.parametrize(
  ("patch_size", "cells", "size"),
  [(16, 2, (64, 96)), (8, 2, (32, 24)), (4, 1, (32, 48)), (14, 2, (28, 56)), (9, 1, (27, 36))],
)
def test_tokens_equal_scikit_image(patch_size, cells, size):
  image = natural_image(*size)
  teacher = HogTeacher(patch_size)
  images = np.stack([image[::-1], image]).astype(np.float32) / 255
  tokens = jax.jit(teacher.apply)({}, images)
  expected = reference(image, patch_size, cells)
  assert tokens.shape == (2, len(expected), teacher.out_dim)
  np.testing.assert_allclose(tokens[1].reshape(expected.shape), expected, rtol=0, atol=1e-6)  # measured 1.7e-7


def test_flat_images_give_zeros_not_nan():
  tokens = jax.jit(HogTeacher(8).apply)({}, np.full((1, 16, 16, 3), 0.4, np.float32))
  np.testing.assert_array_equal(tokens, 0)


def test_size_of_the_published_target():
  """MaskFeat, section 3.1: 16 px patches, 8 px cells, 9 bins, three channels."""
  assert HogTeacher(16).out_dim == 108
