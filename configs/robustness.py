"""Accuracy of an ImageNet classifier on sets that were made to test one; the form names the set, and `SETS` lists them.

  tfds build imagenet_a --file_format=array_record
  python -m dtm_jax.main --config=configs/robustness.py:imagenet_a --config.eval.checkpoint=runs/finetune_vitb \
    --workdir=runs/imagenet_a

The checkpoint is the work folder of a fine-tuning run, or a classifier's weights file. These sets have no training
images: `top1` and `top5` of the classifier's own 1,000 classes are all that is evaluated, each image once.

  imagenet_v2      10,000 new images, collected as ImageNet's were (arXiv 1902.10811; the "matched frequency" set, by
                   which others report; threshold-0.7 and topimages are the other two)
  imagenet_real    ImageNet's validation images with all the labels that are right; the 3,163 without any are left out
                   (arXiv 2006.07159)
  imagenet_a       7,500 images that a ResNet-50 gets wrong, of 200 classes (arXiv 1907.07174)
  imagenet_r       30,000 drawings, toys, ..., of 200 classes (arXiv 2006.16241)
  imagenet_sketch  50,000 sketches (arXiv 1905.13549)
  imagenet_c       validation images spoilt in 15 ways at 5 strengths, 75 sets of 50,000; the mean corruption error
                   `mce` beside the means (arXiv 1903.12261). TFDS makes them anew, cut to 224 pixels: the figures can
                   differ a little from those on the published files

Of -A and -R, the 200 classes that occur are the only ones to choose from, as their authors do it.
With this code: not run. Hardware and hours: not run.
"""

from ml_collections import ConfigDict

from dtm_jax import config as config_lib
from dtm_jax.evaluate.corruptions import CORRUPTED_SETS

SETS = {
  "imagenet_v2": {"data.name": "imagenet_v2/matched-frequency"},
  "imagenet_real": {
    "data.name": "imagenet2012_real",
    "data.eval_split": "validation",
    "data.label": "real_label",
  },
  "imagenet_a": {"data.name": "imagenet_a", "eval.only_own_classes": True},
  "imagenet_r": {"data.name": "imagenet_r", "eval.only_own_classes": True},
  "imagenet_sketch": {"data.name": "imagenet_sketch"},
  "imagenet_c": {
    "data.eval_split": "validation",
    "data.eval_crop": 1.0,  # the images are crops
    "eval.sets": tuple(name for names in CORRUPTED_SETS.values() for name in names),
  },
}


def get_config(form: str = "") -> ConfigDict:
  name, form = config_lib.split_form(form, SETS)
  config = config_lib.base()
  config.task = "evaluate"

  config.data.source = "tfds"
  config.data.eval_split = "test"

  config.model.dtype = "float32"  # of a weights file; a run keeps its own

  config.eval.classify = True
  config.eval.knn = False
  config.eval.linear = False
  config.eval.fewshot = ()
  config.eval.max_test_images = None  # all
  config.update_from_flattened_dict(SETS[name])
  return config_lib.with_form(config, form)
