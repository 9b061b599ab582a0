"""Fine-tuning the quickstart's student on scikit-learn's digits, in a minute and a half on two CPU cores.

  python -m dtm_jax.main
  python -m dtm_jax.main --config=configs/finetune_quickstart.py

From scratch, for comparison: --config.finetune.init="". Expected: README, "Results".
"""

from ml_collections import ConfigDict

from dtm_jax import config as config_lib


def get_config(form: str = "") -> ConfigDict:
  config = config_lib.finetune_base()
  config.run.epochs = 30.0
  config.run.log_every_steps = 20
  config.run.checkpoint_every_steps = 200

  config.finetune.init = "runs/quickstart"
  config.finetune.mixup = 0.0
  config.finetune.cutmix = 0.0
  config.finetune.erase_prob = 0.0

  config.data.source = "digits"
  config.data.eval_split = "test"
  config.data.batch_size = 64
  config.data.image_size = 32
  config.data.num_workers = 0
  config.data.crop_scale = (0.6, 1.0)
  config.data.flip = 0.0  # a mirrored digit is no digit
  config.data.rand_augment = ""

  config.model.variant = "tiny"
  config.model.patch_size = 4
  config.model.dtype = "float32"
  config.model.drop_path = 0.0

  config.optim.base_lr = 1.2e-2
  config.optim.warmup_epochs = 2.0
  config.optim.layer_decay = 0.75
  config.optim.ema_decay = 0.99

  config.eval.every_epochs = 5.0

  return config_lib.with_form(config, form)
