"""configs/transfer.py on miniatures of its data sets, under the real ones' features and labels."""

import contextlib
import json

import jax
import numpy as np
import pytest

import miniatures
import runs
from configs import transfer
from dtm_jax import config as config_lib
from dtm_jax import finetuning, main
from dtm_jax.data.pipeline import train_batches
from dtm_jax.errors import InputError

# How ml_collections reads a config file.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

CLASSES = 10
TRAIN, VALIDATION, TEST = [0, 9, 1, 8, 2, 7, 3, 6, 4, 5, 0, 1], [5, 4, 3], [3, 1, 4, 1, 5]
# Where accuracy is reported, by the papers on each set.
EVALUATED = {"inat2018": "validation", "inat2021": "val"}
COMPILED = "flowers"  # the others' rates make other programs
# Each optimizer once, the other sets by those who ask for `long` tests.
OTHERS = [
  pytest.param(name, marks=[pytest.mark.slow] + [pytest.mark.long] * (name != "pets"))
  for name in transfer.SETS
  if name != COMPILED
]


@pytest.fixture(scope="module", autouse=True)
def as_the_command():
  """The precision that the command sets: what it compiles is compiled once."""
  with jax.default_matmul_precision("float32"):
    yield


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tfds")
  for name, settings in transfer.SETS.items():
    features = miniatures.with_classes(miniatures.real_features(settings["data.name"]), CLASSES)
    splits = {"train": TRAIN, EVALUATED.get(name, "test"): TEST}
    if name == "flowers":
      splits["validation"] = VALIDATION
    miniatures.write(folder, settings["data.name"], features, splits)
  return folder


def settings(name: str, data_dir, **changes) -> config_lib.Config:
  config = transfer.get_config(f"{name},smoke")
  config.data.update(source="tfds", path=str(data_dir))
  config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
  return config_lib.resolve(config)


@pytest.fixture(scope="module")
def trained(data_dir):
  """One compiled step and its state, for all sets."""
  parts = finetuning.build(settings(COMPILED, data_dir))
  return parts, parts.create_state()


@pytest.mark.parametrize("name", transfer.SETS)
def test_two_steps_and_an_evaluation_of_each_set(data_dir, trained, name):
  config = settings(name, data_dir)
  parts = finetuning.build(config)
  expected = TRAIN + VALIDATION if name == "flowers" else TRAIN
  assert [parts.train_source[i].label for i in range(len(parts.train_source))] == expected
  assert [parts.eval_source[i].label for i in range(len(parts.eval_source))] == TEST
  assert parts.model.num_classes == CLASSES
  shared, state = trained
  state = jax.tree.map(lambda x: x.copy(), state)  # a step takes its memory
  with contextlib.closing(train_batches(config, parts.train_source, start_step=0)) as batches:
    for _ in range(config.run.steps):
      state, metrics = shared.train_step(state, parts.place(next(batches)))
  assert np.isfinite(metrics["loss"])
  top, labels = shared._classify([state.params], parts.eval_source, None, lambda: False)
  assert labels.tolist() == TEST  # fewer than a batch, and each once
  assert len(top) == len(TEST)


@pytest.mark.parametrize("name", [COMPILED, *OTHERS])
def test_the_command(data_dir, tmp_path, name):
  words = [f"--config={runs.ROOT}/configs/transfer.py:{name},smoke", f"--workdir={tmp_path / 'run'}"]
  words += ["--config.data.source=tfds", f"--config.data.path={data_dir}"]
  assert main.main(["dtm", *words]) == 0
  summary, record = runs.summary(tmp_path / "run"), json.loads((tmp_path / "run" / "config.json").read_text())
  assert (summary["steps"], summary["num_classes"]) == (2, CLASSES)
  assert summary["top1"] * len(TEST) == pytest.approx(round(summary["top1"] * len(TEST)))
  assert record["train_images"] == len(TRAIN) + len(VALIDATION) * (name == "flowers")
  # Its own data again, of which the features are worth something too.
  words = [f"--config={runs.ROOT}/configs/evaluate.py", f"--config.eval.checkpoint={tmp_path / 'run'}"]
  words += ["--config.eval.classify=True", "--config.eval.knn_k=3", "--config.eval.linear=False"]
  words += ["--config.eval.fewshot=()", f"--workdir={tmp_path / 'evaluated'}"]
  assert main.main(["dtm", *words]) == 0
  evaluated = runs.summary(tmp_path / "evaluated")
  assert [evaluated[score] for score in ("top1", "top5")] == [summary[score] for score in ("top1", "top5")]
  assert (evaluated["train_images"], evaluated["test_images"]) == (record["train_images"], len(TEST))
  assert 0 <= evaluated["knn_top1"] <= 1


def test_a_label_that_is_no_class_is_told(tmp_path):
  """iNaturalist's test images, whose classes are secret, have the label -1."""
  name = transfer.SETS["inat2018"]["data.name"]
  features = miniatures.with_classes(miniatures.real_features(name), CLASSES)
  miniatures.write(tmp_path, name, features, {"train": TRAIN, "validation": TEST, "test": [-1] * 8})
  config = settings("inat2018", tmp_path, data__train_split="test")
  parts = finetuning.build(config)
  with (
    contextlib.closing(train_batches(config, parts.train_source, start_step=0)) as batches,
    pytest.raises(InputError, match=r"8 training labels outside 0\.\.9, such as -1"),
  ):
    parts.place(next(batches))


FINE_GRAINED = ("cub200", "cars", "dogs", "flowers")
PUBLISHED = {  # batch size, learning rate, passes, those of warm-up: see the config's sources
  "inat2018": (768, 7.5e-5, 360, 5),
  "inat2021": (512, 5e-5, 300, 20),
  "cifar10": (768, 7.5e-6, 1000, 5),
  "cifar100": (768, 5e-6, 1000, 5),
} | dict.fromkeys(FINE_GRAINED, (384, 5e-4 / 256 * 384, 100, 5))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes(name):
  config = config_lib.resolve(transfer.get_config(name))
  batch_size, rate, epochs, warmup = PUBLISHED[name]
  assert (config.data.batch_size, config.run.epochs) == (batch_size, epochs)
  assert config.peak_lr == pytest.approx(rate)
  assert (config.optim.warmup_epochs, config.optim.layer_decay, config.optim.betas) == (warmup, 1, (0.9, 0.999))
  assert config.optim.min_lr < rate
  assert (config.data.image_size, config.optim.clip_norm) == ((384, 5) if name == "inat2021" else (224, None))
  assert config.finetune.erase_prob == {"inat2018": 0.1, "inat2021": 0.25}.get(name, 0)
  decay, mixing, changes = (
    (0.01, (0, 0, 0), ("square", ""))
    if name in FINE_GRAINED
    else (0.05, (0.8, 1.0, 0.1), ("resized", "m9-mstd0.5-inc1"))
  )
  assert (config.optim.weight_decay, config.model.drop_path) == (decay, 0.1)
  assert (config.finetune.mixup, config.finetune.cutmix, config.finetune.label_smoothing) == mixing
  assert (config.data.train_crop, config.data.rand_augment) == changes


def test_the_published_recipe_for_pets():
  config = config_lib.resolve(transfer.get_config("pets"))
  assert (config.total_steps(3680), config.warmup_steps(3680)) == (500, 100)
  assert (config.data.batch_size, config.data.image_size, config.peak_lr) == (512, 384, 3e-3)
  optim, mixing = config.optim, config.finetune
  assert (optim.name, optim.momentum, optim.clip_norm) == ("sgd", 0.9, 1)
  assert (optim.weight_decay, optim.layer_decay, optim.min_lr, config.model.drop_path) == (0, 1, 0, 0)
  assert (mixing.mixup, mixing.cutmix, mixing.label_smoothing, mixing.erase_prob) == (0, 0, 0, 0)


@pytest.mark.parametrize("form", ["", "smoke", "cub", "cub200 smoke"])
def test_a_form_names_a_set(form):
  with pytest.raises(InputError, match="is no data set; give --config=FILE:NAME, with one of inat2018, inat2021"):
    transfer.get_config(form)
