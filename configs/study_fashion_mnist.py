"""Does DTM help? Pre-training against several teachers on Fashion-MNIST, and what the students are worth afterwards.

  apt-get install dataset-fashion-mnist
  python -m dtm_jax.data.prepare /usr/share/datasets/fashion-mnist --name=fashion_mnist --out=data
  python -m dtm_jax.study --config=configs/study_fashion_mnist.py --scale=ci

The same student is pre-trained against token-wise and against morphed targets, from the same seeds on the same batches;
then come k-NN, linear probe, few-shot, and fine-tuning on few and on all labels. `none` is the student before its first
step. The teachers leave room above themselves: none has seen all labels.

  raw-hog       histograms of oriented gradients: nine bins from the few pixels of a patch
  hog-student   a student pre-trained token-wise against raw-hog: no labels at all
  2000-labels   a classifier from scratch on 2,000 labelled images

Scales:

  ci     49 tokens, few steps: to see that everything runs. 14 runs, a few minutes on two CPU cores
  cpu    196 tokens as in the paper, raw HOG. 36 runs, about an hour
  arms   49 tokens, all arms, the classifier of 2,000 images. 98 runs, about an hour
  seeds  token-wise and DTM of `arms`, six other seeds. 50 runs, 50 minutes beside other work
  long   49 tokens, the classifier of 2,000 images, ten passes instead of two thirds of one. 26 runs
  hog    49 tokens, raw HOG and a student of it: teachers without labels. 86 runs, 72 minutes beside other work
  tokens 196 tokens as in the paper, a student of raw HOG. 26 runs, two hours
  noisy  49 tokens, raw HOG of images with sensor noise, which benchmarks/noisy_images.py makes. 48 runs, 25 minutes
  gpu    196 tokens, all arms and teachers, ViT-S in bfloat16. Not run

docs/study.md has what was found.

`SCALE/RUN` is one of the study's runs, for `dtm_jax.main`; without, the page is gpu's DTM run.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from dtm_jax import config as config_lib

SOURCE = "/usr/share/datasets/fashion-mnist"
DATA_HINTS = {
  "fashion_mnist": "Fashion-MNIST is made by: apt-get install dataset-fashion-mnist;"
  f" python -m dtm_jax.data.prepare {SOURCE} --name=fashion_mnist --out=data",
  "fashion_mnist_noisy": f"The noisy images are made by: python benchmarks/noisy_images.py {SOURCE} noisy;"
  " python -m dtm_jax.data.prepare noisy --name=fashion_mnist_noisy --out=data",
}
BASELINE = "token-wise"
SIZE = 28  # pixels


class Scale(NamedTuple):
  """How much of the study; all steps are optimiser steps of `batch_size` images."""

  data: str
  seeds: tuple[int, ...]
  teachers: tuple[str, ...]
  arms: tuple[str, ...]
  labels: dict[str, int]  # steps of fine-tuning on them
  variant: str
  dtype: str
  patch_size: int  # pixels
  batch_size: int
  lr: float  # peak, of pre-training
  finetune_lr: float
  teacher_steps: int  # of a teacher with labels
  steps: int
  curve_points: int  # k-NN accuracies over the steps of pre-training
  train_images: int | None  # whose features are evaluated
  test_images: int | None
  num_workers: int


CPU = Scale(
  data="fashion_mnist",
  seeds=(0, 1, 2),
  teachers=("raw-hog",),
  arms=("none", "token-wise", "dtm"),
  labels={"600-labels": 100, "all-labels": 150},
  variant="tiny",
  dtype="float32",
  patch_size=2,
  batch_size=64,
  lr=1.5e-3,
  finetune_lr=2e-3,
  teacher_steps=600,
  steps=500,
  curve_points=3,
  train_images=4000,
  test_images=3000,
  num_workers=0,
)
CPU_49 = CPU._replace(patch_size=4, labels={"600-labels": 200, "all-labels": 300}, steps=600)
ALL_ARMS = ("none", "token-wise", "dtm", "half-budget", "fixed-n", "fixed-k", "per-image", "random-split")
SCALES = {
  "ci": CPU._replace(
    seeds=(0, 1),
    teachers=("2000-labels",),
    arms=("token-wise", "dtm"),
    labels={"600-labels": 20},
    patch_size=4,
    teacher_steps=60,
    steps=40,
    curve_points=2,
    train_images=1000,
    test_images=500,
  ),
  "cpu": CPU,
  "arms": CPU_49._replace(teachers=("2000-labels",), arms=ALL_ARMS),
  "seeds": CPU_49._replace(seeds=(*range(3, 9),), teachers=("2000-labels",), arms=("token-wise", "dtm")),
  "long": CPU_49._replace(teachers=("2000-labels",), arms=("token-wise", "dtm"), steps=9400, curve_points=10),
  "hog": CPU_49._replace(teachers=("hog-student", "raw-hog"), arms=("none", "token-wise", "dtm", "half-budget")),
  "tokens": CPU._replace(teachers=("hog-student",), arms=("token-wise", "dtm")),
  "noisy": CPU_49._replace(data="fashion_mnist_noisy", arms=("none", "token-wise", "dtm", "half-budget")),
  "gpu": Scale(
    data="fashion_mnist",
    seeds=(0, 1, 2),
    teachers=("raw-hog", "hog-student", "2000-labels"),
    arms=ALL_ARMS,
    labels={"600-labels": 200, "all-labels": 2400},
    variant="S",
    dtype="bfloat16",
    patch_size=2,
    batch_size=512,
    lr=1e-3,
    finetune_lr=1e-3,
    teacher_steps=400,
    steps=3600,  # 30 passes
    curve_points=12,
    train_images=None,
    test_images=None,
    num_workers=12,
  ),
}
LABELS = {"600-labels": 600, "2000-labels": 2000, "all-labels": 60_000}


def arms(num_tokens: int) -> dict[str, dict[str, object]]:
  """What each way of pre-training sets; the letters are the paper's."""
  return {
    # The learning rate of the first step is 0: the checkpoint holds the initial parameters.
    "none": {"run.steps": 1, "eval.knn": False, "eval.figure_images": 0},
    "token-wise": {"morphing.enabled": False},
    "dtm": {},
    "half-budget": {"morphing.budget": num_tokens // 2},
    "fixed-n": {"morphing.fixed_num_merged": num_tokens // 2},
    "fixed-k": {"morphing.fixed_iterations": 7},
    "per-image": {"morphing.granularity": "image"},
    "random-split": {"morphing.split": "random"},
  }


def get_config(form: str = "") -> ConfigDict:
  """A whole study for "SCALE", one of its runs for "SCALE/RUN"."""
  if form in ("", "smoke"):
    return config_lib.with_form(pretraining(SCALES["gpu"], "raw-hog", "dtm"), form)
  scale, _, run = form.partition("/")
  study = plan(SCALES[scale])
  return study.runs[run] if run else study


def plan(scale: Scale) -> ConfigDict:
  """What `dtm_jax.study` reads: see `dtm_jax/study/plan.py`."""
  study = ConfigDict({"baseline": BASELINE, "data_hint": DATA_HINTS[scale.data]})
  study.update(seeds=scale.seeds, teachers=scale.teachers, labels=(*scale.labels,))
  study.untrained = "none" if "none" in scale.arms else ""
  study.arms = tuple(arm for arm in scale.arms if arm != study.untrained)
  study.runs = ConfigDict({"evaluate": evaluation(scale)})
  if study.untrained:
    study.runs["none"] = pretraining(scale, "raw-hog", "none")
  for teacher in scale.teachers:
    if teacher == "hog-student":
      study.runs[f"{teacher}/teacher"] = pretraining(scale, "raw-hog", BASELINE)
    elif teacher != "raw-hog":
      study.runs[f"{teacher}/teacher"] = finetuning(scale, teacher, scale.teacher_steps)
    study.runs.update({f"{teacher}/{arm}": pretraining(scale, teacher, arm) for arm in study.arms})
  study.runs.update({labels: finetuning(scale, labels, steps) for labels, steps in scale.labels.items()})
  return study


def pretraining(scale: Scale, teacher: str, arm: str) -> ConfigDict:
  """The student against a teacher."""
  config = training(config_lib.base(), scale, scale.lr, images=60_000, steps=scale.steps)
  num_tokens = (SIZE // scale.patch_size) ** 2
  config.data.update(crop_scale=(0.5, 1.0), color_jitter=0.0)  # grey images
  config.data.update(num_masked=75 * num_tokens // 196, mask_min_block=16 * num_tokens // 196)  # the paper's shares
  # The study adds the folder of a teacher that it has trained.
  config.teacher.update(kind="hog" if teacher == "raw-hog" else "checkpoint", weights="", dtype=scale.dtype)
  config.eval.every_epochs = scale.steps / scale.curve_points / (60_000 // scale.batch_size)
  config.update_from_flattened_dict(arms(num_tokens)[arm])
  return config


def finetuning(scale: Scale, labels: str, steps: int) -> ConfigDict:
  """A classifier; the study adds the folder of the student that it begins as, or it is a teacher from scratch."""
  config = training(config_lib.finetune_base(), scale, scale.finetune_lr, images=LABELS[labels], steps=steps)
  config.data.update(train_split=f"train[:{LABELS[labels]}]", crop_scale=(0.8, 1.0), rand_augment="")
  config.finetune.update(mixup=0.0, cutmix=0.0, erase_prob=0.0)
  config.optim.update(layer_decay=1.0, clip_norm=3.0, ema_decay=None)
  config.eval.every_epochs = None
  return config


def training(config: ConfigDict, scale: Scale, lr: float, *, images: int, steps: int) -> ConfigDict:
  """What pre-training and fine-tuning share; a tenth of the steps are warm-up."""
  config.run.update(steps=steps, epochs=None, log_every_steps=max(1, steps // 60), checkpoint_every_steps=200)
  config.data.update(batch_size=scale.batch_size, image_size=SIZE)
  config.model.update(variant=scale.variant, patch_size=scale.patch_size, dtype=scale.dtype, drop_path=0.0)
  config.optim.update(base_lr=lr, base_batch_size=scale.batch_size)
  config.optim.warmup_epochs = 0.1 * steps / (images // scale.batch_size)
  return fashion_mnist(config, scale)


def evaluation(scale: Scale) -> ConfigDict:
  """k-NN, linear probe and 10-shot of a student or teacher, whatever it was trained on."""
  config = config_lib.base()
  config.task = "evaluate"
  config.eval.fewshot = (10,)
  return fashion_mnist(config, scale)


def fashion_mnist(config: ConfigDict, scale: Scale) -> ConfigDict:
  """The data, and how much of them is evaluated."""
  config.data.update(source="tfds", name=scale.data, path="data", eval_split="test", num_workers=scale.num_workers)
  config.data.update(flip=0.0, eval_crop=1.0)  # all shoes point to the left; the things fill their images
  config.eval.update(max_train_images=scale.train_images, max_test_images=scale.test_images)
  return config
