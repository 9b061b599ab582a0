"""Images per second of training in several processes beside one, on this machine, with the same devices.

  python benchmarks/processes.py [--processes=2] [--steps=60] [--batch=64] [--rounds=3] [--json=FILE]

Each is the quickstart, started by `launch/local.sh`: one process with so many devices, and so many processes with one
each, by turns. A figure is the median over the logs of a run, without the first, which has the compilation. The target
is 0.9 of one process's images per second. On GPUs one process alone would have one of them: run it on CPUs.
"""

import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

from common import argument_parser, quartiles, report, warn_if_busy, write_json

ROOT = pathlib.Path(__file__).parents[1]
LOGS = 12  # of a run


def train(processes: int, devices: int, steps: int, batch_size: int, folder: pathlib.Path) -> float:
  """Images per second of a run in a new folder."""
  with tempfile.TemporaryDirectory(dir=folder) as workdir:
    settings = {
      **{"run.steps": steps, "run.log_every_steps": max(1, steps // LOGS), "run.checkpoint_every_steps": steps},
      **{"eval.knn": False, "eval.figure_images": 0, "data.batch_size": batch_size},
    }
    options = [f"--config.{name}={value}" for name, value in settings.items()]
    command = [ROOT / "launch" / "local.sh", str(processes), f"--config={ROOT}/configs/quickstart.py", *options]
    variables = {"DEVICES_PER_PROCESS": str(devices), "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    variables |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    run = [*command, f"--workdir={workdir}"]
    subprocess.run(run, env=os.environ | variables, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
  _, *speeds = (json.loads(line)["images_per_second"] for line in lines)
  return statistics.median(speeds)


def main() -> None:
  parser = argument_parser(__doc__, rounds=3)
  parser.add_argument("--processes", type=int, default=2, help="and devices (%(default)s)")
  parser.add_argument("--steps", type=int, default=60, help="of a run (%(default)s)")
  parser.add_argument("--batch", type=int, default=64, help="images of all processes (%(default)s)")
  options = parser.parse_args()
  warn_if_busy()
  count = options.processes
  with tempfile.TemporaryDirectory() as folder:
    run = functools.partial(train, steps=options.steps, batch_size=options.batch, folder=pathlib.Path(folder))
    contenders = {"one process": (1, count), f"{count} processes": (count, 1)}
    speeds = {name: [] for name in contenders}
    for i in range(options.rounds + 1):  # the first is not counted
      for name in list(contenders)[:: 1 if i % 2 else -1]:
        speeds[name].append(run(*contenders[name]))
  counted = {name: values[1:] for name, values in speeds.items()}
  alone = counted["one process"]
  rows = [
    {
      "contender": name,
      "processes": contenders[name][0],
      "devices": count,
      "images_per_second": statistics.median(values),
      "quartiles": quartiles(values),
      "of_one_process": statistics.median(own / other for own, other in zip(values, alone, strict=True)),
    }
    for name, values in counted.items()
  ]
  columns = {
    "contender": ("contender", ""),
    "images/s": ("images_per_second", ".1f"),
    "of one process": ("of_one_process", ".2f"),
  }
  report(rows, columns)
  write_json(options.json, rows, ("jax", "jaxlib", "numpy"))


if __name__ == "__main__":
  main()
