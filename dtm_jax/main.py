"""`python -m dtm_jax.main --config=configs/NAME.py --workdir=DIR [--config.path.to.key=value]`.

Exit codes: 0 done; 2 wrong usage, config or data; 3 loss not finite; 143 stopped by a signal after saving.
"""

import logging as python_logging
import os
import pathlib
import shlex
import signal
import sys
import threading

from absl import flags, logging
from ml_collections import config_flags

from dtm_jax.errors import InputError

_PACKAGE = pathlib.Path(__file__).parent
# The configs lie beside the package in a checkout and inside it when installed.
_CONFIG_FOLDER = next(folder for folder in (_PACKAGE.parent / "configs", _PACKAGE / "configs") if folder.is_dir())

_CONFIG = config_flags.DEFINE_config_file(
  "config", str(_CONFIG_FOLDER / "quickstart.py"), "The run, a file of configs/; FILE:smoke is its miniature."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "What the run leaves behind goes here; the default is runs/NAME_OF_CONFIG.")

EXIT_INPUT, EXIT_NONFINITE, EXIT_SIGNAL = 2, 3, 143


def main(argv: list[str]) -> int:
  try:
    flags.FLAGS(argv)
    _log_plainly()
    return _run(shlex.join([sys.executable, "-m", "dtm_jax.main", *argv[1:]]))
  except (InputError, flags.Error) as error:
    return _fail(error, EXIT_INPUT)


def _run(command: str) -> int:
  # Not before the flags are right: the backend takes seconds to start.
  from dtm_jax import config, experiment, loop

  stop = threading.Event()
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: stop.set())
  try:
    is_done = experiment.run(config.resolve(_CONFIG.value), _workdir(), command, stop.is_set)
  except loop.NonFiniteError as error:
    return _fail(error, EXIT_NONFINITE)
  return 0 if is_done else EXIT_SIGNAL


def _workdir() -> pathlib.Path:
  name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
  return pathlib.Path(_WORKDIR.value or f"runs/{name}")


def _log_plainly() -> None:
  """This package's messages, and warnings of others, as `12:34:56 text`."""
  logging.use_absl_handler()
  logging.set_verbosity(logging.INFO)
  handler = logging.get_absl_handler()
  handler.setFormatter(python_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
  own = str(_PACKAGE)
  handler.addFilter(lambda record: record.levelno >= python_logging.WARNING or record.pathname.startswith(own))


def _fail(error: Exception, code: int) -> int:
  print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
  return code


if __name__ == "__main__":
  sys.exit(main(sys.argv))
