"""A tiny ViT learns Fashion-MNIST's classes from scratch: what pre-training is compared with.

  apt-get install dataset-fashion-mnist
  python -m dtm_jax.data.prepare /usr/share/datasets/fashion-mnist --name=fashion_mnist --out=data
  python -m dtm_jax.main --config=configs/finetune_fashion_mnist.py

16 tokens an image (patches of 7 pixels), nine passes over the 60,000 images. From a student of the same patches
instead of from scratch: --config.finetune.init=RUN.

Hardware and hours: 5 minutes on two CPU cores. Top-1 expected: 87.1 % for seed 0, after the passes 68.9, 77.1, 77.8,
81.4, 83.3, 84.7, 86.5, 86.9 and 87.1; averaged weights 87.0.

With 49 tokens and twenty passes (--config.model.patch_size=4 --config.run.epochs=20): 90.9 % for seed 0, averaged
weights 90.9, over 90 from the 16th pass on; 51 minutes on two CPU cores that had other work, too (half as long on 770
images/s, which they made undisturbed).
"""

from ml_collections import ConfigDict

from dtm_jax import config as config_lib


def get_config(form: str = "") -> ConfigDict:
  config = config_lib.finetune_base()
  config.run.epochs = 9.0
  config.run.checkpoint_every_steps = 500

  config.finetune.mixup = 0.0  # a few passes learn nothing by heart
  config.finetune.cutmix = 0.0
  config.finetune.erase_prob = 0.0

  config.data.source = "tfds"
  config.data.name = "fashion_mnist"
  config.data.path = "data"
  config.data.eval_split = "test"
  config.data.batch_size = 64
  config.data.image_size = 28
  config.data.num_workers = 0
  config.data.crop_scale = (0.8, 1.0)
  config.data.eval_crop = 1.0  # the things fill their images
  config.data.flip = 0.0  # all shoes point to the left
  config.data.rand_augment = ""

  config.model.variant = "tiny"
  config.model.patch_size = 7
  config.model.dtype = "float32"
  config.model.drop_path = 0.0

  config.optim.base_lr = 1.2e-2  # 3e-3 at this batch
  config.optim.warmup_epochs = 0.5
  config.optim.layer_decay = 1.0  # nothing to keep
  config.optim.clip_norm = 3.0
  config.optim.ema_decay = 0.999

  return config_lib.with_form(config, form)
