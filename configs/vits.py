"""ViT-S/16 on ImageNet-1K against CLIP B/16: configs/vitb.py's recipe with the small student.

  tfds build imagenet2012 --file_format=array_record
  python -m dtm_jax.main --config=configs/vits.py

Source, teacher and data: see configs/vitb.py. With this code: not run. Hardware and hours: not run.
"""

from ml_collections import ConfigDict

from dtm_jax import config as config_lib


def get_config(form: str = "") -> ConfigDict:
  config = config_lib.base()  # ViT-B/16's recipe
  config.model.variant = "S"
  return config_lib.with_form(config, form)
