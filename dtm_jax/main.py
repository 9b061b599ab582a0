"""`python -m dtm_jax.main --config=configs/NAME.py --workdir=DIR [--config.path.to.key=value]`.

Exit codes: 0 done; 2 wrong usage, config or data; 3 loss not finite; 143 stopped by a signal after saving.
"""

import contextlib
import errno
import logging as python_logging
import pathlib
import shlex
import signal
import sys
import threading
from collections.abc import Iterator

import tqdm
from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from dtm_jax.errors import InputError

_PACKAGE = pathlib.Path(__file__).parent
# The configs lie beside the package in a checkout and inside it when installed.
_CONFIG_FOLDER = next(folder for folder in (_PACKAGE.parent / "configs", _PACKAGE / "configs") if folder.is_dir())

EXIT_INPUT, EXIT_NONFINITE, EXIT_SIGNAL = 2, 3, 143
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def main(argv: list[str]) -> int:
  """Runs the command line `argv`, whose first element is the program, and returns the exit code."""
  if {"--help", "-h"} & {*argv}:
    print(__doc__)
    return 0
  try:
    config, workdir = _parse(argv)
    with _plain_log():
      return _run(config, workdir, shlex.join([sys.executable, "-m", "dtm_jax.main", *argv[1:]]))
  except InputError as error:
    return _fail(error, EXIT_INPUT)
  except OSError as error:
    if error.errno not in _CANNOT_WRITE:
      raise
    return _fail(f"{error}; make room or get permission, then run the same command: it goes on", EXIT_INPUT)


def _parse(argv: list[str]) -> tuple[ConfigDict, pathlib.Path]:
  flags.FLAGS(argv[:1])  # absl's own settings, which its log and Grain read
  values = flags.FlagValues()
  try:
    # Keys that do not exist pass here, to be named with their neighbours by `config.resolve`.
    options = {"flag_values": values, "sys_argv": argv, "lock_config": False, "accept_new_attributes": True}
    config = config_flags.DEFINE_config_file("config", str(_CONFIG_FOLDER / "quickstart.py"), **options)
    workdir = flags.DEFINE_string("workdir", None, "", flag_values=values)
    unknown = values(argv)[1:]
    if unknown:
      raise InputError(f"{unknown[0]!r} is not an option; a config file is given as --config=FILE")
    name = pathlib.Path(config_flags.get_config_filename(values["config"]).partition(":")[0]).stem
    return config.value.copy_and_resolve_references(), pathlib.Path(workdir.value or f"runs/{name}")
  except InputError:
    raise
  except flags.Error as error:
    raise InputError(f"{error}; mend that option, --help shows the usage") from error
  except Exception as error:  # a config file is Python: anything can go wrong in it
    given = " ".join(arg for arg in argv if arg.startswith("--config"))
    raise InputError(f"cannot load {given or 'the default config'} ({_reason(error)}); mend the file or option") from error


def _reason(error: Exception) -> str:
  """What ml_collections wraps, often twice and with a traceback in the text."""
  while error.args and isinstance(error.args[0], Exception):
    error = error.args[0]
  text = str(error.args[0]) if isinstance(error, KeyError) else str(error)
  *_, last = (line for line in text.splitlines() if line.strip())
  return f"{type(error).__name__}: {last.strip()}"


def _run(settings: ConfigDict, workdir: pathlib.Path, command: str) -> int:
  # Not before the options are right: the backend takes seconds to start.
  from dtm_jax import config, experiment, loop

  with _noted_signals() as stop:
    try:
      is_done = experiment.run(config.resolve(settings), workdir, command, stop.is_set)
    except loop.NonFiniteError as error:
      return _fail(error, EXIT_NONFINITE)
  return 0 if is_done else EXIT_SIGNAL


@contextlib.contextmanager
def _noted_signals() -> Iterator[threading.Event]:
  """SIGTERM and SIGINT set the event instead of ending the process; a second Ctrl-C ends it."""
  stop = threading.Event()

  def note(number, frame):
    stop.set()
    signal.signal(signal.SIGINT, signal.SIG_DFL)

  previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield stop
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


class _LineHandler(python_logging.Handler):
  """Writes lines above the progress bar, where there is one."""

  def emit(self, record: python_logging.LogRecord) -> None:
    tqdm.tqdm.write(self.format(record), file=sys.stderr)


@contextlib.contextmanager
def _plain_log() -> Iterator[None]:
  """This package's messages, and warnings of others, as `12:34:56 text` on stderr."""
  handler = _LineHandler()
  handler.setFormatter(python_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
  own = str(_PACKAGE)
  # An exception that a background thread of orbax logs comes to us too, to be told in one line.
  handler.addFilter(
    lambda log: log.pathname.startswith(own) or (log.levelno >= python_logging.WARNING and not log.exc_info)
  )
  logging.set_verbosity(logging.INFO)
  python_logging.root.addHandler(handler)
  try:
    yield
  finally:
    python_logging.root.removeHandler(handler)


def _fail(error: Exception | str, code: int) -> int:
  print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
  return code


if __name__ == "__main__":
  sys.exit(main(sys.argv))
