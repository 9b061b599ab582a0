import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from dtm_jax.axes import MESH_AXES
from dtm_jax.config import MeshConfig
from dtm_jax.errors import InputError
from dtm_jax.evaluate import knn
from dtm_jax.sharding import create_mesh

ALL = create_mesh(MeshConfig())
ONE = jax.make_mesh((1, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1])


def sklearn_classes(train, train_labels, test, *, k, temperature):
  model = KNeighborsClassifier(
    n_neighbors=k,
    metric="cosine",
    algorithm="brute",
    weights=lambda distance: np.exp((1 - distance) / temperature),
  )
  return model.fit(train.astype(np.float64), train_labels).predict(test.astype(np.float64))


def noisy_digits(seed=0):
  """Digits blurred by noise, with norms that differ: about half of them are told apart."""
  pixels, labels = load_digits(return_X_y=True)
  rng = np.random.default_rng(seed)
  features = (pixels - pixels.mean(0) + rng.normal(0, 12, pixels.shape)) * rng.uniform(0.1, 10, (len(pixels), 1))
  return features[:1200].astype(np.float32), labels[:1200], features[1200:].astype(np.float32), labels[1200:]


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (20, 1e-3), (200, 0.5)])
def test_classes_and_accuracy_equal_sklearns(k, temperature):
  data, test_labels = noisy_digits()[:3], noisy_digits()[3]
  options = {"k": k, "temperature": temperature, "num_classes": 10, "mesh": ALL}
  expected = sklearn_classes(*data, k=k, temperature=temperature)
  np.testing.assert_array_equal(knn.knn_classes(*data, **options), expected)
  accuracy = np.mean(expected == test_labels)
  assert 0.2 < accuracy < 0.9  # where mistakes would show
  assert knn.knn_accuracy(*data, test_labels, **options) == accuracy


def test_settings_change_the_answer():
  data = noisy_digits()
  answers = {
    knn.knn_accuracy(*data, k=k, temperature=temperature, num_classes=10, mesh=ALL)
    for k, temperature in [(20, 0.07), (200, 0.07), (200, 5.0)]
  }
  assert len(answers) == 3


def test_one_device_and_eight_predict_alike():
  data = noisy_digits()  # 597 test images: eight devices get 75 each, three rows of them filled up
  one = knn.knn_accuracy(*data, k=20, temperature=0.07, num_classes=10, mesh=ONE)
  assert one == knn.knn_accuracy(*data, k=20, temperature=0.07, num_classes=10, mesh=ALL)


def test_chunks_do_not_change_the_predictions(monkeypatch):
  train, train_labels, test, _ = noisy_digits()
  settings = {"k": 20, "num_classes": 10, "mesh": ONE}
  whole = knn._predict(train, train_labels, test, 0.07, **settings)
  monkeypatch.setattr(knn, "_SIMILARITIES_PER_CHUNK", 7 * len(train))  # 597 test images = 85 * 7 + 2: a remainder
  knn._predict.clear_cache()
  np.testing.assert_array_equal(knn._predict(train, train_labels, test, 0.07, **settings), whole)


def test_a_zero_feature_does_not_spoil_the_vote():
  train, test = np.array([[0, 0], [1, 0]], np.float32), np.array([[1, 0]], np.float32)
  labels = np.array([0, 1]), np.array([1])
  options = {"k": 2, "temperature": 0.07, "num_classes": 2, "mesh": ALL}
  assert knn.knn_accuracy(train, labels[0], test, labels[1], **options) == 1.0


@pytest.mark.parametrize(
  ("train_labels", "test_labels", "message"),
  [
    (np.zeros(3, int), np.zeros(1, int), "3 training images and needs 4"),
    (np.zeros(4, int), np.zeros(0, int), "0 test images"),
    (np.full(4, -1), np.zeros(1, int), "training labels outside 0..1.*config.eval.knn=False"),
    (np.zeros(4, int), np.full(1, 2), "test labels outside 0..1"),
  ],
)
def test_bad_labels_are_refused_in_one_line(train_labels, test_labels, message):
  train, test = np.ones((len(train_labels), 2), np.float32), np.ones((len(test_labels), 2), np.float32)
  with pytest.raises(InputError, match=message) as error:
    knn.knn_accuracy(train, train_labels, test, test_labels, k=4, temperature=0.07, num_classes=2, mesh=ALL)
  assert "\n" not in str(error.value)
