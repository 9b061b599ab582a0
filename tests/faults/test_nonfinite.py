"""A loss that is not finite, by way of the data and of the learning rate: the run stops, or goes back and on."""

import contextlib
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

import runs
from dtm_jax import main, metrics, restore
from dtm_jax.config import from_json
from dtm_jax.convert.state_dict import read_state_dict
from dtm_jax.data.pipeline import train_batches
from dtm_jax.data.sources import open_source
from dtm_jax.skipped_batches import SkippedBatches

# How ml_collections reads a config file.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

BRIGHT_FILE = 19  # of 64, some of which are for evaluation
BRIGHT = 17  # its place among those for training; the fourth batch has it
SETTINGS = {"data__source": "folder", "data__image_size": 64, "model__patch_size": 8, "teacher__kind": "clip"}
ROLLBACK = {
  "run__on_nonfinite": "rollback",
  "run__steps": 6,
  "run__checkpoint_every_steps": 2,
  "run__keep_checkpoints": 9,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  folder = tmp_path_factory.mktemp("images")
  rng = np.random.default_rng(0)
  for i in range(64):
    pixels = np.full((20, 20, 3), 255) if i == BRIGHT_FILE else rng.integers(0, 2, (20, 20, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02d}.png")
  return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  """A teacher whose tokens of overexposed images, and only those, are beyond float32."""
  recorded = read_state_dict(runs.ROOT / "tests" / "golden" / "clip_vision_tiny.pth")
  tensors = {name: np.ascontiguousarray(recorded.read(name)) for name in recorded.views}
  tensors["visual.conv1.weight"] = np.full_like(tensors["visual.conv1.weight"], 3e35)
  path = tmp_path_factory.mktemp("weights") / "clip.safetensors"
  safetensors.numpy.save_file(tensors, path)
  return path


@pytest.fixture(scope="module")
def options(images, weights):
  """Of a run on the data above, by its work folder."""
  inputs = {
    "data__path": images,
    "teacher__weights": weights,
    "data__mean": "(0.0,0.0,0.0)",
    "data__std": "(1.0,1.0,1.0)",
  }
  return lambda workdir, **settings: runs.options(workdir, **inputs | SETTINGS | ROLLBACK | settings)


@pytest.fixture(scope="module")
def train(options):
  """Calls main with such options; returns the exit code."""
  return lambda workdir, **settings: main.main(["dtm", *options(workdir, **settings)])


@pytest.fixture(scope="module")
def rolled_back(tmp_path_factory, train):
  workdir = tmp_path_factory.mktemp("rolled_back") / "run"
  assert train(workdir) == 0
  return workdir


def bad_batch(workdir) -> int:
  """Which of the run's data has the overexposed image."""
  config = from_json(json.loads((workdir / "config.json").read_text()))
  stream = train_batches(config, open_source(config.data, "train"), start_step=0)
  return next(number for number, batch in enumerate(stream) if BRIGHT in batch["index"])


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.fault("one batch makes NaN", "on_nonfinite=stop")
def test_stops_at_the_batch(train, tmp_path, capsys, outcome):
  assert train(tmp_path / "run", run__on_nonfinite="stop") == 3
  step = bad_batch(tmp_path / "run")
  assert f"not finite at step {step}; its batch is of source indices" in capsys.readouterr().err
  newest = runs.checkpoints(tmp_path / "run")[-1]
  assert newest == step // 2 * 2
  params = restore.restore_run(tmp_path / "run").params
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
  outcome(f"exit 3 at step {step}, checkpoint of step {newest} kept")


@pytest.mark.slow
@pytest.mark.fault("one batch makes NaN", "on_nonfinite=rollback")
def test_goes_back_and_on_without_the_batch(rolled_back, outcome):
  """All steps are made, and each on another batch, but for the bad one."""
  number = bad_batch(rolled_back)
  rows = runs.rows(rolled_back)
  assert [row for row in rows if "skipped_batch" in row] == [
    {"step": number, "skipped_batch": number, "rolled_back_to": number // 2 * 2}
  ]
  assert [row["step"] for row in rows if "loss" in row] == [*range(1, 7)]
  assert all(np.isfinite(row["loss"]) for row in rows if "loss" in row)
  outcome(f"batch {number} skipped, exit 0")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.fault("one batch makes NaN for two processes", "on_nonfinite=rollback, then stop")
def test_a_pair_goes_back_together_and_stops_together(rolled_back, options, tmp_path, compile_cache, outcome):
  pair = [runs.finish(p) for p in runs.start_pair(options(tmp_path / "back"), compile_cache)]
  assert [code for code, _ in pair] == [0, 0], pair
  told = [[row for row in runs.rows(folder) if "skipped_batch" in row] for folder in (tmp_path / "back", rolled_back)]
  assert told[0] == told[1]
  stopping = options(tmp_path / "stop", run__on_nonfinite="stop")
  (code, stderr), (other, _) = map(runs.finish, runs.start_pair(stopping, compile_cache))
  assert (code, other) == (3, 3), stderr
  assert f"not finite at step {told[1][0]['step']}; its batch is of source indices" in stderr
  outcome("batch skipped, 0 both; 3 both")


@pytest.mark.slow
@pytest.mark.fault("one batch makes NaN", "rollback, then kill -9")
@pytest.mark.parametrize(
  "is_after",
  [False, True],
  ids=["before_the_next_checkpoint", "after_it"],
)
def test_a_resumed_run_skips_it_too(rolled_back, train, tmp_path, is_after, outcome):
  """What a kill leaves: the rows of all steps, and an older checkpoint."""
  workdir, number = tmp_path / "run", bad_batch(rolled_back)
  shutil.copytree(rolled_back, workdir)
  (workdir / "summary.json").unlink()
  newest = number // 2 * 2 + 2 * is_after
  for step in runs.checkpoints(workdir):
    if step > newest:
      shutil.rmtree(workdir / "checkpoints" / str(step))
  assert train(workdir) == 0
  assert runs.rows(workdir) == runs.rows(rolled_back)
  assert runs.summary(workdir)["params_sha256"] == runs.summary(rolled_back)["params_sha256"]
  outcome("as without the kill")


@pytest.mark.slow
@pytest.mark.fault("learning rate makes NaN", "on_nonfinite=rollback, before any checkpoint")
def test_going_back_once_more_to_the_same_place_ends_the_run(train, tmp_path, capsys, outcome):
  blown_up = {"optim__base_lr": 1e38, "optim__warmup_epochs": 0.0, "run__checkpoint_every_steps": 100}
  assert train(tmp_path / "run", **blown_up) == 3
  told = capsys.readouterr().err
  assert "going back to step 0, and on without batch" in told
  assert told.splitlines()[-1].endswith("skipping a batch there has not helped")
  assert not runs.checkpoints(tmp_path / "run")
  outcome("exit 3 at the second time")


def test_batches_are_numbered_without_those_that_are_skipped(tmp_path):
  with contextlib.closing(metrics.MetricWriter(tmp_path)) as writer:
    skipped = SkippedBatches(writer)
    for step in (6, 3, 0, 1):
      skipped.add(step, back_at=0)
    assert skipped.numbers == [6, 3, 0, 2]
    assert [skipped.number_of(step) for step in range(5)] == [1, 4, 5, 7, 8]
    assert [*skipped.left_out(iter("cdefgh"), 2)] == ["e", "f", "h"]
