"""Images per second of training in several processes beside one, on this machine, with the same devices.

  python benchmarks/processes.py [--processes=2] [--rounds=2] [--only=RUN] [--json=FILE]

Each run is started by `launch/local.sh`: one process with so many devices, and so many processes with one each, by
turns. A figure is the median over the logs of a run, without the first, in which the step is compiled and the data
workers start. The target is 0.9 of one process's images per second. On GPUs one process alone would have one of them:
run it on CPUs.

ViT-S reads JPEG files with its page's eight data workers in each process. Processes on CPUs exchange by Gloo, which
costs a millisecond or two for each array: they sum all gradients as one (`dtm_jax.sharding.mean_of_devices`). Without
that, two processes made 0.66 of one's images per second with the quickstart's small steps.
"""

import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from common import (
  ROOT,
  argument_parser,
  in_turns,
  median_ratio,
  quartiles,
  report,
  run_options,
  warn_if_busy,
  write_json,
)
from waiting import LOGS, write_images


def make_runs(images: pathlib.Path) -> dict[str, tuple[str, dict[str, Any]]]:
  """Page and settings by name; `images` is a folder of images."""
  folder = {"data.source": "folder", "data.path": images, "teacher.kind": "hog", "teacher.weights": ""}
  return {
    "ViT-S": ("vits", folder | {"run.steps": 24, "data.batch_size": 32}),
    "quickstart": ("quickstart", {"run.steps": 120, "data.batch_size": 64}),
  }


def train(
  page: str,
  settings: dict[str, Any],
  processes: int,
  devices: int,
  *,
  folder: pathlib.Path,
  environment: Mapping[str, str] = MappingProxyType({}),
) -> float:
  """Seconds per image of a run in a new folder, with `environment` on top of this process's."""
  steps = settings["run.steps"]
  settings = settings | {"run.log_every_steps": steps // LOGS, "run.checkpoint_every_steps": steps}
  variables = {"DEVICES_PER_PROCESS": str(devices), "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
  variables |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
  variables |= environment
  with tempfile.TemporaryDirectory(dir=folder) as workdir:
    options = [*run_options(page, settings, is_cpu=True), f"--workdir={workdir}"]
    command = [ROOT / "launch" / "local.sh", str(processes), *options]
    subprocess.run(
      command, env=os.environ | variables, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
  _, *speeds = (row["images_per_second"] for row in map(json.loads, lines) if "images_per_second" in row)
  return 1 / statistics.median(speeds)


def compare(
  name: str, page: str, settings: dict[str, Any], processes: int, rounds: int, folder: pathlib.Path
) -> dict[str, Any]:
  """One row of the table."""
  run = functools.partial(train, page, settings, folder=folder)
  layouts = {"one": (1, processes), "several": (processes, 1)}
  seconds = in_turns({name: lambda _, layout=layout: run(*layout) for name, layout in layouts.items()}, rounds)
  one, several = seconds.values()
  return {
    "run": name,
    "batch": settings["data.batch_size"],
    "processes": processes,
    "one_images_per_second": 1 / statistics.median(one),
    "several_images_per_second": 1 / statistics.median(several),
    "ratio": median_ratio(one, several),
    "quartiles": quartiles([a / b for a, b in zip(one, several, strict=True)]),
  }


def main() -> None:
  parser = argument_parser(__doc__, rounds=2)
  parser.add_argument("--processes", type=int, default=2, help="and devices (%(default)s)")
  parser.add_argument("--only", choices=[*make_runs(pathlib.Path())], help="of the table")
  options = parser.parse_args()
  warn_if_busy()
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    write_images(folder / "images")
    runs = make_runs(folder / "images")
    rows = [
      compare(name, *run, options.processes, options.rounds, folder)
      for name, run in runs.items()
      if options.only in (None, name)
    ]
  columns = {
    "run": ("run", ""),
    "batch": ("batch", "d"),
    "one process, images/s": ("one_images_per_second", ".2f"),
    f"{options.processes} processes, images/s": ("several_images_per_second", ".2f"),
    "ratio": ("ratio", ".2f"),
  }
  report(rows, columns)
  write_json(options.json, rows, ("jax", "jaxlib", "numpy"))


if __name__ == "__main__":
  main()
