"""Features of a whole split, each image counted once."""

from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np

from dtm_jax.errors import InputError


def extract_features(
  feature_fn: Callable[[np.ndarray], jax.Array], batches: Iterable[Mapping[str, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
  """Runs `feature_fn` over evaluation batches and drops the rows that only fill the last one.

  Args:
    feature_fn: uint8 [b, S, S, 3] -> float [b, D]; jitted by the caller.
    batches: dicts with `image` uint8 [b, S, S, 3], `label` int [b] and `valid` bool [b], False for padding rows.

  Returns:
    Features float32 [n, D] and labels int32 [n], in the order of the batches.

  Raises:
    InputError: there is no image at all.
  """
  features, labels = [], []
  for batch in batches:
    valid = batch["valid"]
    features.append(np.asarray(feature_fn(batch["image"]), np.float32)[valid])
    labels.append(np.asarray(batch["label"], np.int32)[valid])
  if not any(map(len, labels)):
    raise InputError("the evaluation split has no images; check config.data, or set config.eval.knn=False")
  return np.concatenate(features), np.concatenate(labels)
