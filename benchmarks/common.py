"""What the benchmarks share: timing in turns, robust statistics, a table, and a record of where they ran.

Times on a shared machine drift by more than the differences that matter. So
whatever is compared runs in turns in one process, and ratios are medians over
rounds, each of which compares neighbours in time.
"""

import argparse
import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dtm_jax

ROOT = pathlib.Path(__file__).parents[1]
BUSY_LOAD_PER_CORE = 0.3  # above this, other work on the machine decides the figures


def argument_parser(doc: str, rounds: int) -> argparse.ArgumentParser:
  """A parser with the options of every benchmark."""
  parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument(
    "--rounds", type=int, default=rounds, help="rounds that count, after one that does not (%(default)s)"
  )
  parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write results and machine to this file")
  return parser


def run_options(page: str, settings: Mapping[str, Any], is_cpu: bool) -> list[str]:
  """Arguments of a run that only trains: no evaluation, no pictures; on CPUs in float32, which they are better at.

  Args:
    page: of `configs/`.
    settings: of the config, by dotted name, on top.
    is_cpu: whether it runs on CPUs.
  """
  plain = {"model.dtype": "float32", "teacher.dtype": "float32"} if is_cpu else {}
  settings = {"eval.knn": False, "eval.figure_images": 0} | plain | settings
  return [f"--config={ROOT / 'configs' / page}.py", *(f"--config.{name}={value}" for name, value in settings.items())]


def random_clip(folder: pathlib.Path) -> pathlib.Path:
  """A weights file of CLIP B/16's size, for what takes the same time with any weights."""
  import transformers

  transformers.logging.disable_progress_bar()
  sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
  settings = transformers.CLIPVisionConfig(**sizes, patch_size=16, projection_dim=512)
  transformers.CLIPVisionModelWithProjection(settings).save_pretrained(folder)
  return folder / "model.safetensors"


def in_turns(runs: Mapping[str, Callable[[int], Any]], rounds: int) -> dict[str, list[Any]]:
  """What each run returned in each round, after a round that is not counted.

  Args:
    runs: in turn, and back; called with the number of the round, from 0 (not counted).
    rounds: that count.
  """
  returned = {name: [] for name in runs}
  for i in range(rounds + 1):
    # Every other round backwards: what a run leaves in the caches and in memory favours no one.
    for name, run in list(runs.items())[:: 1 if i % 2 else -1]:
      returned[name].append(run(i))
  return {name: values[1:] for name, values in returned.items()}


def alternate(runs: Mapping[str, Callable[[int], Any]], rounds: int) -> dict[str, list[float]]:
  """Seconds that each run took in each round, see `in_turns`. Each waits for its own result."""
  return in_turns({name: functools.partial(_seconds, run) for name, run in runs.items()}, rounds)


def _seconds(run: Callable[[int], Any], i: int) -> float:
  start = time.perf_counter()
  run(i)
  return time.perf_counter() - start


def median_ratio(times: Sequence[float], reference: Sequence[float]) -> float:
  """Median over rounds of one time over the other's in the same round; below 1 the first is faster."""
  return statistics.median(a / b for a, b in zip(times, reference, strict=True))


def quartiles(values: Sequence[float]) -> tuple[float, float]:
  """First and third quartile: half of the rounds lie between."""
  if len(values) < 2:
    return values[0], values[0]
  first, _, third = statistics.quantiles(values, n=4, method="inclusive")
  return first, third


def report(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, tuple[str, str]]) -> None:
  """Prints rows as an aligned table.

  Args:
    rows: values by key; None prints as "-".
    columns: heading -> key and format.
  """
  texts = [["-" if row[key] is None else format(row[key], spec) for key, spec in columns.values()] for row in rows]
  widths = [max(map(len, column)) for column in zip(columns, *texts, strict=True)]
  for line in [list(columns), *texts]:
    first, *others = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
    print("  ".join([first.strip().ljust(widths[0]), *others]))


def warn_if_busy() -> None:
  """Says so where the machine has other work to do. To be called first."""
  load = os.getloadavg()[0]
  if load > BUSY_LOAD_PER_CORE * _cores():
    print(f"the load is {load:.1f} on {_cores()} cores before the start: run again when it is quiet", file=sys.stderr)


def write_json(path: pathlib.Path | None, results: Any, packages: Sequence[str]) -> None:
  """Writes results with the machine, versions, date and command; nothing where no file is asked for."""
  if path is None:
    return
  record = {
    "command": shlex.join(["python", *sys.argv]),
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "cpu": _cpu_model(),
    "cores": _cores(),
    "gpus": _gpus(),
    "load_average": os.getloadavg(),
    "versions": {
      "dtm_jax": dtm_jax.__version__,
      "python": platform.python_version(),
      **{name: importlib.metadata.version(name) for name in packages},
    },
    "results": results,
  }
  path.write_text(json.dumps(record, indent=2) + "\n")


def _cores() -> int:
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _gpus() -> list[str]:
  """Name and driver of each NVIDIA GPU."""
  if shutil.which("nvidia-smi") is None:
    return []
  command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
  process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
  return process.stdout.splitlines() if process.returncode == 0 else []  # a driver may be missing


def _cpu_model() -> str:
  cpuinfo = pathlib.Path("/proc/cpuinfo")
  lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
  names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
  return names[0] if names else platform.processor()
