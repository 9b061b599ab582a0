"""Turns images into a TFDS data set in ArrayRecord files, without TensorFlow.

  python -m dtm_jax.data.prepare SRC --out=DIR [--name=NAME]

SRC is one of
  - a folder per class, or a flat folder, of image files: the splits "train"
    and "validation", every tenth image;
  - a folder with `train` and more such folders in it: one split each;
  - a folder with the four gzipped IDX files of MNIST or Fashion-MNIST: the
    splits "train" and "test".

The result, DIR/NAME/1.0.0, is read by `--config.data.source=tfds
--config.data.name=NAME --config.data.path=DIR` and by TFDS. Until it is whole
it lives in DIR/NAME/incomplete.1.0.0; the same command after a crash goes on
with the first shard that is missing there.
"""

import argparse
import dataclasses
import gzip
import hashlib
import io
import json
import math
import pathlib
import re
import shutil
import struct
import sys
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow_datasets as tfds
import tqdm
from array_record.python import array_record_module

from dtm_jax.data import sources, transforms
from dtm_jax.errors import InputError, some_of
from dtm_jax.files import locked

VERSION = "1.0.0"
_SHARD_EXAMPLES = 4096
_PROVENANCE = "source.json"
_IDX_FILES = {"train": "train", "test": "t10k"}
_IDX_IMAGES, _IDX_LABELS = 0x0803, 0x0801  # magic numbers: uint8, number of axes


@dataclasses.dataclass(frozen=True)
class IdxSource:
  """Images and labels out of a pair of IDX files; see `sources.Source`."""

  path: pathlib.Path
  images: np.ndarray  # uint8 [n, H, W]
  labels: np.ndarray  # uint8 [n]
  class_names: None = None
  label_shape: tuple[int, ...] = ()

  @property
  def num_classes(self) -> int:
    return int(self.labels.max()) + 1

  def __len__(self) -> int:
    return len(self.images)

  def __getitem__(self, index: int) -> sources.Example:
    return sources.Example(transforms.encode_png(self.images[index]), int(self.labels[index]))

  def name(self, index: int) -> str:
    return f"{self.path}[{index}]"

  def fingerprint(self) -> str:
    return hashlib.sha256(self.images.tobytes() + self.labels.tobytes()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Shard:
  """Examples [start, stop) of a split, and the file that they belong in."""

  split: str
  start: int
  stop: int
  file_name: str


def open_raw(root: pathlib.Path) -> dict[str, sources.Source]:
  """Split name -> its images.

  Raises:
    InputError: no such folder, no images, an empty class folder, classes that
      differ between splits, a missing or broken IDX file.
  """
  if not root.is_dir():
    raise InputError(f"{root} is not a folder; give a folder of images or of the four IDX files")
  if list(root.glob("*-ubyte.gz")):
    return {split: _open_idx(root, prefix) for split, prefix in _IDX_FILES.items()}
  if not (root / "train").is_dir():
    held_out = sources.hold_out(root)
    return {"train": held_out["train"], "validation": held_out["eval"]}
  folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
  splits = {path.name: sources.FolderSource(*sources.list_images(path)) for path in folders}
  sources.check_same_classes(root, {"train": splits["train"], **splits})
  return splits


def _open_idx(root: pathlib.Path, prefix: str) -> IdxSource:
  path = root / f"{prefix}-images-idx3-ubyte.gz"
  images = _read_idx(path, _IDX_IMAGES)
  labels = _read_idx(root / f"{prefix}-labels-idx1-ubyte.gz", _IDX_LABELS)
  if len(images) != len(labels):
    raise InputError(f"{path} has {len(images)} images but {len(labels)} labels; fetch both files again")
  return IdxSource(path, images, labels)


def _read_idx(path: pathlib.Path, magic: int) -> np.ndarray:
  """The array in a gzipped IDX file of bytes (format: yann.lecun.com/exdb/mnist)."""
  try:
    with gzip.open(path) as file:
      data = file.read()
  except FileNotFoundError as error:
    raise InputError(f"{path} is missing; put all four IDX files into that folder") from error
  except (OSError, EOFError, zlib.error) as error:
    raise InputError(f"{path} cannot be read ({error}); fetch it again") from error
  header = struct.Struct(f">{1 + (magic & 0xFF)}I")  # the last byte of the magic number counts the axes
  found, *shape = header.unpack(data[: header.size]) if len(data) >= header.size else (None,)
  if found != magic or len(data) - header.size != math.prod(shape):
    raise InputError(f"{path} is no whole IDX file of {magic & 0xFF} axes; fetch it again")
  return np.frombuffer(data, np.uint8, offset=header.size).reshape(shape)


def prepare(splits: Mapping[str, sources.Source], out: pathlib.Path, name: str) -> pathlib.Path:
  """Writes the data set, or what is missing of it.

  Args:
    splits: what to write.
    out: the TFDS data_dir.
    name: of the data set; letters a-z, digits and underscores.

  Returns:
    The folder of the finished data set.

  Raises:
    InputError: an unfit name, files that are no images, another process at work
      on the same data set.
  """
  if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
    raise InputError(f"--name={name!r} must be lower-case letters, digits and underscores, and begin with a letter")
  finished, partial = out / name / VERSION, out / name / f"incomplete.{VERSION}"
  (out / name).mkdir(parents=True, exist_ok=True)
  with locked(out / name / ".lock", f"another process is preparing {out / name}; wait for it"):
    fingerprint = {split: source.fingerprint() for split, source in splits.items()}
    if finished.exists():
      _check_same_files(finished, fingerprint)
    else:
      _start_or_resume(partial, fingerprint)
      features = _features(splits["train"])
      shards = [shard for split, source in splits.items() for shard in plan_shards(name, split, len(source))]
      _write_shards(shards, splits, features, partial)
      _write_metadata(shards, features, partial)
      partial.rename(finished)
  return finished


def plan_shards(name: str, split: str, num_examples: int) -> list[Shard]:
  """Cuts a split into files of at most 4096 examples, named as TFDS expects."""
  starts = range(0, num_examples, _SHARD_EXAMPLES)
  return [
    Shard(
      split,
      start,
      min(start + _SHARD_EXAMPLES, num_examples),
      f"{name}-{split}.array_record-{i:05d}-of-{len(starts):05d}",
    )
    for i, start in enumerate(starts)
  ]


def _start_or_resume(partial: pathlib.Path, fingerprint: dict[str, str]) -> None:
  """Keeps the shards of an earlier run if they come from the same files."""
  if _read_fingerprint(partial) == fingerprint:
    return
  if partial.exists():
    shutil.rmtree(partial)
  partial.mkdir()
  (partial / _PROVENANCE).write_text(json.dumps(fingerprint))


def _read_fingerprint(folder: pathlib.Path) -> dict[str, str] | None:
  """What a run wrote; None where there is none, or half of one, left by a kill."""
  try:
    return json.loads((folder / _PROVENANCE).read_text())
  except (FileNotFoundError, ValueError):
    return None


def _check_same_files(finished: pathlib.Path, fingerprint: dict[str, str]) -> None:
  if _read_fingerprint(finished) != fingerprint:
    raise InputError(f"{finished} was made from other files; choose another --name or --out, or remove it")


def _features(source: sources.Source) -> tfds.features.FeaturesDict:
  image = tfds.features.Image(shape=(None, None, 3))
  if isinstance(source, IdxSource):
    label = tfds.features.ClassLabel(num_classes=source.num_classes)
    return tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(None, None, 1)), "label": label})
  if source.class_names is None:
    return tfds.features.FeaturesDict({"image": image})
  return tfds.features.FeaturesDict({"image": image, "label": tfds.features.ClassLabel(names=source.class_names)})


def _write_shards(
  shards: Sequence[Shard],
  splits: Mapping[str, sources.Source],
  features: tfds.features.FeaturesDict,
  folder: pathlib.Path,
) -> None:
  """Raises InputError after the last of them, where images cannot be read: all that are met are told."""
  missing = [shard for shard in shards if not (folder / shard.file_name).exists()]
  total, remaining = (sum(shard.stop - shard.start for shard in part) for part in (shards, missing))
  unreadable = []
  with tqdm.tqdm(total=total, initial=total - remaining, unit=" images") as progress:
    for shard in missing:
      unreadable += _write_shard(shard, splits[shard.split], features, folder, progress)
  if unreadable:
    raise InputError(f"{some_of(unreadable)}: no images that can be read; remove or repair them")


def _write_shard(
  shard: Shard, source: sources.Source, features: tfds.features.FeaturesDict, folder: pathlib.Path, progress: tqdm.tqdm
) -> list[str]:
  """Names of images that cannot be read; where there are any, there is no shard."""
  unreadable, unfinished = [], folder / f".{shard.file_name}"
  writer = array_record_module.ArrayRecordWriter(str(unfinished), "group_size:1")  # for random access
  try:
    for index in range(shard.start, shard.stop):
      record = _serialize(source, index, features)
      if record is None:
        unreadable.append(source.name(index))
        progress.write(f"cannot be read: {unreadable[-1]}", file=sys.stderr)
      elif not unreadable:
        writer.write(record)
      progress.update()
    writer.close()
  except RuntimeError as error:  # what ArrayRecord makes of a full disk
    raise OSError(str(error)) from error
  if unreadable:
    unfinished.unlink()
  else:
    unfinished.rename(folder / shard.file_name)
  return unreadable


def _serialize(source: sources.Source, index: int, features: tfds.features.FeaturesDict) -> bytes | None:
  """None where the image cannot be read."""
  try:
    example = source[index]
    transforms.check_readable(example.image)
  except (OSError, transforms.UnreadableImageError):
    return None
  values = {"image": io.BytesIO(example.image), "label": example.label}
  return features.serialize_example({name: values[name] for name in features})


def _write_metadata(shards: Sequence[Shard], features: tfds.features.FeaturesDict, folder: pathlib.Path) -> None:
  template = tfds.core.ShardedFileTemplate(data_dir=folder)
  by_split = {split: [shard for shard in shards if shard.split == split] for split in {s.split for s in shards}}
  infos = [
    tfds.core.SplitInfo(
      name=split,
      shard_lengths=[shard.stop - shard.start for shard in members],
      num_bytes=sum((folder / shard.file_name).stat().st_size for shard in members),
      filename_template=template,
    )
    for split, members in by_split.items()
  ]
  tfds.folder_dataset.write_metadata(
    data_dir=folder, features=features, split_infos=infos, version=VERSION, check_data=False
  )


def main(arguments: Sequence[str] | None = None) -> int:
  """Command line; returns the exit code."""
  parser = argparse.ArgumentParser(prog="python -m dtm_jax.data.prepare", description=__doc__.partition("\n")[0])
  parser.add_argument("source", type=pathlib.Path, help="folder of images, or of four IDX files")
  parser.add_argument("--out", type=pathlib.Path, required=True, help="TFDS data_dir, made if need be")
  parser.add_argument("--name", help="of the data set; the folder's own name if not given")
  options = parser.parse_args(arguments)
  name = options.name or re.sub(r"[^a-z0-9]+", "_", options.source.resolve().name.lower())
  try:
    folder = prepare(open_raw(options.source), options.out, name)
  except InputError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except OSError as error:
    print(f"error: cannot write the data set: {error}; give another --out or free space", file=sys.stderr)
    return 2
  print(f"{folder} is ready: --config.data.source=tfds --config.data.name={name} --config.data.path={options.out}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
