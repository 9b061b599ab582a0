"""Colour operations against Pillow, which rounds to 8 bits after each, and erasing against its definition's integrals.

Measured errors stand beside the tolerances.
"""

import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from PIL import Image, ImageEnhance

from dtm_jax.augment import adjust_colors, box_mask, color_jitter, draw_erasure, normalize, random_erase, to_unit

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


# ------------------------------------------------------------ random erasing

NUM_ERASURES = 20_000
DRAW_ERASURES = jax.jit(jax.vmap(draw_erasure, (0, None, None)))  # one program for all sizes
ERASE = jax.jit(random_erase)


@functools.cache
def try_probabilities(height: int, width: int) -> dict[tuple[int, int], float]:
  """How likely one try is each size (h, w) that fits, with the definition's two integrals as sums over midpoints.

  The area is U(0.02, 1/3) of the image's, the logarithm of the aspect U(log 0.3, log 1 / 0.3).
  """
  midpoints = (np.arange(1000) + 0.5) / 1000
  area = (0.02 + (1 / 3 - 0.02) * midpoints)[:, None] * height * width
  aspect = 0.3 ** (1 - 2 * midpoints)
  h, w = (np.sqrt(area * aspect).round().astype(int), np.sqrt(area / aspect).round().astype(int))
  fits = (h < height) & (w < width)
  counts = np.bincount((h * width + w)[fits])
  return {divmod(size, width): counts[size] / h.size for size in np.flatnonzero(counts).tolist()}


@functools.cache
def draw_boxes(height: int, width: int) -> np.ndarray:
  """Boxes [NUM_ERASURES, 4]: first row and column, and those after the last."""
  return np.asarray(DRAW_ERASURES(jax.random.split(jax.random.key(0), NUM_ERASURES), height, width))


def assert_fraction(actual: float, expected: float, number: int = NUM_ERASURES):
  """`actual` of `number` draws is within four standard deviations."""
  assert actual == pytest.approx(expected, abs=4 * (expected * (1 - expected) / number) ** 0.5)


@pytest.mark.parametrize("box", [(0, 0, 5, 7), (1, 2, 4, 3), (2, 0, 5, 7), (0, 6, 1, 7), (3, 3, 3, 3), (0, 0, 0, 0)])
def test_a_box_is_a_slice(box):
  top, left, bottom, right = box
  expected = np.zeros((5, 7), bool)
  expected[top:bottom, left:right] = True
  np.testing.assert_array_equal(box_mask(jnp.array(box), 5, 7), expected)


def test_erased_areas_and_log_aspects_are_uniform():
  top, left, bottom, right = draw_boxes(1024, 1024).T
  height, width = bottom - top, right - left
  areas, aspects = height * width / 1024**2, height / width
  # Not quite: 0.5 % of the tries are wider or higher than the image.
  assert scipy.stats.kstest(areas, scipy.stats.uniform(0.02, 1 / 3 - 0.02).cdf).statistic < 0.015  # measured 0.0094
  half = -np.log(0.3)
  assert scipy.stats.kstest(np.log(aspects), scipy.stats.uniform(-half, 2 * half).cdf).statistic < 0.015  # 0.0073
  assert (areas.min(), areas.max()) == pytest.approx((0.02, 1 / 3), abs=1e-3)
  assert (aspects.min(), aspects.max()) == pytest.approx((0.3, 1 / 0.3), rel=0.01)


@pytest.mark.parametrize(("height", "width"), [(24, 16), (32, 12)])
def test_erased_sizes_follow_the_definition(height, width):
  top, left, bottom, right = draw_boxes(height, width).T
  probabilities = try_probabilities(height, width)
  drawn = collections.Counter(zip((bottom - top).tolist(), (right - left).tolist(), strict=True))
  assert drawn.keys() <= probabilities.keys()  # (0, 0) is not among them: a try fits in three of four cases at least
  expected = {size: NUM_ERASURES * p / sum(probabilities.values()) for size, p in probabilities.items()}
  common = [size for size in expected if expected[size] >= 10]
  observed, wanted = [drawn[size] for size in common], [expected[size] for size in common]
  test = scipy.stats.chisquare([*observed, NUM_ERASURES - sum(observed)], [*wanted, NUM_ERASURES - sum(wanted)])
  assert test.pvalue > 1e-3


@pytest.mark.parametrize(("height", "width"), [(24, 16), (32, 12)])
def test_erased_places_are_uniform_and_inside(height, width):
  top, left, bottom, right = draw_boxes(height, width).T
  for start, stop, side in ((top, bottom, height), (left, right, width)):
    assert (start >= 0).all() and (stop <= side).all()
    at_an_edge = (1 / (side - (stop - start) + 1)).mean()
    assert_fraction((start == 0).mean(), at_an_edge)
    assert_fraction((stop == side).mean(), at_an_edge)
    assert ((start + stop) / 2).mean() == pytest.approx(side / 2, abs=4 * side * (12 * NUM_ERASURES) ** -0.5)


def test_ten_tries_are_made():
  """Hardly a box fits a narrow strip, so that most images stay: as many as ten tries in vain leave."""
  height, width = 64, 2
  top, left, bottom, right = draw_boxes(height, width).T
  fits = sum(try_probabilities(height, width).values())
  assert fits == pytest.approx(0.023, abs=1e-3)
  erased = (bottom - top) * (right - left) > 0
  assert_fraction(erased.mean(), 1 - (1 - fits) ** 10)


@functools.cache
def erase_all(seed: int, probability: float) -> tuple[np.ndarray, np.ndarray]:
  """A thousand images of 24 x 16 pixels in a ramp of 5 to 6, and what becomes of them."""
  images = np.broadcast_to(np.linspace(5, 6, 24 * 16 * 3, dtype=np.float32).reshape(24, 16, 3), (1000, 24, 16, 3))
  return images, np.asarray(ERASE(jax.random.split(jax.random.key(seed), 1000), images, probability))


def test_erased_pixels_are_normal_noise_in_a_box_and_the_others_stay():
  images, erased = erase_all(3, 1.0)
  changed = (erased != images).all(axis=-1)
  np.testing.assert_array_equal((erased != images).any(axis=-1), changed)
  rows, columns = changed.any(axis=2), changed.any(axis=1)
  for lines in (rows, columns):  # without a gap
    assert (np.diff(lines, axis=1, prepend=False, append=False).sum(axis=1) == 2).all()
  np.testing.assert_array_equal(changed, rows[:, :, None] & columns[:, None])
  noise = erased[changed]
  assert len(noise) > 50_000
  assert scipy.stats.kstest(noise[::7].ravel(), "norm").pvalue > 1e-3
  assert np.abs(np.corrcoef(noise.T) - np.eye(3)).max() < 4 * len(noise) ** -0.5  # a draw for each channel
  assert np.abs(np.corrcoef(noise[:-1, 0], noise[1:, 0])[0, 1]) < 4 * len(noise) ** -0.5  # and for each pixel


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_as_many_images_are_erased_as_asked(probability):
  images, erased = erase_all(3, probability)
  assert 1 - sum(try_probabilities(24, 16).values()) < 0.07  # so that hardly one image in 1e11 stays for want of a box
  assert_fraction((erased != images).any(axis=(1, 2, 3)).mean(), probability, 1000)


def test_erasing_is_a_function_of_each_images_own_key():
  images, erased = erase_all(3, 1.0)
  assert len({image.tobytes() for image in erased}) == 1000
  keys = jax.random.split(jax.random.key(3), 1000)
  np.testing.assert_array_equal(ERASE(keys[::-1], images, 1.0), erased[::-1])
