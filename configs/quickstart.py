"""DTM on scikit-learn's digits in about a minute on two CPU cores: no download, no weights, no accelerator.

  python -m dtm_jax.main

A tiny ViT learns from half-masked 32-pixel digits to predict histograms of oriented gradients, grouped by DTM.
Expected: the loss falls, and the k-NN accuracy of its frozen features rises (README, "Results").
"""

from ml_collections import ConfigDict

from dtm_jax import config as config_lib


def get_config(form: str = "") -> ConfigDict:
  config = config_lib.base()
  config.run.steps = 400
  config.run.log_every_steps = 10
  config.run.checkpoint_every_steps = 200

  config.data.source = "digits"
  config.data.eval_split = "test"
  config.data.batch_size = 64
  config.data.image_size = 32
  config.data.num_workers = 0
  config.data.crop_scale = (0.4, 1.0)
  config.data.flip = 0.0  # a mirrored digit is no digit
  config.data.color_jitter = 0.0  # grey images
  config.data.num_masked = 32  # of 64
  config.data.mask_min_block = 4

  config.model.variant = "tiny"
  config.model.patch_size = 4
  config.model.dtype = "float32"

  config.teacher.kind = "hog"
  config.teacher.weights = ""

  config.optim.base_lr = 6e-3
  config.optim.warmup_epochs = 2.0

  return config_lib.with_form(config, form)
