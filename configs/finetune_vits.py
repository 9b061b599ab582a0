"""Fine-tuning a pre-trained ViT-S/16 on ImageNet-1K: configs/finetune_vitb.py's recipe with the small model.

  python -m dtm_jax.main --config=configs/finetune_vits.py --config.finetune.init=runs/vits

Source, data and 384 pixels: see configs/finetune_vitb.py.
With this code: not run. Hardware and hours: not run.
"""

from ml_collections import ConfigDict

from dtm_jax import config as config_lib


def get_config(form: str = "") -> ConfigDict:
  config = config_lib.finetune_base()  # ViT-B/16's recipe
  config.model.variant = "S"
  return config_lib.with_form(config, form)
