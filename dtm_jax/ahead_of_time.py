"""The training step compiled without the devices that it is for, and without images or weights that are not there."""

import collections
import dataclasses
import os
import pathlib
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from dtm_jax import collectives, compile_cache, experiment, finetuning, pretraining, roofline, sharding
from dtm_jax.collectives import Collective
from dtm_jax.command_line import Plan
from dtm_jax.config import Config, DataConfig
from dtm_jax.data.sources import Source, open_source
from dtm_jax.errors import LESS_MEMORY, OUT_OF_MEMORY, InputError
from dtm_jax.models.clip import CLIP_B16, ClipVision
from dtm_jax.models.layers import Constrain
from dtm_jax.networks import create_student, init_params
from dtm_jax.restore import restore_tower
from dtm_jax.roofline import Chip
from dtm_jax.teachers import CheckpointTeacher, ClipTeacher, Teacher, create_teacher

_IMAGENET_IMAGES, _IMAGENET_CLASSES = 1_281_167, 1000
# Nothing runs on these chips: no metadata server to ask for them, no log folder.
_QUIET_LIBTPU = {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # by several of these commands at once
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_LOG_DIR": "disabled",
  "TPU_MIN_LOG_LEVEL": "3",
}
_TWO_CORES_AS_ONE = ("v4", "v5p")  # chips whose two cores a program sees as one device


@dataclasses.dataclass(frozen=True)
class UnseenSource:
  """Stands for images that nobody opens."""

  num_examples: int
  num_classes: int

  def __len__(self) -> int:
    return self.num_examples


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A step and what its compiler says of it; bytes and FLOPs are of one device and one step.

  Attributes:
    parts: of the run that it is the step of.
    assumed: what was taken for granted of what was not read.
    seconds: that lowering and compiling took.
    arguments, outputs, aliased, temporaries: bytes of memory; the outputs that lie where arguments were are `aliased`.
    counted_flops, moved: as the compiler counts them, the body of a loop once; None where it does not tell.
    collectives: what devices say to each other.
  """

  parts: experiment.Parts
  assumed: tuple[str, ...]
  seconds: float
  arguments: int
  outputs: int
  aliased: int
  temporaries: int
  counted_flops: float | None
  moved: float | None
  collectives: tuple[Collective, ...]

  @property
  def needed(self) -> int:
    """Bytes that are in use at once, at the most."""
    return self.arguments + self.outputs - self.aliased + self.temporaries

  @property
  def flops(self) -> float:
    """Of the matrix products, see `roofline.training_flops`."""
    teacher = getattr(self.parts, "teacher", None)
    batch_size, tower = self.parts.config.data.batch_size, getattr(teacher, "tower", None)
    return roofline.training_flops(batch_size, self.parts.model, tower) / self.parts.mesh.size


def run(config: Config, plan: Plan) -> None:
  """Compiles the step and prints what it needs.

  Raises:
    InputError: there are no such devices, the settings do not fit them, or the step does not fit into their memory.
  """
  if config.task == "evaluate":
    raise InputError("--compile_only is for training; config.task='evaluate' has no step")
  chip = roofline.parse_chip(plan.chip) if plan.chip else None
  devices = open_devices(plan.topology)
  compiled = compile_step(config, devices)
  chip = chip or roofline.chip_of(devices[0].device_kind)
  print("\n".join(report(compiled, chip, plan.mfu)))
  if chip is not None and compiled.needed > chip.memory * 2**30:
    raise InputError(
      f"does not fit: the step needs {_gib(compiled.needed)} of each device's {chip.memory:.4g} GiB; {LESS_MEMORY}"
    )


# ------------------------------------------------------------ devices


def open_devices(topology: str) -> list[jax.Device]:
  """The devices to compile for: "cpu:8", TPU slices ("v5e:4x4", two of them "v5e:4x4:2"), this machine's for "".

  Raises:
    InputError: another name, or what is needed for it is not there.
  """
  if not topology:
    return jax.devices()
  if match := re.fullmatch(r"cpu:([1-9]\d*)", topology):
    return _cpu_devices(int(match[1]))
  if match := re.fullmatch(r"(v\d\w*:\d+(?:x\d+)*)(?::([1-9]\d*))?", topology):
    return _tpu_devices(match[1], int(match[2] or 1))
  raise InputError(
    f"--topology={topology!r} is none of cpu:N, a TPU slice such as v5e:4x4 or v5p:2x2x2, and several (v5e:4x4:2); for"
    " GPUs, leave it out on a machine that has one"
  )


def _cpu_devices(number: int) -> list[jax.Device]:
  try:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", number)
  except RuntimeError:  # the backend has started: with enough devices, perhaps
    pass
  devices = jax.devices("cpu")
  if len(devices) < number:
    raise InputError(f"--topology=cpu:{number} is more than the {len(devices)} devices that this process began with")
  return devices[:number]


def _tpu_devices(topology: str, num_slices: int) -> list[jax.Device]:
  for name, value in _QUIET_LIBTPU.items():
    os.environ.setdefault(name, value)
  jax.config.update("jax_platforms", "cpu")  # for what is not compiled; there need be no TPU
  options = {"chip_config_name": "megacore"} if topology.startswith(_TWO_CORES_AS_ONE) else {}
  options |= {"num_slices": num_slices} if num_slices > 1 else {}
  try:
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
  except RuntimeError as error:
    reason = str(error).partition("\n")[0]
    if "not installed" in reason:
      reason = "libtpu is not installed, which compiles for TPUs on any Linux machine: pip install -e '.[tpu]'"
    raise InputError(f"--topology={topology}: {reason}; or take --topology=cpu:N") from error


# ------------------------------------------------------------ the step


def compile_step(config: Config, devices: list[jax.Device]) -> Compiled:
  """Compiles the very step that training would run; what is there of data and weights is opened, the rest assumed.

  Raises:
    InputError: the settings do not fit each other or the devices, or the compiler finds that memory does not do.
  """
  parts, assumed = _plan_parts(config, devices)
  start = time.perf_counter()
  arguments = parts.step_arguments(parts.abstract_state(), _abstract_batch(parts))
  try:
    with compile_cache.disabled():  # a program that is read from it does not tell all of itself
      program = parts.jitted_step.lower(*arguments).compile()
  except jax.errors.JaxRuntimeError as error:
    if OUT_OF_MEMORY not in str(error):
      raise
    reason = str(error).partition(f"{OUT_OF_MEMORY}: ")[2].partition("\n")[0].split(". ")[:2]
    raise InputError(f"does not fit: {'. '.join(reason).strip(' .')}; {LESS_MEMORY}") from error
  memory, cost = program.memory_analysis(), program.cost_analysis() or {}
  return Compiled(
    parts,
    assumed,
    time.perf_counter() - start,
    arguments=memory.argument_size_in_bytes,
    outputs=memory.output_size_in_bytes,
    aliased=memory.alias_size_in_bytes,
    temporaries=memory.temp_size_in_bytes,
    counted_flops=cost.get("flops"),
    moved=cost.get("bytes accessed"),
    collectives=tuple(collectives.find(program.as_text(), len(devices))),
  )


def _plan_parts(config: Config, devices: list[jax.Device]) -> tuple[experiment.Parts, tuple[str, ...]]:
  """What the run would be made of, arrays by their shapes only, and what is assumed of the rest."""
  source, assumed = plan_source(config.data), []
  setup = experiment.open_setup(config, devices, lambda data, split: source)
  if isinstance(source, UnseenSource):
    assumed.append(f"{_IMAGENET_IMAGES:,} training images of {_IMAGENET_CLASSES:,} classes, as in ImageNet")
  if config.task == "finetune":
    return finetuning.assemble(setup), tuple(assumed)

  def open_teacher(constrain: Constrain) -> tuple[Teacher, Any]:
    teacher, params, taken = plan_teacher(config, constrain)
    assumed.extend(taken)
    return teacher, params

  parts = pretraining.assemble(setup, open_teacher)
  return parts, tuple(assumed)


def plan_source(config: DataConfig) -> Source | UnseenSource:
  """The configured training images, or ImageNet's number of them where they cannot be opened."""
  try:
    return open_source(config, "train")
  except InputError:
    return UnseenSource(_IMAGENET_IMAGES, _IMAGENET_CLASSES)


def plan_teacher(config: Config, constrain: Constrain) -> tuple[Teacher, Any, tuple[str, ...]]:
  """The configured teacher, its parameters by their shapes, and what is assumed where its weights are not there."""
  settings = config.teacher
  if settings.kind in ("hog", "pixels") or pathlib.Path(settings.weights).expanduser().exists():
    teacher, params = create_teacher(config, restore_tower, constrain)
    return teacher, jax.eval_shape(lambda: jax.tree.map(jnp.asarray, params)), ()
  options = {"dtype": np.dtype(settings.dtype), "attention": config.model.attention, "constrain": constrain}
  if settings.kind == "clip":
    if config.model.patch_size != CLIP_B16["patch_size"]:
      raise InputError(
        f"config.teacher.weights={settings.weights} is not there, and CLIP B/16, which would be assumed, has other"
        f" patches than config.model.patch_size={config.model.patch_size}; give a file"
      )
    tower = ClipVision(**CLIP_B16, **options)
    teacher = ClipTeacher(tower, config.data.mean, config.data.std, weights_sha256="")
    size = config.data.image_size
    params = jax.eval_shape(lambda: tower.init(jax.random.key(0), np.zeros((1, size, size, 3), np.float32))["params"])
    return teacher, params, (f"{settings.weights} has CLIP B/16's sizes",)
  tower = create_student(config, 1).clone(**options)
  teacher = CheckpointTeacher(tower, config.data.mean, config.data.std)
  params = jax.eval_shape(lambda: init_params(config, tower))
  return teacher, params, (f"{settings.weights} has the student's sizes",)


def _abstract_batch(parts: experiment.Parts) -> dict[str, jax.ShapeDtypeStruct]:
  config, split = parts.config, sharding.batch_sharding(parts.mesh)
  size = config.data.image_size
  fields = {
    "image": ((size, size, 3), np.uint8),
    "mask": ((config.num_tokens,), np.bool_),
    "label": ((), np.int32),
  }

  def abstract(shape: tuple[int, ...], dtype: type) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((config.data.batch_size, *shape), dtype, sharding=split)

  return {name: abstract(*fields[name]) for name in parts.batch_fields}


# ------------------------------------------------------------ what is printed


def report(compiled: Compiled, chip: Chip | None, mfu: float) -> list[str]:
  """Lines for people."""
  parts, config = compiled.parts, compiled.parts.config
  kind = parts.mesh.devices.flat[0].device_kind
  lines = [
    f"{parts.title}: one step of {config.data.batch_size} images on {sharding.describe(parts.mesh)} ({kind}),"
    f" compiled in {compiled.seconds:.1f} s",
    *([f"assumed: {'; '.join(compiled.assumed)}"] if compiled.assumed else []),
    f"memory of each device: {_gib(compiled.needed)} = arguments {_gib(compiled.arguments)} + outputs"
    f" {_gib(compiled.outputs)} - outputs in the arguments' place {_gib(compiled.aliased)} + temporaries"
    f" {_gib(compiled.temporaries)}",
    f"FLOPs of each device: {compiled.flops:.4g} of the model's matrix products; as the compiler counts, a loop's body"
    f" once, {_or_not_told(compiled.counted_flops)}",
    f"bytes moved by each device to and from its memory, as the compiler counts, a loop's body once:"
    f" {_or_not_told(compiled.moved)}",
    *_collective_lines(compiled),
  ]
  if chip is None:
    return [*lines, f"no peak is known of {kind!r}; --chip=v5e or --chip=TFLOPS,GB/S,GIB tells time and fit"]
  if kind == "cpu":
    lines.append(f"a program for CPUs tells a chip's bytes and memory roughly: {_CPU_CAVEAT}")
  return [*lines, *_chip_lines(compiled, chip, mfu)]


_CPU_CAVEAT = "its loops are fused less and its products of bfloat16 are made in float32, which takes more of both"


def _chip_lines(compiled: Compiled, chip: Chip, mfu: float) -> list[str]:
  seconds = roofline.least_seconds(chip, compiled.flops, compiled.moved or 0.0, mfu)
  rate = compiled.parts.config.data.batch_size / seconds.step
  fit = "fits" if compiled.needed <= chip.memory * 2**30 else "does not fit"
  return [
    f"expected, not measured: at least {seconds.step:.3g} s per step, at most {rate:.4g} images/s: the longer of"
    f" computing ({seconds.computing:.3g} s at {mfu:.0%} of {chip.teraflops:.4g} TFLOP/s) and moving bytes"
    f" ({seconds.moving:.3g} s at {chip.bandwidth:.4g} GB/s); waiting for other devices or images is not in it",
    f"{fit} in {chip.memory:.4g} GiB, what a program can have of each device",
  ]


def _collective_lines(compiled: Compiled) -> list[str]:
  if len({getattr(device, "slice_index", None) for device in compiled.parts.mesh.devices.flat}) > 1:
    return ["sent to other devices: not told for several slices, whose sums are split between two networks"]
  if not compiled.collectives:
    return ["sent to other devices: nothing"]
  sent, unknown = collections.Counter(), 0
  for one in compiled.collectives:
    sent[one.operation] += one.sent * (one.count or 0)
    unknown += one.count is None
  total = ", ".join(f"{operation} {size / 1e6:.4g} MB" for operation, size in sent.most_common())
  rest = f" and, in loops of unknown length, {unknown} more operations" if unknown else ""
  return [f"sent by each device to others: {total}{rest}"]


def _gib(size: int) -> str:
  return f"{size / 2**30:.4g} GiB"


def _or_not_told(value: float | None) -> str:
  return "not told" if value is None else f"{value:.4g}"
