"""Picture of `compare`: how errors grow from the images through the blocks, and back."""

import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from dtm_jax.figures import DPI, save_figure

_FLOOR = 1e-10  # where an error of exactly zero is drawn
# Of the vertical axis, so that mere rounding does not look like a cliff.
_LEAST_TOP, _LEAST_DECADES = 1e-5, 3
_ROUNDING = {"float32": 2.0**-23, "TF32": 2.0**-10, "bfloat16": 2.0**-7}  # distance of 1 to the next number
_MARKERS = {"student": "o", "teacher": "s", "gradient": "o"}


def draw(path: pathlib.Path, comparisons: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
  """Writes a PNG: relative errors of activations at each stage of both towers, and of gradients in each block.

  Args:
    path: file to write.
    comparisons: rows of `compare.difference`, in the order of the step, by what was compared.

  Raises:
    InputError: the file cannot be written.
  """
  figure = Figure(figsize=(10, 4.2), dpi=DPI, layout="constrained")
  forward, backward = figure.subplots(1, 2, sharey=True)
  _order_stages((forward, backward), [row["name"] for rows in comparisons.values() for row in rows])
  for i, (title, rows) in enumerate(comparisons.items()):
    for tower, style in (("student", "-"), ("teacher", "--")):
      _plot(forward, activations(rows, tower), f"{tower}, {title}", style, f"C{i}", _MARKERS[tower])
    _plot(backward, gradients(rows), title, "-", f"C{i}", _MARKERS["gradient"])
  forward.set(title="activations, forward", ylabel="largest error over largest value")
  backward.set(title="gradients of the student, worst tensor of each block")
  errors = [row["relative"] for rows in comparisons.values() for row in rows if _is_drawn(row)]
  span = _span([max(error, _FLOOR) for error in errors if math.isfinite(error)] or [_FLOOR])
  for panel in (forward, backward):
    _finish(panel, span)
  save_figure(figure, path)


def activations(rows: Sequence[Mapping[str, Any]], tower: str) -> dict[str, float]:
  """Relative error at each stage of a tower, in order."""
  prefix = f"{tower}/"
  return {row["name"].removeprefix(prefix): row["relative"] for row in rows if row["name"].startswith(prefix)}


def gradients(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """Largest relative error of the gradients in the embedding, each block, and the head."""
  found: dict[str, float] = {}
  for row in rows:
    if row["name"].startswith("gradient/"):
      stage = _stage(row["name"].removeprefix("gradient/"))
      found[stage] = max(found.get(stage, 0.0), row["relative"])
  depth = sum(stage.startswith("block_") for stage in found)
  return {stage: found[stage] for stage in ("embed", *(f"block_{i}" for i in range(depth)), "tokens")}


def _stage(name: str) -> str:
  """The stage to which a parameter belongs."""
  block = re.match(r"blocks\.(\d+)\.", name)
  if block:
    return f"block_{block[1]}"
  return "tokens" if name.startswith(("norm.", "lm_head.")) else "embed"


def _order_stages(panels: Sequence[Axes], names: Sequence[str]) -> None:
  """Fixes the order of the horizontal axis, also where the towers are not equally deep."""
  blocks = {int(match[1]) for name in names if (match := re.fullmatch(r"\w+/block_(\d+)", name))}
  stages = ["embed", *map(str, sorted(blocks)), "tokens"]
  for panel in panels:
    panel.plot(stages, [float("nan")] * len(stages))


def _plot(panel: Axes, errors: Mapping[str, float], label: str, style: str, color: str, marker: str) -> None:
  if errors:
    names = [name.removeprefix("block_") for name in errors]
    heights = [max(error, _FLOOR) for error in errors.values()]
    panel.plot(names, heights, style, color=color, marker=marker, markersize=4, linewidth=1.3, label=label)


def _is_drawn(row: Mapping[str, Any]) -> bool:
  return row["name"].startswith(("student/", "teacher/", "gradient/"))


def _span(errors: Sequence[float]) -> tuple[float, float]:
  """Whole decades around the errors."""
  low, high = 10.0 ** math.floor(math.log10(min(errors))), 10.0 ** math.ceil(math.log10(max(errors)))
  high = max(high, _LEAST_TOP)
  return min(low, high / 10**_LEAST_DECADES), high


def _finish(panel: Axes, span: tuple[float, float]) -> None:
  panel.set_yscale("log")
  panel.set_ylim(span)
  for name, epsilon in _ROUNDING.items():
    if span[0] < epsilon < span[1]:
      panel.axhline(epsilon, color="0.6", linewidth=0.8, linestyle=":")
      at_left_edge = panel.get_yaxis_transform()
      panel.text(0.005, epsilon * 1.1, f"rounding of {name}", transform=at_left_edge, fontsize=7, color="0.4")
  panel.yaxis.set_major_locator(LogLocator(numticks=12))
  panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}"))
  panel.yaxis.set_minor_formatter(NullFormatter())
  panel.tick_params(labelleft=True)
  panel.set_xlabel("stage (numbers are blocks)")
  panel.tick_params(axis="x", labelsize=8)
  panel.spines[["top", "right"]].set_visible(False)
  panel.grid(alpha=0.3)
  panel.legend(frameon=False, fontsize=8)
