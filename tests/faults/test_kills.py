"""kill -9 at random moments, of a run and of one of two processes: what goes on ends as what was never killed."""

import functools
import os
import random
import shutil
import signal
import subprocess
import time

import pytest

import runs

# `DTM_JAX_KILLS=20 python -m pytest tests/faults/test_kills.py -m slow` for more.
NUM_KILLS = int(os.environ.get("DTM_JAX_KILLS", "2"))
BOUND = 90  # seconds until a process knows that another is no more: it hears nothing of it for 40
SETTINGS = {"run__steps": 60, "run__log_every_steps": 1, "run__checkpoint_every_steps": 3}


@pytest.fixture(scope="module")
def reference(tmp_path_factory, compile_cache):
  """An uninterrupted run, and how many seconds it takes."""
  workdir, start = tmp_path_factory.mktemp("reference"), time.monotonic()
  code, stderr = runs.finish(runs.start(runs.options(workdir, **SETTINGS), compile_cache))
  assert code == 0, stderr
  return workdir, time.monotonic() - start


@pytest.mark.slow
@pytest.mark.fault("kill -9", f"{NUM_KILLS} random moments")
def test_kills_at_random_moments(tmp_path, compile_cache, reference, outcome):
  """From the start of Python to the end of the run, each resumed until the next kill."""
  expected, span = reference
  moments, killed, number = random.Random(0), 0, 0
  while killed < NUM_KILLS:
    workdir, number = tmp_path / str(number), number + 1
    while (code := run_for(moments.uniform(0, span), workdir, compile_cache)) != 0 and killed < NUM_KILLS:
      assert code == -signal.SIGKILL
      killed += 1
    finish_and_compare(workdir, compile_cache, expected)
  outcome(f"same params_sha256 of {number} runs, killed {killed} times")


def finish_and_compare(workdir, compile_cache, expected) -> None:
  code, stderr = runs.finish(runs.start(runs.options(workdir, **SETTINGS), compile_cache))
  assert code == 0, stderr
  assert runs.rows(workdir) == runs.rows(expected)  # none twice, none missing, none half
  assert runs.summary(workdir)["params_sha256"] == runs.summary(expected)["params_sha256"]
  assert not [*(workdir / "checkpoints").glob("*.orbax-checkpoint-tmp")]


def run_for(seconds: float, workdir, compile_cache) -> int:
  """Exit code of a run that is killed after so many seconds, unless it is done before."""
  process = runs.start(runs.options(workdir, **SETTINGS), compile_cache)
  try:
    process.communicate(timeout=seconds)
  except subprocess.TimeoutExpired:
    process.kill()
    process.communicate()
  return process.returncode


@pytest.mark.slow
@pytest.mark.fault("kill -9", "in the middle of a save")
def test_kills_in_the_middle_of_a_save(tmp_path, compile_cache, reference, outcome):
  hits = 0
  for number in range(9):
    workdir = tmp_path / str(number)
    process = runs.start(runs.options(workdir, **SETTINGS), compile_cache)
    runs.wait_until(lambda folder=workdir / "checkpoints": [*folder.glob("*.orbax-checkpoint-tmp")], process)
    process.kill()
    assert runs.finish(process)[0] == -signal.SIGKILL
    hits += bool([*(workdir / "checkpoints").glob("*.orbax-checkpoint-tmp")])
    finish_and_compare(workdir, compile_cache, reference[0])
    if hits >= max(1, NUM_KILLS // 2):
      break
  assert hits
  outcome(f"same params_sha256, {hits} of {number + 1} kills before the save was complete")


# ------------------------------------------------------------ several processes


@pytest.mark.slow
@pytest.mark.fault("kill -9 of one of two processes", "in a step; then a damaged checkpoint")
@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.long), 1])
def test_the_other_process_ends_and_the_pair_goes_on(tmp_path, compile_cache, victim, outcome):
  workdir = tmp_path / "run"
  start_pair = functools.partial(runs.start_pair, runs.options(workdir, **SETTINGS), compile_cache)
  code, seconds = kill_when(lambda: len(saved(workdir)) == 2, start_pair(), victim)
  what = f"the other ends with {code}; the pair goes on"
  newest = workdir / "checkpoints" / str(saved(workdir)[-1])
  shutil.rmtree(newest / "default")
  (code, stderr), (other, _) = map(runs.finish, start_pair())
  assert (code, other) == (0, 0), stderr
  assert f"checkpoint {newest} cannot be read" in stderr
  assert runs.summary(workdir)["steps"] == SETTINGS["run__steps"]
  assert [row["step"] for row in runs.rows(workdir)] == [*range(1, SETTINGS["run__steps"] + 1)]
  outcome(what, seconds)


def kill_when(condition, pair, victim: int) -> tuple[int, float]:
  """The exit code of the other process of a pair, which says why it ends, and after how many seconds."""
  runs.wait_until(condition, pair[victim])
  start = time.monotonic()
  pair[victim].kill()
  _, stderr = pair[1 - victim].communicate(timeout=2 * BOUND)
  code, seconds = pair[1 - victim].returncode, time.monotonic() - start
  assert runs.finish(pair[victim])[0] == -signal.SIGKILL
  assert code not in (0, 143), stderr
  assert seconds < BOUND
  # In jax's words where it has asked process 0 for the others, or the other one compiles.
  assert "another process has ended or cannot be reached" in stderr or "another task died" in stderr, stderr
  return code, seconds


def at(when: str, settings: dict, is_there):
  """A moment of a pair, for a test of such."""
  return pytest.param(settings, is_there, id=when, marks=pytest.mark.fault("kill -9 of one of two processes", when))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(
  ("settings", "is_there"),
  [
    at("in the first compile", {"model__variant": "S"}, lambda folder: [*folder.glob("programs/*train_step*")]),
    at(
      "in an evaluation",
      {"eval__knn": True, "eval__batch_size": 2, "eval__max_train_images": 1024},
      lambda folder: [*folder.glob("compiled/jit_features*-cache")],
    ),
    at("in a save", {}, lambda folder: [*folder.glob("run/checkpoints/*.orbax-checkpoint-tmp")]),
  ],
)
def test_the_other_process_ends_whatever_the_pair_is_at(tmp_path, settings, is_there, victim, outcome):
  arguments, dumping = runs.options(tmp_path / "run", **SETTINGS | settings), runs.dumping(tmp_path / "programs")
  start_pair = functools.partial(runs.start_pair, arguments, tmp_path / "compiled")
  prefixes = (dumping, ()) if victim == 0 else ((), dumping)
  code, seconds = kill_when(lambda: is_there(tmp_path), start_pair(prefixes), victim)
  outcome(f"the other ends with {code}", seconds)


def saved(workdir) -> list[int]:
  return runs.checkpoints(workdir) if (workdir / "checkpoints").exists() else []
