"""A run that was stopped, killed or moved ends where an uninterrupted one does."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from ml_collections import config_dict
from PIL import Image

import runs
from configs import quickstart
from dtm_jax import config as config_lib
from dtm_jax import distributed, metrics, pretraining, restore, sharding
from dtm_jax import workdir as workdir_lib
from dtm_jax.checkpoint import CheckpointStore
from dtm_jax.config import MeshConfig
from dtm_jax.data.pipeline import train_batches
from dtm_jax.errors import InputError
from dtm_jax.train_state import params_sha256

NUM_STEPS = 5


def smoke_config() -> config_lib.Config:
  config: config_dict.ConfigDict = quickstart.get_config("smoke")
  config.run.update(steps=NUM_STEPS, checkpoint_every_steps=2)
  config.eval.update(knn=False, figure_images=0)
  return config_lib.resolve(config)


def run(workdir, *, stop_after=None) -> bool:
  """In this process, on its eight devices; `stop_after` steps it is asked to stop."""
  asked = iter(range(10**6))
  stop = (lambda: False) if stop_after is None else (lambda: next(asked) >= stop_after)
  return pretraining.run(smoke_config(), workdir, "test", stop)


@pytest.fixture(scope="module", autouse=True)
def built_once():
  with runs.built_once(pretraining):
    yield


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("uninterrupted")
  assert run(workdir)
  return workdir


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
  """After one step."""
  workdir = tmp_path_factory.mktemp("stopped")
  assert not run(workdir, stop_after=1)
  return workdir


@pytest.fixture
def again(stopped, tmp_path):
  """A copy of it to go on with."""
  return shutil.copytree(stopped, tmp_path / "again")


@pytest.mark.slow
def test_unreadable_images_are_remembered(tmp_path):
  """The count and the bound are those of the whole run, not of its last part."""
  images = tmp_path / "images"
  images.mkdir()
  for i in range(40):
    Image.fromarray(np.full((20, 20, 3), 6 * i, np.uint8)).save(images / f"{i:02d}.png")
  for i in (7, 12, 23):
    (images / f"{i:02d}.png").write_bytes(b"no image")
  settings = {"source": "folder", "path": str(images), "max_bad_fraction": 0.1}
  config = smoke_config()
  rarely = dataclasses.replace(config.run, log_every_steps=4)  # the stop comes between logs
  config = dataclasses.replace(config, run=rarely, data=dataclasses.replace(config.data, **settings))
  asked = iter(range(100))
  assert pretraining.run(config, tmp_path / "whole", "test", lambda: False)
  assert not pretraining.run(config, tmp_path / "parts", "test", lambda: next(asked) >= 3)
  assert pretraining.run(config, tmp_path / "parts", "test", lambda: False)
  for name in ("whole", "parts"):
    rows = runs.rows(tmp_path / name)
    assert len({index for row in rows for index in row.get("bad_indices", ())}) == rows[-1]["bad_images"] == 3


@pytest.mark.parametrize("name", ["teacher_sha256", "train_images", "train_sha256", "resampler"])
def test_other_inputs_than_the_run_began_with_are_refused(again, name):
  record = json.loads((again / "config.json").read_text())
  (again / "config.json").write_text(json.dumps(record | {name: "other"}))
  with pytest.raises(InputError, match=f"was begun with {name}='other', and now it is"):
    run(again)


def test_a_record_of_an_older_version_may_lack_entries(again):
  record = json.loads((again / "config.json").read_text())
  del record["train_sha256"]
  (again / "config.json").write_text(json.dumps(record))
  assert not run(again, stop_after=1)
  assert runs.checkpoints(again)[-1] == 2


def test_two_at_a_time_are_refused(again):
  before = (again / "config.json").read_bytes()
  with (
    workdir_lib.locked(again),
    pytest.raises(InputError, match=f"another process is at work in {again}; wait for it"),
  ):
    run(again)
  assert (again / "config.json").read_bytes() == before
  assert not run(again, stop_after=0)


def test_a_complete_run_tells_of_other_inputs(uninterrupted, caplog):
  elsewhere = dataclasses.replace(smoke_config().data, path="elsewhere")
  config = dataclasses.replace(smoke_config(), data=elsewhere)
  with caplog.at_level("WARNING", logger="absl"):
    assert pretraining.run(config, uninterrupted, "test", lambda: False)
  assert f"{uninterrupted} was run with config.data.path='', and that is not looked at again" in caplog.text


def test_an_end_before_the_checkpoint_is_refused_and_a_later_one_told(tmp_path, caplog, monkeypatch):
  """It bends the rest of the learning rate's cosine. At the end processes compare their parameters."""
  assert not run(tmp_path, stop_after=3)

  def run_for(steps):
    config = dataclasses.replace(smoke_config(), run=dataclasses.replace(smoke_config().run, steps=steps))
    return pretraining.run(config, tmp_path, "test", lambda: False)

  with pytest.raises(InputError, match="the checkpoint is at step 3, beyond the run's end at 2"):
    run_for(2)
  with (tmp_path / "metrics.jsonl").open("a") as file:  # of a step after the checkpoint, on the old cosine
    file.write(json.dumps(runs.rows(tmp_path)[-1] | {"step": 4, "lr": 99.0}) + "\n")
  compared, check_same = {}, distributed.check_same
  monkeypatch.setattr(
    distributed, "check_same", lambda values, *remedy: compared.update(values) or check_same(values, *remedy)
  )
  with caplog.at_level("WARNING", logger="absl"):
    assert run_for(6)
  assert compared["params_sha256"] == runs.summary(tmp_path)["params_sha256"]
  assert "it was a run of 5 steps before; from here on the learning rate is that of one of 6" in caplog.text
  rates = [row["lr"] for row in runs.rows(tmp_path) if "lr" in row]
  assert len(rates) == 6 and max(rates) < 1


@pytest.mark.parametrize("stop_after", [*(pytest.param(step, marks=pytest.mark.slow) for step in (0, 4)), 1])
def test_resume_at_any_step_equals_an_uninterrupted_run(uninterrupted, tmp_path, stop_after):
  assert not run(tmp_path, stop_after=stop_after)
  assert runs.checkpoints(tmp_path)[-1] == stop_after
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 5, "lo')  # what a kill may leave
  assert run(tmp_path)
  assert runs.rows(tmp_path) == runs.rows(uninterrupted)
  assert runs.summary(tmp_path)["params_sha256"] == runs.summary(uninterrupted)["params_sha256"]


def test_every_step_is_another(uninterrupted):
  """Else the equalities above would mean little."""
  rows = runs.rows(uninterrupted)
  assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
  assert all(len({row[name] for row in rows}) == NUM_STEPS for name in ("loss", "grad_norm", "lr"))
  assert len({row["iterations"] for row in rows}) > 2


def test_a_complete_run_is_left_alone(uninterrupted, monkeypatch):
  monkeypatch.setattr(pretraining, "build", None)  # its data and teacher may be gone
  before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*") if path.is_file()}
  assert run(uninterrupted)
  assert {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*") if path.is_file()} == before


def test_keeps_the_newest_checkpoints(uninterrupted):
  assert runs.checkpoints(uninterrupted) == [4, 5]  # of 2, 4 and 5


def test_saves_in_the_background_hold_the_state_of_their_step(tmp_path):
  """Each step overwrites the memory of the state that is still being written (donated buffers)."""
  parts = pretraining.build(smoke_config())

  def states():
    state = parts.create_state()
    for batch, _ in zip(train_batches(parts.config, parts.train_source, start_step=0), range(4), strict=False):
      state, _ = parts.train_step(state, parts.place(batch))
      yield state

  store = CheckpointStore(tmp_path, keep=4)
  for state in states():
    store.save(state)
  store.wait()
  expected = [params_sha256(state.params) for state in states()]
  saved = [params_sha256(store.restore(step, parts.abstract_state()).params) for step in (1, 2, 3, 4)]
  store.close()
  assert saved == expected
  assert len({*saved}) == 4


def test_a_store_opened_to_read_changes_nothing(uninterrupted):
  """Another run may be using the folder: its unfinished save is not ours to remove."""
  unfinished = uninterrupted / "checkpoints" / "6.orbax-checkpoint-tmp"
  unfinished.mkdir()
  run = restore.restore_run(uninterrupted)
  student, params = run.model, run.params
  assert params_sha256(params) == runs.summary(uninterrupted)["params_sha256"]
  assert student.grid == (4, 4)
  assert unfinished.exists()
  unfinished.rmdir()


def test_restores_to_other_devices(tmp_path):
  one = jax.sharding.SingleDeviceSharding(jax.devices()[3])
  parts = pretraining.build(smoke_config())
  state = jax.device_put(parts.create_state(), one)
  store = CheckpointStore(tmp_path, keep=1)
  store.save(state)
  store.wait()
  restored = store.restore(0, parts.abstract_state())
  store.close()
  everywhere = sharding.replicated(sharding.create_mesh(MeshConfig()))
  assert all(leaf.sharding.is_equivalent_to(everywhere, leaf.ndim) for leaf in jax.tree.leaves(restored))
  jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_rows_are_written_once_and_whole(tmp_path):
  writer = metrics.MetricWriter(tmp_path)
  writer.write(1, {"loss": 0.5, "lr": 0.1})
  writer.write(2, {"loss": 0.4, "lr": 0.1})
  writer.close()
  path = tmp_path / "metrics.jsonl"
  path.write_text(path.read_text() + '{"step": 3, "loss"')
  writer = metrics.MetricWriter(tmp_path)
  writer.write(2, {"loss": 0.4, "lr": 0.1})
  writer.write(2, {"knn_top1": 0.9})
  writer.write(3, {"loss": 0.3, "lr": 0.1})
  writer.close()
  assert [json.loads(line) for line in path.read_text().splitlines()] == [
    {"step": 1, "loss": 0.5, "lr": 0.1},
    {"step": 2, "loss": 0.4, "lr": 0.1},
    {"step": 2, "knn_top1": 0.9},
    {"step": 3, "loss": 0.3, "lr": 0.1},
  ]
  assert writer.series("loss") == ([1, 2, 3], [0.5, 0.4, 0.3])
  assert writer.find(2, "knn_top1") == 0.9


def test_an_unreadable_checkpoint_says_which_folder_to_remove(tmp_path):
  parts = pretraining.build(smoke_config())
  store = CheckpointStore(tmp_path, keep=1)
  store.save(parts.create_state())
  store.close()
  for path in (tmp_path / "checkpoints" / "0" / "default").rglob("*"):
    if path.is_file() and path.stat().st_size > 10_000:
      path.write_bytes(path.read_bytes()[:100])
  store = CheckpointStore(tmp_path, keep=1)
  with pytest.raises(InputError, match=r"checkpoints/0 cannot be read.* move it away"):
    store.restore(0, parts.abstract_state())
  store.close()
