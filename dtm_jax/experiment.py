"""A training run, whatever its task: restores or begins, trains, evaluates, and leaves the work folder behind."""

import abc
import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh

from dtm_jax import compile_cache, distributed, loop, metrics, sharding
from dtm_jax import workdir as workdirs
from dtm_jax.axes import FSDP, TENSOR
from dtm_jax.checkpoint import BEST_FOLDER, CheckpointStore, saved_steps
from dtm_jax.config import Config, DataConfig, to_json
from dtm_jax.data.pipeline import BadImageMonitor, Batch, eval_batches, train_batches
from dtm_jax.data.sources import Source, open_source
from dtm_jax.data.transforms import RESAMPLER
from dtm_jax.errors import InputError, StoppedError
from dtm_jax.models.variants import VARIANTS
from dtm_jax.networks import init_params
from dtm_jax.optim import Schedule, create_optimizer, warmup_cosine
from dtm_jax.restore import abstract_state
from dtm_jax.skipped_batches import SkippedBatches
from dtm_jax.train_state import TrainState, create_train_state, params_sha256
from dtm_jax.workdir import CONFIG_FILE, SUMMARY_FILE, read_json, write_json

StopRequested = Callable[[], bool]

_NOT_IN_STEP = (
  "they computed different things, which a faulty device or network may cause: go on from a checkpoint before that on"
  " other hosts"
)
INIT_SHA256 = "init_sha256"  # entry of the record


@dataclasses.dataclass(frozen=True)
class Setup:
  """What any training run is made of, but for its model."""

  config: Config
  mesh: Mesh
  train_source: Source
  eval_source: Source
  optimizer: optax.GradientTransformation
  schedule: Schedule
  warmup_steps: int
  total_steps: int


def open_setup(
  config: Config,
  devices: Sequence[jax.Device] | None = None,
  open_source: Callable[[DataConfig, str], Source] = open_source,
) -> Setup:
  """Opens the data and the devices.

  Args:
    config: of the run.
    devices: all there are for None.
    open_source: gives the images of split "train" or "eval".

  Raises:
    InputError: they are missing or do not fit the settings.
  """
  mesh = sharding.create_mesh(config.mesh, devices)
  if config.model.attention == "cudnn" and mesh.devices.flat[0].platform != "gpu":
    raise InputError("config.model.attention='cudnn' needs a GPU; choose 'xla' or 'matmul'")
  _check_split(config, mesh)
  micro_batch = config.data.batch_size // config.optim.accumulate_steps
  sharding.check_batch_size(micro_batch, mesh, "config.data.batch_size / config.optim.accumulate_steps")
  train_source, eval_source = (open_source(config.data, split) for split in ("train", "eval"))
  total_steps = config.total_steps(len(train_source))
  warmup_steps = min(config.warmup_steps(len(train_source)), total_steps)
  schedule = warmup_cosine(config.peak_lr, config.optim.min_lr, warmup_steps, total_steps)
  optimizer = create_optimizer(config.optim, schedule)
  return Setup(config, mesh, train_source, eval_source, optimizer, schedule, warmup_steps, total_steps)


def _check_split(config: Config, mesh: Mesh) -> None:
  """Warns of devices that share less than the layout says."""
  name, fsdp, tensor = config.model.variant, mesh.shape[FSDP], mesh.shape[TENSOR]
  width, _, heads, _ = VARIANTS[name]
  if heads % tensor:
    logging.warning(
      "config.mesh.tensor=%d does not divide the %d heads of ViT-%s: every device computes the attention of all",
      *(tensor, heads, name),
    )
  if width % fsdp:
    logging.warning(
      "config.mesh.fsdp=%d does not divide the width of ViT-%s, %d: every device holds much of the state whole; choose"
      " a divisor, and leave the rest to config.mesh.data",
      *(fsdp, name, width),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts(Setup, abc.ABC):
  """All that a run is made of before its first step, and what only its task knows: a subclass for each task."""

  batch_fields: ClassVar[tuple[str, ...]]  # what the device needs of a host batch
  recorded_inputs: ClassVar[tuple[str, ...]]  # entries of `record` that a resumed run has to share
  scores: ClassVar[tuple[str, ...]]  # what of `evaluate` tells how good the model is; the first is always there
  is_evaluated_untrained: ClassVar[bool]  # before the first step, too
  keeps_best: ClassVar[bool]  # the checkpoint with the highest score, beside the newest ones

  model: nn.Module

  @property
  @abc.abstractmethod
  def title(self) -> str:
    """What is done, for the log."""

  @abc.abstractmethod
  def record(self) -> dict[str, Any]:
    """Entries of `config.json` that only the task knows."""

  @property
  @abc.abstractmethod
  def jitted_step(self) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """`(*step_arguments) -> (state, metrics)`, compiled once; gives its state's memory away."""

  @abc.abstractmethod
  def step_arguments(self, state: TrainState, batch: Any) -> tuple[Any, ...]:
    """What `jitted_step` takes, the state first."""

  def train_step(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step; gives its state's memory away."""
    return self.jitted_step(*self.step_arguments(state, batch))

  @property
  @abc.abstractmethod
  def is_evaluated(self) -> bool:
    """Whether there is anything to evaluate."""

  @abc.abstractmethod
  def evaluate(self, state: TrainState, stop_requested: StopRequested) -> dict[str, float]:
    """What the model is worth. Raises StoppedError where it was asked to stop."""

  @abc.abstractmethod
  def draw(self, workdir: pathlib.Path, writer: metrics.MetricWriter) -> None:
    """Pictures of the finished run."""

  @abc.abstractmethod
  def results(self, writer: metrics.MetricWriter) -> dict[str, Any]:
    """Entries of `summary.json` that only the task knows."""

  def begin(self) -> tuple[TrainState, str]:
    """The state before the first step, and the SHA-256 of the weights that it comes from ("" for none)."""
    return self.create_state(), ""

  def check_begun(self, record: dict[str, Any]) -> None:
    """Raises InputError where the run that the record is of began with something else than the settings ask for."""

  def create_state(self) -> TrainState:
    """A new state with parameters drawn from the run's seed, on the devices; none ever holds all of a sharded one."""
    return jax.jit(self._create_state, out_shardings=self.state_shardings)()

  @functools.cached_property
  def state_shardings(self) -> TrainState:
    """Who holds what of the state."""
    return sharding.shard(jax.eval_shape(self._create_state), self.mesh)

  def abstract_state(self) -> TrainState:
    """The state's shapes, dtypes and shardings, to restore to."""
    return abstract_state(self._create_state, self.state_shardings)

  def _create_state(self) -> TrainState:
    return create_train_state(init_params(self.config, self.model), self.optimizer)

  def place(self, batch: loop.HostBatch) -> Any:
    """The part of a host batch that the device needs, as global arrays."""
    needed = {name: batch[name] for name in self.batch_fields}
    return sharding.to_global(needed, sharding.batch_sharding(self.mesh))

  @property
  def evaluate_every(self) -> int:
    """Steps between evaluations."""
    if self.config.eval.every_epochs is None:
      return self.total_steps
    return max(1, round(self.config.eval.every_epochs * self.config.steps_per_epoch(len(self.train_source))))

  def evaluation_images(self, number: int) -> np.ndarray:
    """uint8 [n, S, S, 3]: `number` readable images of the evaluation split, or fewer."""
    batches = eval_batches(self.config, self.eval_source, number, limit=number)
    with contextlib.closing(batches):
      batch = next(batches)
    return batch["image"][batch["valid"]]


def run(
  config: Config, build: Callable[[Config], Parts], workdir: pathlib.Path, command: str, stop_requested: StopRequested
) -> bool:
  """Trains from where the work folder stands to the end, evaluates and writes the summary.

  Args:
    config: of the run; has to agree with the work folder's, but for what does not change the outcome.
    build: opens everything that the run needs.
    workdir: made where it is missing.
    command: how the run was started, for the record.
    stop_requested: asked between steps; True saves and returns.

  Returns:
    True where the run is complete, False where it was stopped before its end.

  Raises:
    InputError: something is wrong that the user can mend.
    loop.NonFiniteError: the loss was not finite.
  """
  start = time.perf_counter()
  record = workdirs.read_record(workdir, config)
  if record is not None and _is_complete(workdir, config.total_steps(record["train_images"])):
    workdirs.warn_of_other_paths(workdir, record, config)
    logging.info("%s is complete; its results are in %s", workdir, workdir / SUMMARY_FILE)
    return True
  parts = distributed.together(lambda: build(config))
  distributed.connect(parts.mesh, sharding.describe(parts.mesh))
  new_record = _new_record(parts, command)
  if distributed.count() > 1:
    # Not in the record: a run that goes on may be evaluated on other images, but all processes on the same.
    distributed.check_same({"eval_images": len(parts.eval_source), "eval_sha256": parts.eval_source.fingerprint()})
  inputs = (*parts.recorded_inputs, "train_images", "train_sha256", "resampler")
  workdirs.check_same_inputs(workdir, record, new_record, inputs)
  is_resumed = distributed.from_first(lambda: bool(saved_steps(workdir)))
  if is_resumed:
    distributed.together(lambda: parts.check_begun(record))
  begun = None if is_resumed else _begin(parts, workdir, record)
  workdirs.create(workdir)
  with contextlib.ExitStack() as stack:
    workdirs.keep(workdir, until=stack)

    def opened(resource):
      return stack.enter_context(contextlib.closing(resource))

    store = opened(CheckpointStore(workdir, keep=config.run.keep_checkpoints))
    best = opened(CheckpointStore(workdir, keep=1, folder=BEST_FOLDER)) if parts.keeps_best else None
    session = _Session(parts, store, best, opened(metrics.MetricWriter(workdir)), stop_requested)
    # Entered last and left first: what is open above waits for the other processes, too.
    stack.enter_context(distributed.ending_at_once(loop.NonFiniteError))
    state, init_sha256 = begun or session.restore(record)
    write_json(workdir / CONFIG_FILE, new_record | {INIT_SHA256: init_sha256})
    state = session.train(state)
    if not session.finish(state):
      logging.info("stopped and saved at step %d; the same command goes on from there", state.step)
      return False
    parts.draw(workdir, session.writer)
    summary = session.summarize(state) | {"seconds": round(time.perf_counter() - start, 1)}
  write_json(workdir / SUMMARY_FILE, summary)
  _log_summary(workdir, summary)
  return True


def _begin(parts: Parts, workdir: pathlib.Path, record: dict[str, Any] | None) -> tuple[TrainState, str]:
  """The state before the first step, and the SHA-256 of the weights that it comes from."""
  batch_size, devices = parts.config.data.batch_size, sharding.describe(parts.mesh)
  logging.info("%s for %d steps of %d images on %s", parts.title, parts.total_steps, batch_size, devices)
  logging.info(
    "learning rate: its peak of %.3g after %d of %d steps", parts.config.peak_lr, parts.warmup_steps, parts.total_steps
  )
  state, init_sha256 = distributed.together(parts.begin)
  if record is not None:  # the run has logged something, though it was killed before its first checkpoint
    old, new = {INIT_SHA256: _init_sha256(record)}, {INIT_SHA256: init_sha256}
    workdirs.check_same_inputs(workdir, old, new, (INIT_SHA256,))
  return state, init_sha256


def _init_sha256(record: dict[str, Any] | None) -> str:
  """Runs that are older than this entry began with no weights."""
  return record[INIT_SHA256] if record and INIT_SHA256 in record else ""


@dataclasses.dataclass(frozen=True)
class _Session:
  """A run between its start and its end or a stop: its parts, and what lies open of its work folder."""

  parts: Parts
  store: CheckpointStore
  best: CheckpointStore | None  # of the highest score, where the task keeps it
  writer: metrics.MetricWriter
  stop_requested: StopRequested

  def must_stop(self) -> bool:
    """Whether the run was asked to stop. Raises what a save in the background has failed with."""
    self.store.check()
    if self.best is not None:
      self.best.check()
    return self.stop_requested()

  @functools.cached_property
  def skipped(self) -> SkippedBatches:
    return SkippedBatches(self.writer)

  def restore(self, record: dict[str, Any] | None) -> tuple[TrainState, str]:
    """The newest state that can be read, and the SHA-256 of the weights that the run began with."""
    parts, step = self.parts, distributed.from_first(self.store.latest_step)
    if step > parts.total_steps:
      raise InputError(
        f"the checkpoint is at step {step}, beyond the run's end at {parts.total_steps}; raise config.run.steps"
      )
    state = self.store.restore_newest(parts.abstract_state())
    logging.info("resuming at step %d of %d", state.step, parts.total_steps)
    before = (record or {}).get("total_steps", parts.total_steps)
    if before != parts.total_steps:
      told = "it was a run of %d steps before; from here on the learning rate is that of one of %d"
      logging.warning(told, before, parts.total_steps)
      self.writer.forget_after(int(state.step))
    return state, _init_sha256(record)

  def train(self, state: TrainState) -> TrainState:
    """Trains to the end, or until asked to stop; returns when all is saved.

    Raises:
      loop.NonFiniteError: the loss was not finite, and that is no reason to go back, or it has not helped.
    """
    train_step = compile_cache.told(self.parts.train_step)
    while True:
      try:
        return self._train(state, train_step)
      except loop.NonFiniteError as error:
        if self.parts.config.run.on_nonfinite == "stop":
          raise
        self.skipped.check_may_skip(error)
        logging.warning("%s", error)
        bad_step = error.step
      # Both here and, now that the error is gone, in the loop: there may be no memory for two.
      state = None
      state = self._go_back(bad_step)

  def _go_back(self, bad_step: int) -> TrainState:
    """The last good state; from there the run goes on without the batch of a step."""
    self.store.wait()
    like, is_saved = self.parts.abstract_state(), distributed.from_first(self.store.latest_step) is not None
    state = self.store.restore_newest(like) if is_saved else distributed.together(self.parts.begin)[0]
    number = self.skipped.add(bad_step, back_at=int(state.step))
    logging.warning("going back to step %d, and on without batch %d of the data", state.step, number)
    return state

  def _train(self, state: TrainState, train_step: Callable[..., Any]) -> TrainState:
    parts, config = self.parts, self.parts.config
    known = [i for row in self.writer.rows if row["step"] <= int(state.step) for i in row.get("bad_indices", ())]
    monitor = BadImageMonitor(parts.train_source, config.data.max_bad_fraction, known)

    met: list[int] = []

    def observe() -> None:
      """All processes learn what each has met."""
      of_all = np.array([i for share in distributed.gather(met) for i in share], int)
      met.clear()
      distributed.together(lambda: monitor.observe(of_all))

    def log(step: int, values: dict[str, float]) -> None:
      observe()
      new = monitor.take_new()
      self.writer.write(step, values | {"bad_images": monitor.count} | ({"bad_indices": new} if new else {}))

    def save(state: TrainState) -> None:
      observe()
      if new := monitor.take_new():  # which nobody would log any more where the run ends here
        self.writer.write(int(state.step), {"bad_indices": new})
      if self.best is not None:
        self.best.wait()  # a run that goes on after this step would not save it again
      self.store.save(state)

    training = loop.Loop(
      train_step=train_step,
      place=parts.place,
      num_steps=parts.total_steps,
      batch_size=config.data.batch_size,
      log_every=config.run.log_every_steps,
      save_every=config.run.checkpoint_every_steps,
      evaluate_every=parts.evaluate_every,
      log=log,
      save=save,
      evaluate=self.evaluate,
      stop_requested=self.must_stop,
    )
    with contextlib.closing(self._batches(int(state.step))) as batches:
      state = training.run(state, _watch(batches, met, observe))
    self.store.wait()
    return state

  def _batches(self, start_step: int) -> Generator[Batch]:
    """Of the steps from `start_step` on."""
    first = self.skipped.number_of(start_step)
    index, count = sharding.batch_share(self.parts.mesh)
    source = self.parts.train_source
    batches = train_batches(self.parts.config, source, start_step=first, process_index=index, process_count=count)
    with contextlib.closing(batches):
      yield from self.skipped.left_out(batches, first)

  def evaluate(self, state: TrainState) -> None:
    """Logs what the model is worth, once for each step. Raises StoppedError where it was asked to stop."""
    parts, writer, step = self.parts, self.writer, int(state.step)
    if not parts.is_evaluated or (step == 0 and not parts.is_evaluated_untrained):
      return
    if writer.find(step, parts.scores[0]) is None:
      values = parts.evaluate(state, self.must_stop)
      writer.write(step, values)
      logging.info("step %d: %s", step, metrics.told(values))
    if self.best is not None and writer.best(parts.scores, until=step).step == step:
      self.best.save(state)

  def finish(self, state: TrainState) -> bool:
    """Evaluates the trained model; False where the run was stopped before its end."""
    if int(state.step) < self.parts.total_steps:
      return False
    try:
      self.evaluate(state)
    except StoppedError:
      return False
    if self.best is not None:
      self.best.wait()
    return True

  def summarize(self, state: TrainState) -> dict[str, Any]:
    writer, last = self.writer, self.parts.total_steps
    sha256 = params_sha256(state.params)
    distributed.check_same({"params_sha256": sha256}, _NOT_IN_STEP)
    return {
      "steps": last,
      "loss": writer.find(last, "loss"),
      "images_per_second": float(np.median(writer.series("images_per_second")[1])),
      "bad_images": writer.find(last, "bad_images"),
      "params_sha256": sha256,
      **self.parts.results(writer),
    }


def _watch(batches: Iterator[Batch], met: list[int], observe: Callable[[], None]) -> Iterator[Batch]:
  """The same batches, with their unreadable images noted; several processes meet to tell them at logs only."""
  for batch in batches:
    met += batch["bad"][batch["bad"] >= 0].tolist()
    if distributed.count() == 1:
      observe()
    yield batch


def _log_summary(workdir: pathlib.Path, summary: dict[str, Any]) -> None:
  logging.info("done: %s", metrics.told(summary))
  logging.info("see %s, %s and %s", *(workdir / name for name in (SUMMARY_FILE, metrics.FILE, "figures")))


def _new_record(parts: Parts, command: str) -> dict[str, Any]:
  return {
    **to_json(parts.config),
    **workdirs.circumstances(command),
    **parts.record(),
    "train_images": len(parts.train_source),
    "train_sha256": parts.train_source.fingerprint(),
    "resampler": RESAMPLER,
    "total_steps": parts.total_steps,
    "peak_lr": parts.config.peak_lr,
  }


def _is_complete(workdir: pathlib.Path, total_steps: int) -> bool:
  summary = distributed.from_first(lambda: read_json(workdir / SUMMARY_FILE))
  return summary is not None and summary["steps"] >= total_steps
