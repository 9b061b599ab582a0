"""TFDS data sets of a dozen tiny images under the real ones' schema, written without TensorFlow."""

import functools
import io
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from PIL import Image

VERSION = "1.0.0"


@functools.cache
def real_features(name: str) -> tfds.features.FeaturesDict:
  """What TFDS's own builder says that the data set has; nothing is downloaded."""
  if name == "i_naturalist2021":  # its list of labels is missing in TFDS 4.9.10 as it is installed
    label, kind = (tfds.features.ClassLabel(num_classes=number) for number in (10_000, 11))
    texts = {"id": tfds.features.Scalar(np.int64), "file_id": tfds.features.Text()}
    image = tfds.features.Image(shape=(None, None, 3))
    return tfds.features.FeaturesDict({"image": image, "label": label, "supercategory": kind, **texts})
  return tfds.builder(name, data_dir="/nonexistent").info.features


def with_classes(features: tfds.features.FeaturesDict, number: int) -> tfds.features.FeaturesDict:
  """The same features, but for only so many of the labels."""
  names = features["label"].names[:number]
  return tfds.features.FeaturesDict({**features, "label": tfds.features.ClassLabel(names=names)})


def picture(index: int, size: tuple[int, int], *, channels: int = 3, encoding: str = "PNG") -> bytes:
  """An encoded image of (height, width) that is like no other."""
  pixels = np.random.default_rng(index).integers(0, 256, (4, 4, channels), np.uint8).squeeze()
  encoded = io.BytesIO()
  Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC).save(encoded, encoding)
  return encoded.getvalue()


def write(data_dir: pathlib.Path, name: str, features: tfds.features.FeaturesDict, splits: Mapping[str, Sequence]):
  """Writes the data set `name` with, in each split, an image for each label (or list of labels)."""
  folder = data_dir / name / VERSION
  folder.mkdir(parents=True)
  template = tfds.core.ShardedFileTemplate(data_dir=folder)
  infos = []
  for number, (split, labels) in enumerate(splits.items()):
    path = folder / f"{name.partition('/')[0]}-{split}.array_record-00000-of-00001"
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for index, label in enumerate(labels):
      values = {key: _value(key, feature, 100 * number + index, label) for key, feature in features.items()}
      writer.write(features.serialize_example(values))
    writer.close()
    infos.append(
      tfds.core.SplitInfo(
        name=split, shard_lengths=[len(labels)], num_bytes=path.stat().st_size, filename_template=template
      )
    )
  tfds.folder_dataset.write_metadata(
    data_dir=folder, features=features, split_infos=infos, version=VERSION, check_data=False
  )


def _value(key: str, feature, index: int, label):
  match feature:
    case tfds.features.Image():
      height, width, channels = feature.shape
      encoding = "JPEG" if channels == 3 and height is None else "PNG"
      return io.BytesIO(picture(index, (height or 20, width or 24), channels=channels, encoding=encoding))
    case tfds.features.ClassLabel() if key not in ("label", "original_label"):
      return index % feature.num_classes
    case tfds.features.ClassLabel():
      return label[0] if isinstance(label, list) and label else label or 0
    case tfds.features.Sequence() if isinstance(feature.feature, tfds.features.ClassLabel):
      return label
    case tfds.features.Sequence():
      return [{"bbox": tfds.features.BBox(0.0, 0.1, 0.5, 1.0)}] * (index % 3)
    case tfds.features.BBoxFeature():
      return tfds.features.BBox(0.0, 0.1, 0.5, 1.0)
    case tfds.features.Text():
      return f"{index:05d}.jpg"
  return index
