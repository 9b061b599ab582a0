"""How often a classifier is right."""

import contextlib
from collections.abc import Mapping

import numpy as np

from dtm_jax.data.pipeline import UNREADABLE
from dtm_jax.data.sources import NO_LABEL, Source
from dtm_jax.evaluate.steps import TOP

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


def accuracies(top_classes: np.ndarray, labels: np.ndarray) -> dict[str, float]:
  """Shares of images whose class is the likeliest, and among the five likeliest where there are more classes.

  Of several classes of an image each is right; images without any are left out.

  Args:
    top_classes: int [n, k], the likeliest classes of each image, best first; k is 5, or all of fewer.
    labels: int [n], or [n, m] for images of up to m classes, filled up with NO_LABEL.

  Returns:
    `top1`, and `top5` where k is 5.
  """
  labels = labels.reshape(len(labels), -1)
  hits = (top_classes[:, :, None] == labels[:, None, :]).any(axis=2)[has_label(labels)]
  values = {"top1": float(hits[:, 0].mean())}
  return values | ({"top5": float(hits.any(axis=1).mean())} if hits.shape[1] == TOP else {})


def has_label(labels: np.ndarray) -> np.ndarray:
  """Which images have a class: int [n, m] -> bool [n]."""
  return (labels != NO_LABEL).any(axis=1)


def read_labels(source: Source) -> np.ndarray:
  """The labels that occur in a source, each once; images that cannot be read are passed over."""
  found = set()
  for index in range(len(source)):
    with contextlib.suppress(*UNREADABLE):
      found.update(np.ravel(source[index].label).tolist())
  if source.label_shape:
    found.discard(NO_LABEL)  # it fills up
  return np.array(sorted(found), int)


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
