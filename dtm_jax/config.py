"""What a run is: every setting, its default, its check, and what follows from it.

The sections below are the schema and the only home of defaults (the paper's
ViT-B/16 recipe on ImageNet). A file in `configs/` starts from `base()` and
states what its run is; `resolve()` turns the resulting ConfigDict into frozen
dataclasses, which is all that the rest of the library ever sees.
"""

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import config_dict

from dtm_jax.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

TRAIN_CROPS = ("resized", "square")
TASKS = ("pretrain", "finetune", "evaluate")
OF_CHECKPOINT = "checkpoint"  # as a source: the data that the evaluated run was trained on
SOURCES = ("digits", "tfds", "folder", "synthetic", OF_CHECKPOINT)
TEACHERS = ("clip", "checkpoint", "hog", "pixels")
VARIANTS = ("tiny", "S", "B", "L")
DISTANCES = ("smooth_l1", "l1", "l2", "negative_cosine")
DTYPES = ("float32", "bfloat16")
ATTENTIONS = ("matmul", "xla", "cudnn")
OPTIMIZERS = ("adamw", "sgd")
LINEAR_SOLVERS = ("lbfgs", "sgd", "lars")
BIAS_TABLES = ("both", "shared", "own")


def _require(condition: bool, message: str) -> None:
  if not condition:
    raise InputError(message)


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
  _require(value in choices, f"config.{name}={value!r} is not one of {', '.join(choices)}")


def _require_positive(section: str, settings: object, *names: str) -> None:
  for name in names:
    value = getattr(settings, name)
    _require(value is None or value > 0, f"config.{section}.{name}={value} must be positive")


def _require_fractions(section: str, settings: object, *names: str) -> None:
  for name in names:
    value = getattr(settings, name)
    _require(0 <= value <= 1, f"config.{section}.{name}={value} must be in [0, 1]")


@dataclasses.dataclass(frozen=True)
class RandAugment:
  """How RandAugment (Cubuk et al. 2020) distorts an image."""

  magnitude: float  # 0 to 10
  magnitude_std: float  # of the normal draw around it, for each operation
  num_ops: int  # operations drawn for an image, with repeats
  prob: float  # that a drawn operation is applied


_RAND_AUGMENT_WORDS = {
  "m": ("magnitude", float),
  "mstd": ("magnitude_std", float),
  "n": ("num_ops", int),
  "p": ("prob", float),
  "inc": ("increasing", int),
}


def parse_rand_augment(text: str) -> RandAugment | None:
  """timm's words for RandAugment, or None for "".

  "m9-mstd0.5-inc1" is magnitude 9 with a spread of 0.5, by operations that all grow stronger with it (`inc1`, the only
  set here). "n2" and "p0.5" are how many operations and how probable each; these two are timm's defaults.

  Raises:
    InputError: other words or values.
  """
  if not text:
    return None
  values = {"magnitude_std": 0.0, "num_ops": 2, "prob": 0.5}
  for word in text.removeprefix("rand-").split("-"):
    match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", word)
    _require(
      match is not None and match[1] in _RAND_AUGMENT_WORDS,
      f"config.data.rand_augment={text!r}: {word!r} is not one of m9, mstd0.5, n2, p0.5, inc1",
    )
    name, number = _RAND_AUGMENT_WORDS[match[1]]
    try:
      values[name] = number(match[2])
    except ValueError as error:
      raise InputError(f"config.data.rand_augment={text!r}: {word!r} needs a whole number") from error
  given = f"config.data.rand_augment={text!r}"
  _require(values.pop("increasing", 0) == 1, f"{given} needs 'inc1': operations that grow with the magnitude")
  _require(0 <= values.get("magnitude", -1) <= 10, f"{given} needs a magnitude from m0 to m10")
  _require(values["num_ops"] > 0 and values["prob"] <= 1, f"{given} needs n1 or more, and p1 or less")
  return RandAugment(**values)


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """How long, how often, from which seed. `steps`, where given, goes before `epochs`."""

  steps: int | None = None
  epochs: float | None = None
  seed: int = 0
  log_every_steps: int = 50
  checkpoint_every_steps: int = 1000
  keep_checkpoints: int = 2
  on_nonfinite: str = "stop"  # "rollback" goes back to the last checkpoint and on without the batch

  def __post_init__(self):
    _require(self.steps is not None or self.epochs is not None, "give config.run.steps or config.run.epochs")
    _require_positive("run", self, "steps", "epochs", "log_every_steps", "checkpoint_every_steps", "keep_checkpoints")
    _require(0 <= self.seed < 2**31, f"config.run.seed={self.seed} must be in 0..2^31-1")
    _require_choice("run.on_nonfinite", self.on_nonfinite, ("stop", "rollback"))


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Images, their augmentation and their block masks; pixels stay uint8 on the host."""

  source: str = "tfds"
  name: str = "imagenet2012"  # TFDS data set, for source "tfds"
  path: str = ""  # TFDS data_dir ("" is TFDS's own default), or the folder for source "folder"
  label: str = "label"  # feature of a TFDS data set: the class, or several
  train_split: str = "train"
  eval_split: str = "validation"
  batch_size: int = 2048  # global, per optimiser step
  image_size: int = 224  # pixels, square
  num_workers: int = 8  # of each process, processes of their own; 0 decodes in threads of this one
  train_crop: str = "resized"  # "square" is as large as evaluation's (eval_crop), but anywhere
  crop_scale: tuple[float, float] = (0.2, 1.0)  # of a "resized" crop: its area over the image's
  crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width over height
  flip: float = 0.5  # probability
  color_jitter: float = 0.4  # brightness, contrast and saturation; 0 turns it off
  color_jitter_on: str = "device"  # "host" is the release's order: before the crop
  rand_augment: str = ""  # in timm's words, such as "m9-mstd0.5-inc1"
  eval_crop: float = 224 / 256  # side of evaluation's centre crop over the image's shorter side
  mean: tuple[float, float, float] = IMAGENET_MEAN  # of RGB in [0, 1]
  std: tuple[float, float, float] = IMAGENET_STD
  num_masked: int = 75  # patches per image, exactly
  mask_min_block: int = 16  # patches
  mask_min_aspect: float = 0.3  # blocks have an aspect in [this, 1 / this]
  max_bad_fraction: float = 0.001  # unreadable images over all images, then the run stops

  def __post_init__(self):
    _require_choice("data.source", self.source, SOURCES)
    _require_choice("data.train_crop", self.train_crop, TRAIN_CROPS)
    _require_choice("data.color_jitter_on", self.color_jitter_on, ("device", "host"))
    _require(
      self.source != "folder" or bool(self.path),
      f"config.data.source={self.source!r} needs config.data.path, the folder of images",
    )
    _require_positive("data", self, "batch_size", "image_size", "mask_min_block")
    _require(self.num_workers >= 0, f"config.data.num_workers={self.num_workers} must not be negative")
    _require(self.num_masked >= 0, f"config.data.num_masked={self.num_masked} must not be negative")
    _require(0 < self.mask_min_aspect <= 1, f"config.data.mask_min_aspect={self.mask_min_aspect} must be in (0, 1]")
    _require(0 <= self.flip <= 1, f"config.data.flip={self.flip} must be in [0, 1]")
    _require(0 <= self.color_jitter < 1, f"config.data.color_jitter={self.color_jitter} must be in [0, 1)")
    parse_rand_augment(self.rand_augment)
    _require(0 <= self.max_bad_fraction <= 1, f"config.data.max_bad_fraction={self.max_bad_fraction} must be in [0, 1]")
    low, high = self.crop_scale
    _require(0 < low <= high <= 1, f"config.data.crop_scale={self.crop_scale} must be 0 < low <= high <= 1")
    low, high = self.crop_ratio
    _require(0 < low <= high, f"config.data.crop_ratio={self.crop_ratio} must be 0 < low <= high")
    _require(0 < self.eval_crop <= 1, f"config.data.eval_crop={self.eval_crop} must be in (0, 1]")
    _require(min(self.std) > 0, f"config.data.std={self.std} must be positive")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The student, a BEiT-style ViT."""

  variant: str = "B"
  patch_size: int = 16  # pixels
  drop_path: float = 0.1  # stochastic depth of the last block, linear from 0 at the first
  dtype: str = "bfloat16"  # of matrix products; parameters and statistics are float32
  attention: str = "matmul"  # "matmul", "xla" or "cudnn", see models/attention.py
  scan_layers: bool = False  # one compiled block for all layers: compiles faster, steps slower
  remat: bool = False  # recompute each block in the backward pass: less memory, more time

  def __post_init__(self):
    _require_choice("model.variant", self.variant, VARIANTS)
    _require_choice("model.dtype", self.dtype, DTYPES)
    _require_choice("model.attention", self.attention, ATTENTIONS)
    _require_positive("model", self, "patch_size")
    _require(0 <= self.drop_path < 1, f"config.model.drop_path={self.drop_path} must be in [0, 1)")


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
  """Where target tokens come from."""

  kind: str = "clip"
  weights: str = ""  # a weights file, a work folder ("checkpoint"), or a Hugging Face hub name
  normalization: str = "student"  # "clip" feeds CLIP's own mean and std; the release does not
  normalize_targets: bool = False  # per token, after morphing
  dtype: str = "bfloat16"  # of matrix products, where the teacher has any

  def __post_init__(self):
    _require_choice("teacher.kind", self.kind, TEACHERS)
    _require_choice("teacher.normalization", self.normalization, ("student", "clip"))
    _require_choice("teacher.dtype", self.dtype, DTYPES)
    _require(
      self.normalization == "student" or self.kind == "clip",
      f"config.teacher.normalization='clip' is for kind 'clip'; {self.kind!r} has its own",
    )
    _require(
      self.kind not in ("clip", "checkpoint") or bool(self.weights),
      f"config.teacher.kind={self.kind!r} needs config.teacher.weights: a weights file"
      + (
        ", or a Hugging Face name such as openai/clip-vit-base-patch16" if self.kind == "clip" else " or a work folder"
      ),
    )


@dataclasses.dataclass(frozen=True)
class MorphingConfig:
  """The paper's letters: L = draws, n = tokens to merge, k = iterations, K = max_iterations."""

  enabled: bool = True  # False: token-wise targets
  draws: int = 2
  budget: int | None = None  # tokens that may merge; None is all N
  max_iterations: int = 14
  fixed_num_merged: int | None = None  # n, for the ablation
  fixed_iterations: int | None = None  # k
  granularity: str = "batch"  # who shares a draw
  group_size: int | None = None  # images, for granularity "group"
  split: str = "alternate"  # "random" is the paper's text
  protect_first: bool = True  # token 0 never merges, as in the release
  distance: str = "smooth_l1"
  loss_on: str = "all"  # "masked": only masked positions count

  def __post_init__(self):
    _require_choice("morphing.granularity", self.granularity, ("batch", "group", "image"))
    _require_choice("morphing.split", self.split, ("alternate", "random"))
    _require_choice("morphing.distance", self.distance, DISTANCES)
    _require_choice("morphing.loss_on", self.loss_on, ("all", "masked"))
    _require_positive("morphing", self, "draws", "budget", "max_iterations", "fixed_iterations", "group_size")
    _require(
      self.fixed_num_merged is None or self.fixed_num_merged >= 0,
      f"config.morphing.fixed_num_merged={self.fixed_num_merged} must not be negative",
    )
    _require(
      (self.granularity == "group") == (self.group_size is not None),
      "config.morphing.group_size goes with config.morphing.granularity='group', and only with it",
    )


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
  """Of task "finetune": where the classifier begins, and what makes classes harder to tell."""

  init: str = ""  # a work folder, a weights file, or a Hugging Face model folder; "" starts from scratch
  bias_tables: str = "both"  # each block's bias table: its own plus the shared one, only the "shared", only its "own"
  erase_prob: float = 0.25  # random erasing: a rectangle of noise
  mixup: float = 0.8  # alpha of the Beta draw; 0 turns it off
  cutmix: float = 1.0  # alpha of the Beta draw; 0 turns it off
  cutmix_prob: float = 0.5  # that a step with both cuts instead of mixing
  label_smoothing: float = 0.1

  def __post_init__(self):
    _require_choice("finetune.bias_tables", self.bias_tables, BIAS_TABLES)
    _require_fractions("finetune", self, "erase_prob", "cutmix_prob")
    _require(0 <= self.label_smoothing < 1, f"config.finetune.label_smoothing={self.label_smoothing} must be in [0, 1)")
    _require(
      self.mixup >= 0 and self.cutmix >= 0,
      f"config.finetune.mixup={self.mixup} and cutmix={self.cutmix} must not be negative",
    )


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """AdamW or SGD with linear warm-up from 0 and a cosine to `min_lr`, per step."""

  name: str = "adamw"  # "sgd" has momentum
  base_lr: float = 1.5e-3
  base_batch_size: int = 2048  # lr = base_lr * sqrt(batch_size / base_batch_size)
  min_lr: float = 1e-5
  warmup_epochs: float = 10.0
  betas: tuple[float, float] = (0.9, 0.98)  # of "adamw"
  eps: float = 1e-8  # of "adamw"
  momentum: float = 0.9  # of "sgd"
  weight_decay: float = 0.05  # times the learning rate; "sgd", too, keeps it out of its momentum
  layer_decay: float = 1.0  # of the learning rate, per layer from the head down; 1 is the same rate for all
  clip_norm: float | None = 3.0  # global norm; None does not clip
  ema_decay: float | None = None  # of an average of the weights, for evaluation; None keeps none
  accumulate_steps: int = 1  # micro-batches per optimiser step

  def __post_init__(self):
    _require_choice("optim.name", self.name, OPTIMIZERS)
    _require_positive("optim", self, "base_lr", "base_batch_size", "eps", "clip_norm", "accumulate_steps")
    _require(self.min_lr >= 0, f"config.optim.min_lr={self.min_lr} must not be negative")
    _require(self.warmup_epochs >= 0, f"config.optim.warmup_epochs={self.warmup_epochs} must not be negative")
    _require(self.weight_decay >= 0, f"config.optim.weight_decay={self.weight_decay} must not be negative")
    _require(0 < self.layer_decay <= 1, f"config.optim.layer_decay={self.layer_decay} must be in (0, 1]")
    _require(
      self.ema_decay is None or 0 <= self.ema_decay < 1, f"config.optim.ema_decay={self.ema_decay} must be in [0, 1)"
    )
    _require(all(0 <= b < 1 for b in self.betas), f"config.optim.betas={self.betas} must be in [0, 1)")
    _require(0 <= self.momentum < 1, f"config.optim.momentum={self.momentum} must be in [0, 1)")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices per mesh axis; -1 takes what is left."""

  data: int = -1  # each has its own images and all of the state
  fsdp: int = 1  # each has its own images and a share of the state
  tensor: int = 1  # share images, heads and hidden features, and state

  def __post_init__(self):
    sizes = (self.data, self.fsdp, self.tensor)
    _require(all(s == -1 or s > 0 for s in sizes), f"config.mesh sizes {sizes} must be positive, or -1")
    _require(sizes.count(-1) <= 1, "only one of config.mesh.data, fsdp and tensor may be -1")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """How a training run is looked at, and all of task "evaluate"."""

  every_epochs: float | None = None  # of a training run; None evaluates it at the end only
  knn: bool = True  # of a pre-training run, before and after, and of task "evaluate"
  knn_k: int = 20
  knn_temperature: float = 0.07
  max_train_images: int | None = 50_000  # None is all
  max_test_images: int | None = 10_000
  batch_size: int = 256  # rounded up to a multiple of the devices
  figure_images: int = 4  # rows of figures/morphing.png; 0 draws none
  # Of task "evaluate" only.
  checkpoint: str = ""  # a work folder, a weights file, or a Hugging Face model folder
  best: bool = False  # the best checkpoint of a fine-tuning run, not the newest
  averaged: bool = False  # the moving average of a fine-tuning run's weights
  linear: bool = True  # linear probe
  linear_solver: str = "lbfgs"  # "sgd" and "lars" sweep learning rates
  linear_epochs: int = 90  # of "sgd" and "lars"
  linear_batch_size: int = 256  # of "sgd" and "lars"
  fewshot: tuple[int, ...] = (1, 5, 10)  # training images per class; () is no few-shot
  fewshot_seeds: int = 5  # draws of these images
  save_features: bool = False  # features_train.npz and features_test.npz
  classify: bool = False  # accuracy of a classifier's own head
  sets: tuple[str, ...] = ()  # TFDS data sets to classify, each by itself; () is the one of config.data
  only_own_classes: bool = False  # a set's images are told apart among the classes that occur in the set

  def __post_init__(self):
    _require_positive("eval", self, "knn_k", "knn_temperature", "max_train_images", "max_test_images", "batch_size")
    _require_positive("eval", self, "every_epochs")
    _require_positive("eval", self, "linear_epochs", "linear_batch_size", "fewshot_seeds")
    _require(self.figure_images >= 0, f"config.eval.figure_images={self.figure_images} must not be negative")
    _require_choice("eval.linear_solver", self.linear_solver, LINEAR_SOLVERS)
    _require(
      all(number > 0 for number in self.fewshot) and len({*self.fewshot}) == len(self.fewshot),
      f"config.eval.fewshot={self.fewshot} must be different positive numbers of images",
    )
    _require(len({*self.sets}) == len(self.sets), f"config.eval.sets={self.sets} names a data set twice")

  @property
  def needs_labels(self) -> bool:
    return self.knn or self.linear or bool(self.fewshot)

  @property
  def needs_features(self) -> bool:
    return self.needs_labels or self.save_features


@dataclasses.dataclass(frozen=True)
class Config:
  """One run."""

  task: str = "pretrain"
  run: RunConfig = RunConfig(epochs=300)
  data: DataConfig = DataConfig()
  model: ModelConfig = ModelConfig()
  teacher: TeacherConfig = TeacherConfig(weights="openai/clip-vit-base-patch16")
  morphing: MorphingConfig = MorphingConfig()
  finetune: FinetuneConfig = FinetuneConfig()
  optim: OptimConfig = OptimConfig()
  mesh: MeshConfig = MeshConfig()
  eval: EvalConfig = EvalConfig()

  def __post_init__(self):
    _require_choice("task", self.task, TASKS)
    if self.task == "evaluate":  # the checkpoint says what the model is
      self._check_evaluation()
      return
    self._check_training()
    if self.task == "pretrain":
      self._check_pretraining()
    else:
      self._check_finetuning()

  def _check_evaluation(self) -> None:
    settings = self.eval
    _require(
      settings.needs_features or settings.classify,
      "nothing to evaluate: set one of config.eval.knn, linear, fewshot, save_features and classify",
    )
    _require(
      settings.classify or not (settings.sets or settings.only_own_classes),
      "config.eval.sets and only_own_classes are for classifiers: set config.eval.classify=True",
    )
    _require(
      not settings.sets or (self.data.source == "tfds" and not settings.needs_features),
      "config.eval.sets are TFDS data sets to classify: set config.data.source='tfds', config.eval.knn=False,"
      " linear=False, fewshot=() and save_features=False",
    )

  def _check_training(self) -> None:
    _require(
      self.data.source != OF_CHECKPOINT,
      f"config.data.source={OF_CHECKPOINT!r} is for config.task='evaluate'; choose one of {', '.join(SOURCES[:-1])}",
    )
    size, patch, batch = self.data.image_size, self.model.patch_size, self.data.batch_size
    _require(
      size % patch == 0,
      f"config.data.image_size={size} is not a multiple of config.model.patch_size={patch};"
      f" {size // patch * patch or patch} or {(size // patch + 1) * patch} would be",
    )
    _require(
      batch % self.optim.accumulate_steps == 0,
      f"config.data.batch_size={batch} is not divisible by config.optim.accumulate_steps={self.optim.accumulate_steps}",
    )
    _require(
      self.model.attention != "cudnn" or self.model.dtype == "bfloat16",
      "config.model.attention='cudnn' needs config.model.dtype of 'bfloat16'",
    )

  def _check_pretraining(self) -> None:
    batch, group = self.data.batch_size, self.morphing.group_size
    _require(
      self.data.num_masked <= self.num_tokens,
      f"config.data.num_masked={self.data.num_masked} is over the {self.num_tokens} patches of an image; mask fewer",
    )
    _require(
      self.model.attention != "cudnn" or self.teacher.dtype == "bfloat16",
      "config.model.attention='cudnn' needs config.teacher.dtype of 'bfloat16'",
    )
    _require(
      not self.data.rand_augment and self.optim.ema_decay is None,
      "config.data.rand_augment and config.optim.ema_decay are for config.task='finetune'; leave them out",
    )
    _require(
      group is None or batch % group == 0,
      f"config.morphing.group_size={group} does not divide config.data.batch_size={batch}",
    )
    _require(
      self.morphing.loss_on == "all" or self.data.num_masked > 0,
      "config.morphing.loss_on='masked' needs config.data.num_masked > 0",
    )
    budget, fixed = self.morphing_budget, self.morphing.fixed_num_merged
    _require(
      budget <= self.num_tokens, f"config.morphing.budget={budget} is over the {self.num_tokens} tokens of an image"
    )
    _require(
      fixed is None or fixed <= budget, f"config.morphing.fixed_num_merged={fixed} is over the budget of {budget}"
    )

  def _check_finetuning(self) -> None:
    _require(
      not self.data.color_jitter and not self.data.num_masked,
      "fine-tuning sees whole images, and RandAugment changes their colours: set config.data.color_jitter=0 and"
      " num_masked=0",
    )

  @property
  def grid(self) -> tuple[int, int]:
    """Patches (down, across)."""
    side = self.data.image_size // self.model.patch_size
    return side, side

  @property
  def num_tokens(self) -> int:
    """Patches per image, N."""
    return math.prod(self.grid)

  @property
  def morphing_budget(self) -> int:
    return self.num_tokens if self.morphing.budget is None else self.morphing.budget

  @property
  def peak_lr(self) -> float:
    """Learning rate after warm-up: base times sqrt(batch / base batch)."""
    return self.optim.base_lr * math.sqrt(self.data.batch_size / self.optim.base_batch_size)

  def steps_per_epoch(self, num_examples: int) -> int:
    return max(1, num_examples // self.data.batch_size)

  def total_steps(self, num_examples: int) -> int:
    if self.run.steps is not None:
      return self.run.steps
    return max(1, round(self.run.epochs * self.steps_per_epoch(num_examples)))

  def warmup_steps(self, num_examples: int) -> int:
    return round(self.optim.warmup_epochs * self.steps_per_epoch(num_examples))


def base() -> config_dict.ConfigDict:
  """The paper's pre-training recipe for ViT-B/16 as a ConfigDict, for a config file to change."""
  return _to_config_dict(Config())


def finetune_base() -> config_dict.ConfigDict:
  """The paper's fine-tuning recipe for ViT-B/16 as a ConfigDict, for a config file to change."""
  config = base()
  config.task = "finetune"
  config.run.epochs = 100.0
  config.data.update(batch_size=1024, num_masked=0, color_jitter=0.0)
  config.data.update(crop_scale=(0.08, 1.0), rand_augment="m9-mstd0.5-inc1")
  config.optim.update(base_lr=5e-4, base_batch_size=1024, min_lr=1e-6, warmup_epochs=20.0)
  config.optim.update(betas=(0.9, 0.999), layer_decay=0.65, clip_norm=None, ema_decay=0.9999)
  config.eval.update(every_epochs=1.0, max_test_images=None)
  return config


def _to_config_dict(settings: object) -> config_dict.ConfigDict:
  result = config_dict.ConfigDict()
  for field in dataclasses.fields(settings):
    value, optional_type = getattr(settings, field.name), _optional_type(field.type)
    if dataclasses.is_dataclass(value):
      result[field.name] = _to_config_dict(value)
    elif optional_type is not None:
      result[field.name] = config_dict.placeholder(optional_type)
      result[field.name] = value
    else:
      result[field.name] = value
  return result


def _optional_type(annotation: object) -> type | None:
  """`int` for `int | None`; None for anything else."""
  if not isinstance(annotation, types.UnionType):
    return None
  return next(t for t in typing.get_args(annotation) if t is not type(None))


def resolve(config: config_dict.ConfigDict) -> Config:
  """ConfigDict -> checked, frozen dataclasses.

  Raises:
    InputError: a key that does not exist or is missing, a value of the wrong
      type or range, or settings that do not go together.
  """
  return _resolve_section(config, Config, "config")


def _resolve_section(values: config_dict.ConfigDict, schema: type, path: str):
  fields = {f.name: f for f in dataclasses.fields(schema)}
  for name in values:
    _require(name in fields, f"{path}.{name} does not exist; {path} has {', '.join(fields)}")
  for name in fields:
    _require(name in values, f"{path}.{name} is missing; start the config from dtm_jax.config.base()")
  return schema(**{name: _resolve_value(values[name], field.type, f"{path}.{name}") for name, field in fields.items()})


def _resolve_value(value: object, annotation: object, path: str):
  if dataclasses.is_dataclass(annotation):
    _require(isinstance(value, config_dict.ConfigDict), f"{path} is a section, not {value!r}")
    return _resolve_section(value, annotation, path)
  if typing.get_origin(annotation) is tuple:
    element, *rest = typing.get_args(annotation)
    _require(isinstance(value, (tuple, list)), f"{path}={value!r} must be a tuple")
    length = len(value) if rest == [...] else 1 + len(rest)
    _require(len(value) == length, f"{path}={value!r} must have {length} elements")
    return tuple(_resolve_value(v, element, path) for v in value)
  optional_type = _optional_type(annotation)
  if optional_type is not None:
    return None if value is None else _resolve_value(value, optional_type, path)
  if annotation is float and type(value) is int:
    return float(value)
  _require(
    type(value) is annotation, f"{path}={value!r} must be of type {annotation.__name__}, not {type(value).__name__}"
  )
  return value


def to_json(config: Config) -> dict[str, Any]:
  """The settings as plain lists and dicts, one entry per section."""
  return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(record: dict[str, Any]) -> Config:
  """`to_json`'s inverse; entries that are not sections are left out.

  A setting that the record lacks is newer than the run: its default is what the run did.
  """
  sections = to_json(Config())
  for name in sections.keys() & record.keys():
    sections[name] = sections[name] | record[name] if isinstance(record[name], dict) else record[name]
  return resolve(config_dict.ConfigDict(sections))


def flatten(sections: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Values by dotted name."""
  flat = {}
  for name, value in sections.items():
    flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
  return flat


def split_form(form: str, names: Collection[str]) -> tuple[str, str]:
  """Of a config file for several data sets: "cub200,smoke" is its set "cub200" in the form "smoke".

  Raises:
    InputError: none of the names is given.
  """
  name, _, rest = form.partition(",")
  known = ", ".join(names)
  _require(name in names, f"form {name!r} of the config is no data set; give --config=FILE:NAME, with one of {known}")
  return name, rest


def with_form(config: config_dict.ConfigDict, form: str) -> config_dict.ConfigDict:
  """What a config file returns for `--config=FILE:form`: the run itself, or its miniature for "smoke".

  Raises:
    InputError: another form.
  """
  _require(form in ("", "smoke"), f"form {form!r} of the config is none; give ':smoke' after the file, or nothing")
  return _smoke(config) if form == "smoke" else config


def _smoke(config: config_dict.ConfigDict) -> config_dict.ConfigDict:
  """To see that a run starts and ends: two CPU steps of a tiny student on synthetic images."""
  config.run.steps = 2
  config.run.log_every_steps = 1
  config.data.source = "synthetic"
  config.data.batch_size = 8
  config.data.num_workers = 0
  config.data.image_size = 4 * config.model.patch_size
  if config.task == "pretrain":
    config.data.num_masked = 6
    config.data.mask_min_block = 2
  config.model.variant = "tiny"
  config.model.dtype = "float32"
  config.teacher.kind = "hog"
  config.teacher.weights = ""
  config.morphing.budget = None
  config.eval.sets = ()
  config.eval.batch_size = 32
  config.eval.max_train_images = 64
  config.eval.max_test_images = 32
  config.eval.figure_images = 2
  return config
