"""Files that are there whole or not at all, and folders that one process at a time is at work in."""

import contextlib
import fcntl
import os
import pathlib
import shutil
import time
from collections.abc import Iterator
from typing import IO

from dtm_jax.errors import InputError

_POLL_SECONDS = 0.2


@contextlib.contextmanager
def replacing(path: pathlib.Path, remedy: str = "make room or choose another place") -> Iterator[pathlib.Path]:
  """Gives a name beside `path` for a file or folder, which takes the place of `path` once it is whole.

  Of a folder that is there already, the files of the same names are replaced, one after the other.

  Args:
    path: To write; its folder is made where it is missing. Of a link, what it leads to is written.
    remedy: For the message, where it cannot be written.

  Raises:
    InputError: it cannot be written, or is neither a file nor a folder.
  """
  place = _place(path)
  unfinished = place.with_name(f".{place.name}.{os.getpid()}.tmp")
  try:
    place.parent.mkdir(parents=True, exist_ok=True)
    _remove(unfinished)
    yield unfinished
    if unfinished.is_dir() and place.is_dir():
      for file in unfinished.iterdir():
        file.replace(place / file.name)
    else:
      _to_disk(unfinished)
      unfinished.replace(place)
  except OSError as error:
    raise InputError(f"cannot write {path} ({error.strerror or error}); {remedy}") from error
  finally:
    with contextlib.suppress(OSError):  # what went wrong is told already
      _remove(unfinished)


@contextlib.contextmanager
def locked(path: pathlib.Path, problem: str, patience: float = 0) -> Iterator[int]:
  """Holds a lock until it is left, or this process ends, and all children do that were passed its file descriptor.

  Args:
    path: of the lock, an empty file that stays.
    problem: what is wrong where another process holds it.
    patience: seconds to wait for that one.

  Raises:
    InputError: with `problem`, or because the file cannot be made.
  """
  try:
    file = path.open("w")
  except OSError as error:
    raise InputError(f"cannot write {path} ({error.strerror or error}); choose another place") from error
  with file:
    end = time.monotonic() + patience
    while not _takes_lock(file):
      if time.monotonic() >= end:
        raise InputError(problem)
      time.sleep(_POLL_SECONDS)
    yield file.fileno()


def _takes_lock(file: IO) -> bool:
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError:  # a file system without locks
    pass
  return True


def _to_disk(path: pathlib.Path) -> None:
  """Else a power cut could leave the new name without its content."""
  if path.is_file():
    with path.open("rb") as file:
      os.fsync(file.fileno())


def _place(path: pathlib.Path) -> pathlib.Path:
  """Where `path` leads. Raises InputError where no file or folder can be."""
  try:
    place = path.resolve()
    is_circle = place.is_symlink()  # from Python 3.13 on; a RuntimeError before
    is_odd = not place.name or is_circle or (place.exists() and not place.is_file() and not place.is_dir())
  except (OSError, RuntimeError) as error:
    raise InputError(f"cannot write {path} ({error}); choose another place") from error
  if is_odd:
    raise InputError(f"cannot write {path}: it is no file or folder that can be replaced; choose another place")
  return place


def _remove(path: pathlib.Path) -> None:
  if path.is_dir():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)
