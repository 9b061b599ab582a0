"""Reading the weights of a ViT-B student beside `torch.load`: seconds, and peak memory over the size of the file.

  python benchmarks/read_weights.py [--rounds=5] [--json=FILE]

Each reading is a process of its own, by turns. Memory is the highest resident
size (VmHWM) that the process reaches, the mapped file included, less what it
had after its imports; the parameters themselves are part of it. The file has
just been written, so it comes from the page cache, not from the disk. The
targets are 3 s and 1.2. Linux only.
"""

import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

import jax
import numpy as np
from common import argument_parser, report, warn_if_busy, write_json

from dtm_jax import save_torch
from dtm_jax.models.variants import VARIANTS
from dtm_jax.models.vit import ViT

GRID, PATCH_SIZE, TARGET_DIM = (14, 14), 16, 512
READERS = {
  "load_torch": ("from dtm_jax import load_torch", "load_torch(path)"),
  "torch.load": ("import torch", "torch.load(path, weights_only=True)"),
}
_CHILD = """
import json, sys, time
{imports}
def memory(field):
  lines = open("/proc/self/status").read().splitlines()
  return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field + ":")))
path, before = sys.argv[1], memory("VmRSS")
start = time.perf_counter()
weights = {call}
seconds = time.perf_counter() - start
print(json.dumps({{"seconds": seconds, "bytes": memory("VmHWM") - before}}))
"""


def write_student(path: pathlib.Path) -> None:
  """A ViT-B student of random numbers, as the released code saves it."""
  student = ViT(**VARIANTS["B"]._asdict(), patch_size=PATCH_SIZE, grid=GRID, out_dim=TARGET_DIM)
  side = PATCH_SIZE * GRID[0]
  images, mask = np.zeros((1, side, side, 3), np.float32), np.zeros((1, GRID[0] * GRID[1]), bool)
  shapes = jax.eval_shape(lambda: student.init(jax.random.key(0), images, mask))["params"]
  rng = np.random.default_rng(0)
  save_torch(path, "student", jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes))


def read(reader: str, path: pathlib.Path) -> dict[str, float]:
  """Seconds and bytes of one reading in a new process."""
  imports, call = READERS[reader]
  program = _CHILD.format(imports=imports, call=call)
  child = subprocess.run([sys.executable, "-c", program, str(path)], check=True, capture_output=True, text=True)
  return json.loads(child.stdout)


def take_turns(path: pathlib.Path, rounds: int) -> dict[str, list[dict[str, float]]]:
  """What each reader gave in each round, after one that is not counted."""
  readings = {reader: [] for reader in READERS}
  for i in range(rounds + 1):
    for reader in list(READERS)[:: 1 if i % 2 else -1]:
      readings[reader].append(read(reader, path))
  return {reader: counted for reader, (_, *counted) in readings.items()}


def main() -> None:
  options = argument_parser(__doc__, rounds=5).parse_args()
  warn_if_busy()
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "student.pth"
    write_student(path)
    megabytes = path.stat().st_size / 1e6
    readings = take_turns(path, options.rounds)
  rows = [
    {
      "reader": reader,
      "megabytes": megabytes,
      "seconds": statistics.median(reading["seconds"] for reading in counted),
      "slowest": max(reading["seconds"] for reading in counted),
      "memory_over_size": max(reading["bytes"] for reading in counted) / 1e6 / megabytes,
    }
    for reader, counted in readings.items()
  ]
  columns = {
    "reader": ("reader", ""),
    "MB": ("megabytes", ".0f"),
    "seconds": ("seconds", ".2f"),
    "slowest": ("slowest", ".2f"),
    "memory / size": ("memory_over_size", ".2f"),
  }
  report(rows, columns)
  write_json(options.json, rows, ("numpy", "torch"))


if __name__ == "__main__":
  main()
