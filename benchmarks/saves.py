"""How long a save holds training up on several devices: how writing is shared, and how the checksum is compiled.

  python benchmarks/saves.py [--page=vitb] [--devices=8] [--rounds=5] [--json=FILE]

What all devices hold alike, orbax lets each write a slice of. `checkpoint.py` has only large arrays sliced: a save
returns when the slices have left the devices, and small ones take longer to cut than to copy. Each way saves the same
state by turns; the first save of each is told apart, for it compiles, and what both ways need is ready before. The
checksum of the state, which each save takes first, is a program for each kind of array (shape, type and sharding); the
other way is one program for all. On CPUs the devices share the cores.
"""

import contextlib
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from common import argument_parser, in_turns, median_ratio, quartiles, report, run_options, warn_if_busy, write_json

from dtm_jax import checkpoint, command_line, pretraining
from dtm_jax import config as config_lib
from dtm_jax.checkpoint import CheckpointStore

WAYS = {"each array sliced (orbax's default)": 0, "large arrays sliced (ours)": checkpoint._MIN_SLICE_BYTES}


@jax.jit
def checksum_at_once(state: Any) -> jax.Array:
  """The same number as `checkpoint._checksum`, in one program."""
  total = jnp.uint32(0)
  for number, leaf in enumerate(jax.tree.leaves(state)):
    weighted = checkpoint._words(leaf) * (2 * checkpoint._places(leaf.shape) + 1)
    total += (2 * number + 1) * weighted.sum(dtype=jnp.uint32)
  return total


CHECKSUMS = {"one program for all arrays": checksum_at_once, "one for each kind (ours)": checkpoint._checksum}


def time_checksum(checksum: Callable[[Any], Any], state: Any, expected: int) -> tuple[float, float]:
  """Seconds of the first one, which compiles, and of the next."""
  jax.clear_caches()
  start = time.perf_counter()
  found = int(checksum(state))
  first = time.perf_counter()
  if {found, int(checksum(state))} != {expected}:
    raise SystemExit("the ways of computing the checksum differ")
  return first - start, time.perf_counter() - first


def new_state(page: str, devices: int) -> Any:
  """A train state that all devices hold alike."""
  settings = {"data.source": "synthetic", "data.batch_size": devices, "teacher.kind": "hog", "teacher.weights": ""}
  options = run_options(page, settings, is_cpu=jax.default_backend() == "cpu")
  config = config_lib.resolve(command_line.parse_config(["saves", *options]))
  return pretraining.build(config).begin()[0]


def save(state: Any, min_slice_bytes: int) -> tuple[float, float]:
  """Seconds until a save returns, and until its files are there."""
  with (
    tempfile.TemporaryDirectory() as folder,
    mock.patch.object(checkpoint, "_MIN_SLICE_BYTES", min_slice_bytes),
    contextlib.closing(CheckpointStore(pathlib.Path(folder), keep=1)) as store,
  ):
    start = time.perf_counter()
    store.save(state)
    returned = time.perf_counter() - start
    store.wait()
    return returned, time.perf_counter() - start


def first_save(state: Any, min_slice_bytes: int) -> tuple[float, float]:
  """The same with nothing compiled but the checksum, which both ways need."""
  jax.clear_caches()
  checkpoint._checksum(state)
  return save(state, min_slice_bytes)


def main() -> None:
  parser = argument_parser(__doc__, rounds=5)
  parser.add_argument("--page", default="vitb", help="of configs/, a pre-training (%(default)s)")
  parser.add_argument("--devices", type=int, default=8, help="on CPUs: how many to make (%(default)s)")
  options = parser.parse_args()
  warn_if_busy()
  jax.config.update("jax_num_cpu_devices", options.devices)
  state = new_state(options.page, jax.device_count())
  save(state, 2**62)  # nothing sliced: what a process does once, whichever way
  firsts = {name: first_save(state, size) for name, size in WAYS.items()}
  seconds = in_turns({name: lambda _, size=size: save(state, size) for name, size in WAYS.items()}, options.rounds)
  rows = [row(name, firsts[name], seconds[name], seconds[next(iter(WAYS))]) for name in WAYS]
  expected = checkpoint._checksum(state)
  runs = {name: lambda _, way=way: time_checksum(way, state, expected) for name, way in CHECKSUMS.items()}
  checksums = [
    {"way": name, "first_seconds": statistics.median(first), "seconds": statistics.median(again)}
    for name, times in in_turns(runs, options.rounds).items()
    for first, again in [zip(*times, strict=True)]
  ]
  columns = {"first, s": ("first_seconds", ".2f"), "returns, s": ("seconds", ".2f"), "ratio": ("ratio", ".2f")}
  report(rows, {"": ("way", "")} | columns | {"files there, s": ("until_there", ".2f")})
  report(checksums, {"checksum": ("way", ""), "first, s": ("first_seconds", ".2f"), "again, s": ("seconds", ".2f")})
  results = {"devices": jax.device_count(), "rows": rows, "checksums": checksums}
  write_json(options.json, results, ("jax", "jaxlib", "orbax-checkpoint", "numpy"))


def row(name: str, first: tuple[float, float], times: list[tuple], reference: list[tuple]) -> dict[str, Any]:
  (returned, there), (others, _) = zip(*times, strict=True), zip(*reference, strict=True)
  return {
    "way": name,
    "first_seconds": first[0],
    "seconds": statistics.median(returned),
    "quartiles": quartiles(returned),
    "ratio": median_ratio(returned, others),
    "until_there": statistics.median(there),
  }


if __name__ == "__main__":
  main()
