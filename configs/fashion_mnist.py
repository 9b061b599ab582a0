"""DTM on Fashion-MNIST: 60,000 real images on a laptop, 196 tokens an image as in the paper.

  apt-get install dataset-fashion-mnist
  python -m dtm_jax.data.prepare /usr/share/datasets/fashion-mnist --name=fashion_mnist --out=data
  python -m dtm_jax.main --config=configs/fashion_mnist.py --config.data.path=data

Hardware and hours: not run to the end yet. k-NN expected: not run.
"""

from ml_collections import ConfigDict

from dtm_jax import config as config_lib


def get_config(form: str = "") -> ConfigDict:
  config = config_lib.base()
  config.run.epochs = 10.0
  config.run.checkpoint_every_steps = 500

  config.data.source = "tfds"
  config.data.name = "fashion_mnist"
  config.data.eval_split = "test"
  config.data.batch_size = 128
  config.data.image_size = 28
  config.data.num_workers = 2
  config.data.crop_scale = (0.5, 1.0)
  config.data.flip = 0.0  # all shoes point to the left
  config.data.eval_crop = 1.0  # the things fill their images
  config.data.color_jitter = 0.0  # grey images

  config.model.variant = "tiny"
  config.model.patch_size = 2  # 14 x 14 tokens
  config.model.dtype = "float32"

  config.teacher.kind = "hog"
  config.teacher.weights = ""

  config.optim.base_lr = 4e-3
  config.optim.warmup_epochs = 1.0

  return config_lib.with_form(config, form)
