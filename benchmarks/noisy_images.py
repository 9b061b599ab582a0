"""Images with sensor noise, for a study of what noise in a teacher's targets does.

  python benchmarks/noisy_images.py /usr/share/datasets/fashion-mnist noisy --std=80
  python -m dtm_jax.data.prepare noisy --name=fashion_mnist_noisy --out=data
  python -m dtm_jax.study --scale=noisy

Every pixel of every image gets its own Gaussian noise, the same in every run. Labels stay.
"""

import argparse
import gzip
import pathlib
import shutil
import struct

import numpy as np

from dtm_jax.data.prepare import IdxSource, open_raw

IDX_IMAGES = 0x0803  # magic number


def add_noise(images: np.ndarray, std: float, seed: int) -> np.ndarray:
  """uint8 in, uint8 out, of any shape, cut off at 0 and 255; `std` in grey levels of 256."""
  noise = std * np.random.default_rng(seed).standard_normal(images.shape, np.float32)
  return np.clip(np.rint(images + noise), 0, 255).astype(np.uint8)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("source", type=pathlib.Path, help="folder of the four IDX files of MNIST or Fashion-MNIST")
  parser.add_argument("out", type=pathlib.Path, help="folder for four such files")
  parser.add_argument("--std", type=float, default=80, help="of the noise, in grey levels of 256 (%(default)s)")
  args = parser.parse_args()
  splits = open_raw(args.source)
  if not all(isinstance(split, IdxSource) for split in splits.values()):
    parser.error(f"{args.source} has images, but not as IDX files")
  if args.out.resolve() == args.source.resolve():
    parser.error("the noisy images need a folder of their own")
  args.out.mkdir(parents=True, exist_ok=True)
  for seed, (_, split) in enumerate(sorted(splits.items())):
    data = struct.pack(">4I", IDX_IMAGES, *split.images.shape) + add_noise(split.images, args.std, seed).tobytes()
    (args.out / split.path.name).write_bytes(gzip.compress(data, compresslevel=1, mtime=0))
    shutil.copy(split.path.with_name(split.path.name.replace("images-idx3", "labels-idx1")), args.out)


if __name__ == "__main__":
  main()
