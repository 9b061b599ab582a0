"""Trains the PyTorch reference as a config says, and keeps all that is needed to replay it."""

import pathlib
import shlex
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
  Inputs,
  loss_settings,
  random_draws,
  teacher_images,
  to_device,
  to_nchw,
  torch_device,
  torch_optimizer,
  torch_student,
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
    student_file: where the case's weights come from; None writes them as `new_student_file` says.

  Returns:
    The file of the weights that the trace begins with.

  Raises:
    InputError: a file cannot be written, or the loss is not finite.
  """
  student = torch_student(case)
  arrays = _settings(case) | _train(case, student, num_steps)
  final = {name: value.detach().cpu().numpy() for name, value in student.named_parameters()}
  if student_file is not None:
    write_trace(out, arrays, final)
    return student_file
  with replacing(new_student_file(out)) as unfinished:  # there once the trace is
    convert.save_torch(unfinished, "student", case.params)
    write_trace(out, arrays, final)
  return new_student_file(out)


def new_student_file(trace_file: pathlib.Path) -> pathlib.Path:
  """Beside the trace, for weights that come from no file."""
  return trace_file.with_suffix(".student.pth")


def describe(case: Case, num_steps: int, out: pathlib.Path, student_file: pathlib.Path) -> str:
  """What was recorded, and the command that replays it."""
  command = ["python", "-m", "dtm_jax.numerics", "replay", "--trace", out, "--student", student_file]
  if _replay_computes_targets(case):
    command += ["--teacher", locate_weights(case.config.teacher.weights)]
  lines = [
    *case.notes,
    f"recorded {num_steps} steps of {case.config.data.batch_size} images with PyTorch {torch.__version__} on"
    f" {torch_device()}: {out} ({out.stat().st_size / 1e6:.1f} MB)",
    f"replay it: {shlex.join(map(str, command))}",
  ]
  return "\n".join(lines)


def _train(case: Case, student: torch.nn.Module, num_steps: int) -> dict[str, np.ndarray]:
  """The arrays of S steps, by name."""
  optimizer, rows = torch_optimizer(case, student), []
  with case.inputs() as stream:
    teacher = torch_teacher(case) if case.teacher_is_live else None
    for step, inputs in zip(tqdm.trange(num_steps, desc="steps", disable=None), stream, strict=False):
      rows.append(_step(case, student, teacher, optimizer, inputs))
      if not np.isfinite(rows[-1]["losses"]):
        raise InputError(f"the loss is not finite at step {step}; lower config.optim.base_lr")
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _step(case: Case, student, teacher, optimizer, inputs: Inputs) -> dict[str, Any]:
  tokens = to_device(case.teacher_fn(inputs.unit_images)) if teacher is None else None
  if teacher is not None:
    with torch.no_grad():
      tokens = teacher(teacher_images(case, inputs))
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
    "images_nchw": inputs.images.transpose(0, 3, 1, 2),
    "masks": inputs.mask,
    "per_iteration": inputs.merges,
    "iterations": inputs.iterations,
    "lr": inputs.lr,
    "losses": loss.item(),
    "grad_norms": grad_norm.item(),
  }
  return row if _replay_computes_targets(case) else row | {"target_tokens": tokens.cpu().numpy()}


def _settings(case: Case) -> dict[str, Any]:
  """What is the same at every step, by its name in the trace."""
  config, optim = case.config, case.config.optim
  return loss_settings(case) | {
    "kind": "pretrain",
    "betas": optim.betas,
    "eps": optim.eps,
    "weight_decay": optim.weight_decay,
    "layer_decay": optim.layer_decay,
    "patch_size": config.model.patch_size,
    "drop_path": config.model.drop_path,
    "split": config.morphing.split,
    "seed": config.run.seed,
    "recorded_with": f"PyTorch {torch.__version__} on {torch_device()}",
  }


def _replay_computes_targets(case: Case) -> bool:
  """Whether the trace's images are what a CLIP teacher was shown."""
  return case.teacher_is_live and case.config.teacher.normalization == "student"
