"""Fine-tuning a pre-trained ViT-B/16 on other data sets; the form names the set, and `SETS` lists them.

  tfds build caltech_birds2011 --file_format=array_record
  python -m dtm_jax.main --config=configs/transfer.py:cub200 --config.finetune.init=runs/vitb --workdir=runs/cub200

`init` is the work folder of a pre-training or fine-tuning run, or weights. All images become 224 pixels wide.

iNaturalist 2018 and CIFAR: the published settings of DeiT (arXiv 2012.12877) and DINO (arXiv 2104.14294), as their
authors told them for ViT-B/16 (github.com/facebookresearch/deit/issues/105, .../dino/issues/81 and 144): AdamW at the
same rate in all layers, 5 epochs of warm-up. Not as there: no repeated augmentation, warm-up from 0 instead of 1e-6,
and a least rate below the highest one.
All others are ours. iNaturalist 2021: 2018's settings, for as many images. The fine-grained sets: about 5,000 steps of
128 images with the layer-wise rates of the ImageNet recipe, without erasing, a tenth of them warm-up (DeiT trained on
Cars with SGD, which is not here; for the rest nothing published was found).

Splits: those on which accuracy is reported; where a set has a validation split beside a test split (flowers), both it
and the training split are trained on. `label` of CIFAR-100 is the fine one; config.data.label=coarse_label, or
supercategory of iNaturalist, are others.

With this code: not run. Hardware and hours: not run.
"""

from ml_collections import ConfigDict

from dtm_jax import config as config_lib

_DEIT = {
  "data.batch_size": 768,
  "optim.base_batch_size": 768,
  "optim.warmup_epochs": 5.0,
  "optim.layer_decay": 1.0,
  "optim.min_lr": 1e-6,
}
_INATURALIST = _DEIT | {"optim.base_lr": 7.5e-5, "finetune.erase_prob": 0.1}
_CIFAR = _DEIT | {
  "run.epochs": 1000.0,
  "eval.every_epochs": 25.0,
  "finetune.erase_prob": 0.0,
  "data.eval_split": "test",
}


def _fine_grained(epochs: int) -> dict:
  """Settings of ours for a set of a few thousand images."""
  return {
    "run.epochs": float(epochs),
    "data.batch_size": 128,
    "data.eval_split": "test",
    "optim.warmup_epochs": epochs / 10,
    "eval.every_epochs": epochs / 10,
    "finetune.erase_prob": 0.0,
  }


SETS = {
  # 437,513 images of 8,142 species.
  "inat2018": {"data.name": "i_naturalist2018", "run.epochs": 360.0, "eval.every_epochs": 10.0, **_INATURALIST},
  # 2,686,843 images of 10,000 species; config.data.train_split=mini has 500,000 of them.
  "inat2021": {
    "data.name": "i_naturalist2021",
    "data.eval_split": "val",
    "run.epochs": 60.0,
    "eval.every_epochs": 2.0,
    **_INATURALIST,
  },
  "cub200": {"data.name": "caltech_birds2011", **_fine_grained(epochs=100)},  # 5,994 images of 200 birds
  "cars": {"data.name": "cars196", **_fine_grained(epochs=80)},  # 8,144 images of 196 models
  "dogs": {"data.name": "stanford_dogs", **_fine_grained(epochs=50)},  # 12,000 images of 120 breeds
  # 2,040 images of 102 flowers.
  "flowers": {
    "data.name": "oxford_flowers102",
    "data.train_split": "train+validation",
    **_fine_grained(epochs=300),
  },
  "pets": {"data.name": "oxford_iiit_pet", **_fine_grained(epochs=180)},  # 3,680 images of 37 breeds
  "cifar10": {"data.name": "cifar10", "optim.base_lr": 7.5e-6, **_CIFAR},  # 50,000 images of 10 classes
  "cifar100": {"data.name": "cifar100", "optim.base_lr": 5e-6, **_CIFAR},  # 50,000 images of 100 classes
}


def get_config(form: str = "") -> ConfigDict:
  name, form = config_lib.split_form(form, SETS)
  config = config_lib.finetune_base()
  config.data.source = "tfds"
  config.data.train_split = "train"
  config.optim.ema_decay = None
  config.update_from_flattened_dict(SETS[name])
  return config_lib.with_form(config, form)
