"""Fine-tuning a pre-trained ViT-B/16 on other data sets; the form names the set, and `SETS` lists them.

  tfds build caltech_birds2011 --file_format=array_record
  python -m dtm_jax.main --config=configs/transfer.py:cub200 --config.finetune.init=runs/vitb --workdir=runs/cub200

`init` is the work folder of a pre-training or fine-tuning run, or weights. Images become 224 pixels wide, those of
iNaturalist 2021 and Pets 384.

iNaturalist 2018 and CIFAR: the published settings of DeiT (arXiv 2012.12877) and DINO (arXiv 2104.14294), as their
authors told them for ViT-B/16 (github.com/facebookresearch/deit/issues/105, .../dino/issues/81 and 144): AdamW at the
same rate in all layers, 5 epochs of warm-up. Not as there: no repeated augmentation, warm-up from 0 instead of 1e-6,
and a least rate below the highest one.

iNaturalist 2021: "MetaFormer" (arXiv 2203.02751, settings from github.com/dqshuai/MetaFormer: the command of its
README, which is given for CUB-200, and for the rest its config.py), a hybrid of convolutions and attention that has 88
to 90 % there without meta-data: AdamW at the same rate in all layers, DeiT's augmentation, 384 pixels. 300 epochs of
2.7 million images are a great deal: --config.run.epochs=30 --config.optim.warmup_epochs=2 is a tenth of it. Not as
there: warm-up from 0 instead of 5e-8.

CUB-200, Cars, Dogs, Flowers: full fine-tuning of masked image models (ViT-B/16) in "Visual Prompt Tuning" (arXiv
2203.12119, settings from github.com/KMnP/vpt): AdamW at the same rate in all layers, weight decay 0.01 (what their code
makes of any that is not 0), stochastic depth, batches of 384, 100 epochs, 5 of them warm-up, square crops and flips and
nothing else. There, validation images choose the peak rate among 1.5e-4, 7.5e-4, 1.5e-3 and 7.5e-3, for each set and
each model; here it is the second until you have chosen yours:

  --config.data.train_split=train[:90%] --config.data.eval_split=train[90%:] --config.optim.base_lr=1.5e-4

Not as there: bicubic resampling, warm-up by steps, for other batch sizes the rate by their square root, and Flowers is
trained on its validation images, too.

Pets: ViT's (arXiv 2010.11929, settings from github.com/google-research/big_vision, its transfer.py): SGD with momentum,
500 steps of 512 images, no decay, gradients of norm 1 at most, 384 pixels, crops and flips. The rate is the one their
ViT-B/32 of ImageNet-21k was best with; ViT's choice was among 1e-3, 3e-3, 1e-2 and 3e-2, to be made as above. Not as
there: bicubic resampling, momentum in float32, and pixels scaled as in pre-training.

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
_CIFAR = _DEIT | {
  "run.epochs": 1000.0,
  "eval.every_epochs": 25.0,
  "finetune.erase_prob": 0.0,
  "data.eval_split": "test",
}
_FLIPS_ALONE = {  # beside crops
  "data.eval_split": "test",
  "data.rand_augment": "",
  "optim.min_lr": 0.0,
  "optim.layer_decay": 1.0,
  "finetune.erase_prob": 0.0,
  "finetune.mixup": 0.0,
  "finetune.cutmix": 0.0,
  "finetune.label_smoothing": 0.0,
}
_FINE_GRAINED = _FLIPS_ALONE | {
  "run.epochs": 100.0,
  "data.batch_size": 384,
  "data.train_crop": "square",
  "model.drop_path": 0.1,
  "optim.base_lr": 7.5e-4,
  "optim.base_batch_size": 384,
  "optim.weight_decay": 1e-2,
  "optim.warmup_epochs": 5.0,
  "eval.every_epochs": 10.0,
}


SETS = {
  # 437,513 images of 8,142 species.
  "inat2018": {
    "data.name": "i_naturalist2018",
    "run.epochs": 360.0,
    "eval.every_epochs": 10.0,
    "optim.base_lr": 7.5e-5,
    "finetune.erase_prob": 0.1,
    **_DEIT,
  },
  # 2,686,843 images of 10,000 species; config.data.train_split=mini has 500,000 of them.
  "inat2021": {
    "data.name": "i_naturalist2021",
    "data.eval_split": "val",
    "data.batch_size": 512,
    "data.image_size": 384,
    "run.epochs": 300.0,
    "optim.base_lr": 5e-5,
    "optim.base_batch_size": 512,
    "optim.min_lr": 5e-7,
    "optim.warmup_epochs": 20.0,
    "optim.layer_decay": 1.0,
    "optim.clip_norm": 5.0,
  },
  "cub200": {"data.name": "caltech_birds2011", **_FINE_GRAINED},  # 5,994 images of 200 birds
  "cars": {"data.name": "cars196", **_FINE_GRAINED},  # 8,144 images of 196 models
  "dogs": {"data.name": "stanford_dogs", **_FINE_GRAINED},  # 12,000 images of 120 breeds
  # 2,040 images of 102 flowers.
  "flowers": {
    "data.name": "oxford_flowers102",
    "data.train_split": "train+validation",
    **_FINE_GRAINED,
  },
  # 3,680 images of 37 breeds: 7 batches.
  "pets": {
    "data.name": "oxford_iiit_pet",
    **_FLIPS_ALONE,
    "data.batch_size": 512,
    "data.image_size": 384,
    "data.crop_scale": (0.05, 1.0),
    "data.eval_crop": 384 / 448,
    "run.epochs": None,
    "run.steps": 500,
    "model.drop_path": 0.0,
    "optim.name": "sgd",
    "optim.base_lr": 3e-3,
    "optim.base_batch_size": 512,
    "optim.warmup_epochs": 100 / 7,
    "optim.weight_decay": 0.0,
    "optim.clip_norm": 1.0,
    "eval.every_epochs": 100 / 7,
  },
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
