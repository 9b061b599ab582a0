"""Operations beside their definitions in NumPy and SciPy, draws beside their distributions."""

import math

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage, stats

from dtm_jax.config import parse_rand_augment
from dtm_jax.data.rand_augment import OPERATIONS, draw_operations, rand_augment

FILL = (10, 200, 90)
PAPER = "AutoContrast Equalize Invert Rotate Posterize Solarize SolarizeAdd Color Contrast Brightness Sharpness ShearX"
TIMM = {*PAPER.split(), "ShearY", "TranslateX", "TranslateY"}  # the names of its increasing set


def make_pixels(height: int = 16, width: int = 24) -> np.ndarray:
  """Every value that a channel can have, no symmetry, and channels of different range and mean."""
  rng = np.random.default_rng(0)
  pixels = np.stack([rng.permutation(height * width) % 256, *rng.integers(30, 160, size=(2, height * width))], axis=-1)
  return pixels.reshape(height, width, 3).astype(np.uint8)


def apply(name: str, strength: float, pixels: np.ndarray) -> np.ndarray:
  return np.asarray(OPERATIONS[name](Image.fromarray(pixels), strength, FILL))


@pytest.mark.parametrize(
  ("name", "strength", "expected"),
  [
    ("Invert", 0.9, lambda v: 255 - v),
    ("Posterize", 0.0, lambda v: v & 0b11110000),
    ("Posterize", 0.24, lambda v: v & 0b11110000),
    ("Posterize", -0.25, lambda v: v & 0b11100000),
    ("Posterize", 0.9, lambda v: v & 0b10000000),
    ("Posterize", 1.0, np.zeros_like),
    ("Solarize", 0.0, lambda v: v),
    ("Solarize", -0.9, lambda v: np.where(v < 26, v, 255 - v)),  # 256 - int(230.4)
    ("Solarize", 1.0, lambda v: 255 - v),
    ("SolarizeAdd", 0.0, lambda v: v),
    ("SolarizeAdd", -0.9, lambda v: np.where(v < 128, v + 99, v)),
    ("SolarizeAdd", 1.0, lambda v: np.where(v < 128, v + 110, v)),
  ],
)
def test_maps_of_single_values(name, strength, expected):
  pixels = make_pixels()
  np.testing.assert_array_equal(apply(name, strength, pixels), expected(pixels))


def test_auto_contrast_stretches_each_channel():
  pixels = make_pixels()
  low, high = pixels.min((0, 1)).astype(float), pixels.max((0, 1))
  stretched = (pixels - low) * 255 / (high - low)
  assert np.abs(apply("AutoContrast", 0.9, pixels) - stretched).max() <= 1  # it rounds down


def test_equalize_makes_each_channel_uniform():
  """A value becomes its share of smaller ones, in steps of the mean count of all values but the largest."""
  pixels = make_pixels()
  expected = np.empty_like(pixels)
  for channel in range(3):
    values = pixels[..., channel].ravel().astype(int)
    counts = np.bincount(values, minlength=256)
    step = (len(values) - counts[values.max()]) // 255
    smaller = np.cumsum(counts) - counts
    expected[..., channel] = ((smaller + step // 2) // step).clip(0, 255)[pixels[..., channel]]
  np.testing.assert_array_equal(apply("Equalize", 0.9, pixels), expected)


def grey(pixels: np.ndarray) -> np.ndarray:
  return (pixels @ np.array([0.299, 0.587, 0.114])).round()


def smooth(pixels: np.ndarray) -> np.ndarray:
  """Weights of 5 in the middle and 1 around; the border stays as it is."""
  kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]])[..., None] / 13
  smoothed = ndimage.convolve(pixels.astype(float), kernel).round()
  smoothed[[0, -1]], smoothed[:, [0, -1]] = pixels[[0, -1]], pixels[:, [0, -1]]
  return smoothed


@pytest.mark.parametrize(("strength", "factor"), [(0.9, 1.81), (-0.9, 0.19), (0.5, 1.45), (0.0, 1.0), (-1.0, 0.1)])
@pytest.mark.parametrize(
  ("name", "anchor"),
  [
    ("Color", lambda pixels: grey(pixels)[..., None]),
    ("Contrast", lambda pixels: grey(pixels).mean().round()),
    ("Brightness", lambda pixels: 0),
    ("Sharpness", smooth),
  ],
)
def test_enhancements_are_blends_with_what_lacks_it(name, anchor, strength, factor):
  pixels = make_pixels()
  expected = (anchor(pixels) + factor * (pixels - anchor(pixels))).clip(0, 255)
  assert np.abs(apply(name, strength, pixels) - expected).max() < 1  # grey levels: it rounds down; measured 0.99


ANGLE = math.radians(30 * 0.9)


def cubic(pixels: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
  """Pixels [H, W, 3] between their centres by the cubic kernel of Keys (1981), a = -1 as in Pillow; edges repeated."""

  def weights(distance):
    d = np.abs(distance)
    return np.where(d < 1, d**3 - 2 * d**2 + 1, np.where(d < 2, -(d**3) + 5 * d**2 - 8 * d + 4, 0))

  row, column = np.floor(y).astype(int), np.floor(x).astype(int)
  total = np.zeros((*y.shape, 3))
  for i in range(-1, 3):
    for j in range(-1, 3):
      rows, columns = (row + i).clip(0, len(pixels) - 1), (column + j).clip(0, pixels.shape[1] - 1)
      total += (weights(y - row - i) * weights(x - column - j))[..., None] * pixels[rows, columns]
  return total.clip(0, 255)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
  ("name", "matrix", "center"),
  [
    ("Rotate", [[math.cos(ANGLE), -math.sin(ANGLE)], [math.sin(ANGLE), math.cos(ANGLE)]], (12, 8)),
    ("ShearX", [[1, 0.27], [0, 1]], (0, 0)),
    ("ShearY", [[1, 0], [0.27, 1]], (0, 0)),
  ],
)
def test_turns_and_shears_are_bicubic(name, matrix, center, sign):
  """`matrix` takes (x, y) from the centre in the result to the place in the image, at the strength of 0.9."""
  pixels = make_pixels()
  result = apply(name, 0.9 * sign, pixels)
  y, x = np.mgrid[:16, :24] + 0.5
  matrix = np.linalg.inv(matrix) if sign == -1 else np.array(matrix)
  source_x, source_y = np.tensordot(matrix, [x - center[0], y - center[1]], 1) + np.reshape(center, (2, 1, 1))
  covered = (source_x >= 0) & (source_x < 24) & (source_y >= 0) & (source_y < 16)
  assert 0.05 < 1 - covered.mean() < 0.4
  places = np.array([source_y - 0.5, source_x - 0.5])
  assert np.abs(result - cubic(pixels, *places))[covered].max() < 1  # grey levels: it rounds down
  np.testing.assert_array_equal(result[~covered], np.broadcast_to(FILL, result.shape)[~covered])


@pytest.mark.parametrize("strength", [0.9, -0.9, 0.2, 0.0])
def test_translations_are_by_whole_pixels(strength):
  pixels = make_pixels()
  for name, axis, size in (("TranslateX", 1, 24), ("TranslateY", 0, 16)):
    moved = round(0.45 * strength * size)  # of 24: 9.72, 2.16; of 16: 6.48, 1.44
    expected = np.empty_like(pixels)
    expected[:] = FILL
    kept = np.arange(size)[max(0, -moved) : size - max(0, moved)]
    where = (slice(None),) * axis
    expected[*where, kept] = pixels[*where, kept + moved]
    np.testing.assert_array_equal(apply(name, strength, pixels), expected)


def draw_many(words: str, images: int = 20_000) -> list[list[tuple[str, float]]]:
  rng, policy = np.random.default_rng(0), parse_rand_augment(words)
  return [draw_operations(rng, policy) for _ in range(images)]


def test_operations_are_uniform_with_repeats_and_each_applied_half_of_the_time():
  drawn = [[name for name, _ in operations] for operations in draw_many("m9-mstd0.5-inc1")]
  lengths = np.bincount([len(names) for names in drawn])
  assert stats.chisquare(lengths, len(drawn) * np.array([0.25, 0.5, 0.25])).pvalue > 0.01  # measured 0.86
  for place in (0, -1):
    names, counts = np.unique([names[place] for names in drawn if names], return_counts=True)
    assert {*names.tolist()} == TIMM == {*OPERATIONS}
    assert stats.chisquare(counts).pvalue > 0.01  # measured 0.52, 0.83
  pairs = [names for names in drawn if len(names) == 2]
  repeats = sum(first == second for first, second in pairs)
  assert stats.binomtest(repeats, len(pairs), 1 / 15).pvalue > 0.01  # measured 0.63


def test_magnitudes_are_normal_up_to_the_greatest_and_signs_are_even():
  strengths = np.array([strength for operations in draw_many("m9-mstd0.5-inc1") for _, strength in operations])
  magnitudes = 10 * np.abs(strengths)
  assert magnitudes.max() == 10
  assert stats.binomtest((magnitudes == 10).sum(), len(magnitudes), stats.norm.sf(2)).pvalue > 0.01  # measured 0.69
  below = magnitudes[magnitudes < 10]
  assert stats.kstest(below, stats.truncnorm(-18, 2, loc=9, scale=0.5).cdf).pvalue > 0.01  # measured 0.17
  assert stats.binomtest((strengths > 0).sum(), len(strengths)).pvalue > 0.01  # measured 0.72
  assert abs(stats.pearsonr(np.sign(strengths), magnitudes).statistic) < 0.03  # standard deviation 0.007


@pytest.mark.parametrize(
  ("words", "length", "magnitudes"), [("m7-n3-p1-inc1", 3, {7.0}), ("m10-n1-p1-inc1", 1, {10.0}), ("m5-p0-inc1", 0, {})]
)
def test_policies_without_chance(words, length, magnitudes):
  drawn = draw_many(words, images=50)
  assert {len(operations) for operations in drawn} == {length}
  assert {round(10 * abs(strength), 9) for operations in drawn for _, strength in operations} == {*magnitudes}


def test_magnitudes_are_not_negative():
  """A spread around 0 is cut off: half of the draws change nothing, none of them the wrong way."""
  strengths = [strength for operations in draw_many("m0-mstd3-p1-inc1", 2000) for _, strength in operations]
  assert 0.47 < np.mean(np.array(strengths) == 0) < 0.53


def test_an_image_gets_what_is_drawn_in_order():
  policy = parse_rand_augment("m9-mstd0.5-p1-inc1")
  pixels = make_pixels()
  distinct = set()
  for seed in range(40):
    (first, one), (second, other) = draw_operations(np.random.default_rng(seed), policy)
    result = rand_augment(Image.fromarray(pixels), np.random.default_rng(seed), policy, FILL)
    assert (result.mode, result.size) == ("RGB", (24, 16))
    np.testing.assert_array_equal(result, apply(second, other, apply(first, one, pixels)))
    distinct.add(result.tobytes())
  assert len(distinct) > 35


def test_nothing_is_done_where_nothing_is_drawn():
  image = Image.fromarray(make_pixels())
  assert rand_augment(image, np.random.default_rng(0), parse_rand_augment("m9-p0-inc1"), FILL) is image
