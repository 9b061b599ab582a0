"""Encoded bytes -> uint8 RGB crops, with as little work per pixel as possible; and pixels -> bytes."""

import functools
import io
import math
import struct
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance

from dtm_jax.config import DataConfig

try:
  import cykooz_resizer
except ImportError:  # no wheel for this machine: Pillow has the same filter, several times slower
  cykooz_resizer = None

RESAMPLER = "Pillow" if cykooz_resizer is None else "cykooz_resizer"
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels
Crop = Callable[[np.random.Generator, tuple[int, int]], Box]  # draws it in an image of (width, height)

_CROP_TRIES = 10  # torchvision's
_DCT_SCALES = (1, 2, 4, 8)
_REDUCING_GAP = 2.0  # box-average to this many times the output before the bicubic filter
_DECODE_ERRORS = (  # what Pillow raises on damaged files, by format and kind of damage
  OSError,
  SyntaxError,
  ValueError,
  EOFError,
  struct.error,
  TypeError,
  Image.DecompressionBombError,
  Image.DecompressionBombWarning,
)


def encode_png(pixels: np.ndarray) -> bytes:
  """uint8 [H, W] or [H, W, 3] -> PNG."""
  encoded = io.BytesIO()
  Image.fromarray(pixels).save(encoded, "PNG")
  return encoded.getvalue()


class UnreadableImageError(Exception):
  """The bytes are no image, are truncated, or describe an absurdly large one."""


def check_readable(data: bytes) -> None:
  """Raises UnreadableImageError where an encoded image cannot be decoded to its end."""
  try:
    image = Image.open(io.BytesIO(data))
    # Of a JPEG at its smallest scale: all of its bytes are read, few of its pixels made.
    image.draft(None, (max(1, image.width // max(_DCT_SCALES)), max(1, image.height // max(_DCT_SCALES))))
    image.load()
  except _DECODE_ERRORS as error:
    raise UnreadableImageError(str(error)) from error


def train_image(
  data: bytes,
  rng: np.random.Generator,
  *,
  size: int,
  crop: Crop,
  flip: float,
  jitter: float = 0.0,
  jitter_rng: np.random.Generator | None = None,
  distort: Callable[[Image.Image], Image.Image] | None = None,
) -> np.ndarray:
  """Colour jitter (if any), random crop, random flip, distortion (if any).

  The release jitters the whole image, flips it, then crops; flipping the crop
  instead has the same distribution, because crops are mirror-symmetric.

  Args:
    data: an encoded image.
    rng: draws the crop and the flip.
    size: side of the result in pixels.
    crop: see `train_crop`.
    flip: probability of mirroring left and right.
    jitter: strength of brightness, contrast and saturation.
    jitter_rng: draws the jitter; needed where `jitter` is not 0.
    distort: the last step, from RGB of the final size to the same.

  Returns:
    uint8 [size, size, 3], RGB.

  Raises:
    UnreadableImageError: see there.
  """
  try:
    image = Image.open(io.BytesIO(data))
    image, box = _decode(image, crop(rng, image.size), size)
    if jitter:
      image = color_jitter(image.convert("RGB"), jitter_rng, jitter)
    image = _resize(image, box, size)
  except _DECODE_ERRORS as error:
    raise UnreadableImageError(str(error)) from error
  if rng.random() < flip:
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  return np.asarray(image if distort is None else distort(image))


def eval_image(data: bytes | Image.Image, *, size: int, crop: float = DataConfig.eval_crop) -> np.ndarray:
  """The centre of an image, as if its shorter side were resized to `size / crop`, in one resampling.

  Args:
    data: an encoded image, or Pillow's as it is: a large JPEG that Pillow has opened differs a little from its bytes.
    size: side of the result in pixels.
    crop: side of the square that is taken over the image's shorter side.

  Returns:
    uint8 [size, size, 3], RGB.

  Raises:
    UnreadableImageError: see there.
  """
  try:
    # A copy, because decoding at a smaller scale would change the caller's image.
    image = data.copy() if isinstance(data, Image.Image) else Image.open(io.BytesIO(data))
    image, box = _decode(image, center_crop_box(image.size, crop), size)
    return np.asarray(_resize(image, box, size))
  except _DECODE_ERRORS as error:
    raise UnreadableImageError(str(error)) from error


def train_crop(data: DataConfig) -> Crop:
  """How the crops of training images are drawn."""
  if data.train_crop == "square":
    return functools.partial(random_square_box, crop=data.eval_crop)
  return functools.partial(random_crop_box, scale=data.crop_scale, ratio=data.crop_ratio)


def random_crop_box(
  rng: np.random.Generator, image_size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
  """torchvision's RandomResizedCrop: ten tries, then the largest central crop of an allowed shape.

  Args:
    rng: draws the crop.
    image_size: (width, height) in pixels.
    scale: range of the crop's area over the image's.
    ratio: range of the crop's width over its height.

  Returns:
    A box with whole numbers.
  """
  width, height = image_size
  log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
  for area_draw, ratio_draw, left_draw, top_draw in rng.random((_CROP_TRIES, 4)).tolist():
    area = width * height * (scale[0] + (scale[1] - scale[0]) * area_draw)
    aspect = math.exp(log_low + (log_high - log_low) * ratio_draw)
    crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < crop_width <= width and 0 < crop_height <= height:
      left = int(left_draw * (width - crop_width + 1))
      top = int(top_draw * (height - crop_height + 1))
      return left, top, left + crop_width, top + crop_height
  crop_width = min(width, round(height * ratio[1])) or 1
  crop_height = min(height, round(width / ratio[0])) or 1
  left, top = (width - crop_width) // 2, (height - crop_height) // 2
  return left, top, left + crop_width, top + crop_height


def random_square_box(rng: np.random.Generator, image_size: tuple[int, int], crop: float) -> Box:
  """torchvision's Resize and then RandomCrop: a square anywhere, whose side is `crop` of the shorter one."""
  width, height = image_size
  side = min(width, height) * crop
  left, top = rng.random(2) * (width - side, height - side)
  return left, top, left + side, top + side


def center_crop_box(image_size: tuple[int, int], crop: float) -> Box:
  """The central square of (width, height) whose side is `crop` of the shorter one."""
  width, height = image_size
  side = min(width, height) * crop
  left, top = (width - side) / 2, (height - side) / 2
  return left, top, left + side, top + side


def color_jitter(image: Image.Image, rng: np.random.Generator, strength: float) -> Image.Image:
  """torchvision's ColorJitter(strength, strength, strength) on an RGB image: factors and order are random."""
  enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
  factors = rng.uniform(1 - strength, 1 + strength, size=len(enhancers))
  for i in rng.permutation(len(enhancers)):
    image = enhancers[i](image).enhance(factors[i])
  return image


def _decode(image: Image.Image, box: Box, size: int) -> tuple[Image.Image, Box]:
  """Loads pixels at the smallest DCT scale (JPEG only) that leaves the crop at least `size` pixels wide and high.

  Returns:
    The image in a mode that can be resampled, and the box in its pixels.
  """
  shrink = min((box[2] - box[0]) / size, (box[3] - box[1]) / size)
  scale = max(scale for scale in _DCT_SCALES if scale <= max(shrink, 1))
  # Pillow decodes at the largest of these scales that leaves the size it is asked for.
  if image.draft("RGB", (image.width // scale, image.height // scale)) is not None:
    box = (box[0] / scale, box[1] / scale, box[2] / scale, box[3] / scale)
  image.load()
  return _to_8_bit_color(image), box


def _to_8_bit_color(image: Image.Image) -> Image.Image:
  if image.mode in ("RGB", "L"):
    return image
  if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion clips at 255
    return Image.fromarray((np.asarray(image, dtype=np.float32) / 257).round().clip(0, 255).astype(np.uint8))
  if image.mode == "P":  # straight to RGB warns about transparency
    image = image.convert("RGBA")
  return image.convert("RGB")


def _resize(image: Image.Image, box: Box, size: int) -> Image.Image:
  """RGB, cropped and resampled in one call with the antialiased Catmull-Rom filter that Pillow calls bicubic."""
  if cykooz_resizer is None:
    resized = image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=_REDUCING_GAP)
  else:
    resized = Image.new(image.mode, (size, size))
    filtered = cykooz_resizer.ResizeAlg.convolution(cykooz_resizer.FilterType.catmull_rom)
    crop = cykooz_resizer.CropBox(box[0], box[1], box[2] - box[0], box[3] - box[1])
    options = cykooz_resizer.ResizeOptions(resize_alg=filtered, crop_box=crop)
    cykooz_resizer.Resizer().resize_pil(image, resized, options)
  return resized if resized.mode == "RGB" else resized.convert("RGB")
