"""One training step in both frameworks, and how far apart they are at every stage."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import tqdm

from dtm_jax.augment import normalize
from dtm_jax.models.clip import ClipVision
from dtm_jax.models.vit import ViT
from dtm_jax.numerics import partings, torch_reference
from dtm_jax.numerics.case import (
  Inputs,
  Pretraining,
  loss_settings,
  random_draws,
  teacher_images,
  to_device,
  to_nchw,
  torch_model,
  torch_optimizer,
  torch_teacher,
)
from dtm_jax.numerics.replay import GivenTokens, parameters
from dtm_jax.optim import create_optimizer
from dtm_jax.steps.pretrain import make_train_step
from dtm_jax.train_state import create_train_state

TORCH, XLA = "PyTorch", "XLA"


class Setting(NamedTuple):
  """How one run computes."""

  framework: str  # TORCH or XLA
  dtype: str  # of matrix products: "float32" or "bfloat16"
  precision: str = "float32"  # of float32 products: "float32" or "tensorfloat32"

  def __str__(self) -> str:
    return f"{self.framework} {self.precision if self.dtype == 'float32' else self.dtype}"


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What one framework made of one step.

  Attributes:
    tensors: float32 by name: "student/embed", "student/block_0", "student/tokens", the same of a "teacher" that both
      compute, "step/loss", "step/token_loss", "step/grad_norm", and by PyTorch's names "gradient/..." (before
      clipping) and "updated/..." (parameters after the step).
    targets: target tokens, float32 [B, N, D].
    group: how they are grouped.
  """

  tensors: Mapping[str, np.ndarray]
  targets: np.ndarray
  group: partings.Group


def pairs(dtype: str) -> list[tuple[Setting, Setting]]:
  """What is compared with what: (reference, other)."""
  settings = [(Setting(TORCH, dtype), Setting(XLA, dtype))]
  if dtype == "bfloat16":
    # How far PyTorch's own rounding takes it: the yardstick of the first pair.
    settings.append((Setting(TORCH, "float32"), Setting(TORCH, dtype)))
  elif jax.default_backend() == "gpu":
    settings.append((Setting(TORCH, dtype, "tensorfloat32"), Setting(XLA, dtype, "tensorfloat32")))
  return settings


def compare_all(case: Pretraining, dtype: str) -> dict[str, dict[str, Any]]:
  """Runs the first step of the config's data in each setting once, and compares the `pairs`.

  Returns:
    What `compare` gives, by what was compared.
  """
  with case.inputs() as stream:
    inputs = next(stream)
  wanted = pairs(dtype)
  settings = list(dict.fromkeys(setting for pair in wanted for setting in pair))
  outcomes = {}
  for setting in (bar := tqdm.tqdm(settings, disable=None)):
    bar.set_description(str(setting))
    outcomes[setting] = run(case, inputs, setting)
  return {
    f"{other} beside {reference}": compare(outcomes[reference], outcomes[other], case, inputs)
    for reference, other in wanted
  }


def run(case: Pretraining, inputs: Inputs, setting: Setting) -> Outcome:
  """Runs one step at the run's peak learning rate."""
  return (run_torch if setting.framework == TORCH else run_xla)(case, inputs, setting)


# ------------------------------------------------------------ XLA


def run_xla(case: Pretraining, inputs: Inputs, setting: Setting) -> Outcome:
  """One step of `make_train_step`, and what goes on inside."""
  with jax.default_matmul_precision(setting.precision):
    compute, teacher_params = _xla_step(case, inputs)
    tensors, targets, grads, params = jax.tree.map(np.asarray, compute(case.params, teacher_params))
  for prefix, tree in (("gradient", grads), ("updated", params)):
    tensors |= {f"{prefix}/{name}": value for name, value in parameters("student", tree).items()}
  return Outcome(tensors, targets, functools.partial(partings.group_in_xla, keys=inputs.split_keys))


def _xla_step(case: Pretraining, inputs: Inputs) -> tuple[Callable, Any]:
  # What is random in the augmentation has been done.
  config = dataclasses.replace(case.config, data=dataclasses.replace(case.config.data, color_jitter=0.0))
  student, teacher, teacher_params = case.model, case.parts.teacher, case.parts.teacher_params
  if not case.teacher_is_live:
    teacher, teacher_params = GivenTokens(teacher.out_dim), case.teacher_fn(inputs.unit_images)

  def schedule(step):
    return jnp.float32(config.peak_lr)

  optimizer = optax.chain(_remember_gradients(), create_optimizer(config.optim, schedule))
  draws = jnp.asarray(inputs.merges), jnp.asarray(inputs.iterations)
  step = make_train_step(config, student, teacher, optimizer, schedule, lambda step: draws)
  batch = {"image": inputs.unit_images, "mask": inputs.mask}

  @jax.jit
  def compute(params, teacher_params):
    online, student_stream = _residual_stream(student, params, inputs.images, inputs.mask, inputs.drop_path_keys)
    tensors = _stages("student", student_stream, online)
    targets = teacher.apply(teacher_params, inputs.unit_images)
    if case.teacher_is_live:
      _, stream = _residual_stream(
        teacher.tower, teacher_params, normalize(inputs.unit_images, teacher.mean, teacher.std)
      )
      tensors |= _stages("teacher", stream, targets)
    state, metrics = step(create_train_state(params, optimizer), teacher_params, batch)
    tensors |= {f"step/{name}": metrics[name] for name in ("loss", "token_loss", "grad_norm")}
    return tensors, targets, state.opt_state[0], state.params

  return compute, teacher_params


def _remember_gradients() -> optax.GradientTransformation:
  """Changes nothing; its state is the last gradient."""
  return optax.GradientTransformation(optax.tree.zeros_like, lambda updates, state, params=None: (updates, updates))


def _residual_stream(module: ViT | ClipVision, params: Any, *inputs: jax.Array) -> tuple[Any, tuple[jax.Array, ...]]:
  """What a tower gives, and what enters its first block and leaves each."""
  output, seen = module.apply({"params": params}, *inputs, mutable="intermediates")
  return output, seen["intermediates"]["residual_stream"]


def _stages(prefix: str, stream: Sequence[jax.Array], tokens: jax.Array) -> dict[str, jax.Array]:
  embed, *blocks = stream
  names = {f"block_{i}": block for i, block in enumerate(blocks)}
  return {f"{prefix}/{name}": value for name, value in {"embed": embed, **names, "tokens": tokens}.items()}


# ------------------------------------------------------------ PyTorch


def run_torch(case: Pretraining, inputs: Inputs, setting: Setting) -> Outcome:
  """One step of `torch_reference.train_step`, watched from outside."""
  student, seen = torch_model(case), {}

  def keep(name, tensor):
    seen[name] = tensor.detach().float().cpu().numpy().copy()

  _watch_tower("student", student, student.blocks, keep)
  for name, parameter in student.named_parameters():
    parameter.register_post_accumulate_grad_hook(lambda p, name=name: keep(f"gradient/{name}", p.grad))
  with _tf32(setting.precision == "tensorfloat32"):
    loss, grad_norm = torch_reference.train_step(
      student,
      _torch_targets(case, inputs, keep),
      torch_optimizer(case, student),
      to_nchw(inputs.images),
      to_device(inputs.mask),
      inputs.merges.tolist(),
      inputs.iterations.tolist(),
      lr=case.config.peak_lr,
      dtype=getattr(torch, setting.dtype),
      **random_draws(inputs),
      **loss_settings(case),
    )
  seen["step/loss"], seen["step/grad_norm"] = np.float32(loss.item()), np.float32(grad_norm.item())
  targets = seen["teacher/tokens"] if case.teacher_is_live else case.teacher_fn(inputs.unit_images)
  seen["step/token_loss"] = _token_loss(case, inputs, seen["student/tokens"], targets)
  for name, parameter in student.named_parameters():
    keep(f"updated/{name}", parameter)
  return Outcome(seen, targets, functools.partial(partings.group_in_torch, priorities=inputs.priorities))


def _watch_tower(prefix: str, tower: torch.nn.Module, blocks: torch.nn.ModuleList, keep: Callable) -> None:
  """Hands what `_stages` names over to `keep`."""
  blocks[0].register_forward_pre_hook(lambda module, args: keep(f"{prefix}/embed", args[0]))
  for i, block in enumerate(blocks):
    block.register_forward_hook(lambda module, args, output, i=i: keep(f"{prefix}/block_{i}", output))
  tower.register_forward_hook(lambda module, args, output: keep(f"{prefix}/tokens", output))


def _torch_targets(case: Pretraining, inputs: Inputs, keep: Callable) -> Callable | torch.Tensor:
  if not case.teacher_is_live:
    return to_device(case.teacher_fn(inputs.unit_images))
  teacher, images = torch_teacher(case), teacher_images(case, inputs)
  _watch_tower("teacher", teacher, teacher.transformer.resblocks, keep)
  return lambda _: teacher(images)  # which may be normalised in another way than the student's


def _token_loss(case: Pretraining, inputs: Inputs, online: np.ndarray, targets: np.ndarray) -> np.float32:
  morphing = case.config.morphing
  loss = torch_reference.dtm_loss(
    torch.from_numpy(online),
    torch.from_numpy(np.array(targets)),
    [],
    [],
    distance=morphing.distance,
    mask=torch.from_numpy(inputs.mask) if morphing.loss_on == "masked" else None,
    normalize_targets=case.config.teacher.normalize_targets,
  )
  return np.float32(loss.item())


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
  switches = torch.backends.cuda.matmul, torch.backends.cudnn
  before = [switch.allow_tf32 for switch in switches]
  for switch in switches:
    switch.allow_tf32 = allowed
  try:
    yield
  finally:
    for switch, value in zip(switches, before, strict=True):
      switch.allow_tf32 = value


# ------------------------------------------------------------ differences


def compare(reference: Outcome, other: Outcome, case: Pretraining, inputs: Inputs) -> dict[str, Any]:
  """Differences by tensor, in the order of the step, and how the token groups agree."""
  tensors = [difference(name, value, other.tensors[name]) for name, value in reference.tensors.items()]
  protect_first = case.config.morphing.protect_first
  morphing = partings.compare_groups(
    *((outcome.targets, outcome.group) for outcome in (reference, other)),
    *(inputs.merges, inputs.iterations, protect_first, inputs.priorities),
  )
  return {"tensors": tensors, "morphing": morphing}


def difference(name: str, reference: np.ndarray, other: np.ndarray) -> dict[str, Any]:
  """Largest absolute difference, the same over the largest value of the reference, and cosine.

  Where either side is not finite, both differences are infinite and the cosine is NaN.
  """
  a, b = np.asarray(reference, np.float64).ravel(), np.asarray(other, np.float64).ravel()
  largest = float(np.abs(a).max())
  if not np.isfinite([a, b]).all():
    return _row(name, np.inf, np.inf, np.nan, largest)
  max_abs = float(np.abs(a - b).max())
  norms = float(np.linalg.norm(a) * np.linalg.norm(b))
  same = max_abs == 0
  relative = 0.0 if same else max_abs / max(largest, np.finfo(np.float32).tiny)
  cosine = 1.0 if same else float(a @ b) / max(norms, np.finfo(np.float64).tiny)
  return _row(name, max_abs, relative, cosine, largest)


def _row(name: str, max_abs: float, relative: float, cosine: float, largest: float) -> dict[str, Any]:
  figures = {"max_abs": max_abs, "relative": relative, "cosine": cosine, "reference_max_abs": largest}
  return {"name": name} | figures


def not_finite(comparisons: Mapping[str, Mapping[str, Any]]) -> list[str]:
  """Names of the tensors in which a comparison of `compare_all` has found NaN or infinity."""
  rows = [row for comparison in comparisons.values() for row in comparison["tensors"]]
  return list(dict.fromkeys(row["name"] for row in rows if row["max_abs"] == np.inf))
