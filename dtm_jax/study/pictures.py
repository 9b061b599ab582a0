"""Pictures of a study: curves of its arms, their differences at the end, and its teachers' token groups."""

import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dtm_jax import metrics
from dtm_jax.figures import DPI, plain_axes, running_mean, save_figure
from dtm_jax.files import replacing
from dtm_jax.study import results
from dtm_jax.study.plan import TRAIN, Study

_SMOOTHED_STEPS = 5  # logged ones
_PANEL_INCHES = (4.5, 3.6)
_DIFFERENCE_INCHES = (2.0, 0.3)  # of a readout, of an arm
_LABEL_INCHES = 0.1  # of a letter of a teacher's name, which stands upright

Curve = tuple[Sequence[int], Sequence[float]]  # steps, ascending, and values
Panels = Mapping[str, Mapping[str, Sequence[Curve]]]  # by teacher and arm, of its seeds


def draw(study: Study, found: Mapping[str, Any]) -> None:
  """Writes what can be drawn of the cells that have run so far.

  Args:
    study: whose curves and token groups are drawn.
    found: see `results.collect`.

  Raises:
    InputError: a file cannot be written.
  """
  folder = study.folder / "figures"
  if losses := _curves(study, "token_loss"):
    curves_figure(folder / "loss.png", losses, "token-wise distance to the teacher", window=_SMOOTHED_STEPS)
  if accuracies := _curves(study, "knn_top1"):
    curves_figure(folder / "accuracy.png", accuracies, "k-NN accuracy, %", window=1, scale=100)
  differences_figure(folder / "differences.png", found, leave_out=study.untrained)
  for teacher in study.teachers:
    _copy_token_groups(study, teacher, folder / f"tokens_{teacher}.png")


def _curves(study: Study, name: str) -> Panels:
  """Of the teachers and arms that have any."""
  panels = {}
  for teacher in study.teachers:
    of_arms = {arm: _of_seeds(study, f"{teacher}/{arm}", name) for arm in study.arms}
    panels[teacher] = {arm: curves for arm, curves in of_arms.items() if curves}
  return {teacher: arms for teacher, arms in panels.items() if arms}


def _of_seeds(study: Study, student: str, name: str) -> list[Curve]:
  curves = []
  for seed in study.seeds:
    rows = metrics.read_rows(study.folder / student / f"seed{seed}" / TRAIN)
    pairs = sorted((row["step"], row[name]) for row in rows if name in row)
    if pairs:
      curves.append(tuple(zip(*pairs, strict=True)))
  return curves


def _copy_token_groups(study: Study, teacher: str, path: pathlib.Path) -> None:
  """The picture that a run with this teacher has left, if one has."""
  pictures = [
    study.folder / f"{teacher}/{arm}/seed{seed}" / TRAIN / "figures" / "morphing.png"
    for seed in study.seeds
    for arm in study.arms
  ]
  if left := [picture for picture in pictures if picture.exists()]:
    with replacing(path) as unfinished:
      shutil.copy(left[0], unfinished)


def curves_figure(path: str | os.PathLike, panels: Panels, ylabel: str, *, window: int, scale: float = 1.0) -> None:
  """Writes a PNG: a panel for each teacher, in it a line for each arm, the mean of its seeds, in a band of their range.

  Args:
    path: file to write; its folder is made where it is missing.
    panels: curves by teacher, arm and seed; the mean is over the steps that all of an arm's seeds have.
    ylabel: of all panels.
    window: points that are averaged for smoothness; 1 leaves them as they are.
    scale: of the values.

  Raises:
    InputError: the file cannot be written.
  """
  width, height = _PANEL_INCHES
  figure = Figure(figsize=(width * len(panels), height), dpi=DPI, layout="constrained")
  for panel, (teacher, arms) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
    for arm, curves in arms.items():
      _draw_mean(panel, [(steps, scale * np.asarray(values)) for steps, values in curves], arm, window)
    panel.set(title=f"teacher: {teacher}", xlabel="step", ylabel=ylabel)
    panel.legend(frameon=False, fontsize=9)
    plain_axes(panel)
  save_figure(figure, path)


def _draw_mean(panel: Axes, curves: Sequence[Curve], name: str, window: int) -> None:
  shared = sorted(set.intersection(*({*steps} for steps, _ in curves)))
  values = np.array([[dict(zip(*curve, strict=True))[step] for step in shared] for curve in curves])
  window = min(window, len(shared) - 1 + len(shared) % 2)  # odd
  values = np.array([running_mean(row, window) for row in values])
  [line] = panel.plot(shared, values.mean(axis=0), label=name, marker="." if len(shared) < 20 else "")
  panel.fill_between(shared, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.15, linewidth=0)


def differences_figure(path: str | os.PathLike, found: Mapping[str, Any], *, leave_out: str = "") -> None:
  """Writes a PNG: how much better than the baseline each arm is by each readout, and how sure that is.

  A row of panels for each teacher, a panel for each readout, in it a dot for each seed and the mean with its standard
  error. Nothing is written as long as there is nothing to compare.

  Args:
    path: file to write; its folder is made where it is missing.
    found: see `results.collect`.
    leave_out: an arm; students without pre-training are so much worse that the others would look the same.

  Raises:
    InputError: the file cannot be written.
  """
  baseline = found["baseline"]
  rows = {
    teacher: {arm: entries for arm, entries in of_teacher["arms"].items() if arm not in (baseline, leave_out)}
    for teacher, of_teacher in found["teachers"].items()
  }
  entries = [entry for arms in rows.values() for columns in arms.values() for entry in columns.values()]
  if not any("difference_mean" in entry for entry in entries):
    return
  readouts = [*next(iter(next(iter(rows.values())).values()))]
  num_arms = max(len(arms) for arms in rows.values())
  width, height = _DIFFERENCE_INCHES
  height = max(0.9 + height * num_arms, _LABEL_INCHES * max(map(len, rows)))
  size = (1.2 + width * len(readouts), 0.3 + len(rows) * height)
  figure = Figure(figsize=size, dpi=DPI, layout="constrained")
  panels = figure.subplots(len(rows), len(readouts), squeeze=False, sharey="row")
  for row, (teacher, arms) in zip(panels, rows.items(), strict=True):
    own = found["teachers"][teacher]["arms"][baseline]
    for panel, readout in zip(row, readouts, strict=True):
      for place, columns in enumerate(arms.values()):
        _draw_difference(panel, place, columns[readout], own[readout])
      panel.axvline(0, color="0.4", linewidth=1)
      panel.set(title=readout, yticks=range(len(arms)), yticklabels=[*arms], ylim=(len(arms) - 0.5, -0.5))
      panel.spines[["top", "right"]].set_visible(False)
      panel.grid(axis="x", alpha=0.3)
    row[0].set_ylabel(f"teacher:\n{teacher}")
  figure.supxlabel(f"difference to {baseline}, points of top-1 accuracy: seeds, mean ± standard error", fontsize=10)
  save_figure(figure, path)


def _draw_difference(panel: Axes, place: int, entry: Mapping[str, Any], own: Mapping[str, Any]) -> None:
  if "difference_mean" not in entry:
    return
  seeds = 100 * np.array(results.paired_differences(entry["values"], own["values"]))
  error = entry["difference_standard_error"]  # None for one seed
  panel.plot(seeds, np.full(len(seeds), place), ".", color="0.6", markersize=5)
  panel.errorbar(
    100 * entry["difference_mean"],
    place,
    xerr=None if error is None else 100 * error,
    **{"fmt": "o", "color": "tab:blue", "markersize": 4, "capsize": 3},
  )
