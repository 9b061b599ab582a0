"""The work folder of a command: its record, its summary, and how they are written."""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import tempfile
from typing import Any

import jax
from absl import logging

from dtm_jax import __version__, distributed
from dtm_jax.config import Config, flatten, from_json, to_json
from dtm_jax.errors import InputError, some_of
from dtm_jax.files import locked as locked_file
from dtm_jax.files import replacing

CONFIG_FILE = "config.json"
SUMMARY_FILE = "summary.json"
RUN_AGAIN = "make room, then run the same command again"  # where a file cannot be written
_REPORTED_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_LOST_HOST_SECONDS = 120  # for so long a network's file system may hold the lock of a host that is no more
# What a resumed run may change: how fast, how long, where and how closely watched. (Another length bends the rest of
# the learning rate's cosine.)
_FREE_SETTINGS = (
  *("run.steps", "run.epochs", "run.log_every_steps", "run.checkpoint_every_steps", "run.keep_checkpoints"),
  *("run.on_nonfinite", "data.num_workers", "data.max_bad_fraction"),
  *("model.attention", "model.scan_layers", "model.remat", "optim.accumulate_steps", "mesh."),
)
# These, too, as long as the images and weights behind them are the same: `experiment` and `evaluation` check that.
_PATHS_OF = {
  "pretrain": ("data.path", "teacher.weights"),
  "finetune": ("data.path", "finetune.init"),
  "evaluate": ("data.path", "eval.checkpoint"),
}
# And what a training step, or of an evaluation its results, do not depend on.
_UNUSED_BY = {
  "pretrain": ("eval.", "finetune."),
  "finetune": ("teacher.", "morphing.", "eval."),
  "evaluate": ("teacher.", "morphing.", "finetune.", "optim.", "eval.batch_size", "eval.figure_images"),
}


def create(workdir: pathlib.Path) -> None:
  """Makes the folder where it is missing, for all processes.

  Raises:
    InputError: it cannot be made, or not written to, or another process sees another folder.
  """
  distributed.from_first(lambda: _create(workdir))
  distributed.check_shared(workdir)


def _create(workdir: pathlib.Path) -> None:
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise InputError(f"cannot make --workdir={workdir} ({error.strerror}); choose another") from error
  if not os.access(workdir, os.W_OK):
    raise InputError(f"no permission to write to --workdir={workdir}; choose another")
  with tempfile.TemporaryDirectory(prefix=".renaming-", dir=workdir) as name:
    _check_renaming(pathlib.Path(name), workdir)


def _check_renaming(empty: pathlib.Path, workdir: pathlib.Path) -> None:
  """Checkpoints become whole by it, and buckets that are mounted as folders may not have it."""
  inner = empty / "unfinished" / "inner"
  inner.mkdir(parents=True)
  (inner / "file").touch()
  try:
    inner.parent.rename(empty / "finished")
  except OSError as error:
    raise InputError(
      f"--workdir={workdir} is on a file system that cannot rename folders ({error.strerror}), by which checkpoints"
      " become whole; choose a disk or a network's file system (of buckets, one with a hierarchical namespace)"
    ) from error


def locked(workdir: pathlib.Path, patience: float = 0) -> contextlib.AbstractContextManager[int]:
  """Keeps others out of a folder, see `files.locked`. Raises InputError where one is at work in it."""
  lock = workdir / "lock"
  problem = f"another process is at work in {workdir}; wait for it, stop it, or choose another --workdir"
  return locked_file(lock, f"{problem} (if it is gone with its host, remove {lock})", patience)


def keep(workdir: pathlib.Path, until: contextlib.ExitStack) -> None:
  """Has the first of all processes lock the folder until the stack is left. Raises InputError where it is taken."""
  patience = _LOST_HOST_SECONDS if distributed.count() > 1 else 0
  distributed.together(lambda: until.enter_context(locked(workdir, patience)) if distributed.is_first() else None)


def read_record(workdir: pathlib.Path, config: Config) -> dict[str, Any] | None:
  """The record of the run that the folder holds, or None where it holds none, as process 0 reads it.

  Raises:
    InputError: it is another run than `config`'s.
  """
  return distributed.from_first(lambda: _read_record(workdir, config))


def _read_record(workdir: pathlib.Path, config: Config) -> dict[str, Any] | None:
  record = read_json(workdir / CONFIG_FILE)
  if workdir.is_file():
    raise InputError(f"--workdir={workdir} is no folder; choose another")
  if record is not None and (changes := settings_that_differ(from_json(record), config)):
    told = some_of([f"{name} is {old!r} there and {new!r} here" for name, (old, new) in changes.items()])
    raise InputError(f"--workdir={workdir} holds another run: {told}; use its settings or another --workdir")
  return record


def settings_that_differ(config: Config, other: Config) -> dict[str, tuple[Any, Any]]:
  """What makes `other` another run than `config`: by name, the values of both."""
  free, new = (*_FREE_SETTINGS, *_PATHS_OF[other.task], *_UNUSED_BY[other.task]), flatten(to_json(other))
  pairs = {name: (old, new[name]) for name, old in flatten(to_json(config)).items() if not name.startswith(free)}
  return {f"config.{name}": pair for name, pair in pairs.items() if pair[0] != pair[1]}


def warn_of_other_paths(workdir: pathlib.Path, record: dict[str, Any], config: Config) -> None:
  """Of a run that is complete, whose inputs may be gone or elsewhere by now: they are not looked at."""
  old, new = flatten(to_json(from_json(record))), flatten(to_json(config))
  for name in _PATHS_OF[config.task]:
    if old[name] != new[name]:
      told = "%s was run with config.%s=%r, and that is not looked at again; for %r choose another --workdir"
      logging.warning(told, workdir, name, old[name], new[name])


def circumstances(command: str) -> dict[str, Any]:
  """For the record: how the program was started, in which versions, on what devices."""
  return {
    "command": command,
    "versions": versions(),
    "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
  }


def versions() -> dict[str, str]:
  """Of this package, Python, and the packages that results may depend on."""
  found = {name: importlib.metadata.version(name) for name in _REPORTED_PACKAGES}
  return {"dtm_jax": __version__, "python": platform.python_version(), **found}


def read_json(path: pathlib.Path) -> dict[str, Any] | None:
  """A record or summary, or None where it is not there. Raises InputError where it is damaged."""
  try:
    return json.loads(path.read_text()) if path.exists() else None
  except (OSError, ValueError, RecursionError) as error:
    raise InputError(f"{path} cannot be read ({error}); use another --workdir") from error


def write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
  """Whole or not at all, by process 0. Raises InputError where it cannot be written."""
  if not distributed.is_first():
    return
  with replacing(path, RUN_AGAIN) as unfinished:
    unfinished.write_text(json.dumps(content, indent=2) + "\n")


def check_same_inputs(
  workdir: pathlib.Path, old: dict[str, Any] | None, new: dict[str, Any], names: tuple[str, ...]
) -> None:
  """Raises InputError where what lies behind paths and packages has changed, so that the run would not be the same.

  On every process, of which none may have inputs of its own.
  """
  distributed.check_same({name: new[name] for name in names})
  for name in names:
    if old is not None and name in old and old[name] != new[name]:  # older runs have fewer entries
      raise InputError(
        f"--workdir={workdir} was begun with {name}={old[name]!r}, and now it is {new[name]!r};"
        " bring that back or use another --workdir"
      )
