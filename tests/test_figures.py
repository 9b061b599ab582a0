import errno
import subprocess
import sys

import numpy as np
import pytest
import scipy.ndimage
import skimage.data
import skimage.segmentation
from matplotlib.figure import Figure
from PIL import Image

from dtm_jax import figures
from dtm_jax.errors import InputError

GRID = (3, 5)  # rectangular
PATCH = (4, 2)  # pixels, not square


def random_case(seed: int) -> tuple[np.ndarray, np.ndarray]:
  """An image and labels as `group_tokens` gives them: smallest index of each group, with gaps."""
  rng = np.random.default_rng(seed)
  image = rng.integers(0, 256, (GRID[0] * PATCH[0], GRID[1] * PATCH[1], 3), np.uint8)
  group = rng.integers(0, 4, GRID[0] * GRID[1])
  smallest = np.array([np.flatnonzero(group == g).min() if (group == g).any() else 0 for g in range(4)])
  return image, smallest[group]


def per_pixel(labels: np.ndarray) -> np.ndarray:
  return np.kron(labels.reshape(GRID), np.ones(PATCH, int))


def test_colors_are_the_mean_over_the_pixels_of_the_group():
  image, labels = random_case(0)
  pixel_labels, groups = per_pixel(labels), np.unique(labels)
  actual = np.kron(figures.group_colors(image, labels, GRID), np.ones((*PATCH, 1), np.uint8))
  for channel in range(3):
    means = scipy.ndimage.mean(image[..., channel], pixel_labels, groups)
    np.testing.assert_array_equal(actual[..., channel], np.rint(means)[np.searchsorted(groups, pixel_labels)])


def test_borders_are_where_scikit_image_finds_them():
  for seed in range(5):
    _, labels = random_case(seed)
    # On patches blown up to 2 x 2 pixels and marked at half pixels, borders lie on the odd coordinates between patches.
    grid = labels.reshape(GRID)
    marks = skimage.segmentation.find_boundaries(np.kron(grid, np.ones((2, 2), int)), connectivity=1, mode="subpixel")
    upright = {(x // 4 + 1, y // 4) for y, x in np.argwhere(marks) if x % 4 == 3 and y % 4 == 0}
    level = {(x // 4, y // 4 + 1) for y, x in np.argwhere(marks) if y % 4 == 3 and x % 4 == 0}
    expected = {((x, y), (x, y + 1)) for x, y in upright} | {((x, y), (x + 1, y)) for x, y in level}
    borders = figures.group_borders(labels, GRID)
    assert len(borders) == len(expected)
    assert {(tuple(a), tuple(b)) for a, b in borders} == expected


def test_borders_of_no_merge_and_of_one_group():
  assert len(figures.group_borders(np.arange(15), GRID)) == 3 * 4 + 2 * 5
  assert figures.group_borders(np.zeros(15, int), GRID).shape == (0, 2, 2)


def test_settings_go_from_nothing_to_the_whole_budget():
  assert figures.morphing_settings(196, 7) == [(0, 7), (49, 7), (98, 7), (147, 7), (196, 7)]


def test_morphing_figure_shows_images_groups_and_counts(tmp_path, saved_figures):
  images = np.stack([skimage.data.astronaut()[:224, :224], skimage.data.coffee()[:224, :224]])
  half = np.arange(196) // 2 * 2
  labels = np.stack([np.stack([np.arange(196), half]), np.stack([np.arange(196), half[::-1].copy()])])
  path = tmp_path / "figures" / "morphing.png"
  figures.morphing_figure(path, images, labels, 7, (14, 14))

  panels = np.reshape(saved_figures[0].axes, (2, 3))
  titles = [panel.get_title() for panel in panels[0]]
  assert titles == [
    "image",
    "0 of 196 tokens merged\nin 7 rounds: 196 groups",
    "98 of 196 tokens merged\nin 7 rounds: 98 groups",
  ]
  np.testing.assert_array_equal(panels[1, 0].images[0].get_array(), images[1])
  expected = figures.group_colors(images[1], labels[1, 1], (14, 14))
  np.testing.assert_array_equal(panels[1, 2].images[0].get_array(), expected)
  assert {len(lines.get_segments()) for lines in panels[1, 1].collections} == {2 * 14 * 13}
  with Image.open(path) as png:
    assert png.size == (855, 645)  # 3 x 1.9 by 2 x 1.9 + 0.5 inches at 150 dpi
  assert [p.name for p in path.parent.iterdir()] == ["morphing.png"]


def test_pixels_of_tiny_images_stay_squares(tmp_path):
  image = np.zeros((8, 8, 3), np.uint8)
  image[::2, ::2] = image[1::2, 1::2] = (255, 0, 0)
  figures.morphing_figure(tmp_path / "tiny.png", image[None], np.zeros((1, 1, 4), int), 1, (2, 2))
  with Image.open(tmp_path / "tiny.png") as png:
    colors = png.convert("RGB").crop((20, 80, 250, 300)).getcolors()  # inside the first panel
  assert {color for _, color in colors} == {(0, 0, 0), (255, 0, 0)}


def test_running_mean_equals_a_plain_loop():
  values = np.random.default_rng(0).normal(size=20)
  expected = [values[max(0, i - 2) : i + 3].mean() for i in range(20)]
  np.testing.assert_allclose(figures.running_mean(values, 5), expected, rtol=2e-15)  # measured 0 to 2.2e-16


@pytest.mark.parametrize(("points", "lines"), [(1, 1), (39, 1), (200, 2)])
def test_loss_figure_smooths_long_curves(points, lines, tmp_path, saved_figures):
  steps, losses = np.arange(points) * 10, np.linspace(1, 0, points)
  figures.loss_figure(
    tmp_path / "loss.png", steps, {"morphed": losses, "token-wise": 2 * losses}, np.full(points, 1e-3)
  )
  loss_panel, lr_panel = saved_figures[0].axes
  assert len(loss_panel.lines) == 2 * lines
  np.testing.assert_array_equal(loss_panel.lines[0].get_xydata(), np.stack([steps, losses], axis=-1))
  np.testing.assert_array_equal(lr_panel.lines[0].get_ydata(), np.full(points, 1e-3))
  note = " (mean of 11 logged steps)" if lines == 2 else ""
  legend = [text.get_text() for text in loss_panel.get_legend().get_texts()]
  assert legend == [f"morphed{note}", f"token-wise{note}"]
  if lines == 2:
    np.testing.assert_allclose(loss_panel.lines[1].get_ydata()[20:-20], losses[20:-20], atol=2e-15)  # measured 2.2e-16


def test_a_failed_write_keeps_the_old_picture_and_names_the_file(tmp_path, monkeypatch):
  path = tmp_path / "loss.png"
  path.write_bytes(b"old")

  def full_disk(figure, file, **settings):
    file.write_bytes(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(Figure, "savefig", full_disk)
  with pytest.raises(InputError, match="cannot write .*loss.png .No space left on device"):
    figures.loss_figure(path, [1], {"loss": [1.0]}, [1e-3])
  assert path.read_bytes() == b"old"
  assert [p.name for p in tmp_path.iterdir()] == ["loss.png"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(InputError, match="cannot write .*file/loss.png"):
    figures.loss_figure(tmp_path / "file" / "loss.png", [1], {"loss": [1.0]}, [1e-3])


def test_pyplot_is_not_imported():
  code = "import sys, dtm_jax.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
  subprocess.run([sys.executable, "-c", code], check=True)
