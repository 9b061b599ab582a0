"""Images per second of the quickstart on CPUs with huge pages of memory beside without them.

  python benchmarks/huge_pages.py [--rounds=2] [--json=FILE]

XLA takes a step's temporary memory from the C library and gives it back after the step; Linux hands it out anew, in
pages of 4 KiB, each of which is cleared and entered into a table when it is first touched. GLIBC_TUNABLES in the
environment asks for pages of 2 MiB. glibc has that from 2.35 on; other C libraries disregard it.
"""

import functools
import pathlib
import statistics
import tempfile
from typing import Any

from common import argument_parser, in_turns, median_ratio, quartiles, report, warn_if_busy, write_json
from processes import train

PAGES = {"without": "", "with": "glibc.malloc.hugetlb=1"}


SETTINGS = {"run.steps": 120, "data.batch_size": 64}  # of the quickstart


def compare(rounds: int, folder: pathlib.Path) -> dict[str, Any]:
  """The row of the table: one process with one device, which has all cores."""
  run = functools.partial(train, "quickstart", SETTINGS, 1, 1, folder=folder)
  seconds = in_turns(
    {
      kind: lambda _, tunables=tunables: run(environment={"GLIBC_TUNABLES": tunables})
      for kind, tunables in PAGES.items()
    },
    rounds,
  )
  return {
    "run": "quickstart",
    "batch": SETTINGS["data.batch_size"],
    **{f"{kind}_images_per_second": 1 / statistics.median(times) for kind, times in seconds.items()},
    "ratio": median_ratio(seconds["with"], seconds["without"]),
    "quartiles": quartiles([a / b for a, b in zip(seconds["with"], seconds["without"], strict=True)]),
  }


def main() -> None:
  options = argument_parser(__doc__, rounds=2).parse_args()
  warn_if_busy()
  with tempfile.TemporaryDirectory() as name:
    rows = [compare(options.rounds, pathlib.Path(name))]
  columns = {
    "run": ("run", ""),
    "batch": ("batch", "d"),
    "without, images/s": ("without_images_per_second", ".2f"),
    "with, images/s": ("with_images_per_second", ".2f"),
    "ratio of times": ("ratio", ".2f"),
  }
  report(rows, columns)
  write_json(options.json, rows, ("jax", "jaxlib", "numpy"))


if __name__ == "__main__":
  main()
