"""ImageNet-C: its data sets, and the error that sums them up. Without jax: a config file imports it."""

from collections.abc import Mapping

import numpy as np

# AlexNet's error on each corruption of ImageNet-C, the mean of five severities, by which others are measured.
# Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR 2019;
# in full digits: github.com/hendrycks/robustness.
ALEXNET_ERRORS = {
  "gaussian_noise": 0.886428,
  "shot_noise": 0.894468,
  "impulse_noise": 0.922640,
  "defocus_blur": 0.819880,
  "glass_blur": 0.826268,
  "motion_blur": 0.785948,
  "zoom_blur": 0.798360,
  "snow": 0.866816,
  "frost": 0.826572,
  "fog": 0.819324,
  "brightness": 0.564592,
  "contrast": 0.853204,
  "elastic_transform": 0.646056,
  "pixelate": 0.717840,
  "jpeg_compression": 0.606500,
}
# The TFDS data sets of each corruption, from the weakest to the strongest.
CORRUPTED_SETS = {
  name: tuple(f"imagenet2012_corrupted/{name}_{severity}" for severity in range(1, 6)) for name in ALEXNET_ERRORS
}


def mean_corruption_error(top1: Mapping[str, float]) -> dict[str, float]:
  """`mce` of ImageNet-C, the mean over corruptions of the classifier's error over AlexNet's.

  Args:
    top1: accuracy by name of the set.

  Returns:
    Nothing where not all of `CORRUPTED_SETS` are there.
  """
  if not {name for names in CORRUPTED_SETS.values() for name in names} <= top1.keys():
    return {}
  errors = {corruption: 1 - np.mean([top1[name] for name in names]) for corruption, names in CORRUPTED_SETS.items()}
  return {"mce": float(np.mean([error / ALEXNET_ERRORS[corruption] for corruption, error in errors.items()]))}
