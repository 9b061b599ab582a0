"""What `compare` tells on the terminal and in its JSON file."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dtm_jax.config import to_json
from dtm_jax.errors import some_of
from dtm_jax.numerics import depth_figure, report
from dtm_jax.numerics.case import Pretraining, torch_device
from dtm_jax.numerics.compare import not_finite

_LISTED_TENSORS = 5
_WORST_FIRST = ", worst first"
_SECTIONS = {
  "teacher/": "teacher, forward",
  "student/": "student, forward",
  "step/": "step",
  "gradient/": f"gradient{_WORST_FIRST}",
  "updated/": f"parameter after one optimiser step{_WORST_FIRST}",
}
_OF_ADAM = (
  "(parameters after one optimiser step: Adam's first step is as long for the smallest gradient, and where that is"
  " rounding alone, so is its direction)"
)

Comparisons = Mapping[str, Mapping[str, Any]]  # what `compare.compare` gives, by what was compared


def write(folder: pathlib.Path, case: Pretraining, comparisons: Comparisons, dtype: str) -> None:
  """Prints the tables, and leaves `compare.json` and `compare.png` in the folder.

  Raises:
    InputError: they cannot be written.
  """
  record = _environment(dtype) | {"config": to_json(case.config), "notes": case.notes, "comparisons": comparisons}
  report.write_json(folder / "compare.json", record)
  depth_figure.draw(folder / "compare.png", {title: rows["tensors"] for title, rows in comparisons.items()})
  print(
    "\n".join([*_header(case, record), "", describe(comparisons), "", f"see {folder}/compare.png and compare.json"])
  )


def _environment(dtype: str) -> dict[str, Any]:
  here = report.environment()
  return here | {
    "versions": here["versions"] | {"torch": torch.__version__},
    "torch_device": str(torch_device()),
    "dtype": dtype,
    "matmul_precision": "float32, and tensorfloat32 where said" if here["device"].startswith("gpu") else "float32",
  }


def _header(case: Pretraining, record: Mapping[str, Any]) -> list[str]:
  config, versions = case.config, record["versions"]
  teacher = "computed by both" if case.teacher_is_live else "computed by XLA for both"
  return [
    f"XLA (jax {versions['jax']}, {record['device']}) beside PyTorch {versions['torch']} ({record['torch_device']});"
    f" {record['dtype']}, float32 products in {record['matmul_precision']}",
    f"student of width {case.model.width} with {case.model.depth} blocks, {config.data.batch_size} images of"
    f" {config.data.source}, targets of {config.teacher.kind} {teacher}",
    "max abs. is the largest difference of a tensor, relative that over its largest value",
    *case.notes,
  ]


def describe(comparisons: Comparisons) -> str:
  """Tables of stages, gradients and parameters, the token groups, where errors grow most, and all that in short."""
  parts = [_section(comparisons, prefix, title) for prefix, title in _SECTIONS.items()]
  parts.insert(2, "\n".join(_morphing_lines(comparisons)))
  parts.append("\n".join(_growth_lines(comparisons)))
  parts.append("\n".join(_summary_lines(comparisons)))
  if bad := not_finite(comparisons):
    parts.append(f"NOT FINITE: {some_of(bad)}")
  return "\n\n".join(part for part in parts if part)


def _section(comparisons: Comparisons, prefix: str, title: str) -> str:
  """A table with three columns for each comparison; tensors are ordered by the first."""
  series = [{row["name"]: row for row in rows["tensors"]} for rows in comparisons.values()]
  names = [name for name in series[0] if name.startswith(prefix)]
  if not names:
    return ""
  left = 0
  if title.endswith(_WORST_FIRST):
    names.sort(key=lambda name: -series[0][name]["relative"])
    left, names = len(names[_LISTED_TENSORS:]), names[:_LISTED_TENSORS]
  heading = [title] + ["max abs.", "relative", "1 - cosine"] * len(series)
  rows = [[name.removeprefix(prefix), *(cell for rows in series for cell in _cells(rows[name]))] for name in names]
  rows += [[f"... and {left} more", *[""] * (len(heading) - 1)]] if left else []
  return report.table(heading, rows, groups=list(comparisons) if len(series) > 1 else ())


def _cells(row: Mapping[str, Any]) -> list[str]:
  return [f"{row['max_abs']:.1e}", f"{row['relative']:.1e}", f"{1 - row['cosine']:.1e}"]


def _morphing_lines(comparisons: Comparisons) -> list[str]:
  lines = []
  for title, comparison in comparisons.items():
    for i, draw in enumerate(comparison["morphing"]):
      schedule = f"r = {_span(draw['merges'])}, k = {_span(draw['iterations'])}"
      lines.append(
        f"token groups, {title}, draw {i} ({schedule}): the same for {100 * draw['tokens_equal']:.6g} % of tokens,"
        f" {100 * draw['images_equal']:.4g} % of images"
      )
      lines += _parting_lines(draw["partings"])
  return lines


def _span(values: Sequence[int]) -> str:
  return str(values[0]) if len(values) == 1 else f"{values[0]}..{values[-1]}"


def _parting_lines(partings: Sequence[Mapping[str, Any]]) -> list[str]:
  """One line about the image that parts by the most, where any does."""
  worst = sorted(partings, key=lambda row: -row["margin"])[:1]
  return [
    f"  of {len(partings)} images that part, image {row['image']} does so by the most: at iteration {row['iteration']}"
    f" the similarities that decide are {row['margin']:.1e} apart, and the two sides' differ by"
    f" {row['score_difference']:.1e}"
    for row in worst
  ]


def _growth_lines(comparisons: Comparisons) -> list[str]:
  return [
    f"{tower}, {title}: relative error {first:.1e} at its first stage and {last:.1e} at its last; it grows most at"
    f" {stage}, by a factor of {factor:.3g}"
    for title, comparison in comparisons.items()
    for tower in ("teacher", "student")
    for first, last, stage, factor in _growth(comparison["tensors"], tower)
  ]


def _growth(rows: Sequence[Mapping[str, Any]], tower: str) -> list[tuple[float, float, str, float]]:
  """At most one: errors at the first and last stage, and the stage that multiplies the error before it the most."""
  stages = [(row["name"].partition("/")[2], row["relative"]) for row in rows if row["name"].startswith(f"{tower}/")]
  if not stages:
    return []
  smallest = 1e-9  # of any interest
  factors = [
    (max(error, smallest) / max(before, smallest), stage)
    for (_, before), (stage, error) in zip([("", smallest), *stages[:-1]], stages, strict=True)
  ]
  factor, stage = max(factors[1:])
  return [(stages[0][1], stages[-1][1], stage, factor)]


def _summary_lines(comparisons: Comparisons) -> list[str]:
  """The worst of each section, for each comparison."""
  lines = []
  for title, comparison in comparisons.items():
    worst = {
      heading.removesuffix(_WORST_FIRST): max(errors)
      for prefix, heading in _SECTIONS.items()
      if (errors := [row["relative"] for row in comparison["tensors"] if row["name"].startswith(prefix)])
    }
    told = "; ".join(f"{name} {error:.1e}" for name, error in worst.items())
    lines.append(f"in short, largest relative errors of {title}: {told}")
  return [*lines, _OF_ADAM]
