"""A study: many runs, in the order in which they need each other, and a table of what they have found.

  python -m dtm_jax.study --config=configs/study_fashion_mnist.py --scale=ci [--workdir=runs/study] [--jobs=N]

Every run is one of `dtm_jax.main` in a folder and a process of its own; as many at a time as there are GPUs, or CPU
cores (up to 8), or --jobs. `--config.path.to.key=value` goes to all of them. Results are in DIR/results.md,
DIR/results.json and DIR/figures, written anew after every run. The same command goes on where it was stopped or killed.

Exit codes: 0 done; 1 some runs failed, the others are done; 2 wrong usage, config or data; 143 stopped by a signal,
after saving.
"""

import argparse
import pathlib
import sys

from absl import logging

from dtm_jax import console, signals
from dtm_jax import workdir as workdirs
from dtm_jax.console import EXIT_INPUT, EXIT_SIGNAL
from dtm_jax.data.sources import open_source
from dtm_jax.errors import InputError
from dtm_jax.study import pictures, results
from dtm_jax.study.plan import Study, read_study
from dtm_jax.study.runner import Runner, find_slots

EXIT_FAILED = 1


def main(argv: list[str]) -> int:
  """Runs the command line `argv`, whose first element is the program, and returns the exit code."""
  try:
    options, overrides = _parser().parse_known_args(argv[1:])
    folder = options.workdir or pathlib.Path(f"runs/study_{options.scale}")
    study = read_study(options.config, options.scale, overrides, folder)
    console.log_plainly()
    _check_data(study)
    return _run(study, options.jobs)
  except (InputError, OSError) as error:
    return console.fail(error, EXIT_INPUT)


def _parser() -> argparse.ArgumentParser:
  parser = console.ArgumentParser(
    prog="python -m dtm_jax.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--config", default="configs/study_fashion_mnist.py", help="the page of the study")
  parser.add_argument("--scale", default="cpu", help="one of the page's, such as ci, cpu, gpu")
  parser.add_argument("--workdir", type=pathlib.Path, help="folder of the study; runs/study_SCALE")
  parser.add_argument("--jobs", type=_positive, help="runs at a time; one for each GPU or CPU core")
  return parser


def _positive(text: str) -> int:
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of runs")
  return int(text)


def _check_data(study: Study) -> None:
  """Before any run is started. Raises InputError where data are missing, with what the page says of making them."""
  for data in {cell.config.data for cell in study.cells}:
    try:
      open_source(data, "train")
      open_source(data, "eval")
    except InputError as error:
      raise InputError(f"{error}. {study.data_hint}") from error


def _run(study: Study, jobs: int | None) -> int:
  workdirs.create(study.folder)
  with workdirs.locked(study.folder) as lock, signals.noted() as stop:
    runner = Runner(study.folder, find_slots(jobs), lock, stop)
    logging.info("%s: %d cells in %s, %d at a time", study.title, len(study.cells), *(study.folder, len(runner.slots)))
    runner.run(study.cells, on_end=lambda: _report(study))
    table = _report(study)
  if runner.failed:
    logging.info("%d cells failed or need one that did; the same command tries them again", len(runner.failed))
  if stop.is_set():
    logging.info("stopped; the same command goes on from there")
  logging.info("see %s and %s", table, study.folder / "figures")
  return EXIT_SIGNAL if stop.is_set() else EXIT_FAILED if runner.failed else 0


def _report(study: Study) -> pathlib.Path:
  found = results.collect(study)
  pictures.draw(study, found)
  return results.write(study.folder, found)


if __name__ == "__main__":
  sys.exit(main(sys.argv))
