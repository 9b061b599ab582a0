"""Task "evaluate" with a classifier: its own classes, on miniatures of configs/robustness.py's data sets."""

import functools
import io
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import miniatures
import runs
from configs import robustness
from dtm_jax import main
from dtm_jax.augment import normalize
from dtm_jax.config import DataConfig
from dtm_jax.convert import load_torch, save_torch
from dtm_jax.data.transforms import eval_image
from dtm_jax.evaluate.accuracy import accuracies
from dtm_jax.evaluate.corruptions import ALEXNET_ERRORS, CORRUPTED_SETS, mean_corruption_error
from dtm_jax.models.vit import Classifier

GOLDEN = pathlib.Path(__file__).parent / "golden"
IMAGES, BATCH = 13, 8  # the last batch is not full
CORRUPTED = ("imagenet2012_corrupted/fog_3", "imagenet2012_corrupted/snow_1")

# How ml_collections reads a config file.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
  """A weights file of ImageNet's 1,000 classes, the module and its parameters."""
  kind, sizes, params = load_torch(GOLDEN / "finetune_tiny.pth")
  rng = np.random.default_rng(0)
  params["head"] = {
    "kernel": rng.normal(size=(sizes["width"], 1000)).astype(np.float32),
    "bias": np.zeros(1000, np.float32),
  }
  path = tmp_path_factory.mktemp("weights") / "classifier.pth"
  save_torch(path, kind, params)
  return path, Classifier(**sizes | {"num_classes": 1000}, layer_scale=0.0), params


@pytest.fixture(scope="module")
def ranked(classifier):
  """The classes of encoded images, likeliest first: int [n, 1000]."""
  _, model, params = classifier
  logits = jax.jit(functools.partial(model.apply, {"params": params}))

  def rank(images: list[bytes], crop: float = 224 / 256) -> np.ndarray:
    size, data = model.grid[0] * model.patch_size, DataConfig()
    pixels = np.stack([eval_image(image, size=size, crop=crop) for image in images])
    return np.argsort(-np.asarray(logits(normalize(pixels, data.mean, data.std))), axis=1)

  return rank


def pictures(size=(20, 24), encoding="JPEG") -> list[bytes]:
  """What `miniatures.write` puts into the first split."""
  return [miniatures.picture(index, size, encoding=encoding) for index in range(IMAGES)]


def evaluate(name, checkpoint, data_dir, workdir, **changes) -> int:
  words = [f"--config={runs.ROOT}/configs/robustness.py:{name}", f"--config.eval.checkpoint={checkpoint}"]
  words += [f"--config.data.path={data_dir}", f"--workdir={workdir}"]
  changes = {"data__num_workers": 0, "eval__batch_size": BATCH} | changes
  return main.main(["dtm", *words, *(f"--config.{key.replace('__', '.')}={value}" for key, value in changes.items())])


def shares(order: np.ndarray, right: list[set[int]]) -> dict[str, float]:
  """Top-1 and top-5 accuracy, counted one by one."""
  hits = [[bool({*row[:k].tolist()} & classes) for row, classes in zip(order, right, strict=True)] for k in (1, 5)]
  return {"top1": sum(hits[0]) / len(right), "top5": sum(hits[1]) / len(right)}


def told(workdir) -> dict[str, float]:
  return {name: runs.summary(workdir)[name] for name in ("top1", "top5")}


def labels_at(order: np.ndarray, ranks=(0, 0, 3, 9, 0, 4, 5, 1, 0, 700, 2, 0, 6)) -> list[int]:
  """Labels that the classifier puts at these ranks."""
  return [int(row[rank]) for row, rank in zip(order, ranks, strict=True)]


@pytest.mark.parametrize("batch_size", [BATCH, 32], ids=["batches", "smaller than a batch"])
@pytest.mark.parametrize("name", ["imagenet_v2", "imagenet_sketch"])
def test_all_classes(tmp_path, classifier, ranked, name, batch_size):
  order = ranked(pictures())
  labels = labels_at(order)
  data_name = robustness.SETS[name]["data.name"]
  miniatures.write(tmp_path, data_name, miniatures.real_features(data_name), {"test": labels})
  assert evaluate(name, classifier[0], tmp_path, tmp_path / "out", eval__batch_size=batch_size) == 0
  assert told(tmp_path / "out") == shares(order, [{label} for label in labels]) == {"top1": 5 / 13, "top5": 9 / 13}
  summary, record = runs.summary(tmp_path / "out"), json.loads((tmp_path / "out" / "config.json").read_text())
  assert (summary["test_images"], summary["num_classes"], summary["kind"]) == (IMAGES, 1000, "classifier")
  assert (record["test_images"], record["train_images"]) == (IMAGES, None)
  assert runs.rows(tmp_path / "out") == [{"step": 0, **told(tmp_path / "out")}]


@pytest.mark.parametrize("name", ["imagenet_a", "imagenet_r"])
def test_only_the_classes_of_the_set(tmp_path, classifier, ranked, name):
  order = ranked(pictures())
  labels = labels_at(order, ranks=(700, 20, 3, 9, 40, 4, 30, 1, 60, 700, 2, 500, 6))
  present = {*labels}
  assert len(present) > 5
  miniatures.write(tmp_path, name, miniatures.real_features(name), {"test": labels})
  assert evaluate(name, classifier[0], tmp_path, tmp_path / "out") == 0
  among = np.array([[c for c in row.tolist() if c in present] for row in order])
  expected = shares(among, [{label} for label in labels])
  assert told(tmp_path / "out") == expected
  assert expected["top1"] > shares(order, [{label} for label in labels])["top1"]
  # The classes are those of the whole set, also where only a part of it is looked at.
  assert evaluate(name, classifier[0], tmp_path, tmp_path / "part", eval__max_test_images=12) == 0
  assert any(
    told(tmp_path / "part") == shares(np.delete(among, i, 0), [{c} for c in np.delete(labels, i)]) for i in range(13)
  )


def test_several_labels_and_none(tmp_path, classifier, ranked):
  order = ranked(pictures())

  def at(image, *ranks):
    return [int(order[image][rank]) for rank in ranks]

  labels = [at(0, 500, 0), at(1, 600), [], at(3, 4, 9, 800), at(4, 0), at(5, *range(5, 40)), at(6, 0, 1)]
  labels += [[], at(8, 3), at(9, 900, 800, 1), at(10, 5), [], at(12, 0)]
  miniatures.write(tmp_path, "imagenet2012_real", miniatures.real_features("imagenet2012_real"), {"validation": labels})
  assert evaluate("imagenet_real", classifier[0], tmp_path, tmp_path / "out") == 0
  kept = [i for i in range(IMAGES) if labels[i]]
  expected = shares(order[kept], [{*labels[i]} for i in kept])
  assert told(tmp_path / "out") == expected == {"top1": 4 / 10, "top5": 7 / 10}
  assert runs.summary(tmp_path / "out")["test_images"] == 10


def write_corrupted(folder, names, ranked) -> dict[str, dict[str, float]]:
  """Miniatures whose labels are at other ranks in each, and what is right of them."""
  order, expected = ranked(pictures((224, 224), "PNG"), crop=1.0), {}
  for number, name in enumerate(names):
    labels = labels_at(order, ranks=(np.arange(IMAGES) + number) % 9)
    miniatures.write(folder, name, miniatures.real_features(name), {"validation": labels})
    expected[name] = shares(order, [{label} for label in labels])
  return expected


def test_one_set_after_another(tmp_path, classifier, ranked):
  expected = write_corrupted(tmp_path, CORRUPTED, ranked)
  assert len({values["top1"] for values in expected.values()}) == 2
  assert evaluate("imagenet_c", classifier[0], tmp_path, tmp_path / "out", eval__sets=CORRUPTED) == 0
  summary = runs.summary(tmp_path / "out")
  for name in CORRUPTED:
    assert {score: summary[f"{name}/{score}"] for score in ("top1", "top5")} == expected[name]
  for score in ("top1", "top5"):
    assert summary[score] == pytest.approx(np.mean([expected[name][score] for name in CORRUPTED]), abs=1e-12)
  assert summary["test_images"] == 2 * IMAGES
  assert "mce" not in summary  # not of two sets
  assert [sorted(row)[:-1] for row in runs.rows(tmp_path / "out")] == [
    *([f"{name}/top1", f"{name}/top5"] for name in CORRUPTED),
    ["step", "top1"],
  ]


def test_an_image_that_is_a_crop_is_taken_whole():
  image = miniatures.picture(0, (224, 224))
  np.testing.assert_array_equal(eval_image(image, size=224, crop=1.0), np.asarray(Image.open(io.BytesIO(image))))


@pytest.mark.slow
def test_all_of_imagenet_c(tmp_path, classifier, ranked):
  expected = write_corrupted(tmp_path, robustness.SETS["imagenet_c"]["eval.sets"], ranked)
  assert evaluate("imagenet_c", classifier[0], tmp_path, tmp_path / "out") == 0
  summary = runs.summary(tmp_path / "out")
  relative = [
    sum(1 - expected[f"imagenet2012_corrupted/{corruption}_{severity}"]["top1"] for severity in range(1, 6)) / 5 / error
    for corruption, error in ALEXNET_ERRORS.items()
  ]
  assert summary["mce"] == pytest.approx(sum(relative) / 15, abs=1e-12)
  assert summary["test_images"] == 75 * IMAGES


def test_mean_corruption_error():
  """AlexNet's is 1 by definition, whatever its errors at the five strengths; twice as right is not half the error."""
  assert len(ALEXNET_ERRORS) == 15 and sum(map(len, CORRUPTED_SETS.values())) == 75
  spread = np.array([-0.2, -0.1, 0.0, 0.1, 0.2])
  top1 = {
    name: 1 - ALEXNET_ERRORS[corruption] + offset
    for corruption, names in CORRUPTED_SETS.items()
    for name, offset in zip(names, spread, strict=True)
  }
  assert mean_corruption_error(top1)["mce"] == pytest.approx(1, abs=1e-12)
  perfect_on_fog = top1 | dict.fromkeys(CORRUPTED_SETS["fog"], 1.0)
  assert mean_corruption_error(perfect_on_fog)["mce"] == pytest.approx(14 / 15, abs=1e-12)
  assert mean_corruption_error(dict(list(top1.items())[1:])) == {}


def test_several_classes_of_one_image():
  top = np.array([[3, 1, 0, 2, 4], [0, 1, 2, 3, 4], [4, 3, 2, 1, 0]])
  assert accuracies(top, np.array([[3, 9, -1], [8, 4, 7], [-1, -1, -1]])) == {"top1": 0.5, "top5": 1.0}
  assert accuracies(top, np.array([3, 4, 4])) == {"top1": 2 / 3, "top5": 1.0}


def test_a_config_file_is_read_without_jax():
  """What is wrong with an option is told at once."""
  program = "import runpy, sys; runpy.run_path('configs/robustness.py'); assert 'jax' not in sys.modules"
  subprocess.run([sys.executable, "-c", program], check=True, cwd=runs.ROOT)


# ------------------------------------------------------------ bad input


def fails(capsys, code: int) -> str:
  assert code == 2
  stderr = capsys.readouterr().err
  assert "Traceback" not in stderr
  last = stderr.splitlines()[-1]
  assert last.startswith("error: ")
  return last.removeprefix("error: ")


@pytest.fixture(scope="module")
def sketches(tmp_path_factory):
  folder = tmp_path_factory.mktemp("sketches")
  features = miniatures.real_features("imagenet_sketch")
  miniatures.write(folder, "imagenet_sketch", features, {"test": [1, 2, 3], "unlabelled": [1, -1, 2]})
  return folder


@pytest.mark.parametrize(
  ("file", "message"),
  [
    ("finetune_tiny.pth", "tells 7 classes, and the imagenet_sketch images are of 1000; name images of its classes"),
    ("student_tiny.pth", "is no classifier but a student; fine-tune it first, or evaluate its features"),
    ("clip_vision_tiny.pth", "is no classifier but a clip_vision"),
  ],
)
def test_a_checkpoint_that_does_not_fit(sketches, tmp_path, capsys, file, message):
  told = fails(capsys, evaluate("imagenet_sketch", GOLDEN / file, sketches, tmp_path / "out"))
  assert f"{GOLDEN / file} {message}" in told
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"data__label": "file_name"}, "config.data.label='file_name' is no class but Text"),
    ({"data__label": "no_such"}, "the images have no classes"),
    ({"data__eval_split": "train"}, "has no split 'train'; set the split in config.data to one of test, unlabelled"),
    ({"data__eval_crop": 0.0}, "config.data.eval_crop=0.0 must be in (0, 1]"),
    ({"eval__sets": ("imagenet_sketch", "imagenet_r")}, "TFDS data set 'imagenet_r' is not prepared as ArrayRecord"),
    ({"eval__sets": ("imagenet_r", "imagenet_r")}, "names a data set twice"),
    ({"eval__sets": ("imagenet_r",), "eval__knn": True}, "config.eval.sets are TFDS data sets to classify: set"),
    ({"eval__classify": False}, "nothing to evaluate"),
    ({"eval__classify": False, "eval__knn": True, "eval__only_own_classes": True}, "are for classifiers: set"),
    ({"eval__knn": True}, "has no split 'train'"),
  ],
  ids=lambda value: str(value)[:40],
)
def test_settings_that_do_not_fit(sketches, classifier, tmp_path, capsys, settings, message):
  assert message in fails(capsys, evaluate("imagenet_sketch", classifier[0], sketches, tmp_path / "out", **settings))
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("only_own", [False, True])
def test_labels_out_of_range(sketches, classifier, tmp_path, capsys, only_own):
  changes = {"data__eval_split": "unlabelled", "eval__only_own_classes": only_own}
  told = fails(capsys, evaluate("imagenet_sketch", classifier[0], sketches, tmp_path / "out", **changes))
  assert "1 imagenet_sketch labels outside 0..999, such as -1" in told
  assert not (tmp_path / "out" / "summary.json").exists()


def test_a_set_of_which_no_image_has_a_class(classifier, tmp_path, capsys):
  features = miniatures.real_features("imagenet2012_real")
  miniatures.write(tmp_path, "imagenet2012_real", features, {"validation": [[], []]})
  for name, only_own in (("a", False), ("b", True)):
    code = evaluate("imagenet_real", classifier[0], tmp_path, tmp_path / name, eval__only_own_classes=only_own)
    assert "no imagenet2012_real image has a class" in fails(capsys, code)
