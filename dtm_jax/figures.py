"""Pictures of a run: its token groups and its curves.

Figures are built from `matplotlib.figure.Figure`, without pyplot and its global state, and are replaced in one piece.
"""

import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dtm_jax import distributed
from dtm_jax.files import replacing

DPI = 150
_PANEL_INCHES = 1.9
_TITLE_POINTS = 9
_SMOOTHED_POINTS = 0.05  # width of the running mean over the length of the curve
_FEWEST_TO_SMOOTH = 40  # logged steps


def morphing_settings(budget: int, iterations: int) -> list[tuple[int, int]]:
  """(n, k) to show side by side: none, a quarter, half, three quarters and all of the budget merged."""
  return [(round(budget * quarter / 4), iterations) for quarter in range(5)]


def morphing_figure(
  path: str | os.PathLike,
  images: np.ndarray,
  labels: np.ndarray,
  iterations: int,
  grid: tuple[int, int],
) -> None:
  """Writes a PNG with one row per image: the image, then its token groups, fewer from column to column.

  Every group has the mean colour of its pixels and a thin border; parts of a group may lie apart.

  Args:
    path: file to write; its folder is made where it is missing.
    images: uint8 [M, H, W, 3].
    labels: int [M, C, N], group of each token under each of the C settings, row-major over the grid.
    iterations: rounds of matching, k, in all settings.
    grid: patches (down, across), with N = down * across.

  Raises:
    InputError: the file cannot be written.
  """
  rows, columns = len(images), 1 + labels.shape[1]
  height, width = grid
  figure = Figure(
    figsize=(_PANEL_INCHES * columns, _PANEL_INCHES * height / width * rows + 0.5), dpi=DPI, layout="constrained"
  )
  figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03)
  panels = figure.subplots(rows, columns, squeeze=False)
  for row, image, image_labels in zip(panels, images, labels, strict=True):
    _show(row[0], image, grid)
    for panel, group in zip(row[1:], image_labels, strict=True):
      _show(panel, group_colors(image, group, grid), grid)
      _draw_borders(panel, group, grid)
  panels[0, 0].set_title("image", fontsize=_TITLE_POINTS)
  for panel, group in zip(panels[0, 1:], labels[0], strict=True):
    groups = len(np.unique(group))
    title = f"{len(group) - groups} of {len(group)} tokens merged\nin {iterations} rounds: {groups} groups"
    panel.set_title(title, fontsize=_TITLE_POINTS)
  save_figure(figure, path)


def group_colors(image: np.ndarray, labels: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
  """Mean colour of the pixels of each patch's group, uint8 [*grid, 3].

  Args:
    image: uint8 [H, W, 3], sides multiples of the grid's.
    labels: int [N], group of each patch.
    grid: patches (down, across).
  """
  height, width = grid
  patches = image.reshape(height, image.shape[0] // height, width, image.shape[1] // width, 3)
  patch_means = patches.mean(axis=(1, 3)).reshape(-1, 3)
  _, group = np.unique(labels, return_inverse=True)
  sums = np.stack([np.bincount(group, channel) for channel in patch_means.T], axis=-1)
  means = sums / np.bincount(group)[:, None]
  return np.rint(means[group]).astype(np.uint8).reshape(height, width, 3)


def group_borders(labels: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
  """Edges between neighbouring patches of different groups.

  Args:
    labels: int [N], group of each patch.
    grid: patches (down, across).

  Returns:
    float [S, 2, 2]: S segments of one patch's length, each from (x, y) to (x, y), in patches from the top left.
  """
  labels = labels.reshape(grid)
  row, column = np.nonzero(labels[:, 1:] != labels[:, :-1])
  upright = np.stack([np.stack([column + 1, row], -1), np.stack([column + 1, row + 1], -1)], axis=1)
  row, column = np.nonzero(labels[1:] != labels[:-1])
  level = np.stack([np.stack([column, row + 1], -1), np.stack([column + 1, row + 1], -1)], axis=1)
  return np.concatenate([upright, level]).astype(float)


def _show(panel: Axes, pixels: np.ndarray, grid: tuple[int, int]) -> None:
  """Image in units of patches. Matplotlib's automatic interpolation keeps the pixels of tiny images as squares."""
  height, width = grid
  panel.imshow(pixels, extent=(0, width, height, 0), interpolation="auto")
  panel.set_axis_off()


def _draw_borders(panel: Axes, labels: np.ndarray, grid: tuple[int, int]) -> None:
  """White lines in a dark outline, which show on groups of any colour."""
  borders = group_borders(labels, grid)
  for color, pixels in (("0.3", 4), ("white", 2)):  # both even: snapped to pixels alike, the outline stays centred
    panel.add_collection(LineCollection(borders, colors=color, linewidths=pixels * 72 / DPI, capstyle="projecting"))


def loss_figure(
  path: str | os.PathLike,
  steps: Sequence[int],
  losses: Mapping[str, Sequence[float]],
  learning_rates: Sequence[float],
) -> None:
  """Writes a PNG with the losses of the logged steps, long curves also smoothed, above their learning rate.

  Args:
    path: file to write; its folder is made where it is missing.
    steps: logged steps, ascending.
    losses: loss at each of them, by the name that the legend gives it.
    learning_rates: learning rate at each of them.

  Raises:
    InputError: the file cannot be written.
  """
  figure = Figure(figsize=(7, 4.5), dpi=DPI, layout="constrained")
  loss_panel, lr_panel = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
  for i, (name, values) in enumerate(losses.items()):
    _draw_loss(loss_panel, np.asarray(steps), np.asarray(values, float), name, f"C{i}")
  loss_panel.set_ylabel("loss")
  loss_panel.legend(frameon=False)
  lr_panel.plot(steps, learning_rates, color="0.4")
  lr_panel.set_ylim(bottom=0)
  lr_panel.set(xlabel="step", ylabel="learning rate")
  lr_panel.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
  for panel in (loss_panel, lr_panel):
    plain_axes(panel)
  save_figure(figure, path)


def accuracy_figure(path: str | os.PathLike, curves: Mapping[str, tuple[Sequence[int], Sequence[float]]]) -> None:
  """Writes a PNG with accuracies over steps, the last of each curve in figures.

  Args:
    path: file to write; its folder is made where it is missing.
    curves: steps, ascending, and accuracies in [0, 1], by the name that the legend gives them.

  Raises:
    InputError: the file cannot be written.
  """
  figure = Figure(figsize=(7, 3.5), dpi=DPI, layout="constrained")
  panel = figure.subplots()
  for name, (steps, values) in curves.items():
    percent = 100 * np.asarray(values, float)
    panel.plot(steps, percent, marker=".", label=f"{name}, {percent[-1]:.1f} % at the end")
  panel.set(xlabel="step", ylabel="accuracy, %")
  panel.legend(frameon=False, loc="lower right")
  plain_axes(panel)
  save_figure(figure, path)


def plain_axes(panel: Axes) -> None:
  """Whole numbers below, a light grid, no frame."""
  panel.xaxis.set_major_locator(MaxNLocator(integer=True, steps=(1, 2, 5, 10)))
  panel.spines[["top", "right"]].set_visible(False)
  panel.grid(alpha=0.3)


def _draw_loss(panel: Axes, steps: np.ndarray, losses: np.ndarray, name: str, color: str) -> None:
  if len(losses) < _FEWEST_TO_SMOOTH:
    panel.plot(steps, losses, color=color, marker=".", label=name)
    return
  window = 2 * round(_SMOOTHED_POINTS * len(losses) / 2) + 1
  panel.plot(steps, losses, color=color, alpha=0.3, linewidth=0.8)
  panel.plot(steps, running_mean(losses, window), color=color, label=f"{name} (mean of {window} logged steps)")


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
  """Mean over `window` (odd) values around each one, over fewer near the ends. [n] -> [n]."""
  kernel = np.ones(window)
  return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
  """Writes a PNG, by process 0. Raises InputError where it cannot be written."""
  if not distributed.is_first():
    return
  with replacing(pathlib.Path(path)) as unfinished:
    figure.savefig(unfinished, format="png")
