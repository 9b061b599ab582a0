"""`python -m dtm_jax.main --config=configs/NAME.py --workdir=DIR [--config.path.to.key=value]`.

Exit codes: 0 done; 2 wrong usage, config or data; 3 loss not finite; 143 stopped by a signal after saving.
"""

import contextlib
import errno
import pathlib
import shlex
import signal
import sys
import threading
from collections.abc import Iterator

from ml_collections import ConfigDict

from dtm_jax import command_line, console
from dtm_jax.errors import InputError

EXIT_INPUT, EXIT_NONFINITE, EXIT_SIGNAL = 2, 3, 143
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def main(argv: list[str]) -> int:
  """Runs the command line `argv`, whose first element is the program, and returns the exit code."""
  if {"--help", "-h"} & {*argv}:
    print(__doc__)
    return 0
  try:
    config, workdir = command_line.parse(argv)
    console.log_plainly()
    return _run(config, workdir, shlex.join([sys.executable, "-m", "dtm_jax.main", *argv[1:]]))
  except InputError as error:
    return console.fail(error, EXIT_INPUT)
  except OSError as error:
    if error.errno not in _CANNOT_WRITE:
      raise
    return console.fail(f"{error}; make room or get permission, then run the same command: it goes on", EXIT_INPUT)


def _run(settings: ConfigDict, workdir: pathlib.Path, command: str) -> int:
  # Not before the options are right: the backend takes seconds to start.
  import jax

  from dtm_jax import config, evaluation, finetuning, loop, pretraining

  tasks = {"pretrain": pretraining.run, "finetune": finetuning.run, "evaluate": evaluation.run}

  with noted_signals() as stop:
    try:
      # float32 means float32, on TPUs and GPUs too; products of bfloat16 are not concerned.
      with jax.default_matmul_precision("float32"):
        resolved = config.resolve(settings)
        is_done = tasks[resolved.task](resolved, workdir, command, stop.is_set)
    except loop.NonFiniteError as error:
      return console.fail(error, EXIT_NONFINITE)
  return 0 if is_done else EXIT_SIGNAL


@contextlib.contextmanager
def noted_signals() -> Iterator[threading.Event]:
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


if __name__ == "__main__":
  sys.unraisablehook = console.report_unraisable
  sys.exit(main(sys.argv))
