"""Source -> batches. The stream is a pure function of (seed, step).

Position s * global_batch + r of the stream is row r of the global batch at
step s, for any number of hosts, workers and restarts: everything that is
random about a row is drawn from (seed, Stream, position), and the order is a
shuffle of the whole source that changes every epoch.
"""

import contextlib
import functools
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing import resource_tracker
from typing import NotRequired, TypedDict

import grain
import numpy as np
from absl import flags, logging
from PIL import Image

from dtm_jax.axes import Stream
from dtm_jax.config import Config, parse_rand_augment
from dtm_jax.data import masking, transforms
from dtm_jax.data.rand_augment import rand_augment
from dtm_jax.data.sources import NO_LABEL, Source
from dtm_jax.errors import InputError

_REPLACEMENTS = 20  # tries for a readable image before giving up
_READ_THREADS = 2  # of this process, where there are no workers; more only wait for the interpreter lock
UNREADABLE = (transforms.UnreadableImageError, OSError)


class Batch(TypedDict):
  """Training batch; b is this process's share of the global batch, S the image side, N the number of patches."""

  image: np.ndarray  # uint8 [b, S, S, 3], RGB
  mask: NotRequired[np.ndarray]  # bool [b, N], True = masked; of task "pretrain"
  label: np.ndarray  # int32 [b], -1 where the source has none
  position: np.ndarray  # int64 [b], place in the stream
  index: np.ndarray  # int64 [b], place in the source
  bad: np.ndarray  # int64 [b], place in the source of an unreadable image that this row replaces, or -1


class EvalBatch(TypedDict):
  """Evaluation batch; a row that is not valid is padding (index -1) or an unreadable image (its index)."""

  image: np.ndarray  # uint8 [b, S, S, 3]
  label: np.ndarray  # int32 [b, ...], of the source's label_shape
  index: np.ndarray  # int64 [b]
  valid: np.ndarray  # bool [b]


def train_batches(
  config: Config, source: Source, *, start_step: int, process_index: int = 0, process_count: int = 1
) -> Generator[Batch]:
  """Endless training batches; `close()` (or `contextlib.closing`) stops the threads or worker processes.

  Args:
    config: the run.
    source: where images come from.
    start_step: step of the first batch; nothing before it is read.
    process_index: which rows of the global batch are this process's.
    process_count: how many processes share the global batch.

  Returns:
    A generator. Its `next` raises InputError where an image and all its
    replacements are unreadable.

  Raises:
    InputError: the global batch is not divisible by `process_count`.
  """
  rows = _rows_per_process(config.data.batch_size, process_count)
  order_seed = np.random.SeedSequence((config.run.seed, Stream.ORDER)).generate_state(1).item()
  stream = grain.MapDataset.range(len(source)).shuffle(seed=order_seed).repeat()
  chunks = stream.map_with_index(_TrainRow(config, source)).batch(rows, drop_remainder=True)
  # Chunk s * process_count + p holds the rows of process p at step s.
  return _run(chunks[start_step * process_count + process_index :: process_count], config.data.num_workers)


def eval_batches(
  config: Config,
  source: Source,
  batch_size: int,
  *,
  limit: int | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> Generator[EvalBatch]:
  """Each image once, in source order; `close()` (or `contextlib.closing`) stops the threads or worker processes.

  Args:
    config: the run.
    source: where images come from.
    batch_size: global; the last batch is padded with rows that are not valid.
    limit: at most this many images, spread over the source; None is all.
    process_index: which rows of the global batch are this process's.
    process_count: how many processes share the global batch.

  Returns:
    A generator, of as many batches for each process.

  Raises:
    InputError: `batch_size` is not divisible by `process_count`.
  """
  rows = _rows_per_process(batch_size, process_count)
  members = _spread(len(source), limit)
  padding = -len(members) % batch_size
  padded = np.concatenate([members, np.full(padding, -1)])
  chunks = grain.MapDataset.source(padded).map(_EvalRow(config, source)).batch(rows, drop_remainder=True)
  return _run(chunks[process_index::process_count], config.data.num_workers)


def num_evaluated(source: Source, limit: int | None) -> int:
  """How many images `eval_batches` gives."""
  return len(source) if limit is None else min(limit, len(source))


class BadImageMonitor:
  """Names every unreadable image in the log once, and stops the run when there are too many."""

  def __init__(self, source: Source, max_fraction: float, known: Iterable[int] = ()):
    """`known` are the indices that an earlier part of the run has met."""
    self._source = source
    self._allowed = math.ceil(max_fraction * len(source))
    self._seen = set(known)
    self._unreported: list[int] = []

  @property
  def count(self) -> int:
    """Distinct unreadable images so far."""
    return len(self._seen)

  def take_new(self) -> list[int]:
    """Indices that were met first since the last call."""
    new, self._unreported = self._unreported, []
    return new

  def observe(self, indices: np.ndarray) -> None:
    """Takes note of the `bad` field of a batch (or other indices; negative ones mean nothing).

    Raises:
      InputError: more distinct images than allowed.
    """
    for index in sorted({*indices[indices >= 0].tolist()} - self._seen):
      self._seen.add(index)
      self._unreported.append(index)
      name = self._source.name(index)
      logging.warning("unreadable image skipped: %s", name)
      if self.count > self._allowed:
        raise InputError(
          f"{name} is unreadable image number {self.count}, and {self._allowed} are allowed;"
          " repair them or raise config.data.max_bad_fraction"
        )


class _TrainRow:
  """(position in the stream, shuffled index) -> one row of a `Batch`."""

  def __init__(self, config: Config, source: Source):
    self._config, self._source = config, source
    self._crop = transforms.train_crop(config.data)
    self._policy = parse_rand_augment(config.data.rand_augment)
    self._mean_color = tuple(round(255 * mean) for mean in config.data.mean)

  def __call__(self, position: int, index: int) -> dict[str, np.ndarray]:
    image, label, used, bad = self._read(position, index)
    row = {
      "image": image,
      "label": np.int32(label),
      "position": np.int64(position),
      "index": np.int64(used),
      "bad": np.int64(bad),
    }
    return row | {"mask": self._mask(position)} if self._config.task == "pretrain" else row

  def _mask(self, position: int) -> np.ndarray:
    data, rng = self._config.data, _row_rng(self._config, Stream.MASK, position)
    return masking.block_mask(rng, self._config.grid, data.num_masked, data.mask_min_block, data.mask_min_aspect)

  def _read(self, position: int, index: int) -> tuple[np.ndarray, int, int, int]:
    """Image, label, index in the source, and -1 or the index that could not be read."""
    try:
      return *self._augmented(position, index), index, -1
    except UNREADABLE:
      bad = index
    rng = _row_rng(self._config, Stream.ORDER, position)
    for replacement in rng.integers(len(self._source), size=_REPLACEMENTS).tolist():
      try:
        return *self._augmented(position, replacement), replacement, bad
      except UNREADABLE:
        continue
    raise InputError(
      f"{self._source.name(bad)} and {_REPLACEMENTS} random other images are unreadable; check config.data"
    )

  def _augmented(self, position: int, index: int) -> tuple[np.ndarray, int]:
    data = self._config.data
    jitter = data.color_jitter if data.color_jitter_on == "host" else 0.0
    example = self._source[index]
    image = transforms.train_image(
      example.image,
      _row_rng(self._config, Stream.AUGMENT, position),
      size=data.image_size,
      crop=self._crop,
      flip=data.flip,
      jitter=jitter,
      jitter_rng=_row_rng(self._config, Stream.COLOR_JITTER, position) if jitter else None,
      distort=self._distortion(position),
    )
    return image, example.label

  def _distortion(self, position: int) -> Callable[[Image.Image], Image.Image] | None:
    if self._policy is None:
      return None
    rng = _row_rng(self._config, Stream.RAND_AUGMENT, position)
    return functools.partial(rand_augment, rng=rng, policy=self._policy, fill=self._mean_color)


class _EvalRow:
  """Index in the source, or -1 for padding -> one row of an `EvalBatch`."""

  def __init__(self, config: Config, source: Source):
    self._size, self._crop, self._source = config.data.image_size, config.data.eval_crop, source

  def __call__(self, index: int) -> dict[str, np.ndarray]:
    image, valid = np.zeros((self._size, self._size, 3), np.uint8), False
    label = np.full(self._source.label_shape, NO_LABEL, np.int32)
    if index >= 0:
      with contextlib.suppress(*UNREADABLE):
        example = self._source[index]
        image, valid = transforms.eval_image(example.image, size=self._size, crop=self._crop), True
        label[...] = example.label
    return {"image": image, "label": label, "index": np.int64(index), "valid": np.bool_(valid)}


def _row_rng(config: Config, stream: Stream, position: int) -> np.random.Generator:
  """Counter-based: the key is (seed, stream), and every position has 2^64 draws of its own."""
  key, counter = np.array([config.run.seed, stream], np.uint64), np.array([0, position, 0, 0], np.uint64)
  return np.random.Generator(np.random.Philox(key=key, counter=counter))


def _rows_per_process(batch_size: int, process_count: int) -> int:
  if batch_size % process_count:
    raise InputError(f"a batch of {batch_size} is not divisible by {process_count} processes; change the batch size")
  return batch_size // process_count


def _spread(length: int, limit: int | None) -> np.ndarray:
  """int64 indices: all, or one at a fixed random place in each of `limit` equal stretches.

  Even steps could always meet the same class where classes alternate.
  """
  if limit is None or limit >= length:
    return np.arange(length)
  edges = np.arange(limit + 1) * length // limit
  return np.random.default_rng(0).integers(edges[:-1], edges[1:])


def _run(batches: grain.MapDataset, num_workers: int) -> Generator[dict[str, np.ndarray]]:
  """Threads of this process, or worker processes that each build whole batches in turn."""
  threads = 1 if num_workers else _READ_THREADS
  dataset = batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
  if num_workers:
    _start_resource_tracker()
    if not flags.FLAGS.is_parsed():  # Grain reads absl flags, also where no absl app runs
      flags.FLAGS.mark_as_parsed()
    dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers), worker_init_fn=_init_worker)
  with _deaf_offspring():
    iterator = iter(dataset)
  with contextlib.closing(iterator):
    while True:
      with _deaf_offspring():  # each worker is started when its first batch is asked for
        batch = next(iterator, None)
      if batch is None:
        return
      # Workers send views of shared memory: scarce, and not to be aliased by a device array.
      yield {name: np.array(value) for name, value in batch.items()}


@functools.cache
def _start_resource_tracker() -> None:
  """Not later: it would unblock the signals that `_deaf_offspring` blocks.

  It removes what a run has to leave behind that ends at once, and need not warn of that.
  """
  before = os.environ.get("PYTHONWARNINGS")
  os.environ["PYTHONWARNINGS"] = ",".join(filter(None, (before, "ignore:resource_tracker:UserWarning")))
  try:
    resource_tracker.ensure_running()
  finally:
    del os.environ["PYTHONWARNINGS"]
    if before is not None:
      os.environ["PYTHONWARNINGS"] = before


@contextlib.contextmanager
def _deaf_offspring() -> Iterator[None]:
  """Processes that are started in here hear no signal before they can ignore it; other threads of this one still do."""
  before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _init_worker(worker_index: int, worker_count: int) -> None:
  """Ties a worker's life to the parent's, and to nothing else."""
  del worker_index, worker_count
  # Ctrl-C and a scheduler's SIGTERM reach the whole process group; the parent still needs batches
  # to finish its step, and stops its workers itself.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
  multiprocessing.parent_process().join()  # returns also when the parent was killed
  os._exit(0)
