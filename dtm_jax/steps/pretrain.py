"""One step of DTM pre-training: augment, teach, predict, morph, compare, update."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dtm_jax.augment import color_jitter, normalize, to_unit
from dtm_jax.axes import Stream
from dtm_jax.config import Config
from dtm_jax.losses import dtm_loss, normalize_tokens, token_loss
from dtm_jax.models.vit import ViT
from dtm_jax.morphing import sample_schedule
from dtm_jax.optim import Schedule
from dtm_jax.sharding import Average, by_compiler
from dtm_jax.steps.accumulation import Metrics, Rows, accumulate
from dtm_jax.teachers import Teacher
from dtm_jax.train_state import TrainState, apply_gradients, image_keys, stream_key

TrainStep = Callable[[TrainState, Any, Rows], tuple[TrainState, Metrics]]
Draw = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


def make_train_step(
  config: Config,
  student: ViT,
  teacher: Teacher,
  optimizer: optax.GradientTransformation,
  schedule: Schedule,
  draw: Draw,
  average: Average = by_compiler,
) -> TrainStep:
  """Builds the pure function of one optimiser step.

  Args:
    config: of the run; its seed and the state's step give every random number.
    student: predicts [B, N, D].
    teacher: gives the targets [B, N, D]; its parameters are an argument of the step.
    optimizer: changes the student's parameters.
    schedule: learning rate of a step, for the metrics.
    draw: merges and iterations of a step; `functools.partial(draw_schedules, config)` in training.
    average: how devices share the rows; `sharding.average_on(mesh)` in training.

  Returns:
    `(state, teacher_params, batch) -> (state, metrics)`, to be jitted. `batch`
    is the global batch: `image` uint8 [B, S, S, 3] and `mask` bool [B, N].
    Metrics are float32 scalars: `loss`; `token_loss`, the same distance without
    morphing, which does not jump with the draws; `grad_norm` (before clipping);
    `lr`; and the means of the drawn `merges` and `iterations`.
  """
  loss = make_loss(config, student, teacher)

  def train_step(state, teacher_params, batch):
    merges, iterations = draw(state.step)
    rows = batch | row_keys(config, state.step)
    shared = {}
    (rows if merges.ndim == 2 else shared).update(merges=merges, iterations=iterations)

    def loss_and_grads(rows):
      return jax.value_and_grad(loss, has_aux=True)(state.params, teacher_params, rows | shared)

    micro_batches = functools.partial(accumulate, loss_and_grads, num_micro_batches=config.optim.accumulate_steps)
    (value, aux), grads = average(micro_batches)(rows)
    lr = schedule(state.step)
    state, grad_norm = apply_gradients(state, value, grads, optimizer)
    metrics = {"loss": value, **aux, "grad_norm": grad_norm, "lr": lr}
    return state, metrics | {"merges": merges.mean(), "iterations": iterations.mean()}

  return train_step


def make_loss(config: Config, student: ViT, teacher: Teacher) -> Callable[[Any, Any, Rows], tuple[jax.Array, Metrics]]:
  """`(params, teacher_params, rows) -> (loss, metrics)` of one (micro-)batch; rows as `train_step` collects them."""
  data, morphing = config.data, config.morphing

  def loss(params, teacher_params, rows):
    images = augment(config, rows)
    target = teacher.apply(teacher_params, images)
    normal = normalize(images, data.mean, data.std)
    online = student.apply({"params": params}, normal, rows["mask"], rows.get("drop_path_keys"))
    counted = rows["mask"] if morphing.loss_on == "masked" else None
    token_target = normalize_tokens(target) if config.teacher.normalize_targets else target
    token_wise = token_loss(online, token_target, distance=morphing.distance, mask=counted)
    metrics = {"token_loss": jax.lax.stop_gradient(token_wise)}
    if not morphing.enabled:
      return token_wise, metrics
    morphed = dtm_loss(
      online,
      target,
      rows["merges"],
      rows["iterations"],
      distance=morphing.distance,
      mask=counted,
      protect_first=morphing.protect_first,
      split=morphing.split,
      image_keys=rows.get("split_keys"),
      normalize_targets=config.teacher.normalize_targets,
    )
    return morphed, metrics

  return loss


def augment(config: Config, rows: Rows) -> jax.Array:
  """The images that teacher and student see, float32 [B, S, S, 3] in [0, 1]; rows as `train_step` collects them."""
  images = to_unit(rows["image"])
  if "jitter_keys" in rows:
    images = color_jitter(rows["jitter_keys"], images, config.data.color_jitter)
  return images


def draw_schedules(config: Config, step: jax.typing.ArrayLike) -> tuple[jax.Array, jax.Array]:
  """Merges and iterations of one step: [L] where the batch shares them, else [B, L]."""
  morphing, batch_size = config.morphing, config.data.batch_size
  key = stream_key(config.run.seed, Stream.SCHEDULE, step)

  def sample(key):
    return sample_schedule(
      key,
      draws=morphing.draws,
      budget=config.morphing_budget,
      max_iterations=morphing.max_iterations,
      fixed_num_merged=morphing.fixed_num_merged,
      fixed_iterations=morphing.fixed_iterations,
    )

  if morphing.granularity == "batch":
    return sample(key)
  group_size = morphing.group_size or 1
  schedules = jax.vmap(sample)(image_keys(key, batch_size // group_size))
  return jax.tree.map(lambda x: jnp.repeat(x, group_size, axis=0), schedules)


def row_keys(config: Config, step: jax.typing.ArrayLike) -> Rows:
  """The keys [B] that this config's step uses up, one for each image."""
  wanted = {
    "jitter_keys": (Stream.COLOR_JITTER, config.data.color_jitter and config.data.color_jitter_on == "device"),
    "drop_path_keys": (Stream.DROP_PATH, config.model.drop_path),
    "split_keys": (Stream.SPLIT, config.morphing.enabled and config.morphing.split == "random"),
  }
  return {
    name: image_keys(stream_key(config.run.seed, stream, step), config.data.batch_size)
    for name, (stream, is_wanted) in wanted.items()
    if is_wanted
  }
