"""Task "pretrain": a student learns to predict a teacher's tokens, grouped by DTM."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from absl import logging

from dtm_jax import distributed, experiment, figures, metrics, sharding
from dtm_jax.config import Config
from dtm_jax.evaluate.features import FeatureExtractor
from dtm_jax.evaluate.knn import knn_accuracy
from dtm_jax.evaluate.steps import make_feature_fn, make_label_fn
from dtm_jax.models.layers import Constrain
from dtm_jax.models.vit import ViT
from dtm_jax.networks import create_student
from dtm_jax.restore import restore_tower
from dtm_jax.steps.pretrain import draw_schedules, make_train_step
from dtm_jax.teachers import Teacher, create_teacher
from dtm_jax.train_state import TrainState, params_sha256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts(experiment.Parts):
  """A pre-training run before its first step."""

  batch_fields = ("image", "mask")
  recorded_inputs = ("teacher_sha256",)
  scores = ("knn_top1",)
  is_evaluated_untrained = True
  keeps_best = False

  model: ViT
  teacher: Teacher
  teacher_params: Any  # on the devices; not part of the train state

  @property
  def title(self) -> str:
    return f"training ViT-{self.config.model.variant} against {self.config.teacher.kind}"

  def record(self) -> dict[str, Any]:
    return {"target_dim": self.teacher.out_dim, "teacher_sha256": self._teacher_sha256()}

  def _teacher_sha256(self) -> str:
    """Of the weights file, or of the parameters where they come from a work folder; "" for teachers without."""
    if self.teacher.weights_sha256 or not self.teacher_params:
      return self.teacher.weights_sha256
    return params_sha256(self.teacher_params)

  @functools.cached_property
  def jitted_step(self):
    """`(state, teacher_params, batch) -> (state, metrics)`, compiled once; gives its state's memory away."""
    draw = functools.partial(draw_schedules, self.config)
    average = sharding.average_on(self.mesh)
    step = make_train_step(self.config, self.model, self.teacher, self.optimizer, self.schedule, draw, average)
    of_state, of_teacher = self.state_shardings, sharding.shard(self.teacher_params, self.mesh)
    split, replicated = sharding.batch_sharding(self.mesh), sharding.replicated(self.mesh)
    shardings = {"in_shardings": (of_state, of_teacher, split), "out_shardings": (of_state, replicated)}
    return jax.jit(step, **shardings, donate_argnums=0)

  def step_arguments(self, state: TrainState, batch: Any) -> tuple[Any, ...]:
    return state, self.teacher_params, batch

  @functools.cached_property
  def is_evaluated(self) -> bool:
    if self.config.eval.knn and self.train_source.num_classes is None:
      logging.warning("no k-NN: the images have no classes (config.eval.knn=False says so)")
    return self.config.eval.knn and self.train_source.num_classes is not None

  @functools.cached_property
  def _extract(self) -> FeatureExtractor:
    return FeatureExtractor(self.config, self.mesh, make_feature_fn(self.config, self.model))

  def evaluate(self, state: TrainState, stop_requested: experiment.StopRequested) -> dict[str, float]:
    """k-NN accuracy of the student's mean patch token."""
    settings = self.config.eval
    train = self._extract(state.params, self.train_source, settings.max_train_images, stop_requested)
    test = self._extract(state.params, self.eval_source, settings.max_test_images, stop_requested)
    accuracy = knn_accuracy(
      *(*train, *test),
      k=settings.knn_k,
      temperature=settings.knn_temperature,
      num_classes=self.train_source.num_classes,
      mesh=self.mesh,
    )
    return {"knn_top1": accuracy}

  def draw(self, workdir: pathlib.Path, writer: metrics.MetricWriter) -> None:
    """Loss, and token groups of a few images."""
    config = self.config
    steps, losses = writer.series("loss")
    curves = {"loss": losses, "without morphing": writer.series("token_loss")[1]}
    figures.loss_figure(workdir / "figures" / "loss.png", steps, curves, writer.series("lr")[1])
    images = self.evaluation_images(config.eval.figure_images) if config.eval.figure_images else ()
    if not len(images):
      return
    iterations = config.morphing.max_iterations // 2
    settings = figures.morphing_settings(config.morphing_budget, iterations)
    label_fn = jax.jit(make_label_fn(config, self.teacher, settings))
    labels = distributed.to_host(label_fn(self.teacher_params, images))
    figures.morphing_figure(workdir / "figures" / "morphing.png", images, labels, iterations, config.grid)

  def results(self, writer: metrics.MetricWriter) -> dict[str, Any]:
    after = writer.find(self.total_steps, "knn_top1")
    return {} if after is None else {"knn_top1_before": writer.find(0, "knn_top1"), "knn_top1": after}


def build(config: Config) -> Parts:
  """Opens the data, the teacher and the devices.

  Raises:
    InputError: any of them is missing or does not fit the others.
  """
  setup = experiment.open_setup(config)

  def open_teacher(constrain: Constrain) -> tuple[Teacher, Any]:
    teacher, params = create_teacher(config, restore_tower, constrain)
    return teacher, sharding.put(params, setup.mesh)

  return assemble(setup, open_teacher)


def assemble(setup: experiment.Setup, open_teacher: Callable[[Constrain], tuple[Teacher, Any]]) -> Parts:
  """The parts around a teacher and its parameters (on the devices, or their shapes only, to compile for)."""
  constrain = sharding.constrain_to(setup.mesh)
  teacher, teacher_params = open_teacher(constrain)
  student = create_student(setup.config, teacher.out_dim).clone(constrain=constrain)
  return Parts(**vars(setup), model=student, teacher=teacher, teacher_params=teacher_params)


def run(config: Config, workdir: pathlib.Path, command: str, stop_requested: experiment.StopRequested) -> bool:
  """See `experiment.run`."""
  return experiment.run(config, build, workdir, command, stop_requested)
