"""Mixup, CutMix and label smoothing against their definitions: exact small cases, and integrals over many draws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dtm_jax.augment import blend, cutmix_box, mix, smooth_labels

HEIGHT, WIDTH = 8, 12
NUM_DRAWS = 20_000
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(5, HEIGHT, WIDTH, 3)).astype(np.float32)
TARGETS = RNG.dirichlet(np.ones(4), 5).astype(np.float32)


def reference_box(share: float, row: int, column: int) -> tuple[slice, slice]:
  """The published CutMix box: sides cut to whole pixels, halves to whole pixels again, then clipped."""
  ratio = np.sqrt(1 - share)
  cut_rows, cut_columns = int(HEIGHT * ratio), int(WIDTH * ratio)
  top, bottom = np.clip([row - cut_rows // 2, row + cut_rows // 2], 0, HEIGHT)
  left, right = np.clip([column - cut_columns // 2, column + cut_columns // 2], 0, WIDTH)
  return slice(top, bottom), slice(left, right)


# ------------------------------------------------------------ exact cases


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_mixup_blends_images_and_targets_with_the_reversed_batch(share):
  images, targets = jax.jit(blend)(IMAGES, TARGETS, False, share, jnp.array([3, 4]))
  for i in range(5):
    expected = np.float64(share) * IMAGES[i] + (1 - np.float64(share)) * IMAGES[4 - i]
    np.testing.assert_allclose(images[i], expected, rtol=0, atol=1e-6)  # measured 2.4e-7
    expected = np.float64(share) * TARGETS[i] + (1 - np.float64(share)) * TARGETS[4 - i]
    np.testing.assert_allclose(targets[i], expected, rtol=0, atol=1e-7)  # measured 1.5e-8


@pytest.mark.parametrize(
  ("share", "centre", "num_pasted"),
  [
    (0.75, (4, 6), 4 * 6),  # half of each side
    (0.75, (0, 0), 2 * 3),  # clipped at two borders
    (0.75, (7, 11), 3 * 4),  # at the others
    (0.75, (4, 11), 4 * 4),
    (0.5, (4, 6), 4 * 8),  # 5.7 and 8.5 pixels: two halves of 2 and 4
    (0.36, (4, 6), 6 * 8),  # 6.4 and 9.6 pixels: halves of 3 and 4
    (0.0, (4, 6), 8 * 12),  # all
    (0.0, (0, 0), 4 * 6),
    (0.99, (4, 6), 0),
    (1.0, (4, 6), 0),
  ],
)
def test_cutmix_pastes_the_partners_box_and_counts_its_pixels(share, centre, num_pasted):
  images, targets = jax.jit(blend)(IMAGES, TARGETS, True, share, jnp.array(centre))
  box = reference_box(share, *centre)
  expected = IMAGES.copy()
  expected[:, *box] = IMAGES[::-1][:, *box]
  np.testing.assert_array_equal(images, expected)
  assert expected[0, *box, 0].size == num_pasted
  own = 1 - num_pasted / (HEIGHT * WIDTH)
  expected = own * TARGETS + (1 - own) * TARGETS[::-1]
  np.testing.assert_allclose(targets, expected, rtol=0, atol=5e-7)  # measured 6e-8


def test_every_box_equals_the_published_one():
  shares = np.random.default_rng(1).random(50)
  centres = np.stack(np.meshgrid(np.arange(HEIGHT), np.arange(WIDTH), indexing="ij"), axis=-1).reshape(-1, 2)
  over_centres = jax.vmap(cutmix_box, (None, 0, None, None))
  boxes = jax.jit(jax.vmap(over_centres, (0, None, None, None)), static_argnums=(2, 3))(shares, centres, HEIGHT, WIDTH)
  for share, row_of_boxes in zip(shares, np.asarray(boxes), strict=True):
    for centre, box in zip(centres, row_of_boxes, strict=True):
      rows, columns = reference_box(share, *centre)
      assert box.tolist() == [rows.start, columns.start, rows.stop, columns.stop]


def test_a_batch_shares_one_draw_in_reverse_order():
  mixed = jax.jit(functools.partial(mix, mixup=0.8, cutmix=1.0, cutmix_prob=0.0))
  images, targets = mixed(jax.random.key(0), IMAGES, TARGETS)
  share = float((targets[0, 0] - TARGETS[4, 0]) / (TARGETS[0, 0] - TARGETS[4, 0]))
  assert 0.01 < share < 0.99
  for actual, whole in ((images, IMAGES), (targets, TARGETS)):
    np.testing.assert_allclose(actual, share * whole + (1 - share) * whole[::-1], rtol=0, atol=1e-6)  # measured 1.2e-7


def test_nothing_is_mixed_where_both_are_off():
  images, targets = mix(jax.random.key(0), IMAGES, TARGETS, mixup=0.0, cutmix=0.0, cutmix_prob=0.5)
  assert images is IMAGES
  assert targets is TARGETS


# ------------------------------------------------------------ many draws

BOTH, ONLY_MIXUP, ONLY_CUTMIX = (0.8, 0.5, 0.3), (1.2, 0.0, 0.3), (0.0, 1.0, 0.3)


@functools.cache
def draws(mixup: float, cutmix: float, cutmix_prob: float) -> tuple[np.ndarray, np.ndarray]:
  """What becomes of one black and one white image: how white the black one is [n, H, W], its share of its class [n]."""
  images = jnp.stack([jnp.zeros((HEIGHT, WIDTH, 3)), jnp.ones((HEIGHT, WIDTH, 3))])

  def draw(key):
    mixed, targets = mix(key, images, jnp.eye(2), mixup=mixup, cutmix=cutmix, cutmix_prob=cutmix_prob)
    return mixed[0, ..., 0], targets

  white, targets = jax.device_get(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(1), NUM_DRAWS)))
  np.testing.assert_allclose(targets.sum(axis=-1), 1, rtol=0, atol=1e-6)  # measured 1.2e-7
  np.testing.assert_array_equal(targets[:, 0, 0], targets[:, 1, 1])
  return white, targets[:, 0, 0]


def is_cut(white: np.ndarray) -> np.ndarray:
  """Which draws pasted a box: every pixel is all white or all black."""
  return ((white == 0) | (white == 1)).all(axis=(1, 2))


@pytest.mark.parametrize(("settings", "expected"), [(BOTH, 0.3), (ONLY_MIXUP, 0), (ONLY_CUTMIX, 1)], ids=str)
def test_as_many_steps_cut_as_asked(settings, expected):
  fraction = is_cut(draws(*settings)[0]).mean()
  assert fraction == pytest.approx(expected, abs=4 * (expected * (1 - expected) / NUM_DRAWS) ** 0.5)


@pytest.mark.parametrize("settings", [BOTH, ONLY_MIXUP], ids=str)
def test_mixups_shares_are_beta_draws(settings):
  (white, shares), alpha = draws(*settings), settings[0]
  white, shares = white[~is_cut(white)], shares[~is_cut(white)]
  assert len(shares) > 10_000
  np.testing.assert_allclose(white, np.broadcast_to(1 - shares[:, None, None], white.shape), rtol=0, atol=1e-6)
  assert scipy.stats.kstest(shares, scipy.stats.beta(alpha, alpha).cdf).pvalue > 1e-3
  variance = 1 / (4 * (2 * alpha + 1))
  assert shares.mean() == pytest.approx(0.5, abs=4 * (variance / len(shares)) ** 0.5)


@pytest.mark.parametrize("settings", [BOTH, ONLY_CUTMIX], ids=str)
def test_cutmix_pastes_each_pixel_as_often_as_the_definition(settings):
  """Beta(alpha, alpha) by its quantiles times all centres gives how often each pixel comes from the partner."""
  (white, shares), alpha = draws(*settings), settings[1]
  white, shares = white[is_cut(white)], shares[is_cut(white)]
  # A label's share is its share of the pixels.
  np.testing.assert_allclose(shares, 1 - white.mean(axis=(1, 2), dtype=np.float64), rtol=0, atol=6e-8)  # an ulp
  quantiles = scipy.stats.beta(alpha, alpha).ppf((np.arange(200) + 0.5) / 200)
  pasted, areas = np.zeros((HEIGHT, WIDTH)), []
  for share in quantiles:
    for row, column in np.ndindex(HEIGHT, WIDTH):
      box = reference_box(share, row, column)
      pasted[box] += 1
      areas.append((box[0].stop - box[0].start) * (box[1].stop - box[1].start))
  expected = pasted / len(areas)
  errors = (white.mean(axis=0) - expected) / np.sqrt(expected * (1 - expected) / len(white))
  assert np.abs(errors).max() < 4.5  # of 96 pixels
  areas = np.array(areas) / (HEIGHT * WIDTH)
  assert shares.mean() == pytest.approx(1 - areas.mean(), abs=4 * areas.std() / len(shares) ** 0.5)
  assert shares.std() == pytest.approx(areas.std(), rel=0.05)


# ------------------------------------------------------------ label smoothing


def test_smoothing_spreads_a_share_over_all_classes():
  expected = [[0.025, 0.925, 0.025, 0.025], [0.925, 0.025, 0.025, 0.025]]
  smoothed = smooth_labels(jnp.array([1, 0]), 4, 0.1)
  assert smoothed.dtype == jnp.float32
  np.testing.assert_allclose(smoothed, expected, rtol=1e-6)
  np.testing.assert_array_equal(smooth_labels(jnp.array([1, 0]), 4, 0.0), np.eye(4)[[1, 0]])
  many = smooth_labels(jnp.arange(1000), 1000, 0.1)
  np.testing.assert_allclose(many.sum(axis=1), 1, rtol=0, atol=1e-6)  # measured 2.4e-7


def test_smoothed_cross_entropy_equals_torchs():
  torch = pytest.importorskip("torch")
  logits, labels = RNG.normal(size=(6, 7)).astype(np.float32), np.array([0, 3, 6, 1, 1, 5])
  expected = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels), label_smoothing=0.2)
  actual = -(smooth_labels(labels, 7, 0.2) * jax.nn.log_softmax(logits)).sum(axis=1).mean()
  assert float(actual) == pytest.approx(float(expected), rel=1e-6)  # measured 0
