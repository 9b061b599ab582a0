import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import quickstart
from dtm_jax import config as config_lib
from dtm_jax import sharding
from dtm_jax.data.sources import SyntheticSource
from dtm_jax.errors import InputError
from dtm_jax.evaluate.features import FeatureExtractor, extract_features


def batches_of(images, labels, size):
  """Evaluation batches whose last one is filled up with copies of the first image."""
  for start in range(0, len(images), size):
    index = np.arange(start, start + size)
    valid = index < len(images)
    index = np.where(valid, index, 0)
    yield {"image": images[index], "label": labels[index], "index": index, "valid": valid}


def test_each_image_is_counted_once_in_order():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (7, 4, 4, 3), np.uint8)
  labels = rng.integers(0, 5, 7)
  feature_fn = jax.jit(lambda x: x[:, 0, 0].astype(jnp.float32))
  features, actual_labels = extract_features(feature_fn, batches_of(images, labels, 3))
  assert features.dtype == np.float32
  assert actual_labels.dtype == np.int32
  np.testing.assert_array_equal(features, images[:, 0, 0])
  np.testing.assert_array_equal(actual_labels, labels)


def test_no_image_is_one_clear_line():
  padding = {"image": np.zeros((2, 4, 4, 3), np.uint8), "label": np.zeros(2, int), "valid": np.zeros(2, bool)}
  for batches in ([], [padding]):
    with pytest.raises(InputError, match="no images"):
      extract_features(lambda x: x[:, 0, 0], batches)


@pytest.mark.parametrize(("batch_size", "limit", "batch"), [(256, 5, 8), (256, None, 128), (13, None, 16)])
def test_a_batch_is_no_larger_than_the_split(batch_size, limit, batch):
  """Rounded up to the eight devices: a few images do not cost what a whole batch would."""
  settings = quickstart.get_config("smoke")
  settings.eval.batch_size = batch_size
  config = config_lib.resolve(settings)
  sizes = set()

  def feature_fn(params, images):
    sizes.add(len(images))
    return images[:, 0, 0].astype(jnp.float32)

  extract = FeatureExtractor(config, sharding.create_mesh(config.mesh), feature_fn)
  found = extract({}, SyntheticSource("eval"), limit, lambda: False)
  assert (sizes, len(found.labels)) == ({batch}, limit or 128)
