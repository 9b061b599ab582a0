"""Trains the PyTorch reference as a config says, and keeps all that is needed to replay it."""

import pathlib
import shlex
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import tqdm

from dtm_jax import convert
from dtm_jax.errors import InputError
from dtm_jax.files import replacing
from dtm_jax.numerics import torch_reference
from dtm_jax.numerics.case import (
  Case,
  FinetuneInputs,
  Finetuning,
  Inputs,
  Pretraining,
  given,
  loss_settings,
  max_grad_norm,
  random_draws,
  teacher_images,
  to_device,
  to_nchw,
  torch_device,
  torch_model,
  torch_optimizer,
  torch_teacher,
)
from dtm_jax.numerics.trace import write_trace
from dtm_jax.teachers.weights import locate_weights


def record(case: Case, num_steps: int, out: pathlib.Path, student_file: pathlib.Path | None) -> pathlib.Path:
  """Trains in float32 and writes the trace.

  Args:
    case: what to train, on what.
    num_steps: S.
    out: the trace, a new `.npz`.
    student_file: where the case's weights come from; None writes them as `new_weights_file` says.

  Returns:
    The file of the weights that the trace begins with.

  Raises:
    InputError: a file cannot be written, or the loss is not finite.
  """
  model = torch_model(case)
  arrays = _settings(case) | _train(case, model, num_steps)
  final = {name: value.detach().cpu().numpy() for name, value in model.named_parameters()}
  if student_file is not None:
    write_trace(out, arrays, final)
    return student_file
  weights_file = new_weights_file(out, case.kind)
  with replacing(weights_file) as unfinished:  # there once the trace is
    convert.save_torch(unfinished, case.model_kind, case.params)
    write_trace(out, arrays, final)
  return weights_file


def new_weights_file(trace_file: pathlib.Path, kind: str) -> pathlib.Path:
  """Beside a trace of that kind, for weights that it begins with and that are in no file."""
  return trace_file.with_suffix(f".{_option(kind)}.pth")


def _option(kind: str) -> str:
  """Of `replay`, for the weights that a trace begins with."""
  return "model" if kind == "finetune" else "student"


def describe(case: Case, num_steps: int, out: pathlib.Path, weights_file: pathlib.Path) -> str:
  """What was recorded, and the command that replays it."""
  command = ["python", "-m", "dtm_jax.numerics", "replay", "--trace", out, f"--{_option(case.kind)}", weights_file]
  if isinstance(case, Pretraining) and _replay_computes_targets(case):
    command += ["--teacher", locate_weights(case.config.teacher.weights)]
  lines = [
    *case.notes,
    f"recorded {num_steps} steps of {case.config.data.batch_size} images with PyTorch {torch.__version__} on"
    f" {torch_device()}: {out} ({out.stat().st_size / 1e6:.1f} MB)",
    f"replay it: {shlex.join(map(str, command))}",
  ]
  return "\n".join(lines)


def _train(case: Case, model: torch.nn.Module, num_steps: int) -> dict[str, np.ndarray]:
  """The arrays of S steps, by name."""
  rows = []
  step = _pretrain_step(case, model) if isinstance(case, Pretraining) else _finetune_step(case, model)
  with case.inputs() as stream:
    for i, inputs in zip(tqdm.trange(num_steps, desc="steps", disable=None), stream, strict=False):
      rows.append(step(inputs) | {"images_nchw": inputs.images.transpose(0, 3, 1, 2), "lr": inputs.lr})
      if not np.isfinite(rows[-1]["losses"]):
        raise InputError(f"the loss is not finite at step {i}; lower config.optim.base_lr")
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _pretrain_step(case: Pretraining, student: torch.nn.Module) -> Callable[[Inputs], dict[str, Any]]:
  """A step of the reference in place, and what a trace says of it."""
  optimizer = torch_optimizer(case, student)
  teacher = torch_teacher(case) if case.teacher_is_live else None

  @torch.no_grad()
  def target_tokens(inputs: Inputs) -> torch.Tensor:
    return to_device(case.teacher_fn(inputs.unit_images)) if teacher is None else teacher(teacher_images(case, inputs))

  def step(inputs: Inputs) -> dict[str, Any]:
    tokens = target_tokens(inputs)
    loss, grad_norm = torch_reference.train_step(
      student,
      tokens,
      optimizer,
      to_nchw(inputs.images),
      to_device(inputs.mask),
      inputs.merges.tolist(),
      inputs.iterations.tolist(),
      lr=float(inputs.lr),
      **random_draws(inputs),
      **loss_settings(case),
    )
    row = {
      "masks": inputs.mask,
      "per_iteration": inputs.merges,
      "iterations": inputs.iterations,
      "losses": loss.item(),
      "grad_norms": grad_norm.item(),
    }
    return row if _replay_computes_targets(case) else row | {"target_tokens": tokens.cpu().numpy()}

  return step


def _finetune_step(case: Finetuning, model: torch.nn.Module) -> Callable[[FinetuneInputs], dict[str, Any]]:
  """As `_pretrain_step`."""
  optimizer = torch_optimizer(case, model)

  def step(inputs: FinetuneInputs) -> dict[str, Any]:
    loss, grad_norm, _ = torch_reference.finetune_step(
      model,
      optimizer,
      to_nchw(inputs.images),
      to_device(inputs.targets),
      lr=float(inputs.lr),
      max_grad_norm=max_grad_norm(case),
      branch_scales=given(inputs.branch_scales),
    )
    return {"targets": inputs.targets, "losses": loss.item(), "grad_norms": grad_norm.item()}

  return step


def _settings(case: Case) -> dict[str, Any]:
  """What is the same at every step, by its name in the trace."""
  config, optim = case.config, case.config.optim
  of_kind = loss_settings(case) | {"split": config.morphing.split} if isinstance(case, Pretraining) else {}
  return of_kind | {
    "kind": case.kind,
    "max_grad_norm": max_grad_norm(case),
    "betas": optim.betas,
    "eps": optim.eps,
    "weight_decay": optim.weight_decay,
    "layer_decay": optim.layer_decay,
    "patch_size": config.model.patch_size,
    "drop_path": config.model.drop_path,
    "seed": config.run.seed,
    "recorded_with": f"PyTorch {torch.__version__} on {torch_device()}",
  }


def _replay_computes_targets(case: Pretraining) -> bool:
  """Whether the trace's images are what a CLIP teacher was shown."""
  return case.teacher_is_live and case.config.teacher.normalization == "student"
