"""Seconds and memory of one DTM pre-training step: this project's jitted step beside PyTorch's, on the same work.

  python benchmarks/torch_vs_xla.py [--variant=B] [--batch=4] [--rounds=10] [--json=FILE]
  python benchmarks/torch_vs_xla.py --batch=256 --peak_tflops=989.5  # where jax and PyTorch see a GPU, on it

The step: uint8 images, CLIP B/16 teacher forward, student forward and
backward, morphing with both draws, clipping, AdamW; no colour jitter, no
stochastic depth. All start from the same weights and see the same images,
masks, draws and learning rates, so their losses have to agree, step after
step. On CPU in float32; on a GPU in bfloat16 (PyTorch by `torch.autocast`,
XLA with cuDNN's fused attention) unless --dtype says otherwise, and float32
means float32 there, never TF32.

PyTorch runs eagerly and through `torch.compile` (--torch), each with attention
written out and with `scaled_dot_product_attention`; the fastest counts.
Compiled are student and teacher. The grouping is not: its shapes shrink by the
drawn Python integers, and every draw would compile again.

Compile time is apart: for XLA lowering and compiling, for PyTorch the first
step less the second. Memory, in GB: "state" is weights, optimiser state and
batch; "temp" what a step takes beside, by XLA's own analysis, by PyTorch's
allocator on a GPU, and by its profiler's record of tensors made and freed on CPU.

MFU = model FLOPs of a step / (seconds * peak FLOP/s), see
`dtm_jax.roofline.training_flops`: matrix products only, and none of what
--remat computes twice. The peak is that of dense bfloat16 products, known for a
few GPUs, or --peak_tflops.

More XLA contenders join in turn with --attention, --scan_layers and --remat.
--morphing_share then sets the step against the token-wise one, these two alone.
"""

import argparse
import dataclasses
import functools
import os
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from common import alternate, argument_parser, median_ratio, quartiles, report, warn_if_busy, write_json

from dtm_jax import roofline
from dtm_jax.config import ATTENTIONS, DTYPES, Config, DataConfig, ModelConfig, RunConfig, TeacherConfig
from dtm_jax.convert import from_state_dict
from dtm_jax.losses import dtm_loss, token_loss
from dtm_jax.models.clip import CLIP_B16, ClipVision
from dtm_jax.models.variants import VARIANTS
from dtm_jax.networks import create_student
from dtm_jax.numerics import torch_models, torch_reference
from dtm_jax.optim import create_optimizer, warmup_cosine
from dtm_jax.steps.pretrain import draw_schedules, make_train_step
from dtm_jax.teachers import ClipTeacher
from dtm_jax.train_state import create_train_state

IMAGE_SIZE, PATCH_SIZE, GRID = 224, 16, (14, 14)
TEACHER_WIDTH, TEACHER_DEPTH, TARGET_DIM = (CLIP_B16[name] for name in ("width", "depth", "out_dim"))
TORCH_MODES = ("eager", "compile")
BIAS_STD = 0.02  # of the bias tables, which a new model starts at zero: nothing would compare them


@dataclasses.dataclass
class Contender:
  """One way to make the same steps."""

  name: str
  step: Callable[[int], float]  # number of the step -> its loss, once all is computed
  state_gigabytes: float
  temporary_gigabytes: float
  compile_seconds: float | None = None
  counted_flops: float | None = None  # of a step, as the compiler counts
  losses: list[float] = dataclasses.field(default_factory=list)

  def run(self, i: int) -> None:
    self.losses.append(self.step(i))


def make_config(options: argparse.Namespace) -> Config:
  """The paper's recipe, less what is random on one side only."""
  dtype, is_fused = options.dtype, options.device == "gpu" and options.dtype == "bfloat16"
  attention = "cudnn" if is_fused else "matmul"
  return Config(
    run=RunConfig(steps=options.rounds + 1),
    data=DataConfig(source="synthetic", batch_size=options.batch, image_size=IMAGE_SIZE, color_jitter=0.0),
    model=ModelConfig(variant=options.variant, patch_size=PATCH_SIZE, drop_path=0.0, dtype=dtype, attention=attention),
    teacher=TeacherConfig(weights="random", dtype=dtype),
  )


def make_batch(config: Config) -> dict[str, np.ndarray]:
  """Noise for images, and masks of the asked number."""
  rng = np.random.default_rng(config.run.seed)
  images = rng.integers(0, 256, (config.data.batch_size, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
  mask = np.zeros((config.data.batch_size, config.num_tokens), bool)
  mask[:, : config.data.num_masked] = True
  return {"image": images, "mask": rng.permuted(mask, axis=1)}


def make_schedule(config: Config) -> Callable:
  return warmup_cosine(config.peak_lr, config.optim.min_lr, 0, config.run.steps)


# ------------------------------------------------------------ PyTorch


def make_torch_models(config: Config, *, sdpa: bool) -> tuple[torch_models.Student, torch_models.ClipVision]:
  """Student and teacher; random, but the same in every call."""
  torch.manual_seed(config.run.seed)
  student = torch_models.Student(VARIANTS[config.model.variant], GRID, PATCH_SIZE, TARGET_DIM, sdpa=sdpa)
  for name, parameter in student.named_parameters():
    if name.endswith("relative_position_bias_table"):
      torch.nn.init.normal_(parameter, std=BIAS_STD)
  teacher = torch_models.ClipVision(GRID, PATCH_SIZE, TEACHER_WIDTH, TEACHER_DEPTH, TARGET_DIM, sdpa=sdpa)
  return student, teacher


def torch_contender(
  name: str, config: Config, batch: dict[str, np.ndarray], device: str, *, compiled: bool, sdpa: bool
) -> Contender:
  student, teacher = (model.to(device) for model in make_torch_models(config, sdpa=sdpa))
  if compiled:
    student.compile()
    teacher.compile()
  optim, schedule = config.optim, make_schedule(config)
  optimizer = torch_reference.make_optimizer(student, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay)
  images, mask = (torch.from_numpy(batch[key]).to(device) for key in ("image", "mask"))
  mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (config.data.mean, config.data.std))
  draws = [jax.tree.map(np.ndarray.tolist, jax.device_get(draw_schedules(config, i))) for i in range(config.run.steps)]
  rates = [float(schedule(i)) for i in range(config.run.steps)]
  options = {"max_grad_norm": optim.clip_norm, "dtype": getattr(torch, config.model.dtype)}

  def step(i: int, lr: float) -> float:
    normal = (images.permute(0, 3, 1, 2).float().div(255) - mean) / std
    loss, _ = torch_reference.train_step(student, teacher, optimizer, normal, mask, *draws[i], lr=lr, **options)
    return loss.item()  # waits for what was queued before

  def warm_up() -> float:
    """A step that changes no parameter."""
    start = time.perf_counter()
    step(0, lr=0.0)
    return time.perf_counter() - start

  first = warm_up()
  compile_seconds = first - warm_up() if compiled else None
  optimizer.zero_grad(set_to_none=True)
  temporary = peak_bytes(warm_up, device)
  moments = [value for state in optimizer.state.values() for value in state.values()]
  tensors = [images, mask, *student.state_dict().values(), *teacher.state_dict().values(), *moments]
  optimizer.state.clear()
  return Contender(
    name,
    lambda i: step(i, rates[i]),
    state_gigabytes=sum(tensor.nbytes for tensor in tensors) / 1e9,
    temporary_gigabytes=temporary / 1e9,
    compile_seconds=compile_seconds,
  )


def peak_bytes(run: Callable[[], Any], device: str) -> int:
  """Most bytes that tensors made during `run` take at one time."""
  if device == "cuda":
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
  with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
    run()
  events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
  changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
  return int(np.cumsum(changes).max())


def torch_contenders(
  config: Config, batch: dict[str, np.ndarray], options: argparse.Namespace
) -> tuple[list[Contender], dict[str, str]]:
  """All that were asked for and work here, and of the others what is wrong with them."""
  torch.compiler.config.force_disable_caches = True  # or the compile time would be that of an earlier run
  warnings.filterwarnings("ignore", "dynamo_pgo force disabled")
  device = "cuda" if options.device == "gpu" else "cpu"
  contenders, failures = [], {}
  for mode in options.torch:
    for sdpa in (False, True):
      name = f"PyTorch {mode}{' SDPA' if sdpa else ''}"
      try:
        contenders.append(torch_contender(name, config, batch, device, compiled=mode == "compile", sdpa=sdpa))
      except Exception as error:  # no C++ compiler, no room, no kernel: the others still count
        failures[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
  return contenders, failures


# ------------------------------------------------------------ XLA


def make_weights(config: Config) -> list[tuple[dict[str, Any], Any]]:
  """Sizes and parameters of student and teacher: PyTorch's random weights, for XLA."""
  models = make_torch_models(config, sdpa=False)
  return [from_state_dict({name: value.numpy() for name, value in m.state_dict().items()})[1:3] for m in models]


def xla_contender(name: str, config: Config, batch: dict[str, np.ndarray]) -> Contender:
  (_, params), (teacher_sizes, teacher_params) = make_weights(config)
  tower = ClipVision(**teacher_sizes, dtype=np.dtype(config.teacher.dtype), attention=config.model.attention)
  teacher = ClipTeacher(tower, config.data.mean, config.data.std, weights_sha256="")
  schedule = make_schedule(config)
  optimizer = create_optimizer(config.optim, schedule)
  draw = functools.partial(draw_schedules, config)
  student = create_student(config, TARGET_DIM)
  train_step = jax.jit(make_train_step(config, student, teacher, optimizer, schedule, draw), donate_argnums=0)
  state = jax.jit(create_train_state, static_argnums=1)(params, optimizer)
  teacher_params, batch = jax.device_put((teacher_params, batch))
  start = time.perf_counter()
  compiled = train_step.lower(state, teacher_params, batch).compile()
  seconds = time.perf_counter() - start

  def step(i: int) -> float:
    nonlocal state
    state, metrics = compiled(state, teacher_params, batch)
    return float(jax.block_until_ready((state, metrics))[1]["loss"])

  memory = compiled.memory_analysis()
  return Contender(
    name,
    step,
    state_gigabytes=memory.argument_size_in_bytes / 1e9,
    temporary_gigabytes=memory.temp_size_in_bytes / 1e9,
    compile_seconds=seconds,
    counted_flops=compiled.cost_analysis()["flops"],
  )


def change(config: Config, section: str, **values: Any) -> Config:
  return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def xla_contenders(config: Config, batch: dict[str, np.ndarray], options: argparse.Namespace) -> list[Contender]:
  """The configured step, then what was asked to run beside it."""
  configs = {"XLA": config}
  configs |= {f"XLA attention={name}": change(config, "model", attention=name) for name in options.attention}
  if options.scan_layers:
    configs["XLA scan_layers"] = change(config, "model", scan_layers=True)
  if options.remat:
    configs["XLA remat"] = change(config, "model", remat=True)
  return [xla_contender(name, changed, batch) for name, changed in configs.items()]


# ------------------------------------------------------------ results


def make_rows(
  contenders: list[Contender], seconds: dict[str, list[float]], flops: float, peak_tflops: float | None
) -> list[dict[str, Any]]:
  """One row of the table for each contender; losses and ratios against the fastest PyTorch, of all and by mode."""

  def fastest(prefix: str) -> str | None:
    names = [c.name for c in contenders if c.name.startswith(prefix)]
    return min(names, key=lambda name: statistics.median(seconds[name]), default=None)

  references = {"ratio": fastest("PyTorch")} | {f"ratio_{mode}": fastest(f"PyTorch {mode}") for mode in TORCH_MODES}
  expected = np.array(next(c.losses for c in contenders if references["ratio"] in (c.name, None)))
  rows = []
  for contender in contenders:
    times = seconds[contender.name]
    median = statistics.median(times)
    rows.append(
      {
        "contender": contender.name,
        "seconds": median,
        "quartiles": quartiles(times),
        **{key: name and median_ratio(times, seconds[name]) for key, name in references.items()},
        "mfu": peak_tflops and flops / (median * peak_tflops * 1e12),
        "compile_seconds": contender.compile_seconds,
        "state_gigabytes": contender.state_gigabytes,
        "temporary_gigabytes": contender.temporary_gigabytes,
        "counted_flops": contender.counted_flops,
        "loss_first": contender.losses[0],
        "loss_last": contender.losses[-1],
        "loss_difference": float(np.max(np.abs(contender.losses / expected - 1))),
      }
    )
  return rows


def morphing_share(config: Config, batch: dict[str, np.ndarray], step: Contender, rounds: int) -> dict[str, Any]:
  """What part of the step morphing takes: by the two steps' difference, and by the loss's time alone.

  The two steps run by turns with nothing between, because what ran before
  changes a step's time by more than morphing does. The loss alone does not
  compete with the rest of the step for the caches.
  """
  plain = xla_contender("XLA token-wise", change(config, "morphing", enabled=False), batch)
  seconds = alternate({"morphing": step.step, "plain": plain.step}, rounds)
  shares = [1 - without / full for full, without in zip(seconds["morphing"], seconds["plain"], strict=True)]
  extra = loss_seconds(config, rounds)
  return {
    "rounds": rounds,
    "seconds": statistics.median(seconds["morphing"]),
    "seconds_token_wise": statistics.median(seconds["plain"]),
    "by_difference": statistics.median(shares),
    "quartiles": quartiles(shares),
    "alone": extra / statistics.median(seconds["morphing"]),
    "milliseconds_per_image": 1e3 * extra / config.data.batch_size,
  }


def loss_seconds(config: Config, rounds: int) -> float:
  """What the DTM loss and its gradient take beyond the token-wise one; means, because draws differ."""
  rng = np.random.default_rng(config.run.seed)
  shape = (2, config.data.batch_size, config.num_tokens, TARGET_DIM)
  online, target = jnp.asarray(rng.normal(size=shape), jnp.float32)
  morphing, plain = (jax.jit(jax.value_and_grad(loss)) for loss in (dtm_loss, token_loss))
  draws = [draw_schedules(config, i) for i in range(rounds + 1)]
  seconds = alternate(
    {
      "morphing": lambda i: jax.block_until_ready(morphing(online, target, *draws[i])),
      "plain": lambda i: jax.block_until_ready(plain(online, target)),
    },
    rounds,
  )
  return statistics.mean(seconds["morphing"]) - statistics.mean(seconds["plain"])


def print_results(rows: list[dict[str, Any]], failures: dict[str, str], share: dict[str, Any] | None) -> None:
  columns = {
    "contender": ("contender", ""),
    "s/step": ("seconds", ".3f"),
    "/ PyTorch": ("ratio", ".3f"),
    "/ eager": ("ratio_eager", ".3f"),
    "/ compile": ("ratio_compile", ".3f"),
    "MFU": ("mfu", ".1%"),
    "compile s": ("compile_seconds", ".1f"),
    "state GB": ("state_gigabytes", ".2f"),
    "temp GB": ("temporary_gigabytes", ".2f"),
    "first loss": ("loss_first", ".7f"),
    "last loss": ("loss_last", ".7f"),
    "loss differs": ("loss_difference", ".1e"),
  }
  report(rows, columns)
  for name, failure in failures.items():
    print(f"{name}: does not work here: {failure}")
  if share is not None:
    low, high = share["quartiles"]
    print(
      f"morphing: {share['by_difference']:.2%} of the step by difference (half of the rounds {low:.2%} to {high:.2%}),"
      f" {share['alone']:.2%} by the loss alone ({share['milliseconds_per_image']:.2f} ms per image)"
    )


def parse_options() -> argparse.Namespace:
  parser = argument_parser(__doc__, rounds=10)
  parser.add_argument("--variant", choices=("S", "B", "L"), default="B", help="of the student (%(default)s)")
  parser.add_argument("--batch", type=int, default=4, help="images (%(default)s)")
  parser.add_argument("--device", choices=("cpu", "gpu"), help="gpu where jax and PyTorch see one, else cpu")
  parser.add_argument("--dtype", choices=DTYPES, help="bfloat16 on a GPU, else float32")
  parser.add_argument("--torch", choices=TORCH_MODES, nargs="+", default=TORCH_MODES, help="ways to run PyTorch (both)")
  parser.add_argument("--attention", choices=ATTENTIONS, nargs="+", default=[], help="add XLA with other attention")
  parser.add_argument("--scan_layers", action="store_true", help="add XLA with layers scanned")
  parser.add_argument("--remat", action="store_true", help="add XLA with blocks recomputed in the backward pass")
  parser.add_argument(
    "--morphing_share",
    type=int,
    nargs="?",
    const=40,
    metavar="ROUNDS",
    help="then measure what morphing costs, against XLA's token-wise step (%(const)s rounds)",
  )
  parser.add_argument("--peak_tflops", type=float, help="of the device in this type, for the MFU")
  options = parser.parse_args()
  has_gpu = torch.cuda.is_available() and jax.default_backend() == "gpu"
  if options.device == "gpu" and not has_gpu:
    parser.error("--device=gpu: jax and PyTorch do not both see a GPU; leave it out, or install both for CUDA")
  options.device = options.device or ("gpu" if has_gpu else "cpu")
  options.dtype = options.dtype or ("bfloat16" if options.device == "gpu" else "float32")
  if options.peak_tflops is None and options.dtype == "bfloat16":
    chip = roofline.chip_of(jax.devices(options.device)[0].device_kind)
    options.peak_tflops = chip and chip.teraflops
  return options


def set_up(device: str, dtype: str) -> None:
  """One device for all that follows, and float32 that is float32."""
  jax.config.update("jax_default_device", jax.devices(device)[0])
  if (device, dtype) == ("gpu", "float32"):
    jax.config.update("jax_default_matmul_precision", "float32")
    torch.backends.cudnn.allow_tf32 = False


def main() -> None:
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs the GPU's memory, too
  options = parse_options()
  set_up(options.device, options.dtype)
  warn_if_busy()
  config = make_config(options)
  batch = make_batch(config)
  contenders = xla_contenders(config, batch, options)
  others, failures = torch_contenders(config, batch, options)
  contenders += others
  seconds = alternate({c.name: c.run for c in contenders}, options.rounds)
  tower = ClipVision(**CLIP_B16)
  flops = roofline.training_flops(config.data.batch_size, create_student(config, tower.out_dim), tower)
  rows = make_rows(contenders, seconds, flops, options.peak_tflops)
  share = morphing_share(config, batch, contenders[0], options.morphing_share) if options.morphing_share else None
  print_results(rows, failures, share)
  results = {
    **{name: getattr(options, name) for name in ("variant", "batch", "device", "dtype", "peak_tflops")},
    "torch_threads": torch.get_num_threads(),
    "model_flops": flops,
    "steps": rows,
    "failures": failures,
    "morphing_share": share,
  }
  write_json(options.json, results, ("jax", "jaxlib", "flax", "optax", "torch", "numpy"))


if __name__ == "__main__":
  main()
