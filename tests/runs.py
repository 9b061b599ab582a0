"""Runs as a user starts them: the miniature of the quickstart, in a process of its own."""

import contextlib
import functools
import json
import os
import pathlib
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SMOKE = f"--config={ROOT}/configs/quickstart.py:smoke"
# Most of a small run's time goes into compiling: machine code as it comes is there in half of it.
QUICKLY_COMPILED = "--xla_backend_optimization_level=0"
# Not what a run computes, but how fast it did.
_TIMES = ("images_per_second", "percent_waiting")


def options(workdir: pathlib.Path, **settings) -> list[str]:
  """Of a run without k-NN and pictures; `run__steps=3` sets config.run.steps."""
  quick = {"eval__knn": False, "eval__figure_images": 0} | settings
  return [SMOKE, f"--workdir={workdir}", *(f"--config.{k.replace('__', '.')}={v}" for k, v in quick.items())]


@contextlib.contextmanager
def built_once(task: types.ModuleType) -> Iterator[None]:
  """Runs of a task in this process that have the same settings share data, model and compiled steps.

  Most of a small run's time goes into tracing them. Runs in processes of their own share nothing.
  """
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(task, "build", functools.cache(task.build))
    yield


_started: list[subprocess.Popen] = []


def popen(command: list, **settings) -> subprocess.Popen:
  """A process that ends with the test which starts it, also where that fails."""
  process = subprocess.Popen(command, **settings)
  _started.append(process)
  return process


def end_all() -> None:
  """Ends what still runs: a launcher passes that on to what it has started."""
  while _started:
    process = _started.pop()
    if process.poll() is None:
      process.terminate()
      try:
        process.communicate(timeout=90)
      except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


def start(arguments: list[str], cache: pathlib.Path | None, *, devices: int = 1, prefix: tuple[str, ...] = ()):
  """A process of `dtm_jax.main` on so many CPU devices; standard error is piped, as text.

  It keeps its compiled programs in `cache`, or for None where it keeps them unasked.
  """
  environment = os.environ | {
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICKLY_COMPILED}",
    "JAX_COMPILATION_CACHE_DIR": str(cache),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "PYTHONPATH": str(ROOT),
  }
  if cache is None:
    del environment["JAX_COMPILATION_CACHE_DIR"]
  command = [*prefix, sys.executable, "-m", "dtm_jax.main", *arguments]
  return popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def start_pair(arguments: list[str], cache: pathlib.Path, prefixes: tuple[tuple[str, ...], ...] = ((), ())):
  """Two processes of one run, a device each."""
  program = "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])"
  port = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
  together = ("env", f"JAX_COORDINATOR_ADDRESS=127.0.0.1:{port}", "JAX_NUM_PROCESSES=2")
  return [
    start(arguments, cache, prefix=(*together, f"JAX_PROCESS_ID={i}", *prefix)) for i, prefix in enumerate(prefixes)
  ]


def dumping(folder: pathlib.Path) -> tuple[str, ...]:
  """A prefix of a command that writes each of its programs into a folder as it comes to it."""
  return ("env", f"JAX_DUMP_IR_TO={folder}", "JAX_DUMP_IR_MODES=stablehlo")


def finish(process: subprocess.Popen) -> tuple[int, str]:
  """Exit code and standard error."""
  _, stderr = process.communicate()
  return process.returncode, stderr


def train(workdir: pathlib.Path, cache: pathlib.Path, **settings) -> None:
  """A run to its end, in a process of its own."""
  code, stderr = finish(start(options(workdir, **settings), cache))
  assert code == 0, stderr


def wait_until(condition: Callable[[], object], process: subprocess.Popen) -> None:
  """Returns as soon as the condition holds; fails where the process ends before."""
  while not condition():
    assert process.poll() is None, process.stderr.read()
    time.sleep(0.001)


def rows(workdir: pathlib.Path) -> list[dict]:
  """All lines of metrics.jsonl, without how fast the steps were."""
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [{name: value for name, value in line.items() if name not in _TIMES} for line in lines]


def summary(workdir: pathlib.Path) -> dict:
  return json.loads((workdir / "summary.json").read_text())


def checkpoints(workdir: pathlib.Path) -> list[int]:
  """Steps whose checkpoints are complete."""
  return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
