"""What saving costs a run, and how soon a stopped one trains again, from the command to its first step.

  python benchmarks/checkpoints.py [--page=vitb] [--batch=4] [--steps=15] [--rounds=5] [--json=FILE]

A save stalls the device while the state is copied, and then shares the host with the writing of the files. So by turns
a number of steps is made without and with a save before the first of them, until its files are there, too; the
difference is the save's, and the target is 5 % of the time of 100 steps. On CPUs, which write and compute with the same
cores, this is the worst case. A resume is the real command in a new process, with compiled programs from the run
before; the target is 30 s. Images are noise; the teacher's weights are random, and read from a file
of CLIP's size.
"""

import argparse
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
from common import (
  ROOT,
  alternate,
  argument_parser,
  quartiles,
  random_clip,
  report,
  run_options,
  warn_if_busy,
  write_json,
)

from dtm_jax import command_line, metrics, pretraining
from dtm_jax import config as config_lib
from dtm_jax.checkpoint import CheckpointStore
from dtm_jax.console import EXIT_SIGNAL
from dtm_jax.data.pipeline import train_batches

STEPS = 1000  # of the run, which no one waits for
STEPS_BETWEEN_SAVES = 100
POLL_SECONDS = 0.05


def arguments(options: argparse.Namespace, folder: pathlib.Path) -> list[str]:
  """Of the run, on noise."""
  settings = {"data.source": "synthetic", "data.batch_size": options.batch, "teacher.weights": random_clip(folder)}
  settings |= {"run.steps": STEPS, "run.log_every_steps": 1}
  return run_options(options.page, settings, is_cpu=jax.default_backend() == "cpu")


def stall_of_a_save(options: argparse.Namespace, run: list[str], folder: pathlib.Path) -> dict[str, Any]:
  """Seconds of a step, and what a save adds to `--steps` of them."""
  config = config_lib.resolve(command_line.parse_config(["checkpoints", *run]))
  parts = pretraining.build(config)
  batches = train_batches(config, parts.train_source, start_step=0)
  store = CheckpointStore(folder, keep=1)
  state, _ = parts.begin()
  batch = parts.place(next(batches))
  state, _ = parts.train_step(state, batch)

  def steps(_: int) -> None:
    nonlocal state
    for _ in range(options.steps):
      state, metrics = parts.train_step(state, batch)
      jax.block_until_ready(metrics)

  returned = []

  def steps_with_save(i: int) -> None:
    start = time.perf_counter()
    store.save(state)
    returned.append(time.perf_counter() - start)
    steps(i)
    store.wait()  # nothing to wait for where the steps took longer

  seconds = alternate({"without": steps, "with": steps_with_save}, options.rounds)
  store.close()
  batches.close()
  step = statistics.median(seconds["without"]) / options.steps
  extra = [there - alone for there, alone in zip(seconds["with"], seconds["without"], strict=True)]
  gigabytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9
  return {
    "step_seconds": step,
    "gigabytes": gigabytes,
    "seconds_until_save_returns": statistics.median(returned[1:]),
    "save_seconds": statistics.median(extra),
    "save_quartiles": quartiles(extra),
    "share_of_100_steps": statistics.median(extra) / (STEPS_BETWEEN_SAVES * step),
  }


def resumes(rounds: int, run: list[str], folder: pathlib.Path) -> dict[str, Any]:
  """Seconds from the command to its first step, for a run that is stopped by SIGTERM after it, and starts again."""
  seconds = [_until_first_step(run, folder) for _ in range(rounds + 2)]
  new, first, *counted = seconds  # the first resume compiles how to restore
  resumed = {"resume_seconds": statistics.median(counted), "quartiles": quartiles(counted)}
  return {"new_run_seconds": new, "first_resume_seconds": first, **resumed}


def _until_first_step(run: list[str], folder: pathlib.Path) -> float:
  workdir, log = folder / "run", folder / "run.log"
  environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), "PYTHONPATH": str(ROOT)}
  rows, start = _count_rows(workdir), time.perf_counter()
  command = [sys.executable, "-m", "dtm_jax.main", *run, f"--workdir={workdir}"]
  with log.open("w") as out:
    process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
  while _count_rows(workdir) == rows:
    if process.poll() is not None:
      sys.exit(f"the run has ended before its first step:\n{log.read_text()}")
    time.sleep(POLL_SECONDS)
  seconds = time.perf_counter() - start
  process.send_signal(signal.SIGTERM)
  if process.wait() != EXIT_SIGNAL:
    sys.exit(f"the run has not saved:\n{log.read_text()}")
  return seconds


def _count_rows(workdir: pathlib.Path) -> int:
  path = workdir / metrics.FILE
  return len(path.read_text().splitlines()) if path.exists() else 0


def main() -> None:
  parser = argument_parser(__doc__, rounds=5)
  parser.add_argument("--page", default="vitb", help="of configs/, a pre-training (%(default)s)")
  parser.add_argument("--batch", type=int, default=4, help="images per step (%(default)s)")
  parser.add_argument("--steps", type=int, default=15, help="of a block (%(default)s)")
  options = parser.parse_args()
  warn_if_busy()
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    run = arguments(options, folder / "clip")
    save = stall_of_a_save(options, run, folder / "saves")
    resume = resumes(options.rounds, run, folder)
  report(
    [save],
    {
      "step, s": ("step_seconds", ".2f"),
      "GB": ("gigabytes", ".2f"),
      "save returns, s": ("seconds_until_save_returns", ".2f"),
      "save costs, s": ("save_seconds", ".2f"),
      "of 100 steps": ("share_of_100_steps", ".1%"),
    },
  )
  columns = {
    "new run, s": "new_run_seconds",
    "resumed first, s": "first_resume_seconds",
    "resumed, s": "resume_seconds",
  }
  report([resume], {name: (value, ".1f") for name, value in columns.items()})
  write_json(options.json, {"save": save, "resume": resume}, ("jax", "jaxlib", "orbax-checkpoint", "numpy"))


if __name__ == "__main__":
  main()
