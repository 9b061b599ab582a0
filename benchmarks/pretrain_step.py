"""Seconds of one DTM pre-training step: this project's jitted step beside PyTorch eager, on the same work.

  python benchmarks/pretrain_step.py [--variant=B] [--batch=4] [--rounds=10] [--json=FILE]

The step: uint8 images, CLIP B/16 teacher forward, student forward and
backward, morphing with both draws, clipping, AdamW; float32, no colour jitter,
no stochastic depth. Both sides start from the same weights and see the same
images, masks, draws and learning rates, so their losses have to agree, step
after step. PyTorch runs with attention written out and with
`scaled_dot_product_attention`; the faster of the two is what counts.

More XLA contenders join in turn with --attention, --scan_layers, --remat and
--morphing-share; the last one trains token-wise, which shows what morphing costs.
"""

import argparse
import dataclasses
import functools
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from common import alternate, argument_parser, median_ratio, quartiles, report, warn_if_busy, write_json

from dtm_jax.config import ATTENTIONS, Config, DataConfig, ModelConfig, RunConfig, TeacherConfig
from dtm_jax.convert.clip import convert_openai
from dtm_jax.convert.state_dict import StateDict
from dtm_jax.convert.student import convert_student
from dtm_jax.losses import dtm_loss, token_loss
from dtm_jax.models.clip import ClipVision
from dtm_jax.models.variants import VARIANTS
from dtm_jax.models.vit import ViT
from dtm_jax.numerics import torch_models, torch_reference
from dtm_jax.optim import create_optimizer, warmup_cosine
from dtm_jax.steps.pretrain import draw_schedules, make_train_step
from dtm_jax.teachers import ClipTeacher
from dtm_jax.train_state import create_train_state

IMAGE_SIZE, PATCH_SIZE, GRID = 224, 16, (14, 14)
TEACHER_WIDTH, TEACHER_DEPTH, TARGET_DIM = 768, 12, 512  # CLIP ViT-B/16
TOKEN_WISE = "XLA token-wise"
BIAS_STD = 0.02  # of the bias tables, which a new model starts at zero: nothing would compare them


@dataclasses.dataclass
class Contender:
  """One way to make the same steps."""

  name: str
  step: Callable[[int], float]  # number of the step -> its loss, once all is computed
  compile_seconds: float | None = None
  temporary_gigabytes: float | None = None  # beside weights, optimiser state and batch
  losses: list[float] = dataclasses.field(default_factory=list)

  def run(self, i: int) -> None:
    self.losses.append(self.step(i))


def make_config(batch: int, variant: str, num_steps: int) -> Config:
  """The paper's recipe, less what is random on one side only."""
  return Config(
    run=RunConfig(steps=num_steps),
    data=DataConfig(source="synthetic", batch_size=batch, image_size=IMAGE_SIZE, color_jitter=0.0),
    model=ModelConfig(variant=variant, patch_size=PATCH_SIZE, drop_path=0.0, dtype="float32"),
    teacher=TeacherConfig(weights="random", dtype="float32"),
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


def torch_contender(config: Config, batch: dict[str, np.ndarray], *, sdpa: bool) -> Contender:
  student, teacher = make_torch_models(config, sdpa=sdpa)
  optim, schedule = config.optim, make_schedule(config)
  optimizer = torch_reference.make_optimizer(student, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay)
  images, mask = torch.from_numpy(batch["image"]), torch.from_numpy(batch["mask"])
  mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (config.data.mean, config.data.std))
  draws = [jax.tree.map(np.ndarray.tolist, jax.device_get(draw_schedules(config, i))) for i in range(config.run.steps)]
  rates = [float(schedule(i)) for i in range(config.run.steps)]

  def step(i: int) -> float:
    normal = (images.permute(0, 3, 1, 2).float().div(255) - mean) / std
    options = {"lr": rates[i], "max_grad_norm": optim.clip_norm}
    loss, _ = torch_reference.train_step(student, teacher, optimizer, normal, mask, *draws[i], **options)
    return loss.item()

  return Contender("PyTorch SDPA" if sdpa else "PyTorch", step)


# ------------------------------------------------------------ XLA


def make_modules(config: Config) -> tuple[ViT, Any, ClipTeacher, Any]:
  """Student and teacher with PyTorch's random weights: module, parameters, teacher, its parameters."""
  student, teacher = (
    StateDict({name: value.numpy() for name, value in model.state_dict().items()}, pathlib.Path("random weights"))
    for model in make_torch_models(config, sdpa=False)
  )
  sizes, params = convert_student(student)
  model, variant = config.model, VARIANTS[config.model.variant]
  options = {"attention": model.attention, "scan_layers": model.scan_layers, "remat": model.remat}
  vit = ViT(**sizes, layer_scale=variant.layer_scale, **options)
  teacher_sizes, teacher_params = convert_openai(teacher, prefix="")
  tower = ClipVision(**teacher_sizes, attention=model.attention)
  return vit, params, ClipTeacher(tower, config.data.mean, config.data.std, weights_sha256=""), teacher_params


def xla_contender(name: str, config: Config, batch: dict[str, np.ndarray]) -> Contender:
  vit, params, teacher, teacher_params = make_modules(config)
  schedule = make_schedule(config)
  optimizer = create_optimizer(config.optim, schedule)
  draw = functools.partial(draw_schedules, config)
  train_step = jax.jit(make_train_step(config, vit, teacher, optimizer, schedule, draw), donate_argnums=0)
  state = jax.jit(create_train_state, static_argnums=1)(params, optimizer)
  teacher_params, batch = jax.device_put((teacher_params, batch))
  start = time.perf_counter()
  compiled = train_step.lower(state, teacher_params, batch).compile()
  seconds = time.perf_counter() - start

  def step(i: int) -> float:
    nonlocal state
    state, metrics = compiled(state, teacher_params, batch)
    return float(jax.block_until_ready((state, metrics))[1]["loss"])

  return Contender(name, step, seconds, compiled.memory_analysis().temp_size_in_bytes / 1e9)


def xla_contenders(config: Config, batch: dict[str, np.ndarray], options: argparse.Namespace) -> list[Contender]:
  """The configured step, then what was asked to run beside it."""

  def change(section: str, **values: Any) -> Config:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})

  configs = {"XLA": config}
  configs |= {f"XLA attention={name}": change("model", attention=name) for name in options.attention}
  if options.scan_layers:
    configs["XLA scan_layers"] = change("model", scan_layers=True)
  if options.remat:
    configs["XLA remat"] = change("model", remat=True)
  if options.morphing_share:
    configs[TOKEN_WISE] = change("morphing", enabled=False)
  return [xla_contender(name, changed, batch) for name, changed in configs.items()]


# ------------------------------------------------------------ results


def make_rows(contenders: list[Contender], seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
  """One row of the table for each contender; losses and ratios against PyTorch."""
  torch_names = [c.name for c in contenders if c.name.startswith("PyTorch")]
  fastest = min(torch_names, key=lambda name: statistics.median(seconds[name]))
  expected = np.array(next(c.losses for c in contenders if c.name == fastest))
  rows = []
  for contender in contenders:
    times = seconds[contender.name]
    is_same_task = contender.name != TOKEN_WISE
    rows.append(
      {
        "contender": contender.name,
        "seconds": statistics.median(times),
        "quartiles": quartiles(times),
        "ratio": median_ratio(times, seconds[fastest]),
        "compile_seconds": contender.compile_seconds,
        "temporary_gigabytes": contender.temporary_gigabytes,
        "loss_first": contender.losses[0],
        "loss_last": contender.losses[-1],
        "loss_difference": float(np.max(np.abs(contender.losses / expected - 1))) if is_same_task else None,
      }
    )
  return rows


def morphing_share(config: Config, seconds: dict[str, list[float]]) -> dict[str, Any]:
  """What part of the step morphing takes: by the two steps' difference, and by the loss's time alone.

  The difference is of two large numbers and needs many rounds; the loss alone
  does not compete with the rest of the step for the caches.
  """
  shares = [1 - plain / morphing for morphing, plain in zip(seconds["XLA"], seconds[TOKEN_WISE], strict=True)]
  rng = np.random.default_rng(config.run.seed)
  shape = (2, config.data.batch_size, config.num_tokens, TARGET_DIM)
  online, target = jnp.asarray(rng.normal(size=shape), jnp.float32)
  morphing, plain = (jax.jit(jax.value_and_grad(loss)) for loss in (dtm_loss, token_loss))
  draws = [draw_schedules(config, i) for i in range(config.run.steps)]
  losses = alternate(
    {
      "morphing": lambda i: jax.block_until_ready(morphing(online, target, *draws[i])),
      "plain": lambda i: jax.block_until_ready(plain(online, target)),
    },
    config.run.steps - 1,
  )
  extra = statistics.mean(losses["morphing"]) - statistics.mean(losses["plain"])
  return {
    "by_difference": statistics.median(shares),
    "quartiles": quartiles(shares),
    "alone": extra / statistics.median(seconds["XLA"]),
    "milliseconds_per_image": 1e3 * extra / config.data.batch_size,
  }


def print_results(rows: list[dict[str, Any]], share: dict[str, Any] | None) -> None:
  columns = {
    "contender": ("contender", ""),
    "s/step": ("seconds", ".3f"),
    "/ PyTorch": ("ratio", ".3f"),
    "compile s": ("compile_seconds", ".1f"),
    "temp GB": ("temporary_gigabytes", ".2f"),
    "first loss": ("loss_first", ".7f"),
    "last loss": ("loss_last", ".7f"),
    "loss differs": ("loss_difference", ".1e"),
  }
  report(rows, columns)
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
  parser.add_argument("--attention", choices=ATTENTIONS, nargs="+", default=[], help="add XLA with other attention")
  parser.add_argument("--scan_layers", action="store_true", help="add XLA with layers scanned")
  parser.add_argument("--remat", action="store_true", help="add XLA with blocks recomputed in the backward pass")
  parser.add_argument("--morphing-share", action="store_true", help="add XLA's token-wise step: what morphing costs")
  return parser.parse_args()


def main() -> None:
  options = parse_options()
  warn_if_busy()
  config = make_config(options.batch, options.variant, options.rounds + 1)
  batch = make_batch(config)
  contenders = xla_contenders(config, batch, options)
  contenders += [torch_contender(config, batch, sdpa=sdpa) for sdpa in (False, True)]
  seconds = alternate({c.name: c.run for c in contenders}, options.rounds)
  rows = make_rows(contenders, seconds)
  share = morphing_share(config, seconds) if options.morphing_share else None
  print_results(rows, share)
  results = {"batch": options.batch, "variant": options.variant, "steps": rows, "morphing_share": share}
  write_json(options.json, results, ("jax", "jaxlib", "flax", "optax", "torch", "numpy"))


if __name__ == "__main__":
  main()
