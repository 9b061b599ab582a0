"""Images/s per core from JPEG bytes to a training crop: this project beside plain Pillow.

  python benchmarks/host_pipeline.py [--rounds=15] [--json=FILE]

Both sides crop the same random boxes of the same photographs (those that come
with scikit-learn), resample them to 224 px with the bicubic filter and mirror
the same half of them. Fine-tuning's crops are smaller on average, and RandAugment
distorts them, by the same operations on both sides. Plain Pillow decodes the
whole image, converts, crops, resizes, mirrors, and has all geometry of
RandAugment bicubic (here: but for translations). All alternate in
one process on one core. The target is a ratio of 1.5 at 500 x 375.
"""

import dataclasses
import functools
import io
import os
import statistics
from collections.abc import Callable

import numpy as np
from common import alternate, argument_parser, median_ratio, report, warn_if_busy, write_json
from PIL import Image
from sklearn import datasets

from dtm_jax.config import DataConfig, parse_rand_augment
from dtm_jax.data import rand_augment, transforms

SIZE = 224  # pixels
NUM_IMAGES = 32
JPEG_QUALITY = 90
IMAGE_SIZES = ((500, 375), (1280, 960))  # (width, height); DCT scaling only helps crops over 448 px
RECIPES = {
  "pre-training": DataConfig(),
  "fine-tuning": DataConfig(crop_scale=(0.08, 1.0), rand_augment="m9-mstd0.5-inc1"),
}
GREY = (124, 116, 104)


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
  image = image.crop(box).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
  if rng.random() < config.flip:
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  policy = parse_rand_augment(config.rand_augment)
  for name, strength in rand_augment.draw_operations(rng, policy) if policy else ():
    image = PLAIN_OPERATIONS[name](image, strength, GREY)
  return np.asarray(image)


def _bicubic(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
  return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=GREY)


# All others are Pillow's own here and there.
PLAIN_OPERATIONS = rand_augment.OPERATIONS | {
  "Rotate": lambda image, strength, fill: image.rotate(30 * strength, Image.Resampling.BICUBIC, fillcolor=fill),
  "ShearX": lambda image, strength, fill: _bicubic(image, (1, 0.3 * strength, 0, 0, 1, 0)),
  "ShearY": lambda image, strength, fill: _bicubic(image, (1, 0, 0, 0.3 * strength, 1, 0)),
  "TranslateX": lambda image, strength, fill: _bicubic(image, (1, 0, 0.45 * strength * SIZE, 0, 1, 0)),
  "TranslateY": lambda image, strength, fill: _bicubic(image, (1, 0, 0, 0, 1, 0.45 * strength * SIZE)),
}


def ours(jpeg: bytes, rng: np.random.Generator, config: DataConfig) -> np.ndarray:
  """What the pipeline does for each image, but for the mask."""
  policy = parse_rand_augment(config.rand_augment)
  distort = policy and functools.partial(rand_augment.rand_augment, rng=rng, policy=policy, fill=GREY)
  crop = transforms.train_crop(config)
  return transforms.train_image(jpeg, rng, size=SIZE, crop=crop, flip=config.flip, distort=distort)


def load_all(load: Callable[..., np.ndarray], jpegs: list[bytes], config: DataConfig, seed: int) -> None:
  """One pass over all images; the seed decides the boxes."""
  for i, jpeg in enumerate(jpegs):
    load(jpeg, np.random.default_rng((seed, i)), config)


def compare(recipe: str, width: int, height: int, rounds: int) -> dict[str, float | str]:
  """One row of the table."""
  jpegs, config = make_jpegs(width, height), RECIPES[recipe]
  undistorted = dataclasses.replace(config, rand_augment="")
  runs = {
    "plain": functools.partial(load_all, plain_pillow, jpegs, config),
    "ours": functools.partial(load_all, ours, jpegs, config),
    "undistorted": functools.partial(load_all, ours, jpegs, undistorted),
  }
  seconds = alternate(runs, rounds)
  return {
    "recipe": recipe,
    "image": f"{width} x {height}",
    "kilobytes": statistics.mean(map(len, jpegs)) / 1e3,
    "plain_images_per_s": NUM_IMAGES / statistics.median(seconds["plain"]),
    "ours_images_per_s": NUM_IMAGES / statistics.median(seconds["ours"]),
    "ratio": median_ratio(seconds["plain"], seconds["ours"]),
    "rand_augment_share": 1 - median_ratio(seconds["undistorted"], seconds["ours"]) if config.rand_augment else None,
  }


def main() -> None:
  options = argument_parser(__doc__, rounds=15).parse_args()
  warn_if_busy()
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
  rows = [compare(recipe, *size, options.rounds) for recipe in RECIPES for size in IMAGE_SIZES]
  columns = {
    "recipe": ("recipe", ""),
    "image": ("image", ""),
    "kB": ("kilobytes", ".0f"),
    "Pillow images/s": ("plain_images_per_s", ".0f"),
    "ours images/s": ("ours_images_per_s", ".0f"),
    "ratio": ("ratio", ".2f"),
    "RandAugment's share": ("rand_augment_share", ".0%"),
  }
  report(rows, columns)
  write_json(options.json, {"resampler": transforms.RESAMPLER, "rows": rows}, ("numpy", "pillow"))


if __name__ == "__main__":
  main()
