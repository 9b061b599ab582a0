"""Images/s per core from JPEG bytes to a training crop: this project beside plain Pillow.

  python benchmarks/host_pipeline.py [--rounds=15] [--json=FILE]

Both sides crop the same random boxes of the same photographs (those that come
with scikit-learn) and resample them to 224 px with the bicubic filter. Plain
Pillow decodes the whole image, converts, crops, resizes. The two alternate in
one process on one core. The target is a ratio of 1.5 at 500 x 375.
"""

import argparse
import io
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable

import numpy as np
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


def images_per_second(load: Callable[..., np.ndarray], jpegs: list[bytes], seed: int) -> float:
  """One pass over all images; the seed decides the boxes."""
  rngs = [np.random.default_rng((seed, i)) for i in range(len(jpegs))]
  config = DataConfig()
  start = time.perf_counter()
  for jpeg, rng in zip(jpegs, rngs, strict=True):
    load(jpeg, rng, config)
  return len(jpegs) / (time.perf_counter() - start)


def compare(width: int, height: int, rounds: int) -> dict[str, float]:
  """Medians over alternating rounds, the first of which is not counted."""
  jpegs = make_jpegs(width, height)
  pairs = [[images_per_second(load, jpegs, seed) for load in (plain_pillow, ours)] for seed in range(rounds + 1)][1:]
  plain, fast = (statistics.median(side) for side in zip(*pairs, strict=True))
  return {
    "width": width,
    "height": height,
    "kilobytes": statistics.mean(map(len, jpegs)) / 1e3,
    "plain_images_per_s": plain,
    "ours_images_per_s": fast,
    "ratio": statistics.median(mine / theirs for theirs, mine in pairs),
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--rounds", type=int, default=15)
  parser.add_argument("--json", type=pathlib.Path, help="write the results to this file, too")
  options = parser.parse_args()
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
  results = [compare(width, height, options.rounds) for width, height in IMAGE_SIZES]
  print(f"{'image':>11} {'kB':>6} {'Pillow img/s':>13} {'ours img/s':>11} {'ratio':>6}")
  for result in results:
    name = f"{result['width']} x {result['height']}"
    rates = f"{result['plain_images_per_s']:13.0f} {result['ours_images_per_s']:11.0f} {result['ratio']:6.2f}"
    print(f"{name:>11} {result['kilobytes']:6.0f} {rates}")
  if options.json:
    options.json.write_text(json.dumps({"resampler": transforms.RESAMPLER, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
  main()
