"""What a user can do wrong: one line that names the thing and the remedy, exit code 2, nothing lost."""

import errno
import io
import json
import os
import pathlib
import pickle
import shutil
import sys
import zipfile

import huggingface_hub
import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

import runs
from dtm_jax import console, main, metrics, pretraining, restore
from dtm_jax.config import from_json
from dtm_jax.convert.state_dict import read_state_dict
from dtm_jax.data.pipeline import train_batches
from dtm_jax.data.sources import open_source
from dtm_jax.errors import InputError
from dtm_jax.train_state import params_sha256

GOLDEN = pathlib.Path(__file__).parent / "golden"

# How ml_collections reads a config file.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture
def fails(tmp_path, capsys):
  """Calls main with the miniature run plus options; returns the one line that it left, after the word "error"."""

  def call(*arguments: str, code: int = 2, workdir=tmp_path / "run", **settings) -> str:
    assert main.main(["dtm", *runs.options(workdir, **settings), *arguments]) == code
    return told(capsys.readouterr().err)

  return call


def told(stderr: str) -> str:
  lines = stderr.splitlines()
  assert [line.startswith("error: ") for line in lines].count(True) == 1, stderr
  assert lines[-1].startswith("error: "), stderr
  assert "Traceback" not in stderr
  return lines[-1].removeprefix("error: ")


def write_images(folder: pathlib.Path, count: int, size: int = 24) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(0)
  for i in range(count):
    pixels = rng.integers(0, 256, (size, size, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f"{i:03}.png")


# The command line and the config file.


@pytest.mark.parametrize(
  ("arguments", "parts"),
  [
    (["--config.run.stepz=3"], ["config.run.stepz does not exist", "steps, epochs"]),
    (["--config.runn.steps=3"], ["--config.runn.steps=3", 'Did you mean "run"']),
    (["--config.run.steps=abc"], ["--config.run.steps=abc", "int", "mend"]),
    (["--config.run.seed=1.5"], ["--config.run.seed=1.5", "int"]),
    (["--config.eval.knn=maybe"], ["--config.eval.knn=maybe", "boolean"]),
    (["--config.data.crop_scale=(0.5,)"], ["config.data.crop_scale", "2 elements"]),
    (["--config.model.variant=huge"], ["config.model.variant='huge'", "tiny, S, B, L"]),
    (["--config.data.num_masked=17"], ["config.data.num_masked=17", "16 patches", "mask fewer"]),
    (["--config.data.image_size=18"], ["config.data.image_size=18", "config.model.patch_size=4", "16 or 20"]),
    (["--config.data.batch_size=12"], ["config.data.batch_size", "12 is not divisible by 8 devices", "8 or 16"]),
    (["--config.mesh.data=3"], ["config.mesh data x fsdp x tensor = [3, 1, 1]", "devices, 8", "3 is not it", "-1"]),
    (["--config.mesh.fsdp=3"], ["does not fit the number of devices, 8: 3 does not divide it"]),
    (["--nonsense"], ["nonsense", "--help"]),
    (["configs/vitb.py"], ["'configs/vitb.py' is not an option", "--config=FILE"]),
  ],
  ids=lambda value: value[0] if value[0].startswith(("-", "configs")) else "",
)
def test_command_line(fails, arguments, parts):
  message = fails(*arguments)
  assert all(part in message for part in parts), message


@pytest.mark.parametrize(
  ("content", "parts"),
  [
    (None, ["does not exist; name a file of your own, or one of configs: evaluate.py, "]),
    ("def get_config(:\n", ["SyntaxError", "line 1"]),
    ("def get_config():\n  return undefined\n", ["NameError", "undefined"]),
    ("x = 1\n", ["has no attribute 'get_config'"]),
    (
      "from dtm_jax import config\n\ndef get_config():\n  c = config.base()\n  c.data.sise = 3\n  return c\n",
      ["config.data.sise does not exist"],
    ),
    (
      "from dtm_jax import config\n\ndef get_config():\n  c = config.base()\n  del c.optim.eps\n  return c\n",
      ["config.optim.eps is missing"],
    ),
  ],
  ids=["missing", "syntax", "name", "no_get_config", "unknown_key", "missing_key"],
)
def test_config_file(tmp_path, capsys, monkeypatch, content, parts):
  monkeypatch.delitem(sys.modules, "config_config", raising=False)  # the config file that another test loaded
  path = tmp_path / "mine.py"
  if content is not None:
    path.write_text(content)
  assert main.main(["dtm", f"--config={path}", f"--workdir={tmp_path}/run"]) == 2
  message = told(capsys.readouterr().err)
  assert all(part in message for part in parts), message
  assert not (tmp_path / "run").exists()


def test_help_is_no_error(capsys):
  assert main.main(["dtm", "--help"]) == 0
  assert "--workdir=DIR" in capsys.readouterr().out


# Data.


@pytest.mark.parametrize(
  ("settings", "parts"),
  [
    ({"data__source": "folder", "data__path": "/nowhere"}, ["/nowhere", "check the path"]),
    ({"data__source": "folder"}, ["config.data.path"]),
    ({"data__source": "tfds", "data__name": "no_such_set"}, ["'no_such_set'", "config.data"]),
    ({"data__source": "tfds", "data__name": "mnist", "data__path": "/nowhere"}, ["'mnist'", "tfds build mnist"]),
    ({"data__source": "digits", "data__eval_split": "tset"}, ["no split 'tset'", "train, test"]),
  ],
  ids=["folder", "no_path", "unknown_set", "unprepared_set", "split"],
)
def test_missing_data(fails, settings, parts):
  message = fails(**settings)
  assert all(part in message for part in parts), message


def test_empty_class_folder(fails, tmp_path):
  write_images(tmp_path / "images" / "cat", 20)
  (tmp_path / "images" / "dog").mkdir()
  message = fails(data__source="folder", data__path=tmp_path / "images")
  assert f"{tmp_path}/images/dog has no images" in message
  assert "remove it or fill it" in message


@pytest.fixture
def images_with_two_bad(tmp_path):
  """Fourteen images to train on, all of them seen in two steps; one is cut short and one is text."""
  folder = tmp_path / "images"
  write_images(folder, 16)
  cut, text = folder / "007.png", folder / "013.png"
  cut.write_bytes(cut.read_bytes()[:200])
  text.write_text("not an image")
  return {"data__source": "folder", "data__path": folder}


def test_bad_images_are_counted_named_and_skipped(images_with_two_bad, tmp_path, capsys):
  workdir = tmp_path / "run"
  arguments = runs.options(workdir, **images_with_two_bad, data__max_bad_fraction=0.14)
  assert main.main(["dtm", *arguments]) == 0
  stderr = capsys.readouterr().err
  for name in ("007.png", "013.png"):
    assert stderr.count(f"unreadable image skipped: {tmp_path}/images/{name}") == 1
  assert runs.summary(workdir)["bad_images"] == 2
  assert runs.rows(workdir)[-1]["bad_images"] == 2


def test_too_many_bad_images_stop_the_run(images_with_two_bad, tmp_path, fails):
  message = fails(**images_with_two_bad, data__max_bad_fraction=0.001)
  assert f"{tmp_path}/images/0" in message
  assert "unreadable image number 2, and 1 are allowed" in message
  assert "config.data.max_bad_fraction" in message


# Weights.


class _Hostile:
  def __init__(self, path):
    self._path = path

  def __reduce__(self):
    return os.mkdir, (str(self._path),)


def hostile_archive(path: pathlib.Path, victim: pathlib.Path) -> None:
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", pickle.dumps({"visual.proj": _Hostile(victim)}))
    archive.writestr("archive/version", "3\n")


def clip_settings(weights) -> dict:
  return {
    "teacher__kind": "clip",
    "teacher__weights": weights,
    "model__patch_size": 8,
    "data__image_size": 64,
  }


def test_missing_weights(fails):
  message = fails(**clip_settings("/nowhere/ViT-B-16.pt"))
  assert "/nowhere/ViT-B-16.pt does not exist; give" in message


def test_hub_name_without_a_hub(fails, monkeypatch, tmp_path):
  def refuse(*_, **__):
    raise OSError("no route to host")

  monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
  monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
  message = fails(**clip_settings("openai/clip-vit-base-patch16"))
  assert "openai/clip-vit-base-patch16" in message
  assert "config.teacher.weights" in message


@pytest.mark.parametrize("pickled", [True, False], ids=["bare_pickle", "torch_archive"])
def test_hostile_pickle_is_refused(fails, tmp_path, pickled):
  weights, victim = tmp_path / "weights.pt", tmp_path / "made_by_the_pickle"
  if pickled:
    weights.write_bytes(pickle.dumps(_Hostile(victim)))
  else:
    hostile_archive(weights, victim)
  message = fails(**clip_settings(weights))
  assert f"{weights} is " in message
  assert not victim.exists()
  pickle.loads(pickle.dumps(_Hostile(victim)))
  assert victim.exists()


def clip_tensors() -> dict[str, np.ndarray]:
  """The recorded tower, to take names from."""
  recorded = read_state_dict(GOLDEN / "clip_vision_tiny.pth")
  return {name: np.ascontiguousarray(recorded.read(name)) for name in recorded.views}


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_weights_with_wrong_names(fails, tmp_path, change):
  tensors = clip_tensors()
  if change == "missing":
    del tensors["visual.ln_post.bias"]
  else:
    tensors["visual.ln_extra.bias"] = np.zeros(3, np.float32)
  weights = tmp_path / "clip.safetensors"
  safetensors.numpy.save_file(tensors, weights)
  message = fails(**clip_settings(weights))
  assert {"missing": "ln_post.bias", "extra": "ln_extra.bias"}[change] in message
  assert str(weights) in message


def test_weights_of_something_else(fails):
  message = fails(**clip_settings(GOLDEN / "student_tiny.pth"))
  assert "student_tiny.pth" in message
  assert "config.teacher.kind" in message


def test_a_folder_that_is_no_run_as_teacher(fails, tmp_path):
  message = fails(teacher__kind="checkpoint", teacher__weights=tmp_path)
  assert f"{tmp_path} holds no checkpoint" in message
  assert not (tmp_path / "checkpoints").exists()


# The work folder.


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("finished") / "run"
  assert main.main(["dtm", *runs.options(workdir, run__checkpoint_every_steps=1)]) == 0
  return workdir


@pytest.fixture
def two_steps(finished_run, tmp_path):
  """A copy of a work folder at step 2, and a check that its checkpoint is still what it was."""
  workdir = tmp_path / "run"
  shutil.copytree(finished_run, workdir)

  def check():
    params = restore.restore_run(workdir).params
    assert params_sha256(params) == runs.summary(finished_run)["params_sha256"]

  return workdir, check


def test_a_bucket_as_work_folder(fails):
  assert fails("--workdir=gs://bucket/run").startswith("--workdir=gs://bucket/run is no folder; give one on a disk")


def test_a_file_in_the_way(fails, tmp_path):
  (tmp_path / "file").write_text("")
  message = fails(workdir=tmp_path / "file" / "run")
  assert f"--workdir={tmp_path}/file/run" in message
  assert "choose another" in message
  message = fails(workdir=tmp_path / "file")
  assert message == f"--workdir={tmp_path}/file is no folder; choose another"


def test_no_permission_to_write(fails, monkeypatch):
  monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may write anywhere
  assert "no permission to write to --workdir=" in fails()


def test_a_file_system_that_does_not_rename_folders(fails, tmp_path, monkeypatch):
  """As a bucket that is mounted as a folder: else the first save would fail, after hours."""

  def refuse(path, target):
    raise OSError(errno.EMFILE, "Too many open files")

  monkeypatch.setattr(pathlib.Path, "rename", refuse)
  assert f"--workdir={tmp_path}/run is on a file system that cannot rename folders (Too many open files)" in fails()
  assert not [*(tmp_path / "run").iterdir()]


def test_a_file_instead_of_the_checkpoints(fails, tmp_path):
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "checkpoints").write_text("")
  message = fails()
  assert f"cannot use {tmp_path}/run/checkpoints" in message
  assert "choose another --workdir" in message


def test_work_folder_of_another_run(fails, two_steps):
  workdir, check = two_steps
  message = fails(workdir=workdir, model__drop_path=0.5, run__seed=3)
  assert (
    "holds another run: config.run.seed is 0 there and 3 here, config.model.drop_path is 0.1 there and 0.5 here"
    in message
  )
  assert "another --workdir" in message
  check()


def test_checkpoint_of_another_model(fails, two_steps):
  workdir, check = two_steps
  record = (workdir / "config.json").read_text()
  (workdir / "config.json").unlink()
  (workdir / "summary.json").unlink()
  message = fails(workdir=workdir, model__patch_size=8, data__image_size=32)
  assert "checkpoints/2 is of another model: " in message
  assert "params/head/bias is (27,) there and (108,) in this config" in message
  assert not (workdir / "config.json").exists()  # else the right config would now be refused
  (workdir / "config.json").write_text(record)
  check()


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
def test_a_damaged_record(fails, two_steps, name):
  workdir, _ = two_steps
  (workdir / name).write_text('{"steps": ')
  message = fails(workdir=workdir)
  assert f"{workdir}/{name} cannot be read" in message


def test_damaged_checkpoints(fails, two_steps):
  workdir, _ = two_steps
  (workdir / "summary.json").unlink()
  for path in (workdir / "checkpoints").rglob("*"):
    if path.is_file():
      path.write_bytes(path.read_bytes()[:50])
  message = fails(workdir=workdir)
  assert f"{workdir}/checkpoints/2 cannot be read" in message
  assert "move it away" in message


def test_cudnn_without_a_gpu(fails):
  message = fails(model__attention="cudnn", model__dtype="bfloat16", teacher__dtype="bfloat16")
  assert "config.model.attention='cudnn' needs a GPU; choose 'xla' or 'matmul'" in message


@pytest.mark.slow
@pytest.mark.long
def test_disk_full_while_saving(two_steps, compile_cache):
  """A limit on the size of files stands for the full disk: the same calls fail, and no mount is needed."""
  workdir, _ = two_steps
  (workdir / "summary.json").unlink()
  shutil.rmtree(workdir / "checkpoints" / "2")
  before = restore.restore_run(workdir).params
  limited = ("bash", "-c", 'ulimit -f 100; exec "$@"', "-")  # KiB; the largest parameters take more, the rest less
  code, stderr = runs.finish(runs.start(runs.options(workdir), compile_cache, devices=8, prefix=limited))
  assert code == 2, stderr
  message = told(stderr)
  assert f"saving to {workdir}/checkpoints failed" in message
  assert "File too large" in message
  assert "make room" in message
  assert "goes on from step 1" in message
  assert runs.checkpoints(workdir) == [1]
  after = restore.restore_run(workdir).params
  jax.tree.map(np.testing.assert_array_equal, before, after)
  assert main.main(["dtm", *runs.options(workdir)]) == 0
  assert runs.checkpoints(workdir) == [1, 2]


def test_devices_without_enough_memory(fails, monkeypatch):
  """The error is jax's own: no device has a petabyte."""
  monkeypatch.setattr(pretraining, "run", lambda *_: jax.device_put(jax.numpy.zeros(2**50, np.uint8)))
  message = fails()
  assert message.startswith("devices are out of memory (RESOURCE_EXHAUSTED")
  assert "1125899906842624 bytes" in message and "a smaller config.data.batch_size" in message


def test_disk_full_while_logging(fails, monkeypatch, tmp_path):
  def refuse(*_):
    raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

  monkeypatch.setattr(metrics.MetricWriter, "write", refuse)
  message = fails()
  assert "No space left on device: 'metrics.jsonl'" in message
  assert "make room" in message


# Loss that is not finite.


def test_loss_that_is_not_finite(fails, tmp_path):
  workdir = tmp_path / "run"
  settings = {"optim__base_lr": 1e38, "optim__warmup_epochs": 0.0, "run__steps": 40}
  message = fails(code=3, run__log_every_steps=7, run__checkpoint_every_steps=1, **settings)
  config = from_json(json.loads((workdir / "config.json").read_text()))
  step = int(message.partition("at step ")[2].partition(";")[0])
  batch = next(train_batches(config, open_source(config.data, "train"), start_step=step))
  assert str(batch["index"].tolist()) in message
  assert runs.checkpoints(workdir)[-1] == step
  params = restore.restore_run(workdir).params
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
  assert not (workdir / "summary.json").exists()


def test_unreadable_bytes_do_not_reach_the_message():
  """A message is a line, whatever is in it."""
  stream = io.StringIO()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr("sys.stderr", stream)
    assert console.fail(InputError("a\nb\r\n  c"), 2) == 2
  assert stream.getvalue() == "error: a b c\n"
