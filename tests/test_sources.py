import collections
import errno
import io
import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn import datasets, neighbors

import miniatures
from dtm_jax.config import DataConfig
from dtm_jax.data import sources
from dtm_jax.errors import InputError, TransientError


def pixels_of(example: sources.Example) -> np.ndarray:
  return np.asarray(Image.open(io.BytesIO(example.image)))


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory) -> str:
  return str(tmp_path_factory.mktemp("digits"))


@pytest.fixture
def digits_config(digits_dir) -> DataConfig:
  return DataConfig(source="digits", path=digits_dir, eval_split="test")


def test_digits_are_all_of_scikit_learns(digits_config):
  ours = collections.Counter()
  for split in ("train", "eval"):
    source = sources.open_source(digits_config, split)
    ours.update(
      (pixels_of(example).tobytes(), example.label) for example in map(source.__getitem__, range(len(source)))
    )
  digits = datasets.load_digits()
  levels = (digits.images / 16 * 255).round().astype(np.uint8)
  assert ours == collections.Counter(
    (image.tobytes(), label) for image, label in zip(levels, digits.target.tolist(), strict=True)
  )


def test_digits_split_keeps_the_classes_in_proportion(digits_config):
  train, test = (sources.open_source(digits_config, split) for split in ("train", "eval"))
  assert (len(train), len(test)) == (1437, 360)
  assert (train.num_classes, test.num_classes) == (10, 10)
  assert train.class_names is None  # but numbers
  counts = np.bincount([test[i].label for i in range(len(test))])
  np.testing.assert_allclose(counts, np.bincount(datasets.load_digits().target) / 5, atol=1)
  assert test.name(7) == "dtm_digits/test[7]"


def test_digits_prepared_by_two_processes_at_once(tmp_path):
  code = (
    "from dtm_jax.config import DataConfig; from dtm_jax.data.sources import open_source; import sys;"
    "print(len(open_source(DataConfig(source='digits', path='', train_split='train'), 'train')))"
  )
  environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
  runs = [
    subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)
  ]
  outputs = [run.communicate()[0] for run in runs]
  assert [run.returncode for run in runs] == [0, 0]
  assert [output.split()[-1] for output in outputs] == ["1437", "1437"]
  assert [path.name for path in (tmp_path / "dtm_jax" / "dtm_digits").iterdir()] == ["1.0.0"]


def test_digits_where_nothing_can_be_written(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(InputError, match="cannot write the digits to .*config.data.path"):
    sources.open_source(DataConfig(source="digits", path=str(tmp_path / "file" / "below")), "train")


def test_slices_of_a_split(digits_config, digits_dir):
  sources.open_source(digits_config, "train")
  config = DataConfig(source="tfds", name="dtm_digits", path=digits_dir, train_split="train[:10%]")
  assert len(sources.open_source(config, "train")) == 144


def test_unknown_split_is_named_with_those_that_exist(digits_dir):
  with pytest.raises(InputError, match=r"no split 'validation'.*test, train|train, test"):
    sources.open_source(DataConfig(source="digits", path=digits_dir), "eval")


def test_tfds_that_is_not_prepared(tmp_path):
  with pytest.raises(InputError, match=f"under {tmp_path}.*tfds build imagenet2012 --file_format=array_record"):
    sources.open_source(DataConfig(source="tfds", path=str(tmp_path)), "train")


def test_tfds_that_does_not_exist(tmp_path):
  with pytest.raises(InputError, match=f"no TFDS data set 'nonesuch' under {tmp_path}"):
    sources.open_source(DataConfig(source="tfds", name="nonesuch", path=str(tmp_path)), "train")


def test_tfds_name_that_is_none(tmp_path):
  with pytest.raises(InputError, match=r"config.data.name='a/b:c'") as caught:
    sources.open_source(DataConfig(source="tfds", name="a/b:c", path=str(tmp_path)), "train")
  assert "\n" not in str(caught.value)


def test_tfds_in_the_wrong_file_format(digits_config, digits_dir, tmp_path):
  sources.open_source(digits_config, "train")
  copy = tmp_path / "dtm_digits" / "1.0.0"
  copy.mkdir(parents=True)
  for path in pathlib.Path(digits_dir, "dtm_digits", "1.0.0").glob("*.json"):
    info = json.loads(path.read_text())
    if "fileFormat" in info:
      info["fileFormat"] = "tfrecord"
    (copy / path.name).write_text(json.dumps(info))
  with pytest.raises(InputError, match="not prepared as ArrayRecord"):
    sources.open_source(DataConfig(source="tfds", name="dtm_digits", path=str(tmp_path)), "train")


def write_image(path: pathlib.Path, level: int = 0) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new("L", (4, 4), level).save(path)


def folder_config(path: pathlib.Path, **fields) -> DataConfig:
  return DataConfig(source="folder", path=str(path), **fields)


def test_folder_per_class_holds_out_every_tenth_image(tmp_path):
  for label, name in enumerate(("ant", "bee")):
    for i in range(10):
      write_image(tmp_path / name / f"{i}.PNG", level=100 * label + i)
  (tmp_path / "ant" / "notes.txt").write_text("passed over")
  write_image(tmp_path / ".cache" / "hidden.png")
  train, held_out = (sources.open_source(folder_config(tmp_path), split) for split in ("train", "eval"))
  assert (train.num_classes, len(train), len(held_out)) == (2, 18, 2)
  assert train.class_names == ["ant", "bee"]
  seen = sorted((pixels_of(s[i])[0, 0].item(), s[i].label) for s in (train, held_out) for i in range(len(s)))
  assert seen == [(100 * label + i, label) for label in (0, 1) for i in range(10)]
  assert held_out.name(1) == str(tmp_path / "bee" / "0.PNG")


@pytest.mark.parametrize(("number", "raised"), [(errno.ESTALE, TransientError), (errno.EACCES, PermissionError)])
def test_a_file_server_that_does_not_answer_is_no_fault_of_the_image(tmp_path, monkeypatch, number, raised):
  """An unreadable image would be replaced by another one."""
  write_image(tmp_path / "0.png")
  source = sources.FolderSource([str(tmp_path / "0.png")], np.zeros(1, int), None)
  assert source[0].label == 0

  def fail(path):
    raise OSError(number, "no answer")

  monkeypatch.setattr(pathlib.Path, "read_bytes", fail)
  with pytest.raises(raised):
    source[0]


def test_folder_with_a_folder_per_split(tmp_path):
  write_image(tmp_path / "train" / "ant" / "a.png", 1)
  write_image(tmp_path / "train" / "bee" / "b.png", 2)
  write_image(tmp_path / "val" / "bee" / "c.png", 3)
  write_image(tmp_path / "val" / "ant" / "d.png", 4)
  config = folder_config(tmp_path, eval_split="val")
  train, held_out = (sources.open_source(config, split) for split in ("train", "eval"))
  assert [train[i].label for i in range(2)] == [0, 1]
  assert [pixels_of(held_out[i])[0, 0] for i in range(2)] == [4, 3]
  with pytest.raises(InputError, match="no subfolder 'validation'; set config.data.eval_split"):
    sources.open_source(folder_config(tmp_path), "eval")
  write_image(tmp_path / "train" / "cat" / "e.png", 5)  # now class 2 is the cat in one split, and none in the other
  with pytest.raises(InputError, match="class folders in .*val and .*train differ"):
    sources.open_source(config, "eval")


def test_flat_folder_has_no_labels(tmp_path):
  for i in range(11):
    write_image(tmp_path / f"{i:02d}.jpg")
  train = sources.open_source(folder_config(tmp_path), "train")
  assert (len(train), train.num_classes, train[0].label) == (9, None, -1)
  assert len(sources.open_source(folder_config(tmp_path), "eval")) == 2


def test_empty_class_folder_is_named(tmp_path):
  write_image(tmp_path / "ant" / "a.png")
  (tmp_path / "wasp").mkdir()
  with pytest.raises(InputError, match=f"class folder {tmp_path}/wasp has no images; remove it or fill it"):
    sources.open_source(folder_config(tmp_path), "train")


def test_images_beside_class_folders(tmp_path):
  write_image(tmp_path / "ant" / "a.png")
  write_image(tmp_path / "stray.png")
  with pytest.raises(InputError, match=r"both class folders and images .*stray.png"):
    sources.open_source(folder_config(tmp_path), "train")


def test_folder_that_is_missing_empty_or_too_small(tmp_path):
  with pytest.raises(InputError, match="cannot read the image folder .*nonesuch: No such file"):
    sources.open_source(folder_config(tmp_path / "nonesuch"), "train")
  with pytest.raises(InputError, match="has no images"):
    sources.open_source(folder_config(tmp_path), "train")
  write_image(tmp_path / "only.png")
  with pytest.raises(InputError, match=r"too few images \(1\)"):
    sources.open_source(folder_config(tmp_path), "train")


def test_fingerprints_are_of_the_images_wherever_they_lie(tmp_path, digits_config, digits_dir):
  def of(name):
    return sources.open_source(folder_config(tmp_path / name), "train").fingerprint()

  for folder in ("a", "moved", "renamed", "changed"):
    for i in range(20):
      write_image(tmp_path / folder / f"class{i % 2}" / f"{i:02}{'x' * (folder == 'renamed' and i == 9)}.png", level=i)
  (tmp_path / "changed/class1/09.png").write_bytes(b"longer" * 1000)
  assert of("a") == of("moved")
  assert len({of("a"), of("renamed"), of("changed")}) == 3

  train, test = (sources.open_source(digits_config, split).fingerprint() for split in ("train", "eval"))
  shutil.copytree(digits_dir, tmp_path / "digits")
  copy = DataConfig(source="digits", path=str(tmp_path / "digits"), eval_split="test")
  assert sources.open_source(copy, "train").fingerprint() == train != test
  info = next((tmp_path / "digits").rglob("dataset_info.json"))
  content = json.loads(info.read_text())
  content["splits"][0]["numBytes"] = "1"
  info.write_text(json.dumps(content))
  assert sources.open_source(copy, "train").fingerprint() != train


def test_synthetic_is_the_same_each_time_and_never_repeats():
  config = DataConfig(source="synthetic")
  train, again, test = (sources.open_source(config, split) for split in ("train", "train", "eval"))
  assert train[5] == again[5]
  assert len({train[i].image for i in range(len(train))} | {test[i].image for i in range(len(test))}) == 640
  assert pixels_of(train[0]).shape == (72, 96, 3)


def test_synthetic_classes_can_be_told_apart():
  config = DataConfig(source="synthetic")
  spectra, labels = [], []
  for split in ("train", "eval"):
    source = sources.open_source(config, split)
    images = [pixels_of(source[i])[:, :72].astype(float) for i in range(len(source))]
    spectra.append([np.abs(np.fft.rfft2(image.mean(-1)))[:16, :16].ravel() for image in images])
    labels.append([source[i].label for i in range(len(source))])
  assert set(labels[1]) == set(range(8))
  nearest = neighbors.KNeighborsClassifier(5).fit(spectra[0], labels[0])
  assert nearest.score(spectra[1], labels[1]) > 0.5  # chance is 0.125


def test_every_source_travels_to_a_worker_process(tmp_path, digits_config):
  write_image(tmp_path / "a.png")
  write_image(tmp_path / "b.png")
  for config in (digits_config, folder_config(tmp_path), DataConfig(source="synthetic")):
    source = sources.open_source(config, "train")
    assert pickle.loads(pickle.dumps(source))[0] == source[0]


# ------------------------------------------------------------ features of real data sets


@pytest.fixture(scope="module")
def miniature_dir(tmp_path_factory):
  """Small copies of three TFDS data sets."""
  folder = tmp_path_factory.mktemp("miniatures")
  splits = {"train": [3, 1, 4], "validation": [1, 5], "test": [9, 2, 6, 5]}
  for name in ("oxford_flowers102", "cifar100", "oxford_iiit_pet"):
    miniatures.write(folder, name, miniatures.real_features(name), splits)
  features = miniatures.real_features("imagenet2012_real")
  miniatures.write(
    folder, "imagenet2012_real", features, {"validation": [[7], [], [1, 999, 3]], "many": [[*range(65)]]}
  )
  return folder


def labels_of(folder, name: str, split: str, **fields) -> list:
  source = sources.open_source(DataConfig(name=name, path=str(folder), train_split=split, **fields), "train")
  return [source[i].label for i in range(len(source))]


@pytest.mark.parametrize(
  ("split", "expected"),
  [
    ("train+validation", [3, 1, 4, 1, 5]),
    ("validation + train[:1]", [1, 5, 3]),
    ("train[1:]+test[:50%]", [1, 4, 9, 2]),
  ],
)
def test_splits_together(miniature_dir, split, expected):
  assert labels_of(miniature_dir, "oxford_flowers102", split) == expected


@pytest.mark.parametrize("split", ["train+val", "train[:", "train+", "train[:nine]", "train]"])
def test_splits_that_make_no_sense(miniature_dir, split):
  with pytest.raises(InputError, match="oxford_flowers102 has no split") as caught:
    labels_of(miniature_dir, "oxford_flowers102", split)
  assert "\n" not in str(caught.value)


def test_labels_under_another_name(miniature_dir):
  config = DataConfig(name="cifar100", path=str(miniature_dir), label="coarse_label")
  source = sources.open_source(config, "train")
  assert (source.num_classes, source.label_shape) == (20, ())
  assert [source[i].label for i in range(3)] == [0, 1, 2]
  assert labels_of(miniature_dir, "cifar100", "train") == [3, 1, 4]
  assert labels_of(miniature_dir, "cifar100", "train", label="none") == [sources.NO_LABEL] * 3
  with pytest.raises(InputError, match="config.data.label='id' is no class but Text; name the feature that is"):
    labels_of(miniature_dir, "cifar100", "train", label="id")


def test_images_of_several_classes(miniature_dir):
  config = DataConfig(name="imagenet2012_real", path=str(miniature_dir), label="real_label")
  source = pickle.loads(pickle.dumps(sources.open_source(config, "eval")))
  assert (source.num_classes, source.label_shape) == (1000, (sources.MAX_LABELS,))
  labels = np.stack([source[i].label for i in range(3)])
  assert (labels.shape, labels.dtype) == ((3, sources.MAX_LABELS), np.int32)
  assert [row[row != sources.NO_LABEL].tolist() for row in labels] == [[7], [], [1, 999, 3]]
  with pytest.raises(InputError, match=r"imagenet2012_real/many\[0\] is of 65 classes, and no more than 64 are read"):
    labels_of(miniature_dir, "imagenet2012_real", "many", label="real_label")


def test_a_mask_beside_the_image_is_not_decoded(miniature_dir):
  source = sources.open_source(DataConfig(name="oxford_iiit_pet", path=str(miniature_dir)), "train")
  assert isinstance(source._records[0]["segmentation_mask"], bytes)
  assert pixels_of(source[0]).shape == (20, 24, 3)
