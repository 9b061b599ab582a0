"""Weighted k-nearest-neighbour classification of frozen features, as in DINO (Caron et al. 2021, section 4.2)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from dtm_jax import distributed, sharding
from dtm_jax.axes import BATCH_AXES
from dtm_jax.errors import InputError
from dtm_jax.evaluate.features import check_labels

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
  mesh: Mesh,
) -> float:
  """Share of test images that `knn_classes` is right about, in [0, 1]; see there for the arguments.

  Args:
    test_labels: int [m], in 0..num_classes-1.

  Raises:
    InputError: no test image, fewer training images than `k`, or an image without a class.
  """
  for name, labels, needed in (("training", train_labels, k), ("test", test_labels, 1)):
    if len(labels) < needed:
      raise InputError(
        f"k-NN has {len(labels)} {name} images and needs {needed}; add images or lower config.eval.knn_k"
      )
    check_labels(name, labels, num_classes)
  options = {"k": k, "temperature": temperature, "num_classes": num_classes, "mesh": mesh}
  return float(np.mean(knn_classes(train_features, train_labels, test_features, **options) == test_labels))


def knn_classes(
  train_features: np.ndarray,
  train_labels: np.ndarray,
  test_features: np.ndarray,
  *,
  k: int,
  temperature: float,
  num_classes: int,
  mesh: Mesh,
) -> np.ndarray:
  """The class of each test image that wins the vote of its k most similar training images, int32 [m].

  A neighbour at cosine similarity s votes with weight exp(s / temperature). Every pair is compared (no approximate
  search); a tied vote goes to the smaller class. Test images are split over the devices, each of which holds all
  training features.

  Args:
    train_features: float [n, D], not necessarily normalised.
    train_labels: int [n], in 0..num_classes-1.
    test_features: float [m, D].
    k: number of neighbours, at most n.
    temperature: of the weights, positive; small ones make it a nearest-neighbour classifier.
    num_classes: number of classes.
    mesh: devices.
  """
  replicated = sharding.replicated(mesh)
  predicted = _predict(
    sharding.place(np.asarray(train_features, np.float32), replicated),
    sharding.place(np.asarray(train_labels, np.int32), replicated),
    sharding.split_rows(np.asarray(test_features, np.float32), mesh),
    temperature,
    k=k,
    num_classes=num_classes,
    mesh=mesh,
  )
  return distributed.to_host(predicted)[: len(test_features)]


@functools.partial(jax.jit, static_argnames=("k", "num_classes", "mesh"))
def _predict(
  train_features: jax.Array,
  train_labels: jax.Array,
  test_features: jax.Array,
  temperature: jax.Array,
  *,
  k: int,
  num_classes: int,
  mesh: Mesh,
) -> jax.Array:
  """Class of each test image, int32 [m]; m is a multiple of the devices."""

  def predict_share(train_features, train_labels, test_features, temperature):
    def predict(feature):
      similarity, neighbour = jax.lax.top_k(jnp.matmul(train_features, feature, precision=_PRECISION), k)
      # Relative to the nearest one: the same vote, and no overflow at low temperatures.
      weights = jnp.exp((similarity - similarity[0]) / temperature)
      votes = weights[:, None] * jax.nn.one_hot(train_labels[neighbour], num_classes)
      return votes.sum(axis=0).argmax().astype(jnp.int32)

    chunk = max(1, min(len(test_features), _SIMILARITIES_PER_CHUNK // len(train_features)))
    return jax.lax.map(predict, test_features, batch_size=chunk)

  everywhere, split = PartitionSpec(), PartitionSpec(BATCH_AXES)
  specs = {"in_specs": (everywhere, everywhere, split, everywhere), "out_specs": split}
  share = jax.shard_map(predict_share, mesh=mesh, **specs)
  return share(_normalize(train_features), train_labels, _normalize(test_features), temperature)


def _normalize(features: jax.Array) -> jax.Array:
  norm = jnp.linalg.norm(features, axis=-1, keepdims=True)
  return features / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny)
