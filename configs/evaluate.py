"""What the frozen features of a checkpoint are worth: k-NN, linear probe and few-shot accuracy.

  python -m dtm_jax.main --config=configs/evaluate.py --config.eval.checkpoint=runs/quickstart --workdir=runs/evaluate

The checkpoint is the work folder of a run, or a weights file (the released `.pth`, BEiT's, CLIP's). A run is evaluated
with its own data. To name others, or for a weights file, which does not say:

  --config.data.source=folder --config.data.path=IMAGES

Images are cropped to the size that the model is for. Hardware and hours: a minute on two CPU cores for the quickstart.
"""

from ml_collections import ConfigDict

from dtm_jax import config as config_lib


def get_config(form: str = "") -> ConfigDict:
  config = config_lib.base()
  config.task = "evaluate"

  # The run's data; any setting of `config.data` that is something else than the default goes before the run's.
  config.data.source = "checkpoint"

  config.model.dtype = "float32"  # of a weights file; a run keeps its own

  config.eval.max_train_images = None  # all
  config.eval.max_test_images = None

  config.eval.knn_k = 20
  config.eval.knn_temperature = 0.07

  config.eval.linear_solver = "lbfgs"  # or "sgd", "lars"

  config.eval.fewshot = (1, 5, 10)  # images per class
  config.eval.fewshot_seeds = 5

  config.eval.classify = False  # True adds the accuracy of a classifier's own head

  return config_lib.with_form(config, form)
