"""A recorded PyTorch run once more in XLA, step by step, with the step that training uses."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from dtm_jax import config as config_lib
from dtm_jax.convert import load_torch, to_state_dict
from dtm_jax.errors import InputError, some_of
from dtm_jax.models.clip import ClipVision
from dtm_jax.models.vit import Classifier, ViT
from dtm_jax.numerics import report
from dtm_jax.numerics.trace import Trace
from dtm_jax.optim import create_optimizer
from dtm_jax.steps import finetune, pretrain
from dtm_jax.teachers import ClipTeacher, Teacher
from dtm_jax.train_state import TrainState, create_train_state

MODEL_KINDS = {"pretrain": "student", "finetune": "classifier"}
_LISTED_TENSORS = 10

Step = Callable[[TrainState, int], tuple[TrainState, Mapping[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Tolerances:
  """What still counts as the same run: relative, absolute and relative."""

  loss_rtol: float = 1e-5
  param_atol: float = 2e-5
  grad_norm_rtol: float = 1e-4


@dataclasses.dataclass(frozen=True)
class Replayed:
  """What XLA makes of a trace of S steps.

  Attributes:
    losses, grad_norms: float64 [S]; norms are of the gradients before clipping.
    final: parameters after the last step, by their PyTorch names and in their shapes.
  """

  losses: np.ndarray
  grad_norms: np.ndarray
  final: Mapping[str, np.ndarray]


def replay(trace: Trace, model_file: pathlib.Path, teacher_file: pathlib.Path | None) -> Replayed:
  """Trains from the same weights on the same inputs, in float32.

  Args:
    trace: of the recorded run.
    model_file: weights that it began with.
    teacher_file: CLIP's; None for a fine-tuning trace and for one that holds its target tokens.

  Raises:
    InputError: files cannot be read, or do not fit the trace.
  """
  kind, sizes, params = load_torch(model_file)
  if kind != MODEL_KINDS[trace.kind]:
    raise InputError(f"{model_file} holds a {kind}; a {trace.kind} trace begins with a {MODEL_KINDS[trace.kind]}")
  _check_sizes(trace, model_file, sizes, "patch_size", "grid")
  _check_final(trace, parameters(kind, params), model_file)
  config = _resolve_config(trace)
  rates = jnp.asarray(trace["lr"], jnp.float32)
  optimizer = create_optimizer(config.optim, schedule := lambda step: rates[step])
  unsaved = {"layer_scale": 0.0, "drop_path": trace.drop_path}  # layer scale is that of new parameters
  if trace.kind == "pretrain":
    step = _pretrain_step(trace, config, ViT(**sizes, **unsaved), teacher_file, optimizer, schedule)
  else:
    step = _finetune_step(trace, config, Classifier(**sizes, **unsaved), optimizer, schedule)
  state, history = create_train_state(params, optimizer), []
  for i in tqdm.trange(len(trace), desc="steps", disable=None):
    state, metrics = step(state, i)
    history.append([float(metrics["loss"]), float(metrics["grad_norm"])])
  losses, grad_norms = np.transpose(history)
  return Replayed(losses, grad_norms, parameters(kind, jax.tree.map(np.asarray, state.params)))


def parameters(kind: str, params: Any) -> dict[str, np.ndarray]:
  """A parameter tree by PyTorch names, in PyTorch's shapes, without buffers."""
  state = to_state_dict(kind, params)
  return {name: value for name, value in state.items() if value.dtype.kind == "f"}


@dataclasses.dataclass(frozen=True)
class GivenTokens:
  """A teacher whose parameters are the target tokens of the batch themselves."""

  out_dim: int
  weights_sha256: str = ""

  def apply(self, params: jax.Array, images: jax.Array) -> jax.Array:
    """See `Teacher.apply`."""
    del images
    return params


def _pretrain_step(trace, config, student, teacher_file, optimizer, schedule) -> Step:
  teacher, targets = _teacher(trace, config, teacher_file)
  if teacher.out_dim != student.out_dim:
    raise InputError(f"the student predicts tokens of width {student.out_dim}, the targets have {teacher.out_dim}")
  merges, iterations = (jnp.asarray(trace[name], jnp.int32) for name in ("per_iteration", "iterations"))

  def draw(step):
    return merges[step], iterations[step]

  step = jax.jit(pretrain.make_train_step(config, student, teacher, optimizer, schedule, draw))
  return lambda state, i: step(state, targets(i), {"image": _images(trace, i), "mask": trace["masks"][i]})


def _finetune_step(trace, config, model, optimizer, schedule) -> Step:
  if model.num_classes != trace["targets"].shape[-1]:
    raise InputError(f"the model tells {model.num_classes} classes apart, the targets {trace['targets'].shape[-1]}")

  def recorded(step, batch):
    return batch["image"], batch["target"]

  step = jax.jit(finetune.make_train_step(config, model, optimizer, schedule, recorded))
  return lambda state, i: step(state, {"image": _images(trace, i), "target": _float32(trace["targets"][i])})


def _teacher(trace, config, teacher_file) -> tuple[Teacher, Callable[[int], Any]]:
  """The teacher, and its parameters at each step."""
  if "target_tokens" in trace:
    if teacher_file is not None:
      raise InputError(f"{trace.path} holds its target tokens; leave out --teacher")
    return GivenTokens(trace["target_tokens"].shape[-1]), lambda i: _float32(trace["target_tokens"][i])
  if teacher_file is None:
    raise InputError(f"{trace.path} holds no target_tokens; give its CLIP teacher's weights as --teacher")
  kind, sizes, params = load_torch(teacher_file)
  if kind != "clip_vision":
    raise InputError(f"{teacher_file} holds a {kind}, not a CLIP vision tower")
  _check_sizes(trace, teacher_file, sizes, "patch_size")  # its positions are resized to the grid
  params = jax.device_put(params)
  return ClipTeacher(ClipVision(**sizes), config.data.mean, config.data.std, ""), lambda i: params


def _resolve_config(trace: Trace) -> config_lib.Config:
  """The recorded run's settings. Images are augmented and normalised already."""
  config = config_lib.base()
  config.data.update(batch_size=trace["images_nchw"].shape[1], image_size=trace.image_size, color_jitter=0.0)
  config.data.update(mean=(0.0,) * 3, std=(1.0,) * 3, num_masked=1)
  config.model.update(patch_size=trace.patch_size, drop_path=trace.drop_path, dtype="float32")
  clip_norm = float(trace["max_grad_norm"])
  config.optim.update(betas=tuple(trace["betas"].astype(float).tolist()), eps=float(trace["eps"]))
  config.optim.update(
    weight_decay=float(trace["weight_decay"]), clip_norm=clip_norm if np.isfinite(clip_norm) else None
  )
  if "seed" in trace:
    config.run.seed = trace["seed"].item()
  if "layer_decay" in trace:
    config.optim.layer_decay = float(trace["layer_decay"])
  if trace.kind == "pretrain":
    config.morphing.update(enabled=trace["iterations"].shape[-1] > 0, distance=str(trace["distance"]), budget=None)
    config.morphing.split = trace.split
    config.morphing.update({name: trace[name].item() for name in ("loss_on", "protect_first") if name in trace})
    config.teacher.normalize_targets = "normalize_targets" in trace and bool(trace["normalize_targets"])
  try:
    return config_lib.resolve(config)
  except InputError as error:
    raise InputError(f"{trace.path} does not describe a run that can be: {error}") from error


def _images(trace: Trace, step: int) -> np.ndarray:
  return _float32(trace["images_nchw"][step].transpose(0, 2, 3, 1))


def _float32(array: np.ndarray) -> np.ndarray:
  return np.asarray(array, np.float32)


def _check_sizes(trace: Trace, file: pathlib.Path, sizes: Mapping[str, Any], *names: str) -> None:
  for name in names:
    if sizes[name] != (recorded := getattr(trace, name)):
      raise InputError(
        f"{file} has {name} {sizes[name]}, the trace {trace.path} {recorded}; give the run's own weights"
      )


def _check_final(trace: Trace, initial: Mapping[str, np.ndarray], file: pathlib.Path) -> None:
  """The recorded final parameters are those of the model: same names, same shapes."""
  final = {name: value for name, value in trace.final.items() if value.dtype.kind == "f"}
  problems = {
    "lacks final/": sorted(initial.keys() - final.keys()),
    "has unknown final/": sorted(final.keys() - initial.keys()),
    "has another shape of final/": [n for n in initial if n in final and initial[n].shape != final[n].shape],
  }
  for problem, names in problems.items():
    if names:
      raise InputError(f"{trace.path} {problem}{some_of(names)}: it is not of a run that began with {file}")


# ------------------------------------------------------------ report


def summarize(trace: Trace, replayed: Replayed, tolerances: Tolerances) -> dict[str, Any]:
  """What the JSON file holds: the four figures, whether they are within the tolerances, and all that is behind them."""
  per_step = {"loss": _compare_series(trace["losses"], replayed.losses)}
  if "grad_norms" in trace:
    per_step["grad_norm"] = _compare_series(trace["grad_norms"], replayed.grad_norms)
  per_tensor = [_compare_tensor(name, trace.final[name], value) for name, value in replayed.final.items()]
  worst = {name: max(row["rel_error"] for row in rows) for name, rows in per_step.items()}
  result = {
    "max_loss_rel_error": worst["loss"],
    "max_grad_norm_rel_error": worst.get("grad_norm"),
    "max_param_abs_error": max(row["max_abs_error"] for row in per_tensor),
    "steps": len(trace),
  }
  within = (
    (result["max_loss_rel_error"], tolerances.loss_rtol),
    (result["max_param_abs_error"], tolerances.param_atol),
    (result["max_grad_norm_rel_error"] or 0.0, tolerances.grad_norm_rtol),
  )
  return result | {
    "within_tolerance": all(error <= tolerance for error, tolerance in within),
    "tolerances": dataclasses.asdict(tolerances),
    "kind": trace.kind,
    "recorded_with": str(trace["recorded_with"]) if "recorded_with" in trace else None,
    "dtype": "float32",
    "matmul_precision": "float32",
    **report.environment(),
    "per_step": per_step,
    "per_tensor": sorted(per_tensor, key=lambda row: -row["max_abs_error"]),
  }


def _compare_series(recorded: np.ndarray, here: np.ndarray) -> list[dict[str, float]]:
  error = np.abs(here - recorded) / np.maximum(np.abs(recorded), np.finfo(np.float32).tiny)
  # What is not a number is as wrong as can be.
  error = np.nan_to_num(error, nan=np.inf)
  rows = zip(recorded.tolist(), here.tolist(), error.tolist(), strict=True)
  return [dict(zip(("recorded", "here", "rel_error"), row, strict=True)) for row in rows]


def _compare_tensor(name: str, recorded: np.ndarray, here: np.ndarray) -> dict[str, Any]:
  error = float(np.nan_to_num(np.abs(here - recorded).max(), nan=np.inf))
  return {"name": name, "shape": list(recorded.shape), "max_abs_error": error, "max_abs": float(np.abs(recorded).max())}


def describe(summary: Mapping[str, Any], *, all_tensors: bool = False) -> str:
  """The summary as text: a table of steps, one of tensors, and the verdict."""
  return "\n\n".join(
    [_steps_table(summary["per_step"]), _tensors_table(summary["per_tensor"], all_tensors), _verdict(summary)]
  )


def _steps_table(per_step: Mapping[str, list]) -> str:
  heading = ["step"] + [f"{name} {word}" for name in per_step for word in ("recorded", "here", "rel. error")]
  rows = []
  for i, series in enumerate(zip(*per_step.values(), strict=True)):
    cells = [(f"{row['recorded']:.7g}", f"{row['here']:.7g}", f"{row['rel_error']:.1e}") for row in series]
    rows.append([str(i), *(cell for group in cells for cell in group)])
  return report.table([word.replace("_", " ") for word in heading], rows)


def _tensors_table(per_tensor: list, all_tensors: bool) -> str:
  shown = per_tensor if all_tensors else per_tensor[:_LISTED_TENSORS]
  rows = [
    [row["name"], "x".join(map(str, row["shape"])), f"{row['max_abs_error']:.1e}", f"{row['max_abs']:.3g}"]
    for row in shown
  ]
  text = report.table(["final parameter, worst first", "shape", "max abs. error", "largest value"], rows)
  left = len(per_tensor) - len(shown)
  return text + (f"\n... {left} more with smaller errors; --all shows them" if left else "")


def _verdict(summary: Mapping[str, Any]) -> str:
  tolerances = summary["tolerances"]
  parts = [
    f"losses {summary['max_loss_rel_error']:.1e} (at most {tolerances['loss_rtol']:.0e})",
    f"final parameters {summary['max_param_abs_error']:.1e} (at most {tolerances['param_atol']:.0e})",
  ]
  if summary["max_grad_norm_rel_error"] is not None:
    norms = f"gradient norms {summary['max_grad_norm_rel_error']:.1e} (at most {tolerances['grad_norm_rtol']:.0e})"
    parts.insert(1, norms)
  verdict = "XLA repeats the recorded run" if summary["within_tolerance"] else "BEYOND TOLERANCE"
  versions = summary["versions"]
  where = f"{summary['device']}, {summary['dtype']}, matrix products in {summary['matmul_precision']}"
  return (
    f"{verdict}: {summary['steps']} steps, {', '.join(parts)}\n"
    f"here: {where}, jax {versions['jax']}; recorded with {summary['recorded_with'] or 'an unknown version'}"
  )
