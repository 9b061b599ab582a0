"""Saving and restoring the train state with orbax: asynchronous, atomic, and checked against what was saved."""

import contextlib
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging

from dtm_jax import distributed
from dtm_jax.errors import InputError, TransientError, is_of_network
from dtm_jax.train_state import TrainState

FOLDER = "checkpoints"
BEST_FOLDER = "best"  # with the highest score so far
DAMAGED_FOLDER = "damaged"  # checkpoints that could not be read

_POLL_SECONDS = 0.02
# What devices hold alike, orbax has each write a slice of. It cuts them one by one, with a compilation for each shape,
# while training waits: not worth it for slices smaller than this (benchmarks/saves.py).
_MIN_SLICE_BYTES = 2**20
_CHECKSUM = "checksum"  # entry of a checkpoint's metadata
_MOVE_AWAY = "; if it is damaged, move it away to go on from the one before"


class DamagedError(InputError):
  """A checkpoint cannot be read, or not as what was saved."""


def saved_steps(workdir: pathlib.Path, folder: str = FOLDER) -> list[int]:
  """Steps of which a work folder has whole checkpoints, ascending."""
  return sorted(int(path.name) for path in (workdir / folder).glob("*") if path.name.isdigit())


class _Manager(ocp.CheckpointManager):
  def reached_preemption(self, step: int) -> bool:
    """Orbax would ask jax, which counts how often that is asked: `distributed.stop_requests` does."""
    return False


class _Noted(ocp.future.Future):
  """A write that is under way; what it fails with is kept in a list, too."""

  def __init__(self, future: ocp.future.Future, errors: list[Exception]):
    self._future, self._errors = future, errors

  def result(self, timeout: float | None = None) -> Any:
    with _kept(self._errors):
      return self._future.result(timeout)


def _type_handlers() -> ocp.type_handlers.TypeHandlerRegistry:
  """Orbax's, but for what is cut."""
  own = {kind: ocp.type_handlers.get_type_handler(kind) for kind in ocp.type_handlers.supported_types()}
  own[jax.Array] = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_MIN_SLICE_BYTES)
  return ocp.type_handlers.create_type_handler_registry(*own.items())


@contextlib.contextmanager
def _kept(errors: list[Exception]) -> Iterator[None]:
  """What is raised inside is added to the list on its way."""
  try:
    yield
  except Exception as error:  # whatever orbax's writers raise: it goes on
    errors.append(error)
    raise


def _noting(errors: list[Exception]) -> ocp.StandardCheckpointHandler:
  """A handler that keeps its errors: orbax tells of them only when all processes have come to the end of the save.

  No class of its own, whose name would be written into checkpoints: others read them without this package.
  """
  handler = ocp.StandardCheckpointHandler()
  # In public this option is one for all that a process saves, and orbax would warn of the change.
  handler._impl = ocp.PyTreeCheckpointHandler(type_handler_registry=_type_handlers())
  start, merge = handler.async_save, handler.finalize

  async def async_save(*args, **kwargs) -> list[ocp.future.Future]:
    return [_Noted(future, errors) for future in await start(*args, **kwargs) or ()]

  def finalize(directory: Any) -> None:
    with _kept(errors):
      merge(directory)

  handler.async_save, handler.finalize = async_save, finalize
  return handler


def _renaming(errors: list[Exception]) -> type[ocp.path.atomicity.AtomicRenameTemporaryPath]:
  """How a save that is whole gets its name, which process 0 does alone; its errors are kept for the same reason."""

  class Renaming(ocp.path.atomicity.AtomicRenameTemporaryPath):
    async def finalize(self) -> None:
      with _kept(errors):
        await super().finalize()

  return Renaming


class CheckpointStore:
  """The checkpoints of one work folder; `keep` of them stay, and None opens the store to read only.

  A save returns as soon as the state has left the device; the files get their
  final name only when all of them are written, so a run that is killed in the
  middle finds the checkpoint before it.
  """

  def __init__(self, workdir: pathlib.Path, *, keep: int | None = None, folder: str = FOLDER):
    self._workdir, self._folder, self._is_saving = workdir, workdir.resolve() / folder, False
    self._errors: list[Exception] = []  # of this process's writes; after the first no caller goes on
    writes = keep is not None  # what looks unfinished may be the work of a run that goes on
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      create=writes,
      cleanup_tmp_directories=writes,
      # Made in the background, a folder that cannot be made keeps the ended run waiting for five minutes.
      async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
      save_root_metadata=False,  # processes would meet, also where one of them does not find its folder
      temporary_path_class=_renaming(self._errors),
      # Where processes meet, two stores are two places.
      multiprocessing_options=ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=folder),
    )
    try:
      if writes:  # of several processes each: what the others make may be seen late
        self._folder.mkdir(parents=True, exist_ok=True)
      # Naming the handler lets a fresh process read `item_metadata`.
      self._manager = _Manager(self._folder, options=options, item_handlers=_noting(self._errors))
    except OSError as error:
      raise InputError(
        f"cannot use {self._folder} for checkpoints ({error.strerror}); choose another --workdir"
      ) from error

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def save(self, state: TrainState) -> None:
    """Starts saving, unless this step is there already, or a later one.

    Raises:
      InputError: this save or the one before failed (disk full, no permission).
      TransientError: it failed, and may not the next time.
    """
    step, latest = int(state.step), distributed.from_first(self.latest_step)
    if latest is not None and latest >= step:
      return
    self.wait()
    # By force: each process would ask its own view of the folder.
    options = {"custom_metadata": {_CHECKSUM: _checksum(state)}, "force": True}
    self._checked(lambda: self._manager.save(step, args=ocp.args.StandardSave(state), **options))
    self._is_saving = True

  def check(self) -> None:
    """Raises InputError where a save in the background has failed; does not wait for it, nor for other processes."""
    self._checked(self._raise_own_error)
    # `check_for_errors` knows none: they are kept by the thread that has ended, for whoever waits for it.
    if self._is_saving and not self._manager.is_saving_in_progress():
      self.wait()

  def _raise_own_error(self) -> None:
    if self._errors:
      raise self._errors[0]

  def wait(self) -> None:
    """Returns when all saves are complete. Raises InputError where one failed."""
    while self._manager.is_saving_in_progress():
      self._checked(self._raise_own_error)
      time.sleep(_POLL_SECONDS)
    self._is_saving = False
    self._checked(self._manager.wait_until_finished)

  def close(self) -> None:
    """Waits for saves. Raises InputError where one failed."""
    self._checked(self._manager.close)

  def restore(self, step: int, like: TrainState) -> TrainState:
    """Reads a checkpoint onto the devices.

    Args:
      step: one of the saved steps.
      like: arrays or `jax.ShapeDtypeStruct`s with the shapes, dtypes and shardings to restore to.

    Raises:
      InputError: the checkpoint is of another model; DamagedError where it cannot be read.
    """
    state = self._read(step, like)
    if not self._is_as_saved(step, state):
      raise self._damage(step, "not what was saved")
    return state

  def restore_newest(self, like: TrainState) -> TrainState:
    """Reads the newest checkpoint that can be read, on all processes, and moves those aside that cannot.

    Raises:
      InputError: see `restore`; there is one, and none can be read.
    """
    problems = {}
    for step in distributed.from_first(lambda: sorted(self._manager.all_steps(), reverse=True)):
      state, problem = self._attempt(step, like)
      if problem is None:
        self._move_aside(problems, step)
        return state
      problems[step] = problem
    raise distributed.SharedInputError(next(iter(problems.values())))

  def _attempt(self, step: int, like: TrainState) -> tuple[TrainState | None, str | None]:
    """The state, or what is wrong with its checkpoint; the same on all processes."""
    state, problem = None, None
    try:
      state = self._read(step, like)
    except DamagedError as error:
      problem = str(error)
    problem = next(filter(None, distributed.gather(problem)), None)
    if problem is None and not self._is_as_saved(step, state):
      problem = str(self._damage(step, "not what was saved"))
    return state, problem

  def _read(self, step: int, like: TrainState) -> TrainState:
    self._check_shapes(step, like)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    # The manager's way ends where the processes wait for each other, also for one that could not read.
    handler, item = ocp.StandardCheckpointHandler(), self._folder / str(step) / "default"
    return self._readable(step, lambda: handler.restore(item, args=ocp.args.StandardRestore(abstract)))

  def _check_shapes(self, step: int, like: TrainState) -> None:
    saved = _shapes(self._readable(step, lambda: self._metadata(step).item_metadata))
    wanted = _shapes(like)
    names = {name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name)}
    if names:
      name = min(names, key=lambda name: (not name.startswith("params/"), name))
      raise InputError(
        f"checkpoint {self._folder / str(step)} is of another model: {name} is {saved.get(name, 'missing')} there and"
        f" {wanted.get(name, 'missing')} in this config ({len(names)} such); use its config or another --workdir"
      )

  def _is_as_saved(self, step: int, state: TrainState) -> bool:
    """Compression tells of some damage only. Checkpoints that are older than the checksum have none."""
    saved = self._metadata(step).custom_metadata.get(_CHECKSUM)
    return saved is None or saved == _checksum(state)

  def _metadata(self, step: int) -> Any:
    found = self._manager.metadata(step)
    if found.item_metadata is None:
      raise ValueError("its metadata are missing")
    return found

  def _readable(self, step: int, action: Callable[[], Any]) -> Any:
    try:
      return action()
    except (RuntimeError, MemoryError):  # of devices
      raise
    # Orbax raises what it finds in damaged metadata, and a plain Exception from tensorstore's error.
    except Exception as error:
      raise self._damage(step, _brief(error.__cause__ or error)) from error

  def _damage(self, step: int, what: str) -> DamagedError:
    return DamagedError(f"checkpoint {self._folder / str(step)} cannot be read ({what}){_MOVE_AWAY}")

  def _move_aside(self, problems: dict[int, str], good: int) -> None:
    for step, problem in problems.items():
      place = distributed.from_first(lambda step=step: str(self._moved_aside(step)))
      what = problem.removesuffix(_MOVE_AWAY)
      logging.warning("%s; it is moved to %s, and training goes on from %s", what, place, self._folder / str(good))
    if problems:
      self._reload()

  def _reload(self) -> None:
    """Looks again, until all processes see the same: network file systems remember for a while what was there."""
    self._manager.reload()
    steps, end = distributed.from_first(self._manager.all_steps), time.monotonic() + distributed.SHARED_FOLDER_SECONDS
    while self._manager.all_steps() != steps and time.monotonic() < end:
      time.sleep(0.1)
      self._manager.reload()

  def _moved_aside(self, step: int) -> pathlib.Path:
    """Where it is now. Nothing is deleted: who knows what it is still good for."""
    folder = self._folder.parent / DAMAGED_FOLDER
    names = (f"{self._folder.name}_{step}{end}" for end in ("", *map(".{}".format, range(2, 1000))))
    place = next(folder / name for name in names if not (folder / name).exists())
    try:
      folder.mkdir(exist_ok=True)
      return (self._folder / str(step)).rename(place)
    except OSError as error:
      raise InputError(f"cannot move the damaged checkpoint to {place} ({error.strerror}); move it away") from error

  def _checked(self, action: Callable[[], Any]) -> None:
    try:
      action()
    # Orbax passes on whatever its writers raise: OSError, ValueError from
    # tensorstore, RuntimeError from the background thread.
    except (OSError, ValueError, RuntimeError) as error:
      if distributed.is_loss(error) or isinstance(error, jax.errors.JaxRuntimeError):  # of devices
        raise
      told, step = f"saving to {self._folder} failed ({_brief(error)})", max(saved_steps(self._workdir), default=0)
      again = f"the same command: it goes on from step {step}"
      if is_of_network(_error_number(error)):
        raise TransientError(f"{told}; run {again}") from error
      raise InputError(f"{told}; make room or choose another --workdir, then run {again}") from error


def _error_number(error: Exception) -> int | None:
  """The system's, which tensorstore has somewhere in a long line."""
  if isinstance(error, OSError) and error.errno:
    return error.errno
  found = re.search(r"\[os_error_code=\D*(\d+)", str(error))
  return found and int(found[1])


def _brief(error: Exception) -> str:
  """The system's reason, or the ends of the first line."""
  if number := _error_number(error):
    return os.strerror(number)
  line = str(error).partition("\n")[0]
  return line if len(line) < 200 else f"{line[:60]} ... {line[-120:]}"


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """Shapes by name, the same for a state and for what orbax tells of a saved one."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {"/".join(_key_name(key) for key in path): tuple(leaf.shape) for path, leaf in leaves}


def _key_name(key: Any) -> str:
  return str(next(getattr(key, field) for field in ("key", "name", "idx") if hasattr(key, field)))


def _checksum(tree: Any) -> int:
  """32 bits: the sum of all words, each times an odd number of its place, so that no change of one is lost.

  Whole numbers add up to the same in any order, and so whatever the sharding.
  """
  # A program for each kind of array: one for all takes several times as long (benchmarks/saves.py). Each is waited for:
  # on CPUs, sums over devices that are under way together can starve each other of threads.
  return sum((2 * number + 1) * int(_weighted_sum(leaf)) for number, leaf in enumerate(jax.tree.leaves(tree))) % 2**32


@jax.jit
def _weighted_sum(leaf: jax.Array) -> jax.Array:
  """uint32 []: of one array, its place among the others not yet counted."""
  return (_words(leaf) * (2 * _places(leaf.shape) + 1)).sum(dtype=jnp.uint32)


def _words(leaf: jax.Array) -> jax.Array:
  """uint32, one for each element."""
  is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
  bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}") if is_float else leaf
  return bits.astype(jnp.uint32)


def _places(shape: tuple[int, ...]) -> jax.Array:
  """uint32 [*shape]: 0, 1, ... in row-major order; unlike a reshaped range it needs nothing of other devices."""
  places = jnp.zeros(shape, jnp.uint32)
  for axis, size in enumerate(shape):
    places = places * size + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
  return places
