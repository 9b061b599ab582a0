"""Damaged checkpoints, full disks, read-only folders: what is good stays, and the run goes on from it."""

import contextlib
import errno
import gc
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import time
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

import runs
from dtm_jax import checkpoint, console, experiment, metrics
from dtm_jax.checkpoint import CheckpointStore
from dtm_jax.errors import InputError, TransientError
from dtm_jax.train_state import NEVER, TrainState

# Orbax leaves the tasks that read the other arrays to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def new_state(step: int) -> TrainState:
  return TrainState(jnp.int32(step), {"w": jax.random.normal(jax.random.key(step), (99, 99))}, (), jnp.int32(NEVER))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A work folder with checkpoints of steps 1 and 2."""
  workdir = tmp_path_factory.mktemp("saved")
  with contextlib.closing(CheckpointStore(workdir, keep=3)) as store:
    for step in (1, 2):
      store.save(new_state(step))
  return workdir


@pytest.fixture
def workdir(saved, tmp_path):
  """A copy of it."""
  yield shutil.copytree(saved, tmp_path / "run")
  gc.collect()


def restore_newest(workdir: pathlib.Path) -> TrainState:
  with contextlib.closing(CheckpointStore(workdir, keep=3)) as store:
    state = store.restore_newest(new_state(0))
    assert store.latest_step() == int(state.step)
  expected = new_state(int(state.step))
  jax.tree.map(np.testing.assert_array_equal, state, expected)
  return state


def largest_file(folder: pathlib.Path) -> pathlib.Path:
  return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(folder):
  path = largest_file(folder)
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble_a_byte(folder):
  """In the middle of some parameters: they are stored as they are where compression gains nothing."""
  path = largest_file(folder)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def empty_all(folder):
  for path in folder.rglob("*"):
    if path.is_file():
      path.write_bytes(b"")


def remove_the_state(folder):
  shutil.rmtree(folder / "default")


def garble_metadata(folder):
  (folder / "default" / "_METADATA").write_text('{"tree_metadata": {"')


DAMAGES = [truncate, garble_a_byte, empty_all, remove_the_state, garble_metadata]


@pytest.mark.fault("newest checkpoint damaged", "at the start")
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_the_last_good_checkpoint_is_taken(workdir, caplog, damage, outcome):
  checkpoint, place = workdir / "checkpoints" / "2", workdir / "damaged" / "checkpoints_2"
  damage(checkpoint)
  damaged = sorted(path.relative_to(checkpoint) for path in checkpoint.rglob("*"))
  assert int(restore_newest(workdir).step) == 1
  [line] = [record.getMessage() for record in caplog.records if "moved to" in record.getMessage()]
  assert line.startswith(f"checkpoint {checkpoint} cannot be read (")
  assert line.endswith(f"it is moved to {place}, and training goes on from {workdir}/checkpoints/1")
  assert sorted(path.relative_to(place) for path in place.rglob("*")) == damaged  # nothing is lost
  outcome(f"{damage.__name__}: the one before is taken")


@pytest.mark.fault("all checkpoints damaged", "at the start")
def test_without_a_good_checkpoint_nothing_is_moved(workdir, outcome):
  for step in (1, 2):
    truncate(workdir / "checkpoints" / str(step))
  with pytest.raises(InputError, match=f"{workdir}/checkpoints/2 cannot be read .* move it away"):
    restore_newest(workdir)
  assert runs.checkpoints(workdir) == [1, 2]
  assert not (workdir / "damaged").exists()
  outcome("exit 2, nothing moved")


def test_damaged_checkpoints_do_not_replace_each_other(workdir):
  for _ in range(2):
    shutil.copytree(workdir / "checkpoints" / "1", workdir / "checkpoints" / "7")
    truncate(workdir / "checkpoints" / "7")
    restore_newest(workdir)
  assert sorted(path.name for path in (workdir / "damaged").iterdir()) == ["checkpoints_7", "checkpoints_7.2"]


def test_a_checkpoint_without_checksum_is_read(workdir):
  """Those of earlier versions have none."""
  path = workdir / "checkpoints" / "2" / "_CHECKPOINT_METADATA"
  metadata = json.loads(path.read_text())
  assert metadata.pop("custom_metadata")["checksum"] > 0
  path.write_text(json.dumps(metadata))
  assert int(restore_newest(workdir).step) == 2


@pytest.mark.parametrize("devices", [1, 8])
def test_the_checksum_is_the_same_whatever_the_sharding(devices):
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("x",))
  values = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
  sharded = jax.device_put(values, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x")))
  half = np.arange(5, dtype=ml_dtypes.bfloat16)
  words = [values.view(np.uint32).ravel(), half.view(np.uint16), np.array([7])]
  sums = [sum((2 * place + 1) * int(word) for place, word in enumerate(leaf)) for leaf in words]
  expected = sum((2 * number + 1) * total for number, total in enumerate(sums)) % 2**32
  assert checkpoint._checksum({"a": sharded, "b": half, "c": jnp.int32(7)}) == expected


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.fault("newest checkpoint damaged", "the whole run")
def test_a_run_with_a_damaged_checkpoint_ends_as_without(tmp_path, compile_cache, outcome):
  settings = {"run__steps": 3, "run__checkpoint_every_steps": 1, "run__keep_checkpoints": 3}

  def run() -> str:
    code, stderr = runs.finish(runs.start(runs.options(tmp_path, **settings), compile_cache))
    assert code == 0, stderr
    return stderr

  run()
  rows, summary = runs.rows(tmp_path), runs.summary(tmp_path)
  (tmp_path / "summary.json").unlink()
  garble_a_byte(tmp_path / "checkpoints" / "3")
  truncate(tmp_path / "checkpoints" / "2")
  assert "resuming at step 1 of 3" in run()
  assert runs.checkpoints(tmp_path) == [1, 2, 3]  # two of them made anew
  assert runs.rows(tmp_path) == rows
  assert runs.summary(tmp_path)["params_sha256"] == summary["params_sha256"]
  outcome("same params_sha256")


@contextlib.contextmanager
def small_files(size: int):
  """A limit on the size of files stands for the full disk: the same calls fail, and no mount is needed."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_only_large_arrays_are_cut_among_devices(tmp_path, monkeypatch):
  """Cutting is for each slice a call, and for each shape a compilation, while training waits."""
  cut, slice_in_dim = [], jax.lax.slice_in_dim
  monkeypatch.setattr(jax.lax, "slice_in_dim", lambda x, **where: cut.append(x.shape) or slice_in_dim(x, **where))
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
  params = {"small": jnp.zeros((8, 999)), "large": jnp.zeros((8, 2**18))}  # a MiB to each of 8 devices
  state = TrainState(jnp.int32(1), params, (), jnp.int32(NEVER))
  with contextlib.closing(CheckpointStore(tmp_path, keep=1)) as store:
    store.save(jax.device_put(state, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())))
  assert cut == [(8, 2**18)] * 8


@pytest.mark.parametrize("end", ["", ' for {"driver":"zarr"}'])
def test_the_systems_reason_is_told_wherever_it_stands(end):
  text = f"Error writing \"{'x' * 300}\": Failed to write to file 11: No space [os_error_code='28'] [source]{end * 20}"
  assert checkpoint._brief(ValueError(text)) == "No space left on device"
  assert checkpoint._brief(ValueError("x" * 199 + "\n more")) == "x" * 199
  assert checkpoint._brief(PermissionError(13, "Permission denied", "a", None, "b")) == "Permission denied"


@pytest.mark.parametrize(
  ("error", "told"),
  [
    (OSError(errno.ESTALE, "stale"), TransientError),
    (ValueError(f"NOT_FOUND: ... [os_error_code='{errno.ETIMEDOUT}']"), TransientError),
    (OSError(errno.ENOSPC, "full"), InputError),
    (jax.errors.JaxRuntimeError("INTERNAL: of a device"), jax.errors.JaxRuntimeError),
  ],
  ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_may_pass_is_told_from_what_has_to_be_mended(tmp_path, error, told):
  """Schedulers try again where exit code 1 asks them to, and not after 2."""

  def fail():
    raise error

  with contextlib.closing(CheckpointStore(tmp_path, keep=1)) as store, pytest.raises(told) as raised:
    store._checked(fail)
  codes = {TransientError: console.EXIT_FAILED, InputError: console.EXIT_INPUT}
  assert console.tell(raised.value) == codes.get(told)


def test_checkpoints_name_the_classes_of_orbax(saved):
  """Others read them without this package."""
  metadata = json.loads((saved / "checkpoints/2/_CHECKPOINT_METADATA").read_text())
  [handler] = metadata["item_handlers"].values()
  assert handler == ocp.StandardCheckpointHandler().typestr()


@pytest.mark.fault("disk full in a save in the background", "between saves")
def test_a_failed_save_is_noticed_before_the_next(tmp_path, outcome):
  store = CheckpointStore(tmp_path, keep=3)
  store.save(new_state(1))  # compiles, too, for which there is no limit
  store.wait()
  state = new_state(2)
  with (
    small_files(2**14),
    pytest.raises(InputError, match=f"saving to {tmp_path}/checkpoints failed.*from step 1") as told,
  ):
    store.save(state)
    for _ in range(1000):
      store.check()
      time.sleep(0.02)
  assert "check" in {entry.name for entry in told.traceback}
  with pytest.raises(InputError, match="File too large"):
    store.close()
  assert runs.checkpoints(tmp_path) == [1]
  outcome("told when it is asked before the next step")


def test_a_failed_save_ends_an_evaluation(tmp_path):
  """Which asks between its batches whether to stop, and may take longer than the save."""
  store, state = CheckpointStore(tmp_path, keep=3), new_state(2)

  def evaluate(state, stop_requested):
    for _ in range(1000):
      assert not stop_requested()
      time.sleep(0.02)

  parts = types.SimpleNamespace(is_evaluated=True, is_evaluated_untrained=True, scores=("knn_top1",), evaluate=evaluate)
  with contextlib.closing(metrics.MetricWriter(tmp_path)) as writer, small_files(2**14):
    store.save(state)
    with pytest.raises(InputError, match=f"saving to {tmp_path}/checkpoints failed"):
      experiment._Session(parts, store, None, writer, lambda: False).evaluate(state)
  with pytest.raises(InputError, match="File too large"):
    store.close()


# 100 KiB: the largest parameters take more, the rest less.
WITH_SMALL_FILES = ("bash", "-c", 'ulimit -f 100; exec "$@"', "-")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.fault("disk full in a save in the background", "in the middle of the run")
def test_a_failed_save_ends_the_run(tmp_path, compile_cache, outcome):
  settings = {"run__steps": 3000, "run__log_every_steps": 1, "run__checkpoint_every_steps": 100}
  code, stderr = runs.finish(runs.start(runs.options(tmp_path, **settings), compile_cache, prefix=WITH_SMALL_FILES))
  assert code == 2, stderr
  assert f"saving to {tmp_path}/checkpoints failed" in stderr
  assert not (tmp_path / "summary.json").exists() and not runs.checkpoints(tmp_path)
  last = runs.rows(tmp_path)[-1]["step"]
  assert 100 <= last < 200  # it does not come to the next save
  outcome(f"exit 2 at step {last}, the save began at 100")


@pytest.fixture
def disk(tmp_path):
  """A folder on a disk of its own, and what gives that another size, such as 9m."""
  folder = tmp_path / "disk"
  folder.mkdir()

  def mount(size: str, *options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join((f"size={size}", *options)), "tmpfs", folder], check=True)

  try:
    mount("1m")
  except (OSError, subprocess.CalledProcessError):
    pytest.skip("cannot mount a disk here; root may")
  yield folder, lambda size: mount(size, "remount")
  subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
@pytest.mark.fault("a disk that is really full", "in the third save; then there is room")
def test_with_room_again_the_run_goes_on(disk, tmp_path, compile_cache, outcome):
  folder, resize = disk
  settings = {
    "run__steps": 30,
    "run__log_every_steps": 1,
    "run__checkpoint_every_steps": 10,
    "run__keep_checkpoints": 3,
  }

  def run(workdir) -> tuple[int, str]:
    return runs.finish(runs.start(runs.options(workdir, **settings), compile_cache))

  resize("12m")  # two checkpoints of 5.5 MB
  code, stderr = run(folder / "run")
  assert code == 2, stderr
  assert "No space left on device" in stderr and stderr.endswith("it goes on from step 20\n")
  assert runs.checkpoints(folder / "run") == [10, 20]
  resize("40m")
  code, stderr = run(folder / "run")
  assert (code, "resuming at step 20 of 30" in stderr) == (0, True), stderr
  run(tmp_path / "elsewhere")
  assert runs.rows(folder / "run") == runs.rows(tmp_path / "elsewhere")
  assert runs.summary(folder / "run")["params_sha256"] == runs.summary(tmp_path / "elsewhere")["params_sha256"]
  outcome("exit 2, checkpoints stay, goes on")


@pytest.mark.slow
@pytest.mark.fault("disk full for one of two processes", "in a save in the background")
@pytest.mark.parametrize("steps", [2000, pytest.param(20, marks=pytest.mark.long)], ids=["in_the_middle", "at_the_end"])
def test_the_process_that_cannot_save_ends_the_pair(tmp_path, compile_cache, steps, outcome):
  settings = {"run__steps": steps, "run__checkpoint_every_steps": 20, "mesh__fsdp": 2}  # both have something to save
  pair = runs.start_pair(runs.options(tmp_path, **settings), compile_cache, prefixes=((), WITH_SMALL_FILES))
  _, stderr = pair[1].communicate(timeout=300)  # orbax's processes wait for each other for 1200 s
  assert pair[1].returncode == 2, stderr
  assert f"error in process 1: saving to {tmp_path}/checkpoints failed" in stderr
  code, stderr = runs.finish(pair[0])
  assert code not in (0, 143)  # at the end it only waits, and jax ends it
  assert "another process has ended or cannot be reached" in stderr or steps == 20
  assert not runs.checkpoints(tmp_path)
  outcome("it ends with exit 2 at once, the other after it")


# Root may write anywhere unless it gives that up.
HELD_TO_PERMISSIONS = ("setpriv", "--bounding-set=-dac_override") if os.geteuid() == 0 else ()


@contextlib.contextmanager
def read_only(folder: pathlib.Path):
  folder.chmod(0o555)
  try:
    yield
  finally:
    folder.chmod(0o755)


@pytest.mark.slow
@pytest.mark.fault("a read-only folder", "at the start")
def test_a_read_only_folder_is_told_in_one_line(tmp_path, compile_cache, outcome):
  with read_only(tmp_path):
    process = runs.start(runs.options(tmp_path / "run"), compile_cache, prefix=HELD_TO_PERMISSIONS)
    code, stderr = runs.finish(process)
  assert code == 2, stderr
  assert stderr.splitlines()[-1] == f"error: cannot make --workdir={tmp_path}/run (Permission denied); choose another"
  assert "Traceback" not in stderr
  outcome("exit 2, one line")


@pytest.mark.slow
@pytest.mark.fault("a folder becomes read-only", "in the middle of the run")
def test_a_folder_that_becomes_read_only_ends_the_run_and_it_goes_on(tmp_path, compile_cache, outcome):
  settings = {"run__log_every_steps": 200, "run__checkpoint_every_steps": 200}
  long = runs.options(tmp_path, run__steps=4000, **settings)
  process = runs.start(long, compile_cache, prefix=HELD_TO_PERMISSIONS)
  folder = tmp_path / "checkpoints"
  runs.wait_until(lambda: folder.is_dir() and runs.checkpoints(tmp_path), process)
  with read_only(folder):
    _, stderr = process.communicate(timeout=200)  # threads of orbax's once kept it for 300 s more
  code = process.returncode
  kept = runs.checkpoints(tmp_path)
  assert code == 2 and kept, stderr
  assert f"saving to {folder} failed" in stderr and f"it goes on from step {kept[-1]}" in stderr
  runs.train(tmp_path, compile_cache, run__steps=kept[-1] + 2, **settings)
  assert runs.summary(tmp_path)["steps"] == kept[-1] + 2
  outcome("exit 2, checkpoints stay, goes on")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.fault("a folder becomes read-only for a pair", "between the last file of a save and its renaming")
def test_a_save_that_cannot_get_its_name_ends_the_pair(tmp_path, compile_cache, outcome):
  """Process 0 renames when the other one has written, too, and that is held back until the folder is closed."""
  settings = {"run__steps": 100_000, "run__checkpoint_every_steps": 20, "mesh__fsdp": 2}
  pair = runs.start_pair(runs.options(tmp_path, **settings), compile_cache, prefixes=(HELD_TO_PERMISSIONS,) * 2)
  folder = tmp_path / "checkpoints"

  def waits_for_its_name() -> bool:
    """Stops the other process in the middle of a save; lets it go on where it came too late."""
    if not (unfinished := [*folder.glob("*.orbax-checkpoint-tmp")]):
      return False
    pair[1].send_signal(signal.SIGSTOP)
    time.sleep(1)
    if unfinished[0].exists():
      return True
    pair[1].send_signal(signal.SIGCONT)
    return False

  runs.wait_until(waits_for_its_name, pair[0])
  with read_only(folder):
    pair[1].send_signal(signal.SIGCONT)
    start = time.monotonic()
    (code, stderr), (other, others) = map(runs.finish, pair)
  assert time.monotonic() - start < 100, stderr + others  # processes wait for each other for 1200 s
  assert (code, f"saving to {folder} failed (Permission denied)" in stderr) == (2, True), stderr
  assert other not in (0, 143), others
  outcome("exit 2, the other after it", time.monotonic() - start)
