"""What a run prints: plain lines that do not break the progress bar, and no tracebacks of other people's threads."""

import argparse
import logging as python_logging
import pathlib
import sys
from collections.abc import Callable

import tqdm
from absl import logging

from dtm_jax.errors import InputError

EXIT_INPUT, EXIT_INTERRUPTED = 2, 130
_PACKAGE = str(pathlib.Path(__file__).parent)


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
  except MemoryError as error:
    return fail(f"not enough memory for these weights ({error})", EXIT_INPUT)
  except KeyboardInterrupt:
    return fail("interrupted", EXIT_INTERRUPTED)
  return 0


def fail(error: Exception | str, code: int) -> int:
  """Tells what is wrong in one line on standard error; returns the exit code."""
  print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
  return code


def report_unraisable(problem) -> None:
  """For `sys.unraisablehook`."""
  # After a save has failed, tensorstore's other writes report to orbax's loop that is gone; the failure itself is told.
  if str(problem.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(problem)
