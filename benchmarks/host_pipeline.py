"""Images/s per core from JPEG bytes to a training crop: this project beside plain Pillow.

  python benchmarks/host_pipeline.py [--rounds=15] [--json=FILE]

Both sides crop the same random boxes of the same photographs (those that come
with scikit-learn) and resample them to 224 px with the bicubic filter. Plain
Pillow decodes the whole image, converts, crops, resizes. The two alternate in
one process on one core. The target is a ratio of 1.5 at 500 x 375.
"""

import functools
import io
import os
import statistics
from collections.abc import Callable

import numpy as np
from common import alternate, argument_parser, median_ratio, report, warn_if_busy, write_json
from PIL import Image
from sklearn import datasets

from dtm_jax.config import DataConfig
from dtm_jax.data import transforms

SIZE = 224  # pixels
NUM_IMAGES = 32
JPEG_QUALITY = 90
IMAGE_SIZES = ((500, 375), (1280, 960))  # (width, height); DCT scaling only helps crops over 448 px


def make_jpegs(width: int, height: int) -> list[bytes]:
  """Random cuts of photographs; cuts that need more pixels than there are come from an enlargement."""
  rng = np.random.default_rng(0)
  photographs = [Image.fromarray(pixels) for pixels in datasets.load_sample_images().images]
  return [_cut(photographs[i % len(photographs)], width, height, rng) for i in range(NUM_IMAGES)]


def _cut(photograph: Image.Image, width: int, height: int, rng: np.random.Generator) -> bytes:
  zoom = max(1.0, 1.1 * width / photograph.width, 1.1 * height / photograph.height)
  photograph = photograph.resize((round(photograph.width * zoom), round(photograph.height * zoom)))
  left, top = rng.integers(photograph.width - width), rng.integers(photograph.height - height)
  encoded = io.BytesIO()
  photograph.crop((left, top, left + width, top + height)).save(encoded, "JPEG", quality=JPEG_QUALITY)
  return encoded.getvalue()


def plain_pillow(jpeg: bytes, rng: np.random.Generator, config: DataConfig) -> np.ndarray:
  """What a straightforward loader does."""
  image = Image.open(io.BytesIO(jpeg)).convert("RGB")
  box = transforms.random_crop_box(rng, image.size, config.crop_scale, config.crop_ratio)
  return np.asarray(image.crop(box).resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def ours(jpeg: bytes, rng: np.random.Generator, config: DataConfig) -> np.ndarray:
  """What the pipeline does for each image, but for the mask."""
  return transforms.train_image(
    jpeg, rng, size=SIZE, crop_scale=config.crop_scale, crop_ratio=config.crop_ratio, flip=0.0
  )


def load_all(load: Callable[..., np.ndarray], jpegs: list[bytes], seed: int) -> None:
  """One pass over all images; the seed decides the boxes."""
  config = DataConfig()
  for i, jpeg in enumerate(jpegs):
    load(jpeg, np.random.default_rng((seed, i)), config)


def compare(width: int, height: int, rounds: int) -> dict[str, float]:
  """One row of the table."""
  jpegs = make_jpegs(width, height)
  runs = {load.__name__: functools.partial(load_all, load, jpegs) for load in (plain_pillow, ours)}
  seconds = alternate(runs, rounds)
  return {
    "image": f"{width} x {height}",
    "kilobytes": statistics.mean(map(len, jpegs)) / 1e3,
    "plain_images_per_s": NUM_IMAGES / statistics.median(seconds["plain_pillow"]),
    "ours_images_per_s": NUM_IMAGES / statistics.median(seconds["ours"]),
    "ratio": median_ratio(seconds["plain_pillow"], seconds["ours"]),
  }


def main() -> None:
  options = argument_parser(__doc__, rounds=15).parse_args()
  warn_if_busy()
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
  rows = [compare(width, height, options.rounds) for width, height in IMAGE_SIZES]
  columns = {
    "image": ("image", ""),
    "kB": ("kilobytes", ".0f"),
    "Pillow images/s": ("plain_images_per_s", ".0f"),
    "ours images/s": ("ours_images_per_s", ".0f"),
    "ratio": ("ratio", ".2f"),
  }
  report(rows, columns)
  write_json(options.json, {"resampler": transforms.RESAMPLER, "rows": rows}, ("numpy", "pillow"))


if __name__ == "__main__":
  main()
