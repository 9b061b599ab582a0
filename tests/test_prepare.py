import gzip
import io
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from dtm_jax.config import DataConfig
from dtm_jax.data import prepare, sources
from dtm_jax.errors import InputError
from dtm_jax.files import locked

NUM_IMAGES = {"train": 20, "t10k": 5}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
  monkeypatch.setattr(prepare, "_SHARD_EXAMPLES", 8)


def idx_arrays(prefix: str) -> tuple[np.ndarray, np.ndarray]:
  rng = np.random.default_rng(len(prefix))
  count = NUM_IMAGES[prefix]
  return rng.integers(256, size=(count, 6, 5), dtype=np.uint8), rng.permutation(count).astype(np.uint8) % 10


def write_idx(path: pathlib.Path, array: np.ndarray) -> None:
  header = bytes([0, 0, 8, array.ndim]) + b"".join(length.to_bytes(4, "big") for length in array.shape)
  path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def idx_folder(tmp_path) -> pathlib.Path:
  folder = tmp_path / "My-Digits"
  folder.mkdir()
  for prefix in NUM_IMAGES:
    images, labels = idx_arrays(prefix)
    write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", images)
    write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", labels)
  return folder


def image_folder(root: pathlib.Path, classes=("ant", "bee"), count: int = 9) -> pathlib.Path:
  rng = np.random.default_rng(0)
  for name in classes:
    (root / name).mkdir(parents=True)
    for i in range(count):
      Image.fromarray(rng.integers(256, size=(7, 8, 3), dtype=np.uint8)).save(root / name / f"{i}.jpg")
  return root


def open_split(out: pathlib.Path, name: str, split: str = "train") -> sources.Source:
  return sources.open_source(DataConfig(source="tfds", name=name, path=str(out), train_split=split), "train")


def run(*arguments: object) -> int:
  return prepare.main([str(argument) for argument in arguments])


def assert_one_line(text: str, *parts: str) -> None:
  line = text.rpartition("\r")[2].strip().rpartition("\n")[2]  # what follows the progress bar
  assert line.startswith("error: ")
  for part in parts:
    assert part in line
  assert "Traceback" not in text


def test_idx_files_become_a_tfds_data_set(idx_folder, tmp_path, capsys):
  out = tmp_path / "out"
  assert run(idx_folder, f"--out={out}") == 0
  assert "--config.data.name=my_digits" in capsys.readouterr().out
  for split, prefix in (("train", "train"), ("test", "t10k")):
    source, (images, labels) = open_split(out, "my_digits", split), idx_arrays(prefix)
    assert len(source) == len(images)
    assert [source[i].label for i in range(len(source))] == labels.tolist()
    decoded = [np.asarray(Image.open(io.BytesIO(source[i].image))) for i in range(len(source))]
    np.testing.assert_array_equal(decoded, images)
  builder = tfds.builder_from_directory(out / "my_digits" / "1.0.0")
  assert builder.info.splits["train"].num_examples == 20
  assert builder.info.splits["train"].num_shards == 3


def test_image_files_keep_their_bytes_and_classes(tmp_path):
  root, out = image_folder(tmp_path / "insects"), tmp_path / "out"
  assert run(root, f"--out={out}") == 0
  files = sorted(root.glob("*/*.jpg"))
  labels = [0] * 9 + [1] * 9
  held_out = [0, 10]  # every tenth, as where the folder is read as it is
  for split, members in (("train", [i for i in range(18) if i not in held_out]), ("validation", held_out)):
    source = open_split(out, "insects", split)
    assert [source[i].image for i in range(len(source))] == [files[i].read_bytes() for i in members]
    assert [source[i].label for i in range(len(source))] == [labels[i] for i in members]
  builder = tfds.builder_from_directory(out / "insects" / "1.0.0")
  assert builder.info.features["label"].names == ["ant", "bee"]


def test_splits_and_flat_folders(tmp_path):
  image_folder(tmp_path / "split" / "train")
  image_folder(tmp_path / "split" / "validation", count=2)
  assert run(tmp_path / "split", f"--out={tmp_path}", "--name=both") == 0
  assert [len(open_split(tmp_path, "both", split)) for split in ("train", "validation")] == [18, 4]
  flat = image_folder(tmp_path / "flat", classes=("",))
  assert run(flat, f"--out={tmp_path}", "--name=plain") == 0
  source = open_split(tmp_path, "plain")
  assert (len(source), source.num_classes, source[0].label) == (8, None, -1)


def break_after(monkeypatch, count: int) -> None:
  """Makes the process fail when it would write example number `count`."""
  written = []
  serialize = prepare._serialize

  def failing(*arguments):
    if len(written) == count:
      raise KeyboardInterrupt
    written.append(None)
    return serialize(*arguments)

  monkeypatch.setattr(prepare, "_serialize", failing)


def test_noisy_images_are_those_images_with_noise(idx_folder, tmp_path):
  grey = np.full((40, 28, 28), 128, np.uint8)
  grey[0], grey[1] = 0, 255
  write_idx(idx_folder / "train-images-idx3-ubyte.gz", grey)
  write_idx(idx_folder / "train-labels-idx1-ubyte.gz", np.arange(40, dtype=np.uint8))
  script = pathlib.Path(__file__).parents[1] / "benchmarks" / "noisy_images.py"
  subprocess.run([sys.executable, script, idx_folder, tmp_path / "noisy", "--std=20"], check=True)
  noisy = prepare.open_raw(tmp_path / "noisy")
  assert noisy["train"].images[0].max() < 120 and noisy["train"].images[1].min() > 135  # no wrapping round
  difference = (noisy["train"].images - grey.astype(float))[2:]
  assert abs(difference.mean()) < 0.5 and abs(difference.std() - 20) < 0.5
  assert len(np.unique(difference.mean(axis=(1, 2)))) > 30  # each image has its own
  np.testing.assert_array_equal(noisy["train"].labels, np.arange(40))
  np.testing.assert_array_equal(noisy["test"].labels, idx_arrays("t10k")[1])
  assert noisy["test"].images.shape == (5, 6, 5)


def test_an_interrupted_run_goes_on_where_it_was(idx_folder, tmp_path, monkeypatch):
  out = tmp_path / "out"
  with monkeypatch.context() as patch:
    break_after(patch, 19)  # in the third shard of `train`
    with pytest.raises(KeyboardInterrupt):
      run(idx_folder, f"--out={out}")
  with pytest.raises(InputError, match="my_digits"):
    open_split(out, "my_digits")
  shards = sorted((out / "my_digits" / "incomplete.1.0.0").glob("my_digits*"))
  assert len(shards) == 2
  written_at = [path.stat().st_mtime_ns for path in shards]
  assert run(idx_folder, f"--out={out}") == 0
  finished = [out / "my_digits" / "1.0.0" / path.name for path in shards]
  assert [path.stat().st_mtime_ns for path in finished] == written_at
  source, (_, labels) = open_split(out, "my_digits"), idx_arrays("train")
  assert [source[i].label for i in range(20)] == labels.tolist()
  assert [path.name for path in (out / "my_digits").iterdir() if not path.name.startswith(".")] == ["1.0.0"]
  assert not list(finished[0].parent.glob(".*"))


def test_an_interrupted_run_on_other_files_starts_again(tmp_path, monkeypatch):
  root, out = image_folder(tmp_path / "insects"), tmp_path / "out"
  with monkeypatch.context() as patch:
    break_after(patch, 10)
    with pytest.raises(KeyboardInterrupt):
      run(root, f"--out={out}")
  (root / "ant" / "0.jpg").unlink()
  assert run(root, f"--out={out}") == 0
  source, files = open_split(out, "insects"), sorted(root.glob("*/*.jpg"))
  assert [source[i].image for i in range(15)] == [files[i].read_bytes() for i in range(17) if i % 10]


def test_half_a_record_of_the_source_starts_again(tmp_path):
  root, partial = image_folder(tmp_path / "insects"), tmp_path / "out" / "insects" / "incomplete.1.0.0"
  partial.mkdir(parents=True)
  (partial / "source.json").write_text('{"tra')
  assert run(root, f"--out={tmp_path / 'out'}") == 0
  assert len(open_split(tmp_path / "out", "insects")) == 16


def test_a_finished_data_set_of_other_files_is_refused(tmp_path, capsys):
  root, out = image_folder(tmp_path / "insects"), tmp_path / "out"
  assert run(root, f"--out={out}") == 0
  image_folder(root, classes=("wasp",))
  capsys.readouterr()
  assert run(root, f"--out={out}") == 2
  assert_one_line(capsys.readouterr().err, "was made from other files", "choose another --name")


def test_a_finished_data_set_is_left_alone(idx_folder, tmp_path):
  assert run(idx_folder, f"--out={tmp_path}") == 0
  info = tmp_path / "my_digits" / "1.0.0" / "dataset_info.json"
  written_at = info.stat().st_mtime_ns
  assert run(idx_folder, f"--out={tmp_path}") == 0
  assert info.stat().st_mtime_ns == written_at


def test_two_writers_of_one_data_set(idx_folder, tmp_path, capsys):
  (tmp_path / "my_digits").mkdir()
  with locked(tmp_path / "my_digits" / ".lock", "held here"):
    assert run(idx_folder, f"--out={tmp_path}") == 2
  assert_one_line(capsys.readouterr().err, "another process is preparing")


def damage(folder: pathlib.Path, how: str) -> None:
  path = folder / "t10k-images-idx3-ubyte.gz"
  match how:
    case "missing":
      path.unlink()
    case "truncated gzip":
      path.write_bytes(path.read_bytes()[:-20])
    case "truncated array":
      path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))
    case "header only":
      path.write_bytes(gzip.compress(b"\0\0\x08"))
    case "not gzip":
      path.write_bytes(b"nothing of the kind")
    case "floats":
      path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()).replace(b"\x08", b"\x0d", 1)))
    case "labels":
      path.write_bytes((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())


@pytest.mark.parametrize(
  ("how", "message"),
  [
    ("missing", "is missing; put all four IDX files"),
    ("truncated gzip", "cannot be read"),
    ("truncated array", "no whole IDX file of 3 axes"),
    ("header only", "no whole IDX file of 3 axes"),
    ("not gzip", "cannot be read"),
    ("floats", "no whole IDX file of 3 axes"),
    ("labels", "no whole IDX file of 3 axes"),
  ],
)
def test_damaged_idx_files(idx_folder, tmp_path, capsys, how, message):
  damage(idx_folder, how)
  assert run(idx_folder, f"--out={tmp_path / 'out'}") == 2
  assert_one_line(capsys.readouterr().err, "t10k-images-idx3-ubyte.gz", message)
  assert not (tmp_path / "out").exists()


def test_images_without_labels(idx_folder, tmp_path, capsys):
  write_idx(idx_folder / "train-labels-idx1-ubyte.gz", np.zeros(19, np.uint8))
  assert run(idx_folder, f"--out={tmp_path}") == 2
  assert_one_line(capsys.readouterr().err, "20 images but 19 labels")


def test_all_files_that_are_no_images_are_named_at_once(tmp_path, capsys):
  root, out = image_folder(tmp_path / "insects"), tmp_path / "out"
  bad = [root / "ant" / "2.jpg", root / "bee" / "4.jpg"]  # of two shards
  good = [path.read_bytes() for path in bad]
  for path in bad:
    path.write_text("a note") if path == bad[0] else path.write_bytes(good[1][: len(good[1]) // 2])
  assert run(root, f"--out={out}") == 2
  told = capsys.readouterr().err
  assert_one_line(told, f"{bad[0]}, {bad[1]}: no images that can be read", "remove or repair them")
  assert all(told.count(f"cannot be read: {path}\n") == 1 for path in bad)
  assert not (out / "insects" / "1.0.0").exists()
  for path, content in zip(bad, good, strict=True):
    path.write_bytes(content)
  assert run(root, f"--out={out}") == 0
  assert len(open_split(out, "insects")) == 16


def test_folders_that_cannot_be_used(tmp_path, capsys):
  assert run(tmp_path / "nonesuch", f"--out={tmp_path}") == 2
  assert_one_line(capsys.readouterr().err, "nonesuch is not a folder")
  root = image_folder(tmp_path / "insects")
  (root / "wasp").mkdir()
  assert run(root, f"--out={tmp_path}") == 2
  assert_one_line(capsys.readouterr().err, "wasp has no images")
  image_folder(tmp_path / "split" / "train")
  image_folder(tmp_path / "split" / "test", classes=("ant",))
  assert run(tmp_path / "split", f"--out={tmp_path}") == 2
  assert_one_line(capsys.readouterr().err, "class folders", "differ")


def test_names_that_tfds_would_not_find(tmp_path, capsys):
  root = image_folder(tmp_path / "insects")
  assert run(root, f"--out={tmp_path}", "--name=My-Set") == 2
  assert_one_line(capsys.readouterr().err, "--name='My-Set' must be lower-case letters")


def test_out_that_cannot_be_written(tmp_path, capsys):
  root = image_folder(tmp_path / "insects")
  (tmp_path / "file").write_text("")
  assert run(root, f"--out={tmp_path / 'file'}") == 2
  assert_one_line(capsys.readouterr().err, "cannot write the data set", "give another --out")


LIMITED_RUN = """
import resource, signal, sys
from dtm_jax.data import prepare
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # as on a full disk, writing fails
sys.exit(prepare.main(sys.argv[1:]))
"""


def test_a_full_disk_as_a_command_of_its_own(tmp_path):
  noise = np.random.default_rng(0).integers(256, size=(300, 300, 3), dtype=np.uint8)
  root = image_folder(tmp_path / "insects")
  Image.fromarray(noise).save(root / "ant" / "large.png")
  command = [sys.executable, "-c", LIMITED_RUN, str(root), f"--out={tmp_path / 'out'}"]
  environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
  result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
  assert result.returncode == 2
  assert_one_line(result.stderr, "cannot write the data set", "free space")
  assert not (tmp_path / "out" / "insects" / "1.0.0").exists()
  assert json.loads((tmp_path / "out" / "insects" / "incomplete.1.0.0" / "source.json").read_text())
