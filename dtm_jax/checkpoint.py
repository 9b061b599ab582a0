"""Saving and restoring the train state with orbax: asynchronous, atomic, and checked against the model."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp

from dtm_jax.errors import InputError
from dtm_jax.train_state import TrainState

FOLDER = "checkpoints"
BEST_FOLDER = "best"  # with the highest score so far


def saved_steps(workdir: pathlib.Path, folder: str = FOLDER) -> list[int]:
  """Steps of which a work folder has whole checkpoints, ascending."""
  return sorted(int(path.name) for path in (workdir / folder).glob("*") if path.name.isdigit())


class _Manager(ocp.CheckpointManager):
  def reached_preemption(self, step: int) -> bool:
    """Orbax would ask jax, which counts how often that is asked: `distributed.stop_requests` does."""
    return False


class CheckpointStore:
  """The checkpoints of one work folder; `keep` of them stay, and None opens the store to read only.

  A save returns as soon as the state has left the device; the files get their
  final name only when all of them are written, so a run that is killed in the
  middle finds the checkpoint before it.
  """

  def __init__(self, workdir: pathlib.Path, *, keep: int | None = None, folder: str = FOLDER):
    self._folder = workdir.resolve() / folder
    writes = keep is not None  # what looks unfinished may be the work of a run that goes on
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=writes, cleanup_tmp_directories=writes)
    try:
      if writes:  # of several processes each: what the others make may be seen late
        self._folder.mkdir(parents=True, exist_ok=True)
      # Naming the handler lets a fresh process read `item_metadata`.
      self._manager = _Manager(self._folder, options=options, item_handlers=ocp.StandardCheckpointHandler())
    except OSError as error:
      raise InputError(
        f"cannot use {self._folder} for checkpoints ({error.strerror}); choose another --workdir"
      ) from error

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def save(self, state: TrainState) -> None:
    """Starts saving, unless this step is there already.

    Raises:
      InputError: this save or the one before failed (disk full, no permission).
    """
    step = int(state.step)
    if step == self.latest_step():
      return
    self._checked(lambda: self._manager.save(step, args=ocp.args.StandardSave(state)))

  def check(self) -> None:
    """Raises InputError where a save in the background has failed."""
    self._checked(self._manager.check_for_errors)

  def wait(self) -> None:
    """Returns when all saves are complete. Raises InputError where one failed."""
    self._checked(self._manager.wait_until_finished)
    self.check()

  def close(self) -> None:
    """Waits for saves. Raises InputError where one failed."""
    self._checked(self._manager.close)

  def restore(self, step: int, like: TrainState) -> TrainState:
    """Reads a checkpoint onto the devices.

    Args:
      step: one of the saved steps.
      like: arrays or `jax.ShapeDtypeStruct`s with the shapes, dtypes and shardings to restore to.

    Raises:
      InputError: the checkpoint is of another model, or cannot be read.
    """
    self._check_shapes(step, like)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    return self._read(step, lambda: self._manager.restore(step, args=ocp.args.StandardRestore(abstract)))

  def _read(self, step: int, action: Callable[[], Any]) -> Any:
    try:
      return action()
    except (OSError, ValueError) as error:
      raise InputError(
        f"checkpoint {self._folder / str(step)} cannot be read ({_brief(error)});"
        " if it is damaged, move it away to go on from the one before"
      ) from error

  def _check_shapes(self, step: int, like: TrainState) -> None:
    saved = _shapes(self._read(step, lambda: self._manager.item_metadata(step)))
    wanted = _shapes(like)
    names = {name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name)}
    if names:
      name = min(names, key=lambda name: (not name.startswith("params/"), name))
      raise InputError(
        f"checkpoint {self._folder / str(step)} is of another model: {name} is {saved.get(name, 'missing')} there and"
        f" {wanted.get(name, 'missing')} in this config ({len(names)} such); use its config or another --workdir"
      )

  def _checked(self, action: Callable[[], Any]) -> None:
    try:
      action()
    # Orbax passes on whatever its writers raise: OSError, ValueError from
    # tensorstore, RuntimeError from the background thread.
    except (OSError, ValueError, RuntimeError) as error:
      raise InputError(
        f"saving to {self._folder} failed ({_brief(error)}); make room or choose another --workdir, then run"
        f" the same command: it goes on from step {self.latest_step() or 0}"
      ) from error


def _brief(error: Exception) -> str:
  """The ends of the first line: tensorstore has the name at its start and the system's reason at its end."""
  line = str(error).partition("\n")[0]
  return line if len(line) < 200 else f"{line[:60]} ... {line[-120:]}"


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """Shapes by name, the same for a state and for what orbax tells of a saved one."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {"/".join(_key_name(key) for key in path): tuple(leaf.shape) for path, leaf in leaves}


def _key_name(key: Any) -> str:
  return str(next(getattr(key, field) for field in ("key", "name", "idx") if hasattr(key, field)))
