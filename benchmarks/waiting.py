"""How long training waits for its images: pre-training and fine-tuning, from JPEG files, on the same cores.

  python benchmarks/waiting.py [--batch=16] [--steps=24] [--rounds=2] [--json=FILE]

Both are real runs of ViT-S/16 at 224 pixels from the same folder, by turns, each with its own recipe: fine-tuning's has
RandAugment. Waiting is what the loop logs: the time in which the devices have nothing to do until a batch is there. A
run logs three times, and a figure is the median but for the first, in which the step is compiled and the data workers
start. On CPUs these share the cores with the steps.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import jax
from common import ROOT, argument_parser, in_turns, random_clip, report, run_options, warn_if_busy, write_json
from host_pipeline import make_jpegs

NUM_CLASSES, COPIES = 4, 8
LOGS = 3  # of a run
PAGES = {"pre-training": "vits", "fine-tuning": "finetune_vits"}


def write_images(folder: pathlib.Path) -> None:
  """A folder of classes, with 256 photographs of 500 x 375 pixels."""
  for i, content in enumerate(make_jpegs(500, 375) * COPIES):
    path = folder / f"class{i % NUM_CLASSES}" / f"{i:03}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def train(page: str, settings: dict[str, Any], folder: pathlib.Path) -> dict[str, float]:
  """Images per second, and the share of the time that is spent waiting for images, in percent."""
  with tempfile.TemporaryDirectory(dir=folder) as workdir:
    options = run_options(page, settings, is_cpu=jax.default_backend() == "cpu")
    command = [sys.executable, "-m", "dtm_jax.main", *options, f"--workdir={workdir}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)
    lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
  rows = [row for row in map(json.loads, lines) if "percent_waiting" in row][1:]
  return {name: statistics.median(row[name] for row in rows) for name in ("images_per_second", "percent_waiting")}


def main() -> None:
  parser = argument_parser(__doc__, rounds=2)
  parser.add_argument("--batch", type=int, default=16, help="images per step (%(default)s)")
  parser.add_argument("--steps", type=int, default=24, help="of a run (%(default)s)")
  options = parser.parse_args()
  warn_if_busy()
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    write_images(folder / "images")
    settings = {"data.source": "folder", "data.path": folder / "images", "data.batch_size": options.batch}
    settings |= {"run.steps": options.steps, "run.log_every_steps": options.steps // LOGS}
    own = {"pre-training": {"teacher.weights": random_clip(folder / "clip")}, "fine-tuning": {"eval.every_epochs": 1e9}}
    runs = {name: lambda _, name=name: train(PAGES[name], settings | own[name], folder) for name in PAGES}
    results = in_turns(runs, options.rounds)
  rows = [
    {"task": name, **{key: statistics.median(run[key] for run in found) for key in found[0]}}
    for name, found in results.items()
  ]
  columns = {"task": ("task", ""), "images/s": ("images_per_second", ".2f"), "waiting, %": ("percent_waiting", ".2f")}
  report(rows, columns)
  write_json(options.json, rows, ("jax", "jaxlib", "grain", "pillow"))


if __name__ == "__main__":
  main()
