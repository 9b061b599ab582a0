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

from dtm_jax import console, distributed, sharding
from dtm_jax.config import Config
from dtm_jax.data.pipeline import BadImageMonitor, EvalBatch, eval_batches, num_evaluated
from dtm_jax.data.sources import Source
from dtm_jax.errors import InputError, StoppedError

_SMALL_FIELDS = ("label", "index", "valid")


class Features(NamedTuple):
  """What a model makes of the images of a split, and their classes."""

  features: np.ndarray  # [n, ...], such as float32 [n, D]
  labels: np.ndarray  # int32 [n]


@dataclasses.dataclass(frozen=True)
class FeatureExtractor:
  """Computes features of whole splits, batches split over the mesh; compiles once for each size of a batch.

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
    return jax.jit(self.feature_fn)

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
      params: of the model; arrays of a mesh stay where they are, the host's come to every device.
      source: where images come from.
      limit: at most so many images, spread over the source; None is all.
      stop_requested: asked before each batch.
      title: of the bar.

    Raises:
      InputError: no image, or too many unreadable ones.
      StoppedError: `stop_requested` was true.
    """
    total = num_evaluated(source, limit)
    batch_size = sharding.round_up(min(self.config.eval.batch_size, max(total, 1)), self.mesh)
    split, everywhere = sharding.batch_sharding(self.mesh), sharding.replicated(self.mesh)
    params = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else sharding.place(x, everywhere), params)

    def feature_fn(images):
      return distributed.to_host(self._jitted(params, sharding.to_global(images, split)))

    def of_all(rows):
      return jax.tree.map(distributed.to_host, sharding.to_global(rows, split))

    index, count = sharding.batch_share(self.mesh)
    batches = eval_batches(self.config, source, batch_size, limit=limit, process_index=index, process_count=count)
    with contextlib.closing(batches):
      monitor = BadImageMonitor(source, self.config.data.max_bad_fraction)
      with console.progress_bar(total=total, desc=title, unit="image", leave=False) as bar:
        return extract_features(feature_fn, _watch(_global_rows(batches, of_all), monitor, bar, stop_requested))


def _global_rows(
  batches: Iterator[EvalBatch], of_all: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
) -> Iterator[EvalBatch]:
  """The same batches, but for their images with the rows of all processes."""
  for batch in batches:
    yield batch if distributed.count() == 1 else batch | of_all({name: batch[name] for name in _SMALL_FIELDS})


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
    feature_fn: uint8 [b, S, S, 3] -> [B, ...]; jitted by the caller. Of several processes each has b of B images.
    batches: dicts with `image` uint8 [b, S, S, 3], `label` int [B] and `valid` bool [B], False for padding rows.

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
