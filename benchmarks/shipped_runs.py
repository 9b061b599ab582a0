"""The shipped pages that two CPU cores can run, as a user runs them: what they reach, how long they take.

  python benchmarks/shipped_runs.py [--fashion_mnist=DATA] [--only RUN ...] [--json=FILE]

The quickstart, its evaluation, its fine-tuning, the same from scratch and, where the folder of the prepared data set is
given, Fashion-MNIST from scratch, as it is and with more tokens and passes. One run of each, one after the other, each
a process of its own with nothing compiled before; seconds are from the command to its end.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

from common import ROOT, report, warn_if_busy, write_json

SCORES = ("knn_top1_before", "knn_top1", "linear_top1", "fewshot_top1", "top1", "ema_top1")
COLUMNS = {"run": ("run", ""), "seconds": ("seconds", ".0f"), "GB": ("gigabytes", ".2f"), "images/s": ("rate", ".0f")}


def plan(folder: pathlib.Path, fashion_mnist: pathlib.Path | None) -> dict[str, list[str]]:
  """Arguments of each run, but for its work folder in `folder`."""
  runs = {
    "quickstart": [],
    "evaluate": [f"--config.eval.checkpoint={folder / 'quickstart'}"],
    "finetune_quickstart": [f"--config.finetune.init={folder / 'quickstart'}"],
    "finetune_quickstart, from scratch": ["--config.finetune.init="],
  }
  if fashion_mnist is not None:
    data = f"--config.data.path={fashion_mnist}"
    longer = ["--config.model.patch_size=4", "--config.run.epochs=20"]
    runs |= {"finetune_fashion_mnist": [data], "finetune_fashion_mnist, 49 tokens": [data, *longer]}
  return runs


def measure(name: str, arguments: list[str], folder: pathlib.Path) -> dict[str, Any]:
  """Runs a page to its end, and takes its summary."""
  page, workdir = name.partition(",")[0], folder / name
  options = [f"--config={ROOT / 'configs' / page}.py", f"--workdir={workdir}", *arguments]
  environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": ""}
  start = time.perf_counter()
  process = subprocess.Popen([sys.executable, "-m", "dtm_jax.main", *options], env=environment)
  _, status, usage = os.wait4(process.pid, 0)
  if status:
    raise SystemExit(f"{name} ended with {os.waitstatus_to_exitcode(status)}")
  seconds, summary = time.perf_counter() - start, json.loads((workdir / "summary.json").read_text())
  return {
    "run": name,
    "seconds": seconds,
    "gigabytes": usage.ru_maxrss * 1024 / 1e9,
    "rate": summary.get("images_per_second"),
    **{score: summary.get(score) for score in SCORES},
    "params_sha256": summary["params_sha256"],
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--fashion_mnist", type=pathlib.Path, metavar="DATA", help="TFDS data_dir that has it")
  parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write results and machine to this file")
  parser.add_argument("--only", nargs="+", metavar="RUN", help="of the table, and those that they begin from")
  options = parser.parse_args()
  warn_if_busy()
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    rows = []
    for run, arguments in plan(folder, options.fashion_mnist).items():
      if options.only and run not in options.only:
        continue
      rows.append(measure(run, arguments, folder))
      write_json(options.json, rows, ("jax", "jaxlib", "flax", "optax", "numpy"))
  report(rows, COLUMNS | {score: (score, ".4f") for score in SCORES})


if __name__ == "__main__":
  main()
