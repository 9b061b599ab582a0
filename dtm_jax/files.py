"""Files that are there whole or not at all."""

import contextlib
import pathlib
import shutil
from collections.abc import Iterator

from dtm_jax.errors import InputError


@contextlib.contextmanager
def replacing(path: pathlib.Path, remedy: str = "make room or choose another place") -> Iterator[pathlib.Path]:
  """Gives a name beside `path` for a file or folder, which takes the place of `path` once it is whole.

  Of a folder that is there already, the files of the same names are replaced.

  Args:
    path: To write; its folder is made where it is missing.
    remedy: For the message, where it cannot be written.

  Raises:
    InputError: it cannot be written.
  """
  unfinished = path.with_name(f".{path.name}.tmp")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(unfinished)
    yield unfinished
    if unfinished.is_dir() and path.is_dir():
      for file in unfinished.iterdir():
        file.replace(path / file.name)
    else:
      unfinished.replace(path)
  except OSError as error:
    raise InputError(f"cannot write {path} ({error.strerror or error}); {remedy}") from error
  finally:
    with contextlib.suppress(OSError):  # what went wrong is told already
      _remove(unfinished)


def _remove(path: pathlib.Path) -> None:
  if path.is_dir():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)
