"""Features of a whole split, each image counted once."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh

from dtm_jax import sharding
from dtm_jax.config import Config
from dtm_jax.data.pipeline import BadImageMonitor, EvalBatch, eval_batches
from dtm_jax.data.sources import Source
from dtm_jax.errors import InputError


class StoppedError(Exception):
  """The user asked to stop before all images were seen."""


class Features(NamedTuple):
  """Frozen features of a split and its classes."""

  features: np.ndarray  # float32 [n, D]
  labels: np.ndarray  # int32 [n]


@dataclasses.dataclass(frozen=True)
class FeatureExtractor:
  """Computes features of whole splits, batches split over the mesh.

  Attributes:
    config: sizes of images and batches.
    mesh: devices.
    feature_fn: `(params, images uint8 [B, S, S, 3]) -> [B, D]`; jitted here.
    params: of the model.
    stop_requested: asked before each batch.
  """

  config: Config
  mesh: Mesh
  feature_fn: Callable[[Any, jax.Array], jax.Array]
  params: Any
  stop_requested: Callable[[], bool] = lambda: False

  @functools.cached_property
  def _jitted(self):
    split, replicated = sharding.batch_sharding(self.mesh), sharding.replicated(self.mesh)
    compiled, params = (
      jax.jit(self.feature_fn, in_shardings=(replicated, split)),
      jax.device_put(self.params, replicated),
    )
    return lambda images: compiled(params, sharding.to_global(images, split))

  def __call__(self, source: Source, limit: int | None, title: str = "features") -> Features:
    """Each image once, in source order; a bar shows how far it is, where standard error is a terminal.

    Args:
      source: where images come from.
      limit: at most so many images, spread over the source; None is all.
      title: of the bar.

    Raises:
      InputError: no image, or too many unreadable ones.
      StoppedError: `stop_requested` was true.
    """
    batch_size = self.config.eval.batch_size
    with contextlib.closing(eval_batches(self.config, source, batch_size, limit=limit)) as batches:
      monitor = BadImageMonitor(source, self.config.data.max_bad_fraction)
      total = len(source) if limit is None else min(limit, len(source))
      with tqdm.tqdm(total=total, desc=title, unit="image", dynamic_ncols=True, leave=False, disable=None) as bar:
        return extract_features(self._jitted, self._watch(batches, monitor, bar))

  def _watch(self, batches: Iterator[EvalBatch], monitor: BadImageMonitor, bar: tqdm.tqdm) -> Iterator[EvalBatch]:
    for batch in batches:
      if self.stop_requested():
        raise StoppedError
      monitor.observe(batch["index"][~batch["valid"]])
      yield batch
      bar.update(int(np.count_nonzero(batch["index"] >= 0)))


def extract_features(
  feature_fn: Callable[[np.ndarray], jax.Array], batches: Iterable[Mapping[str, np.ndarray]]
) -> Features:
  """Runs `feature_fn` over evaluation batches and drops the rows that only fill the last one.

  Args:
    feature_fn: uint8 [b, S, S, 3] -> float [b, D]; jitted by the caller.
    batches: dicts with `image` uint8 [b, S, S, 3], `label` int [b] and `valid` bool [b], False for padding rows.

  Returns:
    Features and labels, in the order of the batches.

  Raises:
    InputError: there is no image at all.
  """
  features, labels = [], []
  for batch in batches:
    valid = batch["valid"]
    features.append(np.asarray(feature_fn(batch["image"]), np.float32)[valid])
    labels.append(np.asarray(batch["label"], np.int32)[valid])
  if not any(map(len, labels)):
    raise InputError("the evaluation split has no images; check config.data, or set config.eval.knn=False")
  return Features(np.concatenate(features), np.concatenate(labels))


def check_labels(name: str, labels: np.ndarray, num_classes: int) -> None:
  """Raises InputError where an image has no class, or one that the data set says it does not have."""
  outside = labels[(labels < 0) | (labels >= num_classes)]
  if len(outside):
    raise InputError(
      f"{len(outside)} {name} labels outside 0..{num_classes - 1}, such as {outside[0]}; mend them, or where images"
      " have no class, set config.eval.knn=False (and config.eval.linear=False, fewshot=())"
    )
