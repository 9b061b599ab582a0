"""How often a classifier is right."""

import numpy as np

from dtm_jax.evaluate.steps import TOP


def accuracies(top_classes: np.ndarray, labels: np.ndarray) -> dict[str, float]:
  """Shares of images whose class is the likeliest, and among the five likeliest where there are more classes.

  Args:
    top_classes: int [n, k], the likeliest classes of each image, best first; k is 5, or all of fewer.
    labels: int [n].

  Returns:
    `top1`, and `top5` where k is 5.
  """
  hits = top_classes == labels[:, None]
  values = {"top1": float(hits[:, 0].mean())}
  return values | ({"top5": float(hits.any(axis=1).mean())} if hits.shape[1] == TOP else {})
