"""SIGTERM and SIGINT at any time: the run ends with 143, has lost nothing, and goes on."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

import runs
from dtm_jax import distributed, stopping

MINUTE = 60  # which schedulers give; on two cores these tests take a few seconds of it
LONG = {"run__steps": 40, "run__log_every_steps": 1, "run__checkpoint_every_steps": 1000}


@pytest.fixture(scope="module")
def reference(tmp_path_factory, compile_cache):
  """An uninterrupted run."""
  workdir = tmp_path_factory.mktemp("reference")
  runs.train(workdir, compile_cache, **LONG)
  return workdir


def stop_when(condition, process, number: int = signal.SIGTERM) -> tuple[float, str]:
  """Seconds from the signal to the end, and standard error of a process that ends as it should."""
  runs.wait_until(condition, process)
  start = time.monotonic()
  process.send_signal(number)
  code, stderr = runs.finish(process)
  seconds = time.monotonic() - start
  assert code == 143, stderr
  assert "Traceback" not in stderr and "leaked" not in stderr
  assert seconds < MINUTE
  return seconds, stderr


def num_rows(workdir: pathlib.Path) -> int:
  path = workdir / "metrics.jsonl"
  return path.read_bytes().count(b"\n") if path.exists() else 0


DEAF = """
import signal, time
from dtm_jax import console, signals, stopping

console.log_plainly()
stopping.GRACE_SECONDS, stopping._NOTHING_LOST_SECONDS = 3, 1
with signals.noted() as stop, stopping.in_time(stop.is_set, lambda: 17) as stop_requested:
  {before}
  signal.raise_signal(signal.{number})
  {after}
  time.sleep(1000)
"""


@pytest.mark.fault("SIGTERM, SIGINT", "where the run cannot listen")
@pytest.mark.parametrize(
  ("number", "before", "after", "message"),
  [
    ("SIGINT", "", "", "before there was anything to save"),
    ("SIGTERM", "stopping.note_progress()", "", "could not save for 3 s; the newest checkpoint is 17"),
    # One that listens has all the time it needs.
    ("SIGTERM", "stopping.note_progress()", "assert stop_requested(); time.sleep(4); raise SystemExit(7)", None),
  ],
)
def test_who_does_not_listen_is_ended(number, before, after, message, outcome):
  program = DEAF.format(number=number, before=before, after=after)
  ended = subprocess.run([sys.executable, "-c", program], cwd=runs.ROOT, capture_output=True, text=True)
  assert ended.returncode == (143 if message else 7), ended.stderr
  assert message is None or message in ended.stderr
  if message:  # who asks may be quicker than what tells
    assert ("asked to stop: the run will at the next chance" in ended.stderr) == (before != "")
  outcome(f"143, {message}" if message else "left alone")


def test_who_is_not_heard_leaves_within_a_minute():
  """The last of several processes, which ends after the others."""
  assert stopping.GRACE_SECONDS + stopping._FIRST_LAST_SECONDS + distributed._LAST_WORDS_SECONDS < MINUTE


SIGNALS = [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)]


@pytest.mark.slow
@pytest.mark.fault("SIGINT", "while it waits for the other processes")
def test_who_waits_for_the_others_may_be_interrupted(tmp_path, outcome):
  with socket.create_server(("127.0.0.1", 0)) as first:  # which answers nothing
    address = f"JAX_COORDINATOR_ADDRESS=127.0.0.1:{first.getsockname()[1]}"
    # What a shell starts with "&" would leave SIGINT ignored, as it is then meant to be.
    together = ("env", "--default-signal=INT", address, "JAX_NUM_PROCESSES=2", "JAX_PROCESS_ID=1")
    process = runs.start(runs.options(tmp_path / "run"), None, prefix=together)
    first.settimeout(MINUTE)
    connection, _ = first.accept()
    seconds, stderr = stop_when(lambda: True, process, signal.SIGINT)
    connection.close()
  assert stderr.splitlines()[-1] == "error: interrupted before there was anything to save"
  outcome("143, nothing to save", seconds)


@pytest.mark.slow
@pytest.mark.fault("SIGTERM, SIGINT", "in the first compile")
@pytest.mark.parametrize("number", SIGNALS)
def test_in_the_first_compile_it_ends_at_once(tmp_path, number, outcome):
  """The compiler is busy for longer than that. Nothing is lost, and so nothing need be saved."""
  workdir = tmp_path / "run"
  large = {"model__variant": "B", "data__num_workers": 1}
  process = runs.start(runs.options(workdir, **large), tmp_path / "cache", prefix=runs.dumping(tmp_path / "programs"))

  def compiling():
    return any("train_step" in path.name for path in (tmp_path / "programs").glob("*"))

  seconds, stderr = stop_when(compiling, process, number)
  assert "before there was anything to save" in stderr
  outcome("143, nothing to save", seconds)


@pytest.mark.slow
@pytest.mark.fault("SIGTERM, SIGINT", "in an evaluation")
@pytest.mark.parametrize("number", SIGNALS)
def test_an_evaluation_is_left_and_made_again(tmp_path, number, outcome):
  """The one before the first step; the signal comes when its program is there, and it has some hundred batches."""
  workdir, compiled, settings = tmp_path / "run", tmp_path / "compiled", {"run__steps": 1, "eval__knn": True}
  long = runs.options(workdir, **settings, eval__batch_size=1, eval__max_train_images=512)
  process = runs.start(long, compiled)
  seconds, stderr = stop_when(lambda: [*compiled.glob("jit_features*-cache")], process, number)
  assert "stopped and saved at step 0" in stderr
  assert not (workdir / "metrics.jsonl").exists() or not runs.rows(workdir)
  code, stderr = runs.finish(runs.start(runs.options(workdir, **settings), compiled))
  assert code == 0, stderr
  assert "knn_top1_before" in runs.summary(workdir)
  outcome("143, saved, made again", seconds)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.fault("SIGTERM, SIGINT", "in the evaluation after the last step")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_last_evaluation_is_left_and_made_again(tmp_path, number, outcome):
  workdir, compiled, settings = tmp_path / "run", tmp_path / "compiled", {"run__steps": 1, "eval__knn": True}
  long = runs.options(workdir, **settings, eval__batch_size=1, eval__max_train_images=512)
  process = runs.start(long, compiled)
  seconds, stderr = stop_when(lambda: num_rows(workdir) == 2, process, number)  # an evaluation and a step
  assert "stopped and saved at step 1" in stderr
  assert (runs.checkpoints(workdir), num_rows(workdir)) == ([1], 2)
  code, stderr = runs.finish(runs.start(long, compiled))
  assert code == 0, stderr
  assert [row["step"] for row in runs.rows(workdir)] == [0, 1, 1]
  assert "knn_top1" in runs.summary(workdir)
  outcome("143, saved, made again", seconds)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.fault("SIGTERM, SIGINT", "while a checkpoint is read")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_checkpoint_that_is_read_stays(tmp_path, compile_cache, number, outcome):
  """It is large, and nothing is lost: the run ends before its loop or at the first chance in it."""
  workdir = tmp_path / "run"
  large = {"model__variant": "B", "run__checkpoint_every_steps": 1}
  runs.train(workdir, compile_cache, **large, run__steps=1)
  folder = str(workdir / "checkpoints" / "1")
  process = runs.start(runs.options(workdir, **large, run__steps=2), compile_cache)
  seconds, _ = stop_when(lambda: any(path.startswith(folder) for path in open_files(process.pid)), process, number)
  assert runs.checkpoints(workdir) == [1]
  code, stderr = runs.finish(runs.start(runs.options(workdir, **large, run__steps=2), compile_cache))
  assert (code, "resuming at step 1 of 2" in stderr) == (0, True), stderr
  outcome("143, nothing lost", seconds)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.fault("SIGTERM, SIGINT", "while weights are read")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_weights_that_are_read_leave_nothing_half_begun(tmp_path, compile_cache, number, outcome):
  """They are large, and nothing is lost: the run ends before its loop or at the first chance in it."""
  pretrained, workdir = tmp_path / "pretrained", tmp_path / "run"
  large = {"model__variant": "B", "run__steps": 1}
  runs.train(pretrained, compile_cache, **large)
  page = f"--config={runs.ROOT}/configs/finetune_quickstart.py:smoke"
  words = [page, *runs.options(workdir, **large, finetune__init=pretrained)[1:]]
  folder = str(pretrained / "checkpoints" / "1")
  process = runs.start(words, compile_cache)
  seconds, _ = stop_when(lambda: any(path.startswith(folder) for path in open_files(process.pid)), process, number)
  code, stderr = runs.finish(runs.start(words, compile_cache))
  assert code == 0, stderr
  assert runs.summary(workdir)["steps"] == 1
  outcome("143, nothing lost", seconds)


def open_files(pid: int):
  """Paths of what a process has open."""
  for path in pathlib.Path(f"/proc/{pid}/fd").glob("*"):
    with contextlib.suppress(FileNotFoundError):  # closed meanwhile
      yield str(path.readlink())


@pytest.mark.slow
@pytest.mark.fault("SIGTERM, SIGINT", "in a step, while data workers start, in a save")
def test_at_many_moments_a_run_loses_nothing(tmp_path, compile_cache, reference, outcome):
  """One run that is stopped again and again."""
  workdir, seconds = tmp_path / "run", []

  def stop(condition, number, **settings):
    process = runs.start(runs.options(workdir, **LONG | settings), compile_cache)
    seconds.append(stop_when(lambda: condition(process), process, number)[0])

  def unfinished():
    return [*(workdir / "checkpoints").glob("*.orbax-checkpoint-tmp")]

  stop(lambda _: num_rows(workdir) >= 3, signal.SIGTERM)
  stop(lambda _: num_rows(workdir) >= 8, signal.SIGINT)
  stop(lambda process: [*children(process.pid)], signal.SIGTERM, data__num_workers=1)
  for number in (signal.SIGTERM, signal.SIGINT):
    past = num_rows(workdir) + 4
    stop(lambda _, past=past: num_rows(workdir) >= past and unfinished(), number, run__checkpoint_every_steps=2)
  code, stderr = runs.finish(runs.start(runs.options(workdir, **LONG), compile_cache))
  assert code == 0, stderr
  assert runs.rows(workdir) == runs.rows(reference)
  assert runs.summary(workdir)["params_sha256"] == runs.summary(reference)["params_sha256"]
  outcome("143, saved, same params_sha256", max(seconds))


# ------------------------------------------------------------ several processes


def stop_pair_when(condition, pair, number: int = signal.SIGTERM) -> tuple[float, str]:
  """A signal to the second of two processes: seconds until both have ended as they should, and what the first says."""
  runs.wait_until(condition, pair[1])
  start = time.monotonic()
  pair[1].send_signal(number)
  (code, stderr), (other, others) = map(runs.finish, pair)
  seconds = time.monotonic() - start
  assert (code, other) == (143, 143), stderr + others
  assert "Traceback" not in stderr + others
  assert seconds < MINUTE
  return seconds, stderr


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.fault("SIGTERM, SIGINT to one of two processes", "in the first compile")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_pair_ends_after_its_first_compile(tmp_path, number, outcome):
  """No process knows whether the others have begun, and so each ends its compilation first, if that takes no 45 s."""
  workdir, dumps = tmp_path / "run", tmp_path / "programs"
  deep = runs.options(workdir, model__variant="S", run__steps=40)
  pair = runs.start_pair(deep, tmp_path / "cache", prefixes=((), runs.dumping(dumps)))
  seconds, stderr = stop_pair_when(lambda: any("train_step" in path.name for path in dumps.glob("*")), pair, number)
  saved = runs.checkpoints(workdir)
  if "could not save for 45 s" not in stderr:
    assert saved in ([0], [1], [2]), stderr
    assert f"stopped and saved at step {saved[0]}" in stderr
  outcome(f"143 both, saved: {saved}", seconds)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.fault("SIGTERM, SIGINT to one of two processes", "in an evaluation")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_pair_leaves_an_evaluation_and_makes_it_again(tmp_path, number, outcome):
  workdir, compiled, settings = tmp_path / "run", tmp_path / "compiled", {"run__steps": 1, "eval__knn": True}
  long = runs.options(workdir, **settings, eval__batch_size=2, eval__max_train_images=1024)
  pair = runs.start_pair(long, compiled)
  seconds, stderr = stop_pair_when(lambda: [*compiled.glob("jit_features*-cache")], pair, number)
  assert "stopped and saved at step 0" in stderr
  assert not num_rows(workdir)
  for code, stderr in map(runs.finish, runs.start_pair(runs.options(workdir, **settings), compiled)):
    assert code == 0, stderr
  assert "knn_top1_before" in runs.summary(workdir)
  outcome("143 both, saved, made again", seconds)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.fault("SIGTERM, SIGINT to one of two processes", "in a save")
def test_a_pair_that_saves_loses_nothing(tmp_path, compile_cache, outcome):
  """Processes hear of each other's signals within a second, in which there are many steps."""
  undisturbed, workdir, seconds = tmp_path / "undisturbed", tmp_path / "run", []

  def start(folder: pathlib.Path, **settings):
    return runs.start_pair(runs.options(folder, **LONG | {"run__steps": 300} | settings), compile_cache)

  def unfinished():
    return [*(workdir / "checkpoints").glob("*.orbax-checkpoint-tmp")]

  for number in (signal.SIGTERM, signal.SIGINT):
    pair, past = start(workdir, run__checkpoint_every_steps=2), num_rows(workdir) + 2
    seconds.append(stop_pair_when(lambda past=past: num_rows(workdir) >= past and unfinished(), pair, number)[0])
    stopped_at = runs.checkpoints(workdir)[-1]
    assert stopped_at == num_rows(workdir)
  (code, stderr), (other, others) = map(runs.finish, start(workdir))
  assert (code, other) == (0, 0), stderr + others
  assert f"resuming at step {stopped_at} of 300" in stderr
  for process in start(undisturbed):
    runs.finish(process)
  assert runs.rows(workdir) == runs.rows(undisturbed)
  assert runs.summary(workdir)["params_sha256"] == runs.summary(undisturbed)["params_sha256"]
  outcome("143 both, saved, same params_sha256", max(seconds))


# ------------------------------------------------------------ data workers


def children(pid: int):
  """Processes that a process has started."""
  for path in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that ends meanwhile
      yield from map(int, path.read_text().split())


@pytest.mark.slow
@pytest.mark.fault("SIGTERM to the group", "while data workers start")
def test_workers_that_are_still_starting_do_not_end_the_run(tmp_path, compile_cache, outcome):
  """As a terminal and schedulers send it: to all processes of the group at once."""
  arguments = runs.options(tmp_path / "run", **LONG, data__num_workers=2)
  process = runs.start(arguments, compile_cache, prefix=("setsid",))
  runs.wait_until(lambda: len([*children(process.pid)]) >= 2, process)  # the first is of multiprocessing itself
  os.killpg(process.pid, signal.SIGTERM)
  code, stderr = runs.finish(process)
  assert code == 143, stderr
  assert "Traceback" not in stderr
  outcome("143")
