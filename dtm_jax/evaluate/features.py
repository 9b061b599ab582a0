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
from dtm_jax.errors import InputError, StoppedError


class Features(NamedTuple):
  """What a model makes of the images of a split, and their classes."""

  features: np.ndarray  # [n, ...], such as float32 [n, D]
  labels: np.ndarray  # int32 [n]


@dataclasses.dataclass(frozen=True)
class FeatureExtractor:
  """Computes features of whole splits, batches split over the mesh; compiles once, for any parameters.

  Attributes:
    config: sizes of images and batches.
    mesh: devices.
    feature_fn: `(params, images uint8 [B, S, S, 3]) -> [B, ...]`; jitted here.
  """

  config: Config
  mesh: Mesh
  feature_fn: Callable[[Any, jax.Array], jax.Array]

  @functools.cached_property
  def _jitted(self):
    split, replicated = sharding.batch_sharding(self.mesh), sharding.replicated(self.mesh)
    return jax.jit(self.feature_fn, in_shardings=(replicated, split))

  def __call__(
    self,
    params: Any,
    source: Source,
    limit: int | None,
    stop_requested: Callable[[], bool],
    title: str = "features",
  ) -> Features:
    """Each image once, in source order; a bar shows how far it is, where standard error is a terminal.

    Args:
      params: of the model.
      source: where images come from.
      limit: at most so many images, spread over the source; None is all.
      stop_requested: asked before each batch.
      title: of the bar.

    Raises:
      InputError: no image, or too many unreadable ones.
      StoppedError: `stop_requested` was true.
    """
    batch_size, split = self.config.eval.batch_size, sharding.batch_sharding(self.mesh)
    params = jax.device_put(params, sharding.replicated(self.mesh))

    def feature_fn(images):
      return self._jitted(params, sharding.to_global(images, split))

    with contextlib.closing(eval_batches(self.config, source, batch_size, limit=limit)) as batches:
      monitor = BadImageMonitor(source, self.config.data.max_bad_fraction)
      total = len(source) if limit is None else min(limit, len(source))
      with tqdm.tqdm(total=total, desc=title, unit="image", dynamic_ncols=True, leave=False, disable=None) as bar:
        return extract_features(feature_fn, _watch(batches, monitor, bar, stop_requested))


def _watch(
  batches: Iterator[EvalBatch], monitor: BadImageMonitor, bar: tqdm.tqdm, stop_requested: Callable[[], bool]
) -> Iterator[EvalBatch]:
  """The same batches, with their unreadable images noted."""
  for batch in batches:
    if stop_requested():
      raise StoppedError
    monitor.observe(batch["index"][~batch["valid"]])
    yield batch
    bar.update(int(np.count_nonzero(batch["index"] >= 0)))


def extract_features(
  feature_fn: Callable[[np.ndarray], jax.Array], batches: Iterable[Mapping[str, np.ndarray]]
) -> Features:
  """Runs `feature_fn` over evaluation batches and drops the rows that only fill the last one.

  Args:
    feature_fn: uint8 [b, S, S, 3] -> [b, ...]; jitted by the caller.
    batches: dicts with `image` uint8 [b, S, S, 3], `label` int [b] and `valid` bool [b], False for padding rows.

  Returns:
    Features and labels, in the order of the batches.

  Raises:
    InputError: there is no image at all.
  """
  features, labels = [], []
  for batch in batches:
    valid = batch["valid"]
    features.append(np.asarray(feature_fn(batch["image"]))[valid])
    labels.append(np.asarray(batch["label"], np.int32)[valid])
  if not any(map(len, labels)):
    raise InputError("the evaluation split has no images; check config.data")
  return Features(np.concatenate(features), np.concatenate(labels))


def check_labels(name: str, labels: np.ndarray, num_classes: int) -> None:
  """Raises InputError where an image has no class, or one that the data set says it does not have."""
  outside = labels[(labels < 0) | (labels >= num_classes)]
  if len(outside):
    raise InputError(
      f"{len(outside)} {name} labels outside 0..{num_classes - 1}, such as {outside[0]}; mend them, or where images"
      " have no class, ask for nothing that needs one (config.eval.knn=False, linear=False, fewshot=(), ...)"
    )
