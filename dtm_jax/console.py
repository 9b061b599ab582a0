"""What a run prints: plain lines that do not break the progress bar, and no tracebacks of other people's threads."""

import argparse
import errno
import logging as python_logging
import pathlib
import sys
from collections.abc import Callable

import tqdm
from absl import logging

from dtm_jax.errors import LESS_MEMORY, OUT_OF_MEMORY, InputError, TransientError

EXIT_FAILED, EXIT_INPUT, EXIT_INTERRUPTED, EXIT_SIGNAL = 1, 2, 130, 143
INTERRUPTED = "interrupted before there was anything to save"
_PACKAGE = str(pathlib.Path(__file__).parent)
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)

_speaker, _is_silent = "", False  # which of several processes this is, and whether it has a bar


class LineHandler(python_logging.Handler):
  """Writes `12:34:56 text` to stderr, above the progress bar where there is one."""

  def __init__(self):
    super().__init__()
    self.setFormatter(python_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))

  def filter(self, record: python_logging.LogRecord) -> bool:
    """This package's messages, and warnings of others."""
    # An exception that a background thread of orbax logs reaches us too, to be told in one line.
    is_warning = record.levelno >= python_logging.WARNING and not record.exc_info
    return is_warning or record.pathname.startswith(_PACKAGE)

  def emit(self, record: python_logging.LogRecord) -> None:
    tqdm.tqdm.write(self.format(record), file=sys.stderr)


LINES = LineHandler()


def log_plainly() -> None:
  logging.set_verbosity(logging.INFO)
  python_logging.root.addHandler(LINES)


def speak_as(process: int) -> None:
  """Of several processes the first tells how things go; the others are silent but for errors, and all say who fails."""
  global _speaker, _is_silent
  _speaker, _is_silent = f" in process {process}", process > 0
  if _is_silent:
    logging.set_verbosity(logging.ERROR)
    LINES.setLevel(python_logging.ERROR)


def progress_bar(**options) -> tqdm.tqdm:
  """As wide as the terminal; none where standard error is no terminal, or not this process's."""
  return tqdm.tqdm(dynamic_ncols=True, disable=_is_silent or None, **options)


class ArgumentParser(argparse.ArgumentParser):
  """Wrong usage is an `InputError` like any other."""

  def error(self, message: str):
    raise InputError(f"{message}; --help shows the usage")


def exit_code(command: Callable[[], None]) -> int:
  """Runs what reads and writes models: 0, or what went wrong in one line and its exit code."""
  try:
    command()
  except (InputError, OSError) as error:
    return fail(error, EXIT_INPUT)
  except TransientError as error:
    return fail(error, EXIT_FAILED)
  except MemoryError as error:
    return fail(f"not enough memory for these weights ({error})", EXIT_INPUT)
  except KeyboardInterrupt:
    return fail("interrupted", EXIT_INTERRUPTED)
  return 0


def tell(error: Exception) -> int | None:
  """Tells what is wrong with what a run was given, and returns the exit code; None where the error is another."""
  if isinstance(error, InputError):
    return fail(error, EXIT_INPUT)
  if isinstance(error, TransientError):
    return fail(error, EXIT_FAILED)
  if isinstance(error, OSError) and error.errno in _CANNOT_WRITE:
    return fail(f"{error}; make room or get permission, then run the same command: it goes on", EXIT_INPUT)
  if isinstance(error, RuntimeError) and OUT_OF_MEMORY in str(error):
    reason = str(error).partition("\n")[0]
    return fail(f"devices are out of memory ({reason}); {LESS_MEMORY}", EXIT_INPUT)
  return None


def fail(error: Exception | str, code: int) -> int:
  """Tells what is wrong in one line on standard error; returns the exit code."""
  print(f"error{_speaker}: {' '.join(str(error).split())}", file=sys.stderr)
  return code


def report_unraisable(problem) -> None:
  """For `sys.unraisablehook`."""
  # After a save or a read has failed, orbax's other tasks end with no one to tell, or tell once more; it is told.
  text = str(problem.exc_value)
  if text != "Event loop is closed" and not text.startswith("Encountered error while reading array"):
    sys.__unraisablehook__(problem)
