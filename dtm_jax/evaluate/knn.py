"""Weighted k-nearest-neighbour classification of frozen features, as in DINO (Caron et al. 2021, section 4.2)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dtm_jax.errors import InputError

# Neighbours are ranked by similarities, which must not be rounded to TF32 or bfloat16.
_PRECISION = jax.lax.Precision.HIGHEST
_SIMILARITIES_PER_CHUNK = 2**24  # 64 MiB in float32


def knn_accuracy(
  train_features: np.ndarray,
  train_labels: np.ndarray,
  test_features: np.ndarray,
  test_labels: np.ndarray,
  *,
  k: int,
  temperature: float,
  num_classes: int,
) -> float:
  """Share of test images whose class wins the vote of their k most similar training images.

  A neighbour at cosine similarity s votes with weight exp(s / temperature). Every pair is compared (no approximate
  search); a tied vote goes to the smaller class.

  Args:
    train_features: float [n, D], not necessarily normalised.
    train_labels: int [n], in 0..num_classes-1.
    test_features: float [m, D].
    test_labels: int [m], in 0..num_classes-1.
    k: number of neighbours, at most n.
    temperature: of the weights, positive; small ones make it a nearest-neighbour classifier.
    num_classes: number of classes.

  Returns:
    Accuracy in [0, 1].

  Raises:
    InputError: no test image, fewer training images than `k`, or an image without a class.
  """
  _check("training", train_labels, num_classes, at_least=k)
  _check("test", test_labels, num_classes, at_least=1)
  predicted = _predict(
    jnp.asarray(train_features, jnp.float32),
    jnp.asarray(train_labels, jnp.int32),
    jnp.asarray(test_features, jnp.float32),
    temperature,
    k=k,
    num_classes=num_classes,
  )
  return float(np.mean(np.asarray(predicted) == test_labels))


def _check(name: str, labels: np.ndarray, num_classes: int, *, at_least: int) -> None:
  if len(labels) < at_least:
    raise InputError(
      f"k-NN has {len(labels)} {name} images and needs {at_least}; add images or lower config.eval.knn_k"
    )
  if labels.min() < 0 or labels.max() >= num_classes:
    raise InputError(
      f"k-NN found {name} labels outside 0..{num_classes - 1}; where images have no class, set config.eval.knn=False"
    )


@functools.partial(jax.jit, static_argnames=("k", "num_classes"))
def _predict(
  train_features: jax.Array,
  train_labels: jax.Array,
  test_features: jax.Array,
  temperature: jax.Array,
  *,
  k: int,
  num_classes: int,
) -> jax.Array:
  """Class of each test image, int32 [m]."""
  train_features = _normalize(train_features)

  def predict(feature):
    similarity, neighbour = jax.lax.top_k(jnp.matmul(train_features, feature, precision=_PRECISION), k)
    # Relative to the nearest one: the same vote, and no overflow at low temperatures.
    weights = jnp.exp((similarity - similarity[0]) / temperature)
    votes = weights[:, None] * jax.nn.one_hot(train_labels[neighbour], num_classes)
    return votes.sum(axis=0).argmax().astype(jnp.int32)

  chunk = max(1, min(len(test_features), _SIMILARITIES_PER_CHUNK // len(train_features)))
  return jax.lax.map(predict, _normalize(test_features), batch_size=chunk)


def _normalize(features: jax.Array) -> jax.Array:
  norm = jnp.linalg.norm(features, axis=-1, keepdims=True)
  return features / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny)
