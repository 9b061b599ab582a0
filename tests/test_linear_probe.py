import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from dtm_jax.config import MeshConfig
from dtm_jax.errors import InputError
from dtm_jax.evaluate import linear_probe
from dtm_jax.evaluate.features import Features
from dtm_jax.evaluate.linear_probe import Head
from dtm_jax.sharding import create_mesh

ALL = create_mesh(MeshConfig())
CLASSES = 10


@functools.cache
def digits() -> tuple[Features, Features]:
  """Noisy digits, 601 to train (not a multiple of the devices) and 400 to test, standardised."""
  pixels, labels = load_digits(return_X_y=True)
  pixels = pixels + np.random.default_rng(0).normal(0, 5, pixels.shape)

  def split(rows):
    return Features(pixels[rows].astype(np.float32), labels[rows].astype(np.int32))

  train, test = split(slice(601)), split(slice(601, 1001))
  standardize = linear_probe.standardizer(train.features)
  return standardize(train), standardize(test)


def objective(kernel, bias, data: Features, inverse_strength: float) -> float:
  """scikit-learn's, over the number of images; in float64."""
  logits = data.features.astype(np.float64) @ np.asarray(kernel, np.float64) + np.asarray(bias, np.float64)
  losses = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(logits)), data.labels]
  return (losses.sum() + np.square(np.asarray(kernel, np.float64)).sum() / (2 * inverse_strength)) / len(losses)


def test_lbfgs_equals_sklearn():
  train, test = digits()
  strengths = (1e-3, 1e-1, 10.0)
  for c, head in zip(strengths, linear_probe.fit_lbfgs(train, strengths, num_classes=CLASSES, mesh=ALL), strict=True):
    model = LogisticRegression(C=c, tol=1e-8, max_iter=5000).fit(train.features.astype(np.float64), train.labels)
    reference = objective(model.coef_.T, model.intercept_, train, c)
    excess = objective(*head, train, c) - reference
    assert -1e-9 < excess < 1e-5  # 1.2e-6
    logits = test.features @ head.kernel + head.bias
    np.testing.assert_array_equal(np.asarray(logits).argmax(axis=1), model.predict(test.features))


def test_one_device_and_eight_fit_alike():
  train, _ = digits()
  one, eight = (next(linear_probe.fit_lbfgs(train, [1e-3], num_classes=CLASSES, mesh=mesh)) for mesh in (None, ALL))
  np.testing.assert_allclose(one.kernel, eight.kernel, atol=3e-6)  # 3.7e-7
  np.testing.assert_allclose(one.bias, eight.bias, atol=3e-6)


def sgd_by_hand(data: Features, rate: float, steps: int, *, lars: bool) -> Head:
  """In float64, all images in each batch; from the kernel that seed 5 begins with."""
  features = data.features.astype(np.float64)
  kernel = 0.01 * np.asarray(jax.random.normal(jax.random.key(5), (features.shape[1], CLASSES)), np.float64)
  params, momenta = [kernel, np.zeros(CLASSES)], [0.0, 0.0]
  for step in range(steps):
    now = rate * (1 + np.cos(np.pi * step / steps)) / 2
    logits = features @ params[0] + params[1]
    error = np.exp(logits - np.logaddexp.reduce(logits, axis=1)[:, None]) - np.eye(CLASSES)[data.labels]
    grads = [features.T @ error / len(features), error.mean(axis=0)]
    if lars:
      trust = 0.001 * np.linalg.norm(params[0]) / np.linalg.norm(grads[0])
      momenta = [0.9 * m + now * g for m, g in zip(momenta, (trust * grads[0], grads[1]), strict=True)]
      updates = momenta
    else:
      momenta = [0.9 * m + g for m, g in zip(momenta, grads, strict=True)]
      updates = [now * m for m in momenta]
    params = [p - u for p, u in zip(params, updates, strict=True)]
  return Head(*params)


@pytest.mark.parametrize("lars", [False, True])
def test_each_head_of_a_sweep_follows_the_published_rule(lars):
  """SGD with momentum and a cosine to 0; LARS as in You et al. 2017, algorithm 1, for the kernel."""
  few = Features(*(array[:20] for array in digits()[0]))  # fewer than a batch
  rates, epochs = (0.05, 0.4), 6
  options = {"num_classes": CLASSES, "epochs": epochs, "batch_size": 64, "seed": 5, "lars": lars}
  for rate, head in zip(rates, linear_probe.fit_sgd(few, rates, **options), strict=True):
    expected = sgd_by_hand(few, rate, epochs, lars=lars)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=5e-7), head, expected)  # 9e-8


def test_batches_are_of_other_images_each():
  """With orthogonal images a row of the kernel moves by its own image only; seven images make three batches of two."""
  images = Features(np.eye(7, dtype=np.float32), np.zeros(7, np.int32))
  [head] = linear_probe.fit_sgd(images, [1.0], num_classes=CLASSES, epochs=1, batch_size=2, seed=5)
  moved = np.asarray(head.kernel - 0.01 * jax.random.normal(jax.random.key(5), (7, CLASSES)))[:, 0]
  assert (moved > 0.05).sum() == 6
  assert (moved == 0).sum() == 1


def test_sgd_separates_what_can_be_separated():
  """Two points on a line: the boundary of the widest margin is in the middle, by symmetry also without a margin."""
  data = Features(np.array([[-1.0], [1.0]], np.float32), np.array([0, 1], np.int32))
  [head] = linear_probe.fit_sgd(data, [1.0], num_classes=2, epochs=30, batch_size=2, seed=0)
  assert linear_probe.accuracy(head, data) == 1.0
  slope, offset = head.kernel[0, 1] - head.kernel[0, 0], head.bias[1] - head.bias[0]
  assert slope > 5  # from 0 it only grows
  np.testing.assert_allclose(offset, 0, atol=1e-6)


@pytest.mark.parametrize("solver", ["sgd", "lars", "lbfgs"])
def test_a_probe_does_as_well_as_sklearn(solver):
  train, test = digits()
  if solver == "lbfgs":
    candidates = linear_probe.INVERSE_STRENGTHS
    fit = functools.partial(linear_probe.fit_lbfgs, num_classes=CLASSES, mesh=ALL)
  else:
    candidates, options = linear_probe.LEARNING_RATES[solver], {"epochs": 20, "batch_size": 64, "seed": 0}
    fit = functools.partial(linear_probe.fit_sgd, num_classes=CLASSES, lars=solver == "lars", **options)
  probe = linear_probe.linear_probe(train, test, fit, candidates, seed=0)
  best = max(LogisticRegression(C=c).fit(*train).score(*test) for c in (1e-3, 1e-2, 1e-1))
  assert candidates[0] < probe.chosen < candidates[-1]
  assert probe.held_out_top1[probe.chosen] == max(probe.held_out_top1.values())
  assert 0.6 < best < 0.97
  assert probe.top1 > best - 0.03


def test_choosing_looks_at_a_tenth_of_the_training_images_and_never_at_test_images():
  rng = np.random.default_rng(0)
  train = Features(rng.normal(3, 2, (50, 1)).astype(np.float32), np.arange(50, dtype=np.int32))
  seen = []

  def fit(data, candidates):
    seen.append(data)
    # Zero for all but one candidate, whose head finds the class 7 only.
    return [Head(jnp.zeros((1, 50)), 1.0 * (jnp.arange(50) == c)) for c in candidates]

  test = Features(np.zeros((4, 1), np.float32), np.full(4, 11, np.int32))
  held_out = sorted({*range(50)} - {*linear_probe_rest(train, test, fit, seen)})
  assert len(held_out) == 5
  probe = linear_probe.linear_probe(train, test, fit, [11, held_out[2]], seed=0)
  assert (probe.chosen, probe.top1) == (held_out[2], 0.0)  # 11 would be right for all test images
  assert [*seen[-1].labels] == [*train.labels]  # the chosen one is fitted to all
  for data in seen[-2:]:
    np.testing.assert_allclose([data.features.mean(), data.features.std()], [0, 1], atol=1e-6)


def linear_probe_rest(train, test, fit, seen) -> list[int]:
  """Labels of the images that candidates were fitted to."""
  linear_probe.linear_probe(train, test, fit, [0], seed=0)
  return seen[0].labels.tolist()


def test_a_feature_that_does_not_vary_becomes_zero():
  features = np.array([[0.1, 1e6, 1.0], [0.1, 1e6, 3.0], [0.1, 1e6, 2.0]], np.float32)
  standard = linear_probe.standardizer(features)(Features(features, np.zeros(3, np.int32)))
  assert standard.features.dtype == np.float32
  np.testing.assert_allclose(standard.features[:, :2], 0)
  np.testing.assert_allclose(standard.features[:, 2], [-(1.5**0.5), 1.5**0.5, 0], rtol=1e-6)


def test_shots_are_so_many_of_each_class_and_nested():
  labels = np.random.default_rng(0).integers(0, 7, 200)
  labels[labels == 5] = 4
  labels[:2] = 5  # a class of two images
  draws = [linear_probe.draw_shots(labels, n, np.random.default_rng(1)) for n in (1, 5)]
  for rows, n in zip(draws, (1, 5), strict=True):
    assert len({*rows}) == len(rows)
    assert np.bincount(labels[rows]).tolist() == [n, n, n, n, n, min(n, 2), n]
  assert {*draws[0]} < {*draws[1]}
  assert {*linear_probe.draw_shots(labels, 5, np.random.default_rng(2))} != {*draws[1]}


def test_few_shot_is_logistic_regression_of_these_images():
  train, test = digits()
  shots = linear_probe.few_shot(train, test, per_class=5, num_classes=CLASSES, seeds=range(4, 7))
  expected = []
  for seed in range(4, 7):
    rows = linear_probe.draw_shots(train.labels, 5, np.random.default_rng(seed))
    expected.append(LogisticRegression(C=1.0, tol=1e-6).fit(train.features[rows], train.labels[rows]).score(*test))
  np.testing.assert_allclose(shots.top1, expected, atol=0.0026)  # one of 400 images
  assert shots.mean == np.mean(shots.top1)
  np.testing.assert_allclose(shots.std, np.sqrt(np.square(np.subtract(shots.top1, shots.mean)).sum() / 2))
  assert linear_probe.few_shot(train, test, per_class=5, num_classes=CLASSES, seeds=[4]).std == 0


def test_equal_candidates_are_told_apart_by_their_loss():
  rows = Features(np.zeros((40, 1), np.float32), np.zeros(40, np.int32))
  # All are right (the class of NaNs is the first); one that has diverged is never better.
  probe = linear_probe.linear_probe(rows, rows, biased, [0.1, 5.0, 1.0, np.nan], seed=0)
  assert probe.chosen == 5.0
  assert [*probe.held_out_top1.values()] == [1.0] * 4


def biased(data, candidates):
  """Heads that say the first of two classes with such a logit."""
  for c in candidates:
    yield Head(jnp.zeros((1, 2)), jnp.array([c, 0.0]))


def test_the_search_ends_where_it_gets_no_better():
  rows = Features(np.zeros((40, 1), np.float32), np.zeros(40, np.int32))
  candidates = [1.0, 0.0, 3.0, 2.0, 2.5, 4.0]
  probe = linear_probe.linear_probe(rows, rows, biased, candidates, seed=0, patience=2)
  assert [*probe.held_out_top1] == [1.0, 0.0, 3.0, 2.0, 2.5]  # one that is no better does not end it, two do
  assert probe.chosen == 3.0
  probe = linear_probe.linear_probe(rows, rows, biased, candidates, seed=0)
  assert (probe.chosen, [*probe.held_out_top1]) == (4.0, candidates)


def test_one_image_is_too_few():
  one = Features(np.zeros((1, 2), np.float32), np.zeros(1, np.int32))
  with pytest.raises(InputError, match="two training images"):
    linear_probe.linear_probe(one, one, lambda data, candidates: [], [1.0], seed=0)
