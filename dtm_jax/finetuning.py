"""Task "finetune": a classifier, from a pre-trained checkpoint or from scratch."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from dtm_jax import experiment, figures, loop, metrics, sharding
from dtm_jax.config import Config
from dtm_jax.convert.transfer import resize_tables, to_classifier, with_new_head
from dtm_jax.errors import InputError
from dtm_jax.evaluate.accuracy import accuracies
from dtm_jax.evaluate.features import FeatureExtractor, check_labels
from dtm_jax.evaluate.steps import make_top_classes_fn
from dtm_jax.models.vit import Classifier
from dtm_jax.networks import create_classifier
from dtm_jax.optim import averaged_params
from dtm_jax.restore import Checkpoint, open_checkpoint
from dtm_jax.steps import finetune
from dtm_jax.train_state import TrainState, create_train_state

_AVERAGED = "ema_"  # before the names of what the averaged weights reach
_FEW = 32  # images
_BACKBONE = ("width", "depth", "heads", "patch_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts(experiment.Parts):
  """A fine-tuning run before its first step."""

  batch_fields = ("image", "label")
  recorded_inputs = ("num_classes",)
  scores = ("top1", f"{_AVERAGED}top1")
  is_evaluated = True
  is_evaluated_untrained = False
  keeps_best = True

  model: Classifier

  @property
  def title(self) -> str:
    return f"fine-tuning ViT-{self.config.model.variant} on {self.model.num_classes} classes"

  def record(self) -> dict[str, Any]:
    return {"num_classes": self.model.num_classes, "class_names": self.train_source.class_names}

  def begin(self) -> tuple[TrainState, str]:
    """See `experiment.Parts.begin`. Raises InputError where the checkpoint does not fit the model, or a label."""
    self._check_evaluation_labels()
    if not self.config.finetune.init:
      logging.info("beginning from scratch: config.finetune.init names no run and no weights")
      return super().begin()
    checkpoint = open_checkpoint(self.config.finetune.init)
    names, given = self.train_source.class_names, checkpoint.class_names
    if names and given and names != given and len(names) == len(given):
      logging.warning("the head of %s is kept, though its classes have other names than the data's", checkpoint.path)
    params = sharding.put(transfer(checkpoint, self.config, self.model), self.mesh)
    create = functools.partial(create_train_state, optimizer=self.optimizer)
    return jax.jit(create, out_shardings=self.state_shardings)(params), checkpoint.sha256

  def _check_evaluation_labels(self) -> None:
    """Of a few images: the first evaluation, which looks at all, may come after hours."""
    source = self.eval_source
    some = np.linspace(0, len(source) - 1, min(len(source), _FEW)).astype(int)
    check_labels("evaluation", np.array([source[i].label for i in some.tolist()]), self.model.num_classes)

  def check_begun(self, record: dict[str, Any]) -> None:
    """See `experiment.Parts.check_begun`. The weights may be gone by now, or those of a run that has gone on."""
    old, new = record["finetune"]["init"], self.config.finetune.init
    if old == new or (new and not pathlib.Path(new).exists()):
      return
    if (open_checkpoint(new).sha256 if new else "") != record.get(experiment.INIT_SHA256, ""):
      raise InputError(
        f"the run began with config.finetune.init={old!r}, and {new!r} is something else; use that or another --workdir"
      )

  @functools.cached_property
  def jitted_step(self):
    """`(state, batch) -> (state, metrics)`, compiled once; gives its state's memory away."""
    prepare = functools.partial(finetune.augment, self.config, self.model.num_classes)
    average = sharding.average_on(self.mesh)
    step = finetune.make_train_step(self.config, self.model, self.optimizer, self.schedule, prepare, average)
    split, replicated = sharding.batch_sharding(self.mesh), sharding.replicated(self.mesh)
    shardings = {"in_shardings": (self.state_shardings, split), "out_shardings": (self.state_shardings, replicated)}
    return jax.jit(step, **shardings, donate_argnums=0)

  def step_arguments(self, state: TrainState, batch: Any) -> tuple[Any, ...]:
    return state, batch

  def place(self, batch: loop.HostBatch) -> Any:
    """See `experiment.Parts.place`. Raises InputError where a label is no class."""
    check_labels("training", batch["label"], self.model.num_classes)
    return super().place(batch)

  @functools.cached_property
  def _classify(self) -> FeatureExtractor:
    top_classes = make_top_classes_fn(self.config, self.model)

    # All weights on each batch: images are read and decoded once.
    def by_weights(weights, images):
      return jnp.stack([top_classes(params, images) for params in weights], axis=1)

    return FeatureExtractor(self.config, self.mesh, by_weights)

  def evaluate(self, state: TrainState, stop_requested: experiment.StopRequested) -> dict[str, float]:
    """Top-1 and top-5 accuracy of the weights, and of their average where one is kept."""
    weights = {"": state.params}
    if self.config.optim.ema_decay is not None:
      weights[_AVERAGED] = averaged_params(state.opt_state)
    limit = self.config.eval.max_test_images
    found = self._classify([*weights.values()], self.eval_source, limit, stop_requested, "evaluation")
    check_labels("evaluation", found.labels, self.model.num_classes)
    scores = {prefix: accuracies(found.features[:, i], found.labels) for i, prefix in enumerate(weights)}
    return {prefix + name: value for prefix, values in scores.items() for name, value in values.items()}

  def draw(self, workdir: pathlib.Path, writer: metrics.MetricWriter) -> None:
    """Loss and accuracy."""
    steps, losses = writer.series("loss")
    figures.loss_figure(workdir / "figures" / "loss.png", steps, {"loss": losses}, writer.series("lr")[1])
    curves = {name: writer.series(name) for name in self.scores}
    curves = {name: (steps, values) for name, (steps, values) in curves.items() if steps}
    figures.accuracy_figure(workdir / "figures" / "accuracy.png", curves)

  def results(self, writer: metrics.MetricWriter) -> dict[str, Any]:
    last = next(row for row in writer.rows if row["step"] == self.total_steps and "top1" in row)
    best = writer.best(self.scores, until=self.total_steps)
    return {
      "num_classes": self.model.num_classes,
      **{name: value for name, value in last.items() if name.endswith(("top1", "top5"))},
      "best_top1": best.value,
      "best_step": best.step,
      "best_is_ema": best.name.startswith(_AVERAGED),
    }


def transfer(checkpoint: Checkpoint, config: Config, model: Classifier) -> Any:
  """Parameters of `model` that begin as a trained model, numpy; what is changed of it is logged.

  Raises:
    InputError: the checkpoint is of another backbone.
  """
  given = checkpoint.model
  if checkpoint.kind == "clip_vision":
    raise InputError(f"config.finetune.init={checkpoint.path} is CLIP's tower; give a student or classifier")
  for name in _BACKBONE:
    if getattr(given, name) != getattr(model, name):
      raise InputError(
        f"config.finetune.init={checkpoint.path} has {name} {getattr(given, name)}, and config.model asks for"
        f" {getattr(model, name)}; set config.model.variant and patch_size to the checkpoint's"
      )
  logging.info("beginning with the %s of %s, sha256 %s", checkpoint.kind, checkpoint.path, checkpoint.sha256)
  _warn_of_other_pixels(checkpoint, config)
  params, seed = checkpoint.params, config.run.seed
  if checkpoint.kind == "student":
    params = to_classifier(params, model.num_classes, tables=config.finetune.bias_tables, seed=seed)
  elif given.num_classes != model.num_classes:
    params = with_new_head(params, model.num_classes, seed)
    logging.info("new head: its %d classes are not the data's %d", given.num_classes, model.num_classes)
  if given.grid != model.grid:
    params = resize_tables(params, given.grid, model.grid)
    logging.info("bias tables resized from %d x %d to %d x %d patches", *given.grid, *model.grid)
  return params


def _warn_of_other_pixels(checkpoint: Checkpoint, config: Config) -> None:
  data = config.data
  if checkpoint.config and (checkpoint.config.data.mean, checkpoint.config.data.std) != (data.mean, data.std):
    logging.warning("%s was trained on images of other config.data.mean or std than these", checkpoint.path)


def build(config: Config) -> Parts:
  """Opens the data and the devices.

  Raises:
    InputError: they are missing or do not fit the settings, or the images have no classes.
  """
  return assemble(experiment.open_setup(config))


def assemble(setup: experiment.Setup) -> Parts:
  """The parts around the data. Raises InputError where the images have no classes."""
  num_classes = setup.train_source.num_classes
  if num_classes is None:
    raise InputError("the training images have no classes to learn; name data that has (config.data)")
  evaluated = setup.eval_source.num_classes
  if evaluated != num_classes:
    raise InputError(f"{num_classes} classes to learn and {evaluated} to be evaluated; mend the splits of config.data")
  model = create_classifier(setup.config, num_classes).clone(constrain=sharding.constrain_to(setup.mesh))
  return Parts(**vars(setup), model=model)


def run(config: Config, workdir: pathlib.Path, command: str, stop_requested: experiment.StopRequested) -> bool:
  """See `experiment.run`."""
  return experiment.run(config, build, workdir, command, stop_requested)
