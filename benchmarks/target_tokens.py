"""What morphing does to a teacher's tokens: can one token tell the class of its image, before and after?

  python benchmarks/target_tokens.py --config=PAGE [--config.teacher.weights=RUN] [--images=2000] [--json=FILE]

Morphing averages what differs inside a group of similar tokens: where that is noise, students gain, and where it is
what the teacher knows, they lose it. This tells which, for the teacher and the data of any page of pre-training, at
five amounts of morphing from none to all of the budget, in 7 iterations:

  groups       left per image, mean
  kept         share of the variance of an image's tokens that lies between groups; the rest is averaged away
  one token    accuracy of a linear probe of single tokens, as in the pilot study of the DTM paper (section 3)
  random       the same where groups of the same sizes are of random tokens: what averaging alone does
  whole image  accuracy of a linear probe of all tokens side by side: what a student is asked for

"""

import contextlib
from typing import Any

import jax
import numpy as np
from common import argument_parser, report, write_json

from dtm_jax import command_line, figures
from dtm_jax import config as config_lib
from dtm_jax.augment import to_unit
from dtm_jax.config import Config
from dtm_jax.data.pipeline import eval_batches
from dtm_jax.data.sources import open_source
from dtm_jax.evaluate.features import Features
from dtm_jax.evaluate.linear_probe import accuracy, fit_lbfgs, standardizer
from dtm_jax.evaluate.steps import make_label_fn
from dtm_jax.morphing import morph
from dtm_jax.restore import restore_tower
from dtm_jax.teachers import create_teacher

ITERATIONS = 7  # the middle of 1..14
INVERSE_STRENGTH = 1e-3  # C; single tokens and whole images both choose about this
COLUMNS = {
  "merged": ("merged", "d"),
  "groups": ("groups", ".1f"),
  "kept": ("kept", ".3f"),
  "one token": ("one_token", ".3f"),
  "random": ("random", ".3f"),
  "whole image": ("whole_image", ".3f"),
}


def read_images(config: Config, split: str, number: int) -> Features:
  """uint8 [n, S, S, 3] and classes, spread over a split."""
  source = open_source(config.data, split)
  with contextlib.closing(eval_batches(config, source, number, limit=number)) as batches:
    batch = next(batches)
  return Features(batch["image"][batch["valid"]], batch["label"][batch["valid"]])


def probe(train: Features, test: Features, num_classes: int) -> float:
  standardize = standardizer(train.features)
  [head] = fit_lbfgs(standardize(train), [INVERSE_STRENGTH], num_classes=num_classes)
  return accuracy(head, standardize(test))


def single(tokens: np.ndarray, classes: np.ndarray) -> Features:
  """[n, N, D] -> each token an example of its image's class."""
  return Features(tokens.reshape(-1, tokens.shape[-1]), np.repeat(classes, tokens.shape[1]))


def whole(tokens: np.ndarray, classes: np.ndarray) -> Features:
  return Features(tokens.reshape(len(tokens), -1), classes)


def kept_variance(tokens: np.ndarray, morphed: np.ndarray) -> float:
  def variance(x):
    return np.square(x - tokens.mean(axis=1, keepdims=True)).sum()

  return float(variance(morphed) / variance(tokens))


def measure(config: Config, number: int) -> list[dict[str, Any]]:
  """A row for each amount of morphing, over `number` training and half as many test images."""
  teacher, params = create_teacher(config, restore_tower)
  settings = figures.morphing_settings(config.morphing_budget, ITERATIONS)
  splits = {"train": number, "eval": number // 2}
  images = {split: read_images(config, split, count) for split, count in splits.items()}
  apply = jax.jit(lambda params, images: teacher.apply(params, to_unit(images)))
  tokens = {split: np.asarray(apply(params, found.features)) for split, found in images.items()}
  label = jax.jit(make_label_fn(config, teacher, settings))
  labels = {split: np.asarray(label(params, found.features)) for split, found in images.items()}
  average, rng = jax.jit(jax.vmap(morph)), np.random.default_rng(0)
  num_classes = open_source(config.data, "train").num_classes
  rows = []
  for i, (merged, _) in enumerate(settings):
    groups = {split: found[:, i] for split, found in labels.items()}
    morphed = {split: np.asarray(average(tokens[split], groups[split])) for split in splits}
    mixed = {split: np.asarray(average(tokens[split], rng.permuted(groups[split], axis=1))) for split in splits}

    def score(form, given):
      train, test = (form(given[split], images[split].labels) for split in splits)
      return probe(train, test, num_classes)

    rows.append(
      {
        "merged": merged,
        "groups": float(np.mean([len(np.unique(row)) for row in groups["train"]])),
        "kept": kept_variance(tokens["train"], morphed["train"]),
        "one_token": score(single, morphed),
        "random": score(single, mixed),
        "whole_image": score(whole, morphed),
      }
    )
  return rows


def main() -> None:
  parser = argument_parser(__doc__, rounds=1)
  parser.add_argument("--images", type=int, default=2000, help="to fit to; half as many for testing (%(default)s)")
  args, words = parser.parse_known_args()
  config = config_lib.resolve(command_line.parse_config(["target_tokens", *words]))
  rows = measure(config, args.images)
  report(rows, COLUMNS)
  write_json(args.json, rows, ("jax", "numpy"))


if __name__ == "__main__":
  main()
