"""Linear classification of frozen features: a probe on all training images, and few-shot.

The probe's strength of regularisation (or learning rate) is chosen on a tenth of the training images that is held out,
never on test images; the chosen one is then fitted to all of them.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh

from dtm_jax import distributed, sharding
from dtm_jax.errors import InputError
from dtm_jax.evaluate.features import Features

_PRECISION = jax.lax.Precision.HIGHEST  # as in evaluate.knn
_HELD_OUT = 10  # every tenth image, in random order

INVERSE_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # C; for standardised features
LEARNING_RATES = {
  "sgd": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0),
  "lars": (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0),
}
_FEWSHOT_INVERSE_STRENGTH = 1.0  # scikit-learn's default

_LBFGS_TOLERANCE = 1e-5  # of the largest gradient of the mean loss
_LBFGS_MAX_ITERATIONS = 5000
_MOMENTUM = 0.9
_INIT_STD = 0.01


class Head(NamedTuple):
  """Logits are features @ kernel + bias."""

  kernel: jax.Array  # float32 [D, C]
  bias: jax.Array  # float32 [C]


class Probe(NamedTuple):
  """What a linear probe found.

  Attributes:
    top1: accuracy on the test images, in [0, 1].
    chosen: the candidate that did best on the held-out images.
    held_out_top1: accuracy on these, by candidate that was tried.
  """

  top1: float
  chosen: float
  held_out_top1: dict[float, float]


class Shots(NamedTuple):
  """Accuracy in [0, 1] with so many training images per class: each draw's, their mean and sample std (0 for one)."""

  mean: float
  std: float
  top1: list[float]


# Features, candidates (strengths or learning rates) -> one head for each, perhaps made as it is asked for.
Fit = Callable[[Features, Sequence[float]], Iterable[Head]]


def linear_probe(
  train: Features, test: Features, fit: Fit, candidates: Sequence[float], *, seed: int, patience: int | None = None
) -> Probe:
  """Chooses on a held-out tenth of the training images, fits to all, and tests.

  Features are standardised by the mean and the standard deviation of those that are fitted to.

  Args:
    train: training images.
    test: test images.
    fit: a solver, such as `functools.partial(fit_lbfgs, num_classes=10, mesh=mesh)`.
    candidates: what to choose from by accuracy; of equal ones the one with the smallest loss.
    seed: of the choice of held-out images.
    patience: so many candidates in a row that are no better end the search; None tries all.

  Raises:
    InputError: fewer than two training images.
  """
  if len(train.labels) < 2:
    raise InputError("a linear probe needs two training images or more; add images or set config.eval.linear=False")
  order = np.random.default_rng(seed).permutation(len(train.labels))
  is_held_out = np.zeros(len(order), bool)
  is_held_out[order[::_HELD_OUT]] = True
  rest, held_out = (Features(*(array[rows] for array in train)) for rows in (~is_held_out, is_held_out))
  standardize = standardizer(rest.features)
  heads = fit(standardize(rest), candidates)
  held_out, scores = standardize(held_out), {}
  for candidate, head in zip(candidates, heads, strict=False):
    # Other hosts may round otherwise, and must not end the search at another place.
    score = accuracy(head, held_out), -_loss(head, held_out)
    scores[candidate] = tuple(distributed.from_first(lambda score=score: score))
    chosen = max(scores, key=scores.__getitem__)
    if patience is not None and [*scores].index(chosen) + patience < len(scores):
      break
  standardize = standardizer(train.features)
  [head] = fit(standardize(train), [chosen])
  return Probe(accuracy(head, standardize(test)), chosen, {c: top1 for c, (top1, _) in scores.items()})


def few_shot(train: Features, test: Features, *, per_class: int, num_classes: int, seeds: Sequence[int]) -> Shots:
  """Logistic regression of fixed strength (C = 1) on a few images of each class, drawn by each of the seeds.

  Draws are nested: the first image of a class is among its five, and these among its ten. A class that has fewer
  images gives all. Features are standardised by all training images, which needs no labels of theirs.
  """
  standardize = standardizer(train.features)
  train, test = standardize(train), standardize(test)

  def score(seed: int) -> float:
    rows = draw_shots(train.labels, per_class, np.random.default_rng(seed))
    shots = Features(train.features[rows], train.labels[rows])
    [head] = fit_lbfgs(shots, [_FEWSHOT_INVERSE_STRENGTH], num_classes=num_classes)
    return accuracy(head, test)

  top1 = [score(seed) for seed in seeds]
  return Shots(float(np.mean(top1)), float(np.std(top1, ddof=1)) if len(top1) > 1 else 0.0, top1)


def draw_shots(labels: np.ndarray, per_class: int, rng: np.random.Generator) -> np.ndarray:
  """int64 rows of up to `per_class` random images of every class; more of them begin with the same ones."""
  order = rng.permutation(len(labels))
  by_class = order[np.argsort(labels[order], kind="stable")]
  sorted_labels = labels[by_class]
  rank = np.arange(len(labels)) - np.searchsorted(sorted_labels, sorted_labels)
  return by_class[rank < per_class]


def standardizer(features: np.ndarray) -> Callable[[Features], Features]:
  """To mean 0 and standard deviation 1 of `features` [n, D]; a feature that does not vary becomes 0."""
  mean = features.mean(axis=0, dtype=np.float64).astype(np.float32)
  std = np.sqrt(np.square(features - mean).mean(axis=0, dtype=np.float64)).astype(np.float32)
  scale = np.divide(1, std, out=np.zeros_like(std), where=std > 0)
  return lambda given: Features((given.features - mean) * scale, given.labels)


def accuracy(head: Head, test: Features) -> float:
  """Share of images whose class has the largest logit."""
  return float(np.mean(np.asarray(_classify(head, test.features)) == test.labels))


def _loss(head: Head, data: Features) -> float:
  """Mean cross-entropy; infinite where a head has diverged."""
  loss = optax.softmax_cross_entropy_with_integer_labels(_logits(head, data.features), data.labels).mean()
  return float(jnp.nan_to_num(loss, nan=jnp.inf))


@jax.jit
def _classify(head: Head, features: jax.Array) -> jax.Array:
  return _logits(head, features).argmax(axis=-1)


def _logits(head: Head, features: jax.Array) -> jax.Array:
  return jnp.matmul(features, head.kernel, precision=_PRECISION) + head.bias


def fit_lbfgs(
  train: Features, inverse_strengths: Sequence[float], *, num_classes: int, mesh: Mesh | None = None
) -> Iterator[Head]:
  """Multinomial logistic regression, full batch, each C from where the one before ended.

  Minimises sum(cross-entropy) + |kernel|^2 / (2 C), as scikit-learn's LogisticRegression does: the bias is free.

  Args:
    train: standardised features.
    inverse_strengths: C, best from the smallest up.
    num_classes: number of classes.
    mesh: devices to split the images over; None is one device.
  """
  rows = (*train, np.ones(len(train.labels), np.float32))
  head = Head(np.zeros((train.features.shape[1], num_classes), np.float32), np.zeros(num_classes, np.float32))
  if mesh is not None:
    rows = [sharding.split_rows(array, mesh) for array in rows]
    head = Head(*(sharding.place(array, sharding.replicated(mesh)) for array in head))
  for inverse_strength in inverse_strengths:
    head, iterations = _minimize(head, *rows, inverse_strength)
    if distributed.to_host(iterations) == _LBFGS_MAX_ITERATIONS:
      logging.warning("L-BFGS for C = %g was ended after %d iterations", inverse_strength, iterations)
    yield jax.tree.map(distributed.to_host, head)


@jax.jit
def _minimize(
  head: Head, features: jax.Array, labels: jax.Array, weights: jax.Array, inverse_strength: jax.Array
) -> tuple[Head, jax.Array]:
  """The head, and the number of iterations; rows of weight 0 do not count."""

  def objective(head):
    losses = optax.softmax_cross_entropy_with_integer_labels(_logits(head, features), labels)
    penalty = jnp.square(head.kernel).sum() / (2 * inverse_strength)
    return ((losses * weights).sum() + penalty) / weights.sum()

  solver = optax.lbfgs()
  value_and_grad = optax.value_and_grad_from_state(objective)

  def step(carry):
    head, state = carry
    value, grad = value_and_grad(head, state=state)
    updates, state = solver.update(grad, state, head, value=value, grad=grad, value_fn=objective)
    return optax.apply_updates(head, updates), state

  def goes_on(carry):
    _, state = carry
    count, grad = (optax.tree.get(state, name) for name in ("count", "grad"))
    is_far = optax.tree.norm(grad, ord=jnp.inf) > _LBFGS_TOLERANCE
    return (count == 0) | (is_far & (count < _LBFGS_MAX_ITERATIONS))

  head, state = jax.lax.while_loop(goes_on, step, (head, solver.init(head)))
  return head, optax.tree.get(state, "count")


def fit_sgd(
  train: Features,
  learning_rates: Sequence[float],
  *,
  num_classes: int,
  epochs: int,
  batch_size: int,
  seed: int,
  lars: bool = False,
) -> list[Head]:
  """SGD with momentum 0.9 and a cosine to 0, without weight decay; all learning rates in one pass over the data.

  All heads start alike and see the same batches, so each is what it would be alone.

  Args:
    train: standardised features.
    learning_rates: of the first step.
    num_classes: number of classes.
    epochs: passes over the images; what does not fill a batch is left to the next, which is in another order.
    batch_size: images per step, or all where there are fewer.
    seed: of initial kernels and order.
    lars: layer-wise adaptive rates (You et al. 2017, arXiv 1708.03888) for the kernel.
  """
  num_images, width = train.features.shape
  batch_size = min(batch_size, num_images)
  steps = num_images // batch_size
  optimizer = _sgd(epochs * steps, lars)
  kernel = _INIT_STD * jax.random.normal(jax.random.key(seed), (width, num_classes))
  head = Head(kernel, jnp.zeros(num_classes))
  rates = jnp.asarray(learning_rates, jnp.float32)
  carry = jax.vmap(lambda _: (head, optimizer.init(head)))(rates)
  features, labels = jnp.asarray(train.features), jnp.asarray(train.labels)
  rng = np.random.default_rng(seed)
  for _ in range(epochs):
    order = rng.permutation(num_images)[: steps * batch_size].reshape(steps, batch_size)
    carry = _sgd_epoch(carry, rates, features, labels, order, optimizer)
  heads, _ = carry
  return [jax.tree.map(lambda leaf, i=i: leaf[i], heads) for i in range(len(learning_rates))]


@functools.cache
def _sgd(steps: int, lars: bool) -> optax.GradientTransformation:
  """For a learning rate of 1, which each head's own then multiplies: both rules are linear in it."""
  schedule = optax.cosine_decay_schedule(1.0, steps)
  if not lars:
    return optax.sgd(schedule, momentum=_MOMENTUM)
  return optax.lars(schedule, momentum=_MOMENTUM, trust_ratio_mask=Head(kernel=True, bias=False))


@functools.partial(jax.jit, static_argnames="optimizer", donate_argnums=0)
def _sgd_epoch(carry, learning_rates, features, labels, order, optimizer):
  def loss(head, batch):
    return optax.softmax_cross_entropy_with_integer_labels(_logits(head, features[batch]), labels[batch]).mean()

  def update(carry, learning_rate, batch):
    head, state = carry
    updates, state = optimizer.update(jax.grad(loss)(head, batch), state, head)
    return optax.apply_updates(head, optax.tree.scale(learning_rate, updates)), state

  def step(carry, batch):
    return jax.vmap(update, (0, 0, None))(carry, learning_rates, batch), None

  return jax.lax.scan(step, carry, order)[0]
