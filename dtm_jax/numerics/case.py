"""A config as both frameworks can run it: the same weights and images, and what XLA draws given to PyTorch."""

import abc
import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from ml_collections import ConfigDict

from dtm_jax import config as config_lib
from dtm_jax import finetuning, pretraining
from dtm_jax.augment import normalize
from dtm_jax.convert import from_state_dict, load_torch, to_state_dict
from dtm_jax.data.pipeline import Batch, train_batches
from dtm_jax.errors import InputError
from dtm_jax.evaluate.features import check_labels
from dtm_jax.models.clip import resize_positions
from dtm_jax.models.variants import Variant
from dtm_jax.models.vit import Classifier, ViT
from dtm_jax.morphing import split_priorities
from dtm_jax.numerics import torch_models, torch_reference
from dtm_jax.restore import open_checkpoint
from dtm_jax.steps import finetune, pretrain
from dtm_jax.steps.accumulation import Rows
from dtm_jax.teachers import ClipTeacher

# Their tokens are exactly parallel where patches are alike; rounding alone would decide who merges with whom.
_TYING_TEACHERS = ("hog", "pixels")
_NOISE = 0.1  # at 0.01 rounding still decides for 1 in 100 images of digits


class Inputs(NamedTuple):
  """What one step of pre-training needs; B images."""

  unit_images: np.ndarray  # float32 [B, P, P, 3] in [0, 1], augmented
  images: np.ndarray  # the same, normalised for the student
  mask: np.ndarray  # bool [B, N], True = masked
  merges: np.ndarray  # int32 [L] or [B, L], per iteration; L = 0 without morphing
  iterations: np.ndarray  # int32, as merges
  lr: np.ndarray  # float32 []
  drop_path_keys: jax.Array | None  # PRNG keys [B]; None without stochastic depth
  branch_scales: np.ndarray | None  # float32 [depth, 2, B], what they draw
  split_keys: jax.Array | None  # PRNG keys [B, L]; None where morphing.split="alternate"
  priorities: np.ndarray | None  # float32 [B, L, K, N], what they draw


class FinetuneInputs(NamedTuple):
  """What one step of fine-tuning needs; B images."""

  images: np.ndarray  # float32 [B, P, P, 3], augmented, mixed and normalised
  targets: np.ndarray  # float32 [B, C]
  lr: np.ndarray  # float32 []
  branch_scales: np.ndarray | None  # float32 [depth, 2, B] of stochastic depth


@dataclasses.dataclass(frozen=True)
class Case(abc.ABC):
  """One run's parts.

  Attributes:
    config: of the run, but for what only costs time or memory.
    parts: built from it.
    model: with the sizes of its weights.
    params: the model's, numpy, where training begins.
    notes: what the run of the config would do otherwise, as lines.
  """

  kind: ClassVar[str]  # of a trace
  model_kind: ClassVar[str]  # of weights

  config: config_lib.Config
  parts: Any
  model: ViT | Classifier
  params: Any
  notes: tuple[str, ...]

  def inputs(self) -> contextlib.closing[Iterator[Any]]:
    """Endless inputs of the steps from 0 on, from the config's own data."""
    return contextlib.closing(self._inputs())

  def _inputs(self) -> Iterator[Any]:
    look = jax.jit(self._look)
    with contextlib.closing(train_batches(self.config, self.parts.train_source, start_step=0)) as batches:
      for step, batch in enumerate(batches):
        yield jax.tree.map(_to_numpy, look(step, self._rows(batch)))

  def _rows(self, batch: Batch) -> dict[str, np.ndarray]:
    return {name: batch[name] for name in self.parts.batch_fields}

  @abc.abstractmethod
  def _look(self, step: jax.Array, batch: Rows) -> Any:
    """The inputs of a step, to be jitted."""

  def _branch_scales(self, keys: jax.Array | None) -> jax.Array | None:
    return None if keys is None else self.model.apply({"params": self.params}, keys, method="branch_scales")


class Pretraining(Case):
  """A case whose inputs are `Inputs`."""

  kind, model_kind = "pretrain", "student"

  @property
  def teacher_is_live(self) -> bool:
    """Whether PyTorch computes target tokens itself; if not, it is given XLA's."""
    return isinstance(self.parts.teacher, ClipTeacher)

  @functools.cached_property
  def teacher_fn(self):
    """`unit_images -> target tokens` in XLA."""
    apply, ties = jax.jit(self.parts.teacher.apply), self.config.teacher.kind in _TYING_TEACHERS

    def targets(images):
      tokens = np.asarray(apply(self.parts.teacher_params, images))
      return part_ties(tokens) if ties else tokens

    return targets

  def _look(self, step, batch):
    keys, data = pretrain.row_keys(self.config, step), self.config.data
    unit = pretrain.augment(self.config, batch | keys)
    draws = pretrain.draw_schedules(self.config, step)
    merges, iterations = draws if self.config.morphing.enabled else (draw[..., :0] for draw in draws)
    drop_path_keys, split_keys = keys.get("drop_path_keys"), keys.get("split_keys")
    if split_keys is not None:
      split_keys = _fold_in_each(split_keys, self.config.morphing.draws)
    return Inputs(
      *(unit, normalize(unit, data.mean, data.std), batch["mask"], merges, iterations, self.parts.schedule(step)),
      *(drop_path_keys, self._branch_scales(drop_path_keys), split_keys, self._priorities(split_keys)),
    )

  def _priorities(self, keys: jax.Array | None) -> jax.Array | None:
    if keys is None:
      return None
    morphing, num_tokens = self.config.morphing, self.config.num_tokens
    num_iterations = morphing.fixed_iterations or morphing.max_iterations
    draw = jax.vmap(split_priorities, (None, 0, None))
    return jax.vmap(jax.vmap(lambda key: draw(key, jnp.arange(num_iterations), num_tokens)))(keys)


class Finetuning(Case):
  """A case whose inputs are `FinetuneInputs`."""

  kind, model_kind = "finetune", "classifier"

  def _rows(self, batch):
    check_labels("training", batch["label"], self.model.num_classes)
    return super()._rows(batch)

  def _look(self, step, batch):
    images, targets = finetune.augment(self.config, self.model.num_classes, step, batch)
    keys = finetune.row_keys(self.config, step).get("drop_path_keys")
    return FinetuneInputs(images, targets, self.parts.schedule(step), self._branch_scales(keys))


def open_case(
  settings: ConfigDict, student_file: pathlib.Path | None, teacher_file: pathlib.Path | None, dtype: str
) -> Case:
  """Builds a run as its config says, but for what the two frameworks cannot share.

  Args:
    settings: of the run; changed in place.
    student_file: weights to begin with; None has PyTorch draw them, from the config's seed. A fine-tuning run begins
      as config.finetune.init says, or else with weights that PyTorch draws.
    teacher_file: CLIP's weights in place of the config's teacher.
    dtype: of matrix products in both models.

  Raises:
    InputError: the config or a file is wrong, or PyTorch cannot repeat what it asks for.
  """
  if teacher_file is not None:
    settings.teacher.update(kind="clip", weights=str(teacher_file))
  asked = config_lib.resolve(settings)
  if asked.task == "evaluate":
    raise InputError("config.task='evaluate' has no training step; give the config of a training run")
  if asked.task == "finetune" and (student_file or teacher_file):
    raise InputError("fine-tuning has no --student and no --teacher; set config.finetune.init to weights to begin with")
  if asked.optim.name != "adamw":
    raise InputError(f"config.optim.name={asked.optim.name!r} has no reference in PyTorch here; leave it out")
  model = dataclasses.replace(asked.model, dtype=dtype, scan_layers=False)
  if model.attention == "cudnn" and dtype != "bfloat16":
    model = dataclasses.replace(model, attention="xla")
  config = dataclasses.replace(
    asked,
    model=model,
    teacher=dataclasses.replace(asked.teacher, dtype=dtype),
    optim=dataclasses.replace(asked.optim, accumulate_steps=1),  # which gives the same numbers
  )
  notes = tuple(_notes(asked, config))
  if config.task == "pretrain":
    parts = pretraining.build(config)
    return Pretraining(config, parts, *_student(config, parts.model, student_file), notes)
  parts = finetuning.build(config)
  return Finetuning(config, parts, parts.model, _classifier_params(config, parts.model), notes)


def _fold_in_each(keys: jax.Array, num_draws: int) -> jax.Array:
  """Keys [B] -> [B, L], as the loss has them."""
  return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(keys, jnp.arange(num_draws))


def _to_numpy(array: jax.Array) -> np.ndarray | jax.Array:
  """All but PRNG keys, which numpy does not know."""
  return array if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) else np.asarray(array)


def part_ties(tokens: np.ndarray) -> np.ndarray:
  """Adds noise to tokens [B, N, D], the same to each image, in proportion to the longest of all."""
  noise = np.random.default_rng(0).normal(size=tokens.shape[1:]).astype(np.float32)
  noise *= _NOISE / np.linalg.norm(noise, axis=-1, keepdims=True)
  return tokens + noise * np.linalg.norm(tokens, axis=-1).max()


def _notes(asked: config_lib.Config, config: config_lib.Config) -> Iterator[str]:
  if asked.model.dtype != config.model.dtype:
    yield f"matrix products in {config.model.dtype} (config.model.dtype={asked.model.dtype!r})"
  if config.task == "pretrain" and config.teacher.kind in _TYING_TEACHERS:
    yield f"{config.teacher.kind} tokens with {_NOISE:.0%} of noise: like patches would tie, for rounding to decide"


def _student(config: config_lib.Config, module: ViT, file: pathlib.Path | None) -> tuple[ViT, Any]:
  if file is None:
    return module, _drawn_params(config, module)
  kind, sizes, params = load_torch(file)
  if kind != "student":
    raise InputError(f"{file} holds a {kind}, not a pre-training student")
  for name in ("patch_size", "grid", "out_dim"):
    if sizes[name] != getattr(module, name):
      raise InputError(
        f"{file} has {name} {sizes[name]}, the config asks for {getattr(module, name)}; change the config"
      )
  return module.clone(**sizes), params


def _classifier_params(config: config_lib.Config, module: Classifier) -> Any:
  if not config.finetune.init:
    return _drawn_params(config, module)
  return finetuning.transfer(open_checkpoint(config.finetune.init), config, module)


def _drawn_params(config: config_lib.Config, module: ViT | Classifier) -> Any:
  with torch.random.fork_rng():
    torch.manual_seed(config.run.seed)
    state = _new_torch_model(module).state_dict()
  return from_state_dict({name: value.numpy() for name, value in state.items()}).params


# ------------------------------------------------------------ the PyTorch side


def torch_device() -> torch.device:
  """The GPU where PyTorch has one."""
  return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def torch_model(case: Case) -> torch_models.Encoder:
  """The reference's student or classifier with the case's weights."""
  model = _new_torch_model(case.model)
  model.load_state_dict({n: to_device(v) for n, v in to_state_dict(case.model_kind, case.params).items()})
  return model.to(torch_device())


def _new_torch_model(module: ViT | Classifier) -> torch_models.Encoder:
  size = Variant(module.width, module.depth, module.heads, module.layer_scale)
  if isinstance(module, ViT):
    return torch_models.Student(size, module.grid, module.patch_size, module.out_dim)
  return torch_models.Classifier(size, module.grid, module.patch_size, module.num_classes)


def torch_teacher(case: Pretraining) -> torch_models.ClipVision:
  """The reference CLIP tower with the weights of the case's teacher, which is live."""
  tower, params = case.parts.teacher.tower, jax.tree.map(np.asarray, case.parts.teacher_params)
  first, others = params["pos_embed"][:1], resize_positions(params["pos_embed"][1:], tower.grid, case.config.grid)
  params |= {"pos_embed": np.concatenate([first, others])}
  return torch_models.load_clip({n: to_device(v) for n, v in to_state_dict("clip_vision", params).items()}).to(
    torch_device()
  )


def torch_optimizer(case: Case, model: torch_models.Encoder) -> torch.optim.Optimizer:
  """The reference's AdamW as the config sets it."""
  optim = case.config.optim
  return torch_reference.make_optimizer(
    model, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, layer_decay=optim.layer_decay
  )


def max_grad_norm(case: Case) -> float:
  """As the reference's steps and a trace have it."""
  clip_norm = case.config.optim.clip_norm
  return np.inf if clip_norm is None else clip_norm


def random_draws(inputs: Inputs) -> dict[str, torch.Tensor | None]:
  """Keyword arguments of `torch_reference.train_step` that XLA draws."""
  return {"branch_scales": given(inputs.branch_scales), "priorities": given(inputs.priorities)}


def loss_settings(case: Pretraining) -> dict[str, Any]:
  """Keyword arguments of `torch_reference.train_step` that a config decides."""
  morphing = case.config.morphing
  return {
    "max_grad_norm": max_grad_norm(case),
    "loss_on": morphing.loss_on,
    "distance": morphing.distance,
    "protect_first": morphing.protect_first,
    "normalize_targets": case.config.teacher.normalize_targets,
  }


def teacher_images(case: Pretraining, inputs: Inputs) -> torch.Tensor:
  """[B, 3, P, P], normalised for the case's teacher, which is live."""
  teacher = case.parts.teacher
  return to_nchw(np.asarray(normalize(inputs.unit_images, teacher.mean, teacher.std)))


def to_nchw(images: np.ndarray) -> torch.Tensor:
  """[B, P, P, 3] -> [B, 3, P, P] on the device."""
  return to_device(images.transpose(0, 3, 1, 2))


def to_device(array: np.ndarray) -> torch.Tensor:
  """A copy, because JAX's arrays must not be written to."""
  return torch.from_numpy(np.array(array, order="C")).to(torch_device())


def given(draws: np.ndarray | None) -> torch.Tensor | None:
  """What XLA has drawn, on the device, where it has drawn anything."""
  return None if draws is None else to_device(draws)
