"""Where encoded images come from: TFDS data sets, folders, scikit-learn's digits, or a generator."""

import hashlib
import io
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from dtm_jax.config import DataConfig
from dtm_jax.errors import InputError, TransientError, is_of_network

NO_LABEL = -1
MAX_LABELS = 64  # of one image, where a data set has images of several classes
IMAGE_SUFFIXES = frozenset(
  (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
)  # compared in lower case
_FINGERPRINTED_SIZES = 1000  # files
_HOLD_OUT_EVERY = 10  # images of a folder without an evaluation split


class Example(NamedTuple):
  """One encoded image and its class, NO_LABEL where it has none.

  From a source whose images may be of several classes, `label` is int32 [MAX_LABELS]: the classes, then NO_LABEL.
  """

  image: bytes
  label: int | np.ndarray


class Source(Protocol):
  """Random access to encoded images; picklable, for worker processes."""

  num_classes: int | None
  class_names: list[str] | None  # in the order of the labels, where they have any but numbers
  label_shape: tuple[int, ...]  # of an example's label: () or (MAX_LABELS,)

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Example: ...

  def name(self, index: int) -> str:
    """What a log should call this image."""

  def fingerprint(self) -> str:
    """SHA-256 of what tells other images under the same settings, without reading them; the same wherever they lie."""


def open_source(config: DataConfig, split: str) -> Source:
  """Opens the configured source.

  Args:
    config: the data section of a run's config.
    split: "train" or "eval".

  Raises:
    InputError: the data are missing, empty, or not of the expected kind.
  """
  if split not in ("train", "eval"):
    raise ValueError(f"split={split!r} is neither 'train' nor 'eval'")
  split_name = config.train_split if split == "train" else config.eval_split
  match config.source:
    case "digits":
      return TfdsSource(_digits_builder(config.path), split_name, config.label)
    case "tfds":
      return TfdsSource(_tfds_builder(config.name, config.path), split_name, config.label)
    case "folder":
      return _open_folder(config, split)
    case "synthetic":
      return SyntheticSource(split)
  raise ValueError(f"unknown source {config.source!r}")


class TfdsSource:
  """A split of a TFDS data set (or "train[:90%]", "train+validation") kept as ArrayRecord; images stay encoded."""

  def __init__(self, builder, split: str, label: str):
    import tensorflow_datasets as tfds

    features, splits = builder.info.features, builder.info.splits
    self._name = f"{builder.name}/{split}"
    self._contents = {name: (info.num_examples, info.num_bytes) for name, info in splits.items()}
    if not {part.partition("[")[0].strip() for part in split.split("+")} <= splits.keys():
      raise InputError(
        f"{builder.name} has no split {split!r}; set the split in config.data to one of {', '.join(splits)}"
      )
    if "image" not in features:
      raise InputError(f"{builder.name} has no feature 'image', only {', '.join(features)}; choose an image data set")
    self._label = label if label in features else None
    classes = _classes(features[label], label) if label in features else (None, None, ())
    self.num_classes, self.class_names, self.label_shape = classes
    images = [name for name, feature in features.items() if isinstance(feature, tfds.features.Image)]
    try:
      # Some have masks beside the image: nothing is decoded that nobody looks at.
      self._records = builder.as_data_source(split, decoders=dict.fromkeys(images, tfds.decode.SkipDecoding()))
    except NotImplementedError as error:
      raise InputError(_not_array_record(builder.name, builder.data_dir)) from error
    except ValueError as error:
      raise InputError(f"{builder.name} has no split {split!r}: {str(error).partition(chr(10))[0]}") from error

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Example:
    record = self._records[index]
    if self._label is None:
      return Example(record["image"], NO_LABEL)
    label = record[self._label]
    return Example(record["image"], _pad(label, self.name(index)) if self.label_shape else int(label))

  def name(self, index: int) -> str:
    return f"{self._name}[{index}]"

  def fingerprint(self) -> str:
    """Of the name, and of how many images and bytes there are in each split."""
    return _sha256(self._name, *map(str, sorted(self._contents.items())))


def _classes(feature, name: str) -> tuple[int, list[str] | None, tuple[int, ...]]:
  """How many classes a TFDS feature tells apart, their names if it has any, and the shape of a label."""
  import tensorflow_datasets as tfds

  has_several = isinstance(feature, tfds.features.Sequence)
  label = feature.feature if has_several else feature
  if not isinstance(label, tfds.features.ClassLabel):
    raise InputError(f"config.data.label={name!r} is no class but {type(label).__name__}; name the feature that is")
  are_numbers = label.names == [str(i) for i in range(label.num_classes)]  # TFDS's own, where there are no names
  return label.num_classes, None if are_numbers else label.names, (MAX_LABELS,) if has_several else ()


def _pad(labels: Sequence[int], name: str) -> np.ndarray:
  if len(labels) > MAX_LABELS:
    raise InputError(f"{name} is of {len(labels)} classes, and no more than {MAX_LABELS} are read; leave it out")
  return np.append(labels, np.full(MAX_LABELS - len(labels), NO_LABEL)).astype(np.int32)


def _tfds_builder(name: str, data_dir: str):
  """What is on disk goes before the code that TFDS may have for the same name."""
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core import read_only_builder

  try:
    return read_only_builder.builder_from_files(name, data_dir=data_dir or None)
  except tfds.core.DatasetNotFoundError as error:
    where = data_dir or tfds.core.constants.DATA_DIR
    if name.partition("/")[0].partition(":")[0] in tfds.list_builders(with_community_datasets=False):
      raise InputError(_not_array_record(name, where)) from error
    raise InputError(
      f"no TFDS data set {name!r} under {where}, and TFDS does not know the name; see config.data"
    ) from error
  except ValueError as error:
    reason = str(error).partition("\n")[0]
    raise InputError(f"config.data.name={name!r} and path={data_dir!r} name no one TFDS data set: {reason}") from error


def _not_array_record(name: str, where: str) -> str:
  return (
    f"TFDS data set {name!r} is not prepared as ArrayRecord under {where}; say by --config.data.path where it is, or "
    f"make it by: tfds build {name} --file_format=array_record (which needs pip install tensorflow); for a folder of"
    " images set --config.data.source=folder"
  )


def _digits_builder(data_dir: str):
  from dtm_jax.data.builders import digits

  return digits.prepared_builder(data_dir)


class FolderSource:
  """Image files, in the order given."""

  label_shape = ()

  def __init__(self, paths: list[str], labels: np.ndarray, class_names: list[str] | None):
    self._paths, self._labels = paths, labels
    self.class_names = class_names
    self.num_classes = None if class_names is None else len(class_names)

  def __len__(self) -> int:
    return len(self._paths)

  def __getitem__(self, index: int) -> Example:
    path = pathlib.Path(self._paths[index])
    try:
      return Example(path.read_bytes(), int(self._labels[index]))
    except OSError as error:
      if is_of_network(error.errno):  # no fault of the image
        raise TransientError(f"cannot read {path} ({error.strerror}); run the same command again") from error
      raise

  def name(self, index: int) -> str:
    return self._paths[index]

  def fingerprint(self) -> str:
    """Of all names, and of the sizes of some files: a network's file system takes long to tell those of a million."""
    root = os.path.commonpath(self._paths)
    sampled = self._paths[:: -(-len(self._paths) // _FINGERPRINTED_SIZES)]
    names = (os.path.relpath(path, root) for path in self._paths)
    return _sha256(*names, *(str(pathlib.Path(path).stat().st_size) for path in sampled))


def _open_folder(config: DataConfig, split: str) -> FolderSource:
  """The subfolder named after the split; without any such, `hold_out`'s share."""
  root = pathlib.Path(config.path)
  names = {"train": config.train_split, "eval": config.eval_split}
  if any((root / name).is_dir() for name in names.values()):
    if not (root / names[split]).is_dir():
      raise InputError(
        f"{root} has no subfolder {names[split]!r}; set config.data.{split}_split to the one that is meant"
      )
    source = FolderSource(*list_images(root / names[split]))
    train = FolderSource(*list_images(root / names["train"])) if (root / names["train"]).is_dir() else source
    check_same_classes(root, {names["train"]: train, names[split]: source})
    return source
  return hold_out(root)[split]


def check_same_classes(root: pathlib.Path, splits: Mapping[str, FolderSource]) -> None:
  """Raises InputError where the class folders of two splits differ: a label would mean another class in each."""
  (first, train), *others = splits.items()
  for name, source in others:
    if source.class_names != train.class_names:
      raise InputError(f"the class folders in {root / name} and {root / first} differ; make them the same")


def hold_out(root: pathlib.Path) -> dict[str, FolderSource]:
  """A folder without splits as "train" and "eval": every tenth image in sorted order is for evaluation.

  Raises:
    InputError: too few images, and see `list_images`.
  """
  paths, labels, class_names = list_images(root)
  held_out = np.arange(len(paths)) % _HOLD_OUT_EVERY == 0
  if held_out.all():
    raise InputError(f"{root} has too few images ({len(paths)}) to hold some out for evaluation; add images")
  chosen = {"train": np.flatnonzero(~held_out), "eval": np.flatnonzero(held_out)}
  return {split: FolderSource([paths[i] for i in rows], labels[rows], class_names) for split, rows in chosen.items()}


def list_images(root: pathlib.Path) -> tuple[list[str], np.ndarray, list[str] | None]:
  """Image files of a folder per class, or of a flat folder, sorted by class and name.

  What is an image goes by the suffix; hidden and other files are passed over.

  Returns:
    Paths, labels int64, class names; for a flat folder all labels are NO_LABEL and the names None.

  Raises:
    InputError: no such folder, no images, an empty class folder, images beside class folders.
  """
  classes, flat = _scan(root)
  if classes and flat:
    raise InputError(f"{root} has both class folders and images of its own, such as {flat[0]}; move one of them away")
  if not classes:
    if not flat:
      raise InputError(f"{root} has no images ({', '.join(sorted(IMAGE_SUFFIXES))}); give another folder")
    return flat, np.full(len(flat), NO_LABEL), None
  files = [_scan(pathlib.Path(path))[1] for path in classes]
  for path, members in zip(classes, files, strict=True):
    if not members:
      raise InputError(f"class folder {path} has no images; remove it or fill it")
  labels = np.repeat(np.arange(len(classes)), [len(members) for members in files])
  return [path for members in files for path in members], labels, [pathlib.Path(path).name for path in classes]


def _scan(folder: pathlib.Path) -> tuple[list[str], list[str]]:
  """Sorted paths of the subfolders and of the images."""
  try:
    with os.scandir(folder) as scan:
      entries = sorted((entry for entry in scan if not entry.name.startswith(".")), key=lambda entry: entry.name)
  except OSError as error:
    raise InputError(f"cannot read the image folder {folder}: {error.strerror}; check the path") from error
  folders = [entry.path for entry in entries if entry.is_dir()]
  images = [
    entry.path for entry in entries if pathlib.Path(entry.name).suffix.lower() in IMAGE_SUFFIXES and entry.is_file()
  ]
  return folders, images


class SyntheticSource:
  """Gratings whose direction and colour tell the class, as JPEG; the same at every call, without files."""

  num_classes, class_names = 8, None
  label_shape = ()
  _SIZES = {"train": 512, "eval": 128}
  _HEIGHT, _WIDTH = 72, 96  # not square: a swapped axis shows

  def __init__(self, split: str):
    self._split = split

  def __len__(self) -> int:
    return self._SIZES[self._split]

  def __getitem__(self, index: int) -> Example:
    label = index % self.num_classes
    rng = np.random.default_rng((list(self._SIZES).index(self._split), index))
    y, x = np.mgrid[: self._HEIGHT, : self._WIDTH]
    angle = np.pi * label / self.num_classes
    wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) / rng.uniform(2, 4) + rng.uniform(0, 2 * np.pi))
    color = 0.5 + 0.5 * np.cos(angle + np.array([0, 2, 4]))
    pixels = 128 + 90 * wave[..., None] * color + rng.normal(0, 12, size=(*wave.shape, 3))
    encoded = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(encoded, "JPEG", quality=90)
    return Example(encoded.getvalue(), label)

  def name(self, index: int) -> str:
    return f"synthetic/{self._split}[{index}]"

  def fingerprint(self) -> str:
    return _sha256("synthetic", self._split)


def _sha256(*parts: str) -> str:
  return hashlib.sha256("\n".join(parts).encode(errors="surrogateescape")).hexdigest()
