"""How often a classifier is right."""

import contextlib

import numpy as np

from dtm_jax.data.pipeline import UNREADABLE
from dtm_jax.data.sources import NO_LABEL, Source
from dtm_jax.evaluate.steps import TOP


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
