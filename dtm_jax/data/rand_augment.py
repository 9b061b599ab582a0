"""RandAugment (Cubuk, Zoph, Shlens, Le 2020, arXiv 1909.13719) with the operations and ranges of timm's `inc1`.

That is the set of timm's "rand-m9-mstd0.5-inc1" (`timm/data/auto_augment.py`), in which an operation changes an image
the more, the greater the magnitude. Rotations and shears are bicubic, as crops are. Translations are by whole pixels,
as in the authors' TensorFlow code and in torchvision: a hundredth of the time, for nothing is resampled.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from dtm_jax.config import RandAugment

Color = tuple[int, int, int]
Operation = Callable[[Image.Image, float, Color], Image.Image]  # of an RGB image, a strength in [-1, 1] and the fill

_MAX_MAGNITUDE = 10.0
_RESAMPLING = Image.Resampling.BICUBIC


def rand_augment(image: Image.Image, rng: np.random.Generator, policy: RandAugment, fill: Color) -> Image.Image:
  """Applies what `draw_operations` draws.

  Args:
    image: RGB.
    rng: draws the operations.
    policy: how many, how likely, how strong.
    fill: colour of what a rotation, shear or translation uncovers.

  Returns:
    RGB, of the same size; the image itself where nothing is drawn.
  """
  for name, strength in draw_operations(rng, policy):
    image = OPERATIONS[name](image, strength, fill)
  return image


def draw_operations(rng: np.random.Generator, policy: RandAugment) -> list[tuple[str, float]]:
  """What to apply to one image, in order.

  Args:
    rng: draws as many numbers in every case.
    policy: `num_ops` draws, uniform with repeats, each applied with probability `prob`.

  Returns:
    Name in `OPERATIONS` and strength of each: the magnitude, normal around the policy's and clipped to [0, 10], over
    10, with a random sign. Operations without a direction or a strength disregard it.
  """
  chosen = rng.integers(len(_NAMES), size=policy.num_ops)
  applied = rng.random(policy.num_ops) < policy.prob
  magnitudes = rng.normal(policy.magnitude, policy.magnitude_std, size=policy.num_ops).clip(0, _MAX_MAGNITUDE)
  strengths = magnitudes / _MAX_MAGNITUDE * rng.choice((-1, 1), size=policy.num_ops)
  return [(_NAMES[i], strength) for i, strength in zip(chosen[applied], strengths[applied].tolist(), strict=True)]


def _posterize(image: Image.Image, strength: float, fill: Color) -> Image.Image:
  """Keeps the 4 to 0 highest bits; Pillow's own refuses 0, which leaves black."""
  del fill
  step = 2 ** (4 + int(4 * abs(strength)))
  return image.point([value // step * step for value in range(256)] * 3)


def _solarize(image: Image.Image, strength: float, fill: Color) -> Image.Image:
  """Inverts what is at or above a threshold that falls from 256 to 0."""
  del fill
  return ImageOps.solarize(image, 256 - int(256 * abs(strength)))


def _solarize_add(image: Image.Image, strength: float, fill: Color) -> Image.Image:
  """Lifts what is below 128 by 0 to 110."""
  del fill
  added = int(110 * abs(strength))
  return image.point([value + added if value < 128 else value for value in range(256)] * 3)


def _enhanced(enhancer: type) -> Operation:
  """Blends with, or away from, what `enhancer` compares with: a factor of 0.1 to 1.9."""
  return lambda image, strength, fill: enhancer(image).enhance(1 + 0.9 * strength)


def _rotate(image: Image.Image, strength: float, fill: Color) -> Image.Image:
  """By up to 30 degrees, around the centre."""
  return image.rotate(30 * strength, _RESAMPLING, fillcolor=fill)


def _shear_x(image: Image.Image, strength: float, fill: Color) -> Image.Image:
  return _affine(image, (1, 0.3 * strength, 0, 0, 1, 0), fill, _RESAMPLING)


def _shear_y(image: Image.Image, strength: float, fill: Color) -> Image.Image:
  return _affine(image, (1, 0, 0, 0.3 * strength, 1, 0), fill, _RESAMPLING)


def _translate_x(image: Image.Image, strength: float, fill: Color) -> Image.Image:
  return _affine(image, (1, 0, 0.45 * strength * image.width, 0, 1, 0), fill, Image.Resampling.NEAREST)


def _translate_y(image: Image.Image, strength: float, fill: Color) -> Image.Image:
  return _affine(image, (1, 0, 0, 0, 1, 0.45 * strength * image.height), fill, Image.Resampling.NEAREST)


def _affine(image: Image.Image, matrix: tuple[float, ...], fill: Color, resampling: Image.Resampling) -> Image.Image:
  """`matrix` [2 x 3, by rows] takes places in the result to places in the image."""
  return image.transform(image.size, Image.Transform.AFFINE, matrix, resampling, fillcolor=fill)


OPERATIONS: dict[str, Operation] = {
  "AutoContrast": lambda image, strength, fill: ImageOps.autocontrast(image),
  "Equalize": lambda image, strength, fill: ImageOps.equalize(image),
  "Invert": lambda image, strength, fill: ImageOps.invert(image),
  "Rotate": _rotate,
  "Posterize": _posterize,
  "Solarize": _solarize,
  "SolarizeAdd": _solarize_add,
  "Color": _enhanced(ImageEnhance.Color),
  "Contrast": _enhanced(ImageEnhance.Contrast),
  "Brightness": _enhanced(ImageEnhance.Brightness),
  "Sharpness": _enhanced(ImageEnhance.Sharpness),
  "ShearX": _shear_x,
  "ShearY": _shear_y,
  "TranslateX": _translate_x,
  "TranslateY": _translate_y,
}
_NAMES = tuple(OPERATIONS)
