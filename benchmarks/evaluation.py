"""Evaluation of frozen features beside scikit-learn: k-NN at ImageNet's width, and a linear probe of raw pixels.

  python benchmarks/evaluation.py [--fashion_mnist=FOLDER] [--rounds=3] [--json=FILE]

k-NN: 10,000 queries among 60,000 features of width 768 in ten overlapping clusters; the target is 10 s on two cores,
and the same class for every query as scikit-learn's weighted k-NN. Linear probe, where the folder with Fashion-MNIST's
four IDX files is given: logistic regression of the standardised pixels at one strength of regularisation, by the
probe's L-BFGS and by scikit-learn; the target is the same accuracy within 0.3 points. One round of the probe, which
takes minutes; the k-NN runs by turns.
"""

import functools
import pathlib
import statistics
import time
from typing import Any

import numpy as np
from common import alternate, argument_parser, median_ratio, report, warn_if_busy, write_json
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from dtm_jax import sharding
from dtm_jax.config import EvalConfig, MeshConfig
from dtm_jax.data.prepare import open_raw
from dtm_jax.evaluate.features import Features
from dtm_jax.evaluate.knn import knn_classes
from dtm_jax.evaluate.linear_probe import accuracy, fit_lbfgs, standardizer

TRAIN, TEST, WIDTH, CLASSES = 60_000, 10_000, 768, 10
SEPARATION = 0.1  # of the clusters' centres, over their spread: neighbours are of several classes
INVERSE_STRENGTH = 1e-3  # C, which the probe chooses for these pixels


def clusters() -> tuple[Features, Features]:
  """Training and test features, and their clusters."""
  rng = np.random.default_rng(0)
  centres = SEPARATION * rng.standard_normal((CLASSES, WIDTH), np.float32)

  def draw(number: int) -> Features:
    labels = rng.integers(CLASSES, size=number)
    return Features(centres[labels] + rng.standard_normal((number, WIDTH), np.float32), labels.astype(np.int32))

  return draw(TRAIN), draw(TEST)


def compare_knn(rounds: int) -> dict[str, Any]:
  """Seconds of both, the accuracy of each, and how many queries they disagree about."""
  train, test = clusters()
  settings, mesh = EvalConfig(), sharding.create_mesh(MeshConfig())
  k, temperature = settings.knn_k, settings.knn_temperature
  classes = {}

  def here(_):
    options = {"k": k, "temperature": temperature, "num_classes": CLASSES, "mesh": mesh}
    classes["here"] = knn_classes(*train, test.features, **options)

  def scikit_learn(_):
    def weights(distances):
      return np.exp((1 - distances) / temperature)

    classifier = KNeighborsClassifier(k, weights=weights, metric="cosine", algorithm="brute")
    classes["scikit-learn"] = classifier.fit(*train).predict(test.features)

  seconds = alternate({"here": here, "scikit-learn": scikit_learn}, rounds)
  medians = {name: statistics.median(times) for name, times in seconds.items()}
  return {
    "seconds": medians,
    "ratio": median_ratio(seconds["here"], seconds["scikit-learn"]),
    "top1": {name: float(np.mean(found == test.labels)) for name, found in classes.items()},
    "differ": int(np.count_nonzero(classes["here"] != classes["scikit-learn"])),
  }


def compare_linear(folder: pathlib.Path) -> dict[str, Any]:
  """Accuracy on Fashion-MNIST's test images, and seconds, of both."""
  train, test = (_pixels(open_raw(folder)[split]) for split in ("train", "test"))
  standardize = standardizer(train.features)
  train, test = standardize(train), standardize(test)
  seconds, top1 = {}, {}
  start = time.perf_counter()
  [head] = fit_lbfgs(train, [INVERSE_STRENGTH], num_classes=CLASSES, mesh=sharding.create_mesh(MeshConfig()))
  top1["here"] = accuracy(head, test)
  seconds["here"] = time.perf_counter() - start
  start = time.perf_counter()
  top1["scikit-learn"] = LogisticRegression(C=INVERSE_STRENGTH, max_iter=1000).fit(*train).score(*test)
  seconds["scikit-learn"] = time.perf_counter() - start
  return {"seconds": seconds, "ratio": seconds["here"] / seconds["scikit-learn"], "top1": top1}


def _pixels(source) -> Features:
  return Features(source.images.reshape(len(source.images), -1) / np.float32(255), source.labels.astype(np.int32))


def main() -> None:
  parser = argument_parser(__doc__, rounds=3)
  parser.add_argument("--fashion_mnist", type=pathlib.Path, metavar="FOLDER", help="of the four IDX files")
  options = parser.parse_args()
  warn_if_busy()
  contests = {"k-NN": functools.partial(compare_knn, options.rounds)}
  if options.fashion_mnist is not None:
    contests["linear probe of pixels"] = functools.partial(compare_linear, options.fashion_mnist)
  results = {name: compare() for name, compare in contests.items()}
  rows = [
    {
      "contest": name,
      "side": side,
      "ratio": result["ratio"] if side == "here" else None,
      "differ": result.get("differ"),
    }
    | {what: result[what][side] for what in ("seconds", "top1")}
    for name, result in results.items()
    for side in result["seconds"]
  ]
  columns = {
    "contest": ("contest", ""),
    "by": ("side", ""),
    "seconds": ("seconds", ".1f"),
    "ratio": ("ratio", ".2f"),
    "top-1": ("top1", ".4f"),
    "differ": ("differ", ","),
  }
  report(rows, columns)
  write_json(options.json, rows, ("jax", "numpy", "scikit-learn"))


if __name__ == "__main__":
  main()
