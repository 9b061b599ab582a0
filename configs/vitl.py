"""ViT-L/16 on ImageNet-1K against CLIP B/16: configs/vitb.py's recipe with the large student.

  tfds build imagenet2012 --file_format=array_record
  python -m dtm_jax.main --config=configs/vitl.py

Source, teacher and data: see configs/vitb.py. Reported there: 86.7 % ImageNet top-1 after fine-tuning.
With this code: not run. Hardware and hours: not run. Where memory is short: --config.model.remat=True, or
--config.optim.accumulate_steps=2, which gives the same numbers.
"""

from ml_collections import ConfigDict

from dtm_jax import config as config_lib


def get_config(form: str = "") -> ConfigDict:
  config = config_lib.base()  # ViT-B/16's recipe
  config.model.variant = "L"
  return config_lib.with_form(config, form)
