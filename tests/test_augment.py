"""Colour operations against Pillow, which rounds to 8 bits after each. Measured errors beside the tolerances."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance

from dtm_jax.augment import adjust_colors, color_jitter, normalize, to_unit

CLIPPING = (1.9, 0.5, 1.5)  # factors that clip, without which most orders give the same
ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
ORDERS = list(itertools.permutations(range(3)))
IMAGE = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8) // np.array([1, 2, 3], np.uint8)


def pillow(image: np.ndarray, order: tuple[int, ...], factors: tuple[float, ...]) -> np.ndarray:
  result = Image.fromarray(image)
  for operation in order:
    result = ENHANCERS[operation](result).enhance(factors[operation])
  return np.asarray(result) / 255


@pytest.mark.parametrize("operation", [0, 1, 2])
@pytest.mark.parametrize("factor", [0.6, 1.4])
def test_each_operation_equals_pillow(operation, factor):
  factors = [1.0, 1.0, 1.0]
  factors[operation] = factor
  actual = adjust_colors(to_unit(jnp.asarray(IMAGE)), jnp.arange(3), jnp.asarray(factors))
  expected = pillow(IMAGE, (operation,), tuple(factors))
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1.5 / 255)  # measured 1.2 / 255


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_equals_pillow(order):
  actual = adjust_colors(to_unit(jnp.asarray(IMAGE)), jnp.asarray(order), jnp.asarray(CLIPPING))
  np.testing.assert_allclose(actual, pillow(IMAGE, order, CLIPPING), rtol=0, atol=4 / 255)  # measured 3.3 / 255


def test_orders_differ_by_more_than_the_tolerance():
  results = [pillow(IMAGE, order, CLIPPING) for order in ORDERS]
  for a, b in itertools.combinations(results, 2):
    assert np.abs(a - b).max() > 8 / 255


def test_jitter_is_a_function_of_each_images_own_key():
  images = to_unit(jnp.stack([jnp.asarray(IMAGE)] * 6))
  keys = jax.random.split(jax.random.key(0), 6)
  jitter = jax.jit(lambda keys, images: color_jitter(keys, images, 0.4))
  together = jitter(keys, images)
  assert len({np.asarray(image).tobytes() for image in together}) == 6
  alone = jitter(keys[4:5], images[4:5])
  np.testing.assert_allclose(together[4:5], alone, rtol=0, atol=5e-7)  # measured 6e-8
  assert together.min() >= 0
  assert together.max() <= 1


def test_jitter_draws_the_whole_range():
  """A grey ramp shows brightness and contrast: their product is the slope where nothing clips."""
  ramp = jnp.broadcast_to(jnp.linspace(0.4, 0.5, 64)[None, :, None], (2, 64, 3))
  keys = jax.random.split(jax.random.key(1), 2000)
  jittered = jax.jit(lambda k: color_jitter(k, jnp.broadcast_to(ramp, (2000, *ramp.shape)), 0.4))(keys)
  slopes = np.asarray(jittered[:, 0, -1, 0] - jittered[:, 0, 0, 0]) / 0.1
  # The product of two independent U(0.6, 1.4): mean 1, variance (1 + 0.64 / 12) ** 2 - 1 = 0.1095.
  assert slopes.mean() == pytest.approx(1, abs=4 * (0.1095 / 2000) ** 0.5)
  assert slopes.var() == pytest.approx(0.1095, rel=0.15)
  # The extremes of 2,000 draws from [0.36, 1.96].
  assert 0.36 <= slopes.min() < 0.42
  assert 1.8 < slopes.max() <= 1.96 + 1e-5


def test_jitter_draws_its_order():
  """One black and one white pixel: brightened (clips white), then less contrast, their sum is 1, and in no other way.

  Half of the images get a factor of brightness over 1, half one of contrast below 1, half this order.
  """
  image = jnp.stack([jnp.zeros((1, 3)), jnp.ones((1, 3))])
  images = jnp.broadcast_to(image, (4000, 2, 1, 3))
  jittered = jax.jit(lambda keys: color_jitter(keys, images, 0.4))(jax.random.split(jax.random.key(2), 4000))
  black, white = np.asarray(jittered)[..., 0, 0].T
  fraction = np.mean((black > 1e-4) & (abs(black + white - 1) < 1e-6))
  assert fraction == pytest.approx(1 / 8, abs=4 * (1 / 8 * 7 / 8 / 4000) ** 0.5)


def test_zero_strength_changes_nothing():
  images = to_unit(jnp.asarray(IMAGE)[None])
  result = jax.jit(color_jitter)(jax.random.split(jax.random.key(0), 1), images, 0.0)
  np.testing.assert_allclose(result, images, rtol=0, atol=5e-7)  # measured 6e-8


def test_normalize_takes_bytes_and_unit_floats():
  mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
  expected = (IMAGE.astype(np.float64) / 255 - mean) / std
  for images in (jnp.asarray(IMAGE), to_unit(jnp.asarray(IMAGE))):
    actual = normalize(images, mean, std)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6)  # measured 3.2e-7
