"""Fine-tuning a pre-trained ViT-L/16 on ImageNet-1K: configs/finetune_vitb.py's recipe with the large model.

  python -m dtm_jax.main --config=configs/finetune_vitl.py --config.finetune.init=runs/vitl

Source, data and 384 pixels: see configs/finetune_vitb.py. Reported there: 86.7 % top-1, by a recipe
that is not given for L; this is B's.
With this code: not run. Hardware and hours: not run.
"""

from ml_collections import ConfigDict

from dtm_jax import config as config_lib


def get_config(form: str = "") -> ConfigDict:
  config = config_lib.finetune_base()  # ViT-B/16's recipe
  config.model.variant = "L"
  return config_lib.with_form(config, form)
