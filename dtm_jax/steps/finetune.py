"""One step of fine-tuning: augment, classify, compare with soft labels, update."""

import functools
from collections.abc import Callable

import jax
import optax

from dtm_jax.augment import mix, normalize, random_erase, smooth_labels
from dtm_jax.axes import Stream
from dtm_jax.config import Config
from dtm_jax.models.vit import Classifier
from dtm_jax.optim import Schedule
from dtm_jax.sharding import Average, by_compiler
from dtm_jax.steps.accumulation import Metrics, Rows, accumulate
from dtm_jax.train_state import TrainState, apply_gradients, image_keys, stream_key

TrainStep = Callable[[TrainState, Rows], tuple[TrainState, Metrics]]
Prepare = Callable[[jax.Array, Rows], tuple[jax.Array, jax.Array]]


def make_train_step(
  config: Config,
  model: Classifier,
  optimizer: optax.GradientTransformation,
  schedule: Schedule,
  prepare: Prepare,
  average: Average = by_compiler,
) -> TrainStep:
  """Builds the pure function of one optimiser step.

  Args:
    config: of the run; its seed and the state's step give every random number.
    model: the classifier.
    optimizer: changes its parameters.
    schedule: learning rate of a step, for the metrics.
    prepare: `(step, batch) -> (images, targets)` of the global batch, float32 [B, S, S, 3], normalised, and
      [B, C], rows that sum to 1; `functools.partial(augment, config, num_classes)` in training.
    average: how devices share the rows; `sharding.average_on(mesh)` in training.

  Returns:
    `(state, batch) -> (state, metrics)`, to be jitted. `batch` is what `prepare`
    takes. Metrics are float32 scalars: `loss`, the cross-entropy; `grad_norm`
    (before clipping); `lr`.
  """

  def loss(params, rows):
    logits = model.apply({"params": params}, rows["image"], rows.get("drop_path_keys"))
    return optax.softmax_cross_entropy(logits, rows["target"]).mean()

  def train_step(state, batch):
    # Before the batch is split into micro-batches: an image's partner may be in another one.
    images, targets = prepare(state.step, batch)
    rows = {"image": images, "target": targets} | row_keys(config, state.step)
    loss_and_grads = functools.partial(jax.value_and_grad(loss), state.params)
    micro_batches = functools.partial(accumulate, loss_and_grads, num_micro_batches=config.optim.accumulate_steps)
    value, grads = average(micro_batches)(rows)
    lr = schedule(state.step)
    state, grad_norm = apply_gradients(state, value, grads, optimizer)
    return state, {"loss": value, "grad_norm": grad_norm, "lr": lr}

  return train_step


def augment(config: Config, num_classes: int, step: jax.Array, batch: Rows) -> tuple[jax.Array, jax.Array]:
  """What the classifier sees and shall say at one step: erased, smoothed and mixed.

  Args:
    config: of the run.
    num_classes: C.
    step: int32 [], of which all draws are a function.
    batch: the global batch, `image` uint8 [B, S, S, 3] and `label` int32 [B].

  Returns:
    Images, float32 [B, S, S, 3], normalised, and targets, float32 [B, C].
  """
  settings, seed = config.finetune, config.run.seed
  images = normalize(batch["image"], config.data.mean, config.data.std)
  if settings.erase_prob:
    keys = image_keys(stream_key(seed, Stream.ERASE, step), len(images))
    images = random_erase(keys, images, settings.erase_prob)
  targets = smooth_labels(batch["label"], num_classes, settings.label_smoothing)
  return mix(
    stream_key(seed, Stream.MIX, step),
    images,
    targets,
    mixup=settings.mixup,
    cutmix=settings.cutmix,
    cutmix_prob=settings.cutmix_prob,
  )


def row_keys(config: Config, step: jax.typing.ArrayLike) -> Rows:
  """The keys [B] of stochastic depth, where there is any."""
  if not config.model.drop_path:
    return {}
  return {"drop_path_keys": image_keys(stream_key(config.run.seed, Stream.DROP_PATH, step), config.data.batch_size)}
