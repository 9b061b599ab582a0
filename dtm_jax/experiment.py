"""A run from its config: builds the parts, trains, evaluates, and leaves the work folder behind."""

import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh

from dtm_jax import figures, loop, metrics, sharding
from dtm_jax import workdir as workdirs
from dtm_jax.axes import Stream
from dtm_jax.checkpoint import FOLDER as CHECKPOINT_FOLDER
from dtm_jax.checkpoint import CheckpointStore
from dtm_jax.config import Config, DataConfig, from_json, to_json
from dtm_jax.data.pipeline import BadImageMonitor, Batch, eval_batches, train_batches
from dtm_jax.data.sources import Source, open_source
from dtm_jax.data.transforms import RESAMPLER
from dtm_jax.errors import InputError
from dtm_jax.evaluate.features import FeatureExtractor
from dtm_jax.evaluate.knn import knn_accuracy
from dtm_jax.evaluate.steps import make_feature_fn, make_label_fn
from dtm_jax.models.variants import VARIANTS
from dtm_jax.models.vit import ViT
from dtm_jax.optim import Schedule, create_optimizer, warmup_cosine
from dtm_jax.steps.pretrain import draw_schedules, make_train_step
from dtm_jax.teachers import Teacher, create_teacher
from dtm_jax.train_state import TrainState, create_train_state, params_sha256, stream_key
from dtm_jax.workdir import CONFIG_FILE, SUMMARY_FILE, read_json, write_json


@dataclasses.dataclass(frozen=True)
class Parts:
  """All that a run is made of, before its first step."""

  config: Config
  mesh: Mesh
  train_source: Source
  eval_source: Source
  student: ViT
  teacher: Teacher
  teacher_params: Any  # on the devices; not part of the train state
  optimizer: optax.GradientTransformation
  schedule: Schedule
  total_steps: int

  def create_state(self) -> TrainState:
    """A new state, on the devices."""
    return jax.jit(self._create_state, out_shardings=sharding.replicated(self.mesh))()

  def abstract_state(self) -> TrainState:
    """The state's shapes, dtypes and shardings, to restore to."""
    return _abstract(self._create_state, sharding.replicated(self.mesh))

  def _create_state(self) -> TrainState:
    return create_train_state(init_params(self.config, self.student), self.optimizer)

  @functools.cached_property
  def jitted_step(self):
    """`(state, teacher_params, batch) -> (state, metrics)`, compiled once; gives its state's memory away."""
    draw = functools.partial(draw_schedules, self.config)
    step = make_train_step(self.config, self.student, self.teacher, self.optimizer, self.schedule, draw)
    replicated, split = sharding.replicated(self.mesh), sharding.batch_sharding(self.mesh)
    return jax.jit(step, in_shardings=(replicated, replicated, split), out_shardings=replicated, donate_argnums=0)

  def train_step(self, state: TrainState, batch: Any) -> tuple[TrainState, Any]:
    return self.jitted_step(state, self.teacher_params, batch)

  def place(self, batch: loop.HostBatch) -> Any:
    """The part of a host batch that the device needs, as global arrays."""
    needed = {name: batch[name] for name in ("image", "mask")}
    return sharding.to_global(needed, sharding.batch_sharding(self.mesh))


def build(config: Config) -> Parts:
  """Opens the data, the teacher and the devices.

  Raises:
    InputError: any of them is missing or does not fit the others.
  """
  if jax.process_count() > 1:
    raise InputError("several processes are not supported yet; start one process for all local devices")
  if config.model.attention == "cudnn" and jax.default_backend() != "gpu":
    raise InputError("config.model.attention='cudnn' needs a GPU; choose 'xla' or 'matmul'")
  mesh = sharding.create_mesh(config.mesh)
  micro_batch = config.data.batch_size // config.optim.accumulate_steps
  sharding.check_batch_size(micro_batch, mesh, "config.data.batch_size / config.optim.accumulate_steps")
  sharding.check_batch_size(config.eval.batch_size, mesh, "config.eval.batch_size")
  train_source, eval_source = (open_source(config.data, split) for split in ("train", "eval"))
  teacher, teacher_params = create_teacher(config, restore_student)
  total_steps = config.total_steps(len(train_source))
  warmup_steps = min(config.warmup_steps(len(train_source)), total_steps)
  schedule = warmup_cosine(config.peak_lr, config.optim.min_lr, warmup_steps, total_steps)
  return Parts(
    config=config,
    mesh=mesh,
    train_source=train_source,
    eval_source=eval_source,
    student=create_student(config, teacher.out_dim),
    teacher=teacher,
    teacher_params=jax.device_put(teacher_params, sharding.replicated(mesh)),
    optimizer=create_optimizer(config.optim, schedule),
    schedule=schedule,
    total_steps=total_steps,
  )


def create_student(config: Config, out_dim: int) -> ViT:
  """The configured student for targets of width `out_dim`."""
  model = config.model
  return ViT(
    **VARIANTS[model.variant]._asdict(),
    patch_size=model.patch_size,
    grid=config.grid,
    out_dim=out_dim,
    drop_path=model.drop_path,
    dtype=np.dtype(model.dtype),
    attention=model.attention,
    scan_layers=model.scan_layers,
    remat=model.remat,
  )


def init_params(config: Config, student: ViT) -> Any:
  """The student's initial parameters, from the run's seed."""
  size = config.data.image_size
  images, mask = np.zeros((1, size, size, 3), np.float32), np.zeros((1, config.num_tokens), bool)
  return student.init(stream_key(config.run.seed, Stream.INIT, 0), images, mask)["params"]


class Restored(NamedTuple):
  """What a work folder's newest checkpoint holds, and the settings that it was made with."""

  config: Config
  step: int
  student: ViT
  params: Any  # numpy


def restore_student(workdir: pathlib.Path) -> tuple[ViT, Any, DataConfig]:
  """The student of a work folder's newest checkpoint, its parameters as numpy arrays, and the data it was trained on.

  Raises:
    InputError: the folder is not that of a run, or has no checkpoint.
  """
  restored = restore_run(workdir)
  return restored.student, restored.params, restored.config.data


def restore_run(workdir: pathlib.Path) -> Restored:
  """Reads the newest checkpoint of a work folder, whatever devices it was saved on.

  Raises:
    InputError: the folder is not that of a run, its record is damaged, or it has no checkpoint.
  """
  record = read_json(workdir / CONFIG_FILE)
  steps = [path.name for path in (workdir / CHECKPOINT_FOLDER).glob("*") if path.name.isdigit()]
  if record is None or not steps:
    raise InputError(f"{workdir} holds no checkpoint of a run; name its work folder, or a weights file")
  if not isinstance(record, dict) or not isinstance(record.get("target_dim"), int):
    raise InputError(f"{workdir / CONFIG_FILE} is not the record of a pre-training run; name another work folder")
  config = from_json(record)
  student = create_student(config, record["target_dim"])
  optimizer = create_optimizer(config.optim, lambda step: 0.0)
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  like = _abstract(lambda: create_train_state(init_params(config, student), optimizer), here)
  with contextlib.closing(CheckpointStore(workdir)) as store:
    state = store.restore(store.latest_step(), like)
  return Restored(config, int(state.step), student, jax.tree.map(np.asarray, state.params))


def _abstract(create: Callable[[], TrainState], where: jax.sharding.Sharding) -> TrainState:
  """Shapes, dtypes and shardings of a state, to restore to."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), jax.eval_shape(create))


def run(config: Config, workdir: pathlib.Path, command: str, stop_requested: Callable[[], bool]) -> bool:
  """Trains from where the work folder stands to the end, evaluates and writes the summary.

  Args:
    config: of the run; has to agree with the work folder's, but for what does not change the outcome.
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
  workdirs.create(workdir)
  record = workdirs.read_record(workdir, config)
  if record is not None and _is_complete(workdir, config.total_steps(record["train_images"])):
    logging.info("%s is complete; its results are in %s", workdir, workdir / SUMMARY_FILE)
    return True
  parts = build(config)
  new_record = _new_record(parts, command)
  if record is not None:
    workdirs.check_same_inputs(workdir, record, new_record, ("teacher_sha256", "train_images", "resampler"))
  store = CheckpointStore(workdir, keep=config.run.keep_checkpoints)
  with contextlib.closing(store), contextlib.closing(metrics.MetricWriter(workdir)) as writer:
    state = _restore_or_create(parts, store)
    write_json(workdir / CONFIG_FILE, new_record)
    if int(state.step) == 0 and config.eval.knn:
      _evaluate(parts, state, writer)
    state = _train(parts, state, store, writer, stop_requested)
    store.wait()
    if int(state.step) < parts.total_steps:
      logging.info("stopped and saved at step %d; the same command goes on from there", state.step)
      return False
    if config.eval.knn:
      _evaluate(parts, state, writer)
    _draw(parts, workdir, writer)
    summary = _summary(parts, state, writer) | {"seconds": round(time.perf_counter() - start, 1)}
  write_json(workdir / SUMMARY_FILE, summary)
  _log_summary(workdir, summary)
  return True


def _train(parts: Parts, state: TrainState, store: CheckpointStore, writer: metrics.MetricWriter, stop_requested):
  config = parts.config
  known = [i for row in writer.rows if row["step"] <= int(state.step) for i in row.get("bad_indices", ())]
  monitor = BadImageMonitor(parts.train_source, config.data.max_bad_fraction, known)

  def log(step: int, values: dict[str, float]) -> None:
    store.check()
    new = monitor.take_new()
    writer.write(step, values | {"bad_images": monitor.count} | ({"bad_indices": new} if new else {}))

  training = loop.Loop(
    train_step=parts.train_step,
    place=parts.place,
    num_steps=parts.total_steps,
    batch_size=config.data.batch_size,
    log_every=config.run.log_every_steps,
    save_every=config.run.checkpoint_every_steps,
    log=log,
    save=store.save,
    stop_requested=stop_requested,
  )
  batches = train_batches(
    config,
    parts.train_source,
    start_step=int(state.step),
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  with contextlib.closing(batches):
    return training.run(state, _watch(batches, monitor))


def _watch(batches: Iterator[Batch], monitor: BadImageMonitor) -> Iterator[Batch]:
  """The same batches, with their unreadable images noted."""
  for batch in batches:
    monitor.observe(batch["bad"])
    yield batch


def _restore_or_create(parts: Parts, store: CheckpointStore) -> TrainState:
  step = store.latest_step()
  if step is None:
    logging.info(
      "training ViT-%s against %s for %d steps of %d images on %d %s device(s)",
      *(parts.config.model.variant, parts.config.teacher.kind, parts.total_steps, parts.config.data.batch_size),
      *(jax.device_count(), jax.default_backend()),
    )
    return parts.create_state()
  if step > parts.total_steps:
    raise InputError(
      f"the checkpoint is at step {step}, beyond the run's end at {parts.total_steps}; raise config.run.steps"
    )
  logging.info("resuming at step %d of %d", step, parts.total_steps)
  return store.restore(step, parts.abstract_state())


def _evaluate(parts: Parts, state: TrainState, writer: metrics.MetricWriter) -> None:
  """k-NN accuracy of the student's mean patch token, logged at the state's step."""
  config, num_classes = parts.config, parts.train_source.num_classes
  if num_classes is None:
    logging.warning("no k-NN: the images have no classes (config.eval.knn=False says so)")
    return
  extract = FeatureExtractor(config, parts.mesh, make_feature_fn(config, parts.student), state.params)
  train = extract(parts.train_source, config.eval.max_train_images)
  test = extract(parts.eval_source, config.eval.max_test_images)
  accuracy = knn_accuracy(
    *(*train, *test),
    k=config.eval.knn_k,
    temperature=config.eval.knn_temperature,
    num_classes=num_classes,
    mesh=parts.mesh,
  )
  step = int(state.step)
  writer.write(step, {"knn_top1": accuracy})
  logging.info("k-NN accuracy at step %d: %.1f %%", step, 100 * accuracy)


def _draw(parts: Parts, workdir: pathlib.Path, writer: metrics.MetricWriter) -> None:
  config = parts.config
  steps, losses = writer.series("loss")
  curves = {"loss": losses, "without morphing": writer.series("token_loss")[1]}
  figures.loss_figure(workdir / "figures" / "loss.png", steps, curves, writer.series("lr")[1])
  if not config.eval.figure_images:
    return
  with contextlib.closing(
    eval_batches(config, parts.eval_source, config.eval.figure_images, limit=config.eval.figure_images)
  ) as batches:
    batch = next(batches)
  images = batch["image"][batch["valid"]]
  if not len(images):
    return
  settings = figures.morphing_settings(config.morphing_budget, config.morphing.max_iterations // 2)
  label_fn = jax.jit(make_label_fn(config, parts.teacher, settings))
  labels = np.asarray(label_fn(parts.teacher_params, images))
  figures.morphing_figure(workdir / "figures" / "morphing.png", images, labels, settings, config.grid)


def _summary(parts: Parts, state: TrainState, writer: metrics.MetricWriter) -> dict[str, Any]:
  rates = writer.series("images_per_second")[1]
  summary = {
    "steps": parts.total_steps,
    "loss": writer.find(parts.total_steps, "loss"),
    "images_per_second": float(np.median(rates)),
    "bad_images": writer.find(parts.total_steps, "bad_images"),
    "params_sha256": params_sha256(state.params),
  }
  after = writer.find(parts.total_steps, "knn_top1")
  if after is not None:
    summary |= {"knn_top1_before": writer.find(0, "knn_top1"), "knn_top1": after}
  return summary


def _log_summary(workdir: pathlib.Path, summary: dict[str, Any]) -> None:
  logging.info("done: %s", ", ".join(f"{name} {_short(value)}" for name, value in summary.items()))
  logging.info("see %s, %s and %s", *(workdir / name for name in (SUMMARY_FILE, metrics.FILE, "figures")))


def _short(value: Any) -> str:
  return f"{value:.4g}" if isinstance(value, float) else str(value)


def _new_record(parts: Parts, command: str) -> dict[str, Any]:
  return {
    **to_json(parts.config),
    **workdirs.circumstances(command),
    "target_dim": parts.teacher.out_dim,
    "teacher_sha256": _teacher_sha256(parts),
    "train_images": len(parts.train_source),
    "resampler": RESAMPLER,
    "total_steps": parts.total_steps,
    "peak_lr": parts.config.peak_lr,
  }


def _teacher_sha256(parts: Parts) -> str:
  """Of the weights file, or of the parameters where they come from a work folder; "" for teachers without."""
  if parts.teacher.weights_sha256 or not parts.teacher_params:
    return parts.teacher.weights_sha256
  return params_sha256(parts.teacher_params)


def _is_complete(workdir: pathlib.Path, total_steps: int) -> bool:
  summary = read_json(workdir / SUMMARY_FILE)
  return summary is not None and summary["steps"] >= total_steps
