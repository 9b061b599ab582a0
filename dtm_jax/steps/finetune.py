"""One step of fine-tuning: classify, compare with soft labels, update."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from dtm_jax.augment import normalize, to_unit
from dtm_jax.axes import Stream
from dtm_jax.config import Config
from dtm_jax.models.vit import Classifier
from dtm_jax.optim import Schedule
from dtm_jax.steps.accumulation import Metrics, Rows, accumulate
from dtm_jax.train_state import TrainState, apply_gradients, image_keys, stream_key

TrainStep = Callable[[TrainState, Rows], tuple[TrainState, Metrics]]


def make_train_step(
  config: Config, model: Classifier, optimizer: optax.GradientTransformation, schedule: Schedule
) -> TrainStep:
  """Builds the pure function of one optimiser step.

  Args:
    config: of the run; its seed and the state's step give every random number.
    model: the classifier.
    optimizer: changes its parameters.
    schedule: learning rate of a step, for the metrics.

  Returns:
    `(state, batch) -> (state, metrics)`, to be jitted. `batch` is the global
    batch: `image` uint8 [B, S, S, 3] and `target` float32 [B, C], rows that sum
    to 1. Metrics are float32 scalars: `loss`, the cross-entropy; `grad_norm`
    (before clipping); `lr`.
  """

  def loss(params, rows):
    images = normalize(to_unit(rows["image"]), config.data.mean, config.data.std)
    logits = model.apply({"params": params}, images, rows.get("drop_path_keys"))
    return optax.softmax_cross_entropy(logits, rows["target"]).mean()

  def train_step(state, batch):
    rows = batch | _row_keys(config, state.step)
    value, grads = accumulate(
      lambda rows: jax.value_and_grad(loss)(state.params, rows), rows, config.optim.accumulate_steps
    )
    lr = schedule(state.step)
    state, grad_norm = apply_gradients(state, value, grads, optimizer)
    return state, {"loss": value, "grad_norm": grad_norm, "lr": lr}

  return train_step


def _row_keys(config: Config, step: jax.Array) -> dict[str, Any]:
  """The keys [B] of stochastic depth, where there is any."""
  if not config.model.drop_path:
    return {}
  return {"drop_path_keys": image_keys(stream_key(config.run.seed, Stream.DROP_PATH, step), config.data.batch_size)}
