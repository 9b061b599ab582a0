"""`python -m dtm_jax.main --config=configs/evaluate.py`, on a miniature run and on weights files."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

import runs
from configs import evaluate
from dtm_jax import config as config_lib
from dtm_jax import evaluation, main, restore
from dtm_jax.augment import normalize
from dtm_jax.config import DataConfig
from dtm_jax.convert import load_torch
from dtm_jax.evaluate.linear_probe import LEARNING_RATES
from dtm_jax.evaluate.steps import make_feature_fn
from dtm_jax.models.vit import Classifier, ViT
from dtm_jax.train_state import params_sha256

GOLDEN = pathlib.Path(__file__).parent / "golden"

# How ml_collections reads a config file.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def arguments(checkpoint, workdir, **settings) -> list[str]:
  """Of an evaluation; `eval__knn_k=3` sets config.eval.knn_k."""
  words = [f"--config.{name.replace('__', '.')}={value}" for name, value in settings.items()]
  config = f"--config={runs.ROOT}/configs/evaluate.py"
  return ["dtm", config, f"--config.eval.checkpoint={checkpoint}", f"--workdir={workdir}", *words]


def only(*wanted: str) -> dict:
  """Settings that leave out the other results."""
  off = {"knn": False, "linear": False, "fewshot": ()}
  return {f"eval__{name}": value for name, value in off.items() if name not in wanted}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The work folder of a miniature run with k-NN, of 64 training and 32 test images."""
  workdir = tmp_path_factory.mktemp("run")
  assert main.main(["dtm", *runs.options(workdir, eval__knn=True)]) == 0
  return workdir


# A batch that eight devices do not share evenly: it is made larger.
LIMITS = {"eval__max_train_images": 64, "eval__max_test_images": 32, "eval__batch_size": 21}


@pytest.fixture(scope="module")
def evaluated(run, tmp_path_factory):
  """All results of that run, with its data."""
  workdir = tmp_path_factory.mktemp("evaluated")
  assert main.main(arguments(run, workdir, **LIMITS, eval__fewshot="(1,5)", eval__save_features=True)) == 0
  return workdir


def test_the_summary_has_what_was_asked(evaluated, run):
  summary = runs.summary(evaluated)
  assert summary["knn_top1"] == runs.summary(run)["knn_top1"]
  assert 0 < summary["linear_top1"] <= 1
  assert summary["linear"]["solver"] == "lbfgs"
  assert summary["fewshot_top1"] == summary["fewshot"]["5"]["mean"]
  assert [len(shots["top1"]) for shots in summary["fewshot"].values()] == [5, 5]
  assert (summary["train_images"], summary["test_images"], summary["num_classes"]) == (64, 32, 8)
  assert summary["params_sha256"] == runs.summary(run)["params_sha256"]
  assert summary["step"] == 2
  rows = {name: value for row in runs.rows(evaluated) for name, value in row.items()}
  assert rows["step"] == 2
  assert all(rows[name] == summary[name] for name in ("knn_top1", "linear_top1", "fewshot_top1", "fewshot_1_top1"))


def test_the_record_tells_of_the_model_the_data_and_the_command(evaluated, run):
  record = json.loads((evaluated / "config.json").read_text())
  trained = json.loads((run / "config.json").read_text())
  assert record["task"] == "evaluate"
  assert record["data"] == trained["data"]
  assert record["model"] == trained["model"]
  assert record["params_sha256"] == runs.summary(run)["params_sha256"]
  assert record["eval"]["checkpoint"] == str(run)
  assert "jax" in record["versions"] and "dtm_jax.main" in record["command"]


def test_saved_features_are_those_that_were_evaluated(evaluated):
  """Another program's k-NN of them comes to the same; each image is there once."""
  train, test = (np.load(evaluated / f"features_{split}.npz") for split in ("train", "test"))
  for saved, count in ((train, 64), (test, 32)):
    assert (saved["features"].shape, saved["features"].dtype) == ((count, 96), np.float32)
    assert (saved["labels"].shape, saved["labels"].dtype) == ((count,), np.int32)
    assert len(np.unique(saved["features"], axis=0)) == count
  vote = KNeighborsClassifier(20, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07))
  score = vote.fit(train["features"], train["labels"]).score(test["features"], test["labels"])
  assert score == runs.summary(evaluated)["knn_top1"]
  assert not [path for path in evaluated.iterdir() if path.name.startswith(".")]


def test_a_damaged_summary_is_told(tmp_path, evaluated, run, capsys):
  for name, content in {"config.json": (evaluated / "config.json").read_text(), "summary.json": "{"}.items():
    (tmp_path / name).write_text(content)
  assert main.main(arguments(run, tmp_path, **LIMITS, eval__fewshot="(1,5)", eval__save_features=True)) == 2
  error = capsys.readouterr().err
  assert f"error: {tmp_path / 'summary.json'} cannot be read" in error
  assert "Traceback" not in error


def test_the_same_command_again_is_complete(evaluated, run, capsys):
  before = {path: path.stat().st_mtime_ns for path in evaluated.rglob("*") if path.is_file()}
  command = arguments(run, evaluated, **LIMITS, eval__fewshot="(1,5)", eval__save_features=True)
  assert main.main(command) == 0
  assert f"{evaluated} is complete" in capsys.readouterr().err
  assert {path: path.stat().st_mtime_ns for path in evaluated.rglob("*") if path.is_file()} == before


def fails(capsys, command: list[str]) -> str:
  capsys.readouterr()
  assert main.main(command) == 2
  stderr = capsys.readouterr().err
  assert "Traceback" not in stderr
  last = stderr.splitlines()[-1]
  assert last.startswith("error: ")
  return last.removeprefix("error: ")


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"eval__checkpoint": ""}, "give config.eval.checkpoint: the work folder of a run, or a weights file"),
    ({"eval__checkpoint": "/no/such"}, "/no/such does not exist; name the work folder of a run, or a weights file"),
    ({"eval__checkpoint": str(GOLDEN / "student_tiny.pth")}, "name some: config.data.source="),
    ({"eval__checkpoint": str(GOLDEN)}, "golden"),
    ({"eval__linear_solver": "adam"}, "config.eval.linear_solver='adam' is not one of lbfgs, sgd, lars"),
    ({"eval__fewshot": "(5,0)"}, "config.eval.fewshot=(5, 0) must be different positive numbers"),
    ({"eval__fewshot": "(5,5)"}, "config.eval.fewshot=(5, 5) must be different positive numbers"),
    (only(), "nothing to evaluate"),
    ({"task": "pretrain"}, "config.data.source='checkpoint' is for config.task='evaluate'"),
    ({"data__source": "folder", "data__path": "/no/such"}, "cannot read the image folder /no/such"),
  ],
  ids=lambda value: str(value)[:30],
)
def test_bad_input_is_one_line_and_nothing_written(run, tmp_path, capsys, settings, message):
  settings = {"eval__checkpoint": run} | settings
  assert message in fails(capsys, arguments(settings.pop("eval__checkpoint"), tmp_path / "out", **settings))
  assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused(evaluated, run, tmp_path, capsys):
  told = fails(capsys, arguments(run, evaluated, **LIMITS, eval__fewshot="(1,5)", eval__knn_k=5))
  assert "holds another run: config.eval.knn_k is 20 there and 5 here, config.eval.save_features is True" in told
  assert "holds another run: config.task is 'pretrain' there and 'evaluate' here, " in fails(
    capsys, arguments(run, run)
  )
  assert "holds another run: config.task is 'evaluate' there and 'pretrain' here;" in fails(
    capsys, ["dtm", *runs.options(evaluated)]
  )
  assert f"{evaluated} " in fails(capsys, arguments(evaluated, tmp_path / "out"))  # it has no weights


def test_a_checkpoint_that_went_on_is_another(evaluated, run, tmp_path, capsys):
  copy = shutil.copytree(evaluated, tmp_path / "copy")
  record = json.loads((copy / "config.json").read_text())
  (copy / "config.json").write_text(json.dumps(record | {"params_sha256": "0"}))
  told = fails(capsys, arguments(run, copy, **LIMITS, eval__fewshot="(1,5)", eval__save_features=True))
  assert "was begun with params_sha256='0', and now it is" in told


def test_images_without_classes(run, tmp_path, capsys):
  images = tmp_path / "images"
  images.mkdir()
  for i in range(20):
    Image.fromarray(np.full((20, 24, 3), 10 * i, np.uint8)).save(images / f"{i:02}.png")
  data = {"data__source": "folder", "data__path": images, "data__num_workers": 0}
  assert "the images have no classes" in fails(capsys, arguments(run, tmp_path / "out", **data))
  command = arguments(run, tmp_path / "out", **data, **only(), eval__save_features=True)
  assert main.main(command) == 0
  record = json.loads((tmp_path / "out" / "config.json").read_text())
  assert record["data"]["image_size"] == 16  # the model's, not the default
  saved = [np.load(tmp_path / "out" / f"features_{split}.npz") for split in ("train", "test")]
  assert [saved[i]["labels"].tolist() for i in range(2)] == [[-1] * 18, [-1] * 2]


def test_other_images_under_the_same_settings_are_refused(run, tmp_path, capsys):
  def write(name, low, high):
    for label in range(2):
      (tmp_path / name / str(label)).mkdir(parents=True)
      for i in range(20):
        pixels = np.random.default_rng(i).integers(low, high, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name / str(label) / f"{i:02}.png")

  write("dark", 0, 9)
  write("bright", 0, 250)
  shutil.copytree(tmp_path / "dark", tmp_path / "moved")
  data = {"data__source": "folder", "data__num_workers": 0, "eval__batch_size": 3}

  def command(name):
    return arguments(run, tmp_path / "out", **data, **only("knn"), data__path=tmp_path / name)

  assert main.main(command("dark")) == 0
  assert "was begun with images_sha256={" in fails(capsys, command("bright"))
  assert main.main(command("moved")) == 0


def test_what_is_set_goes_before_the_run():
  """A run's data, or another source with the run's normalisation and crop."""
  trained = config_lib.Config(
    data=DataConfig(
      source="folder", path="a", mean=(0.1, 0.2, 0.3), eval_crop=1.0, num_workers=0, image_size=32, num_masked=2
    )
  )
  student = ViT(width=8, depth=1, heads=1, layer_scale=0, patch_size=16, grid=(2, 2), out_dim=4)
  checkpoint = evaluation.Checkpoint(pathlib.Path("run"), "student", 3, student, {}, None, trained)

  def data_of(**given) -> DataConfig:
    return evaluation.with_data_of(checkpoint, config_lib.Config(task="evaluate", data=DataConfig(**given))).data

  assert data_of(source="checkpoint") == trained.data
  moved = data_of(source="checkpoint", path="b", num_workers=2)
  assert (moved.source, moved.path, moved.num_workers, moved.mean) == ("folder", "b", 2, (0.1, 0.2, 0.3))
  other = data_of(source="tfds", name="cifar10")
  assert (other.source, other.name, other.path, other.num_workers) == ("tfds", "cifar10", "", 8)
  assert (other.mean, other.eval_crop, other.image_size) == ((0.1, 0.2, 0.3), 1.0, 32)
  assert data_of(source="tfds", mean=(0.5, 0.5, 0.5)).mean == (0.5, 0.5, 0.5)


def test_which_images_are_the_runs_choice_is_told(run, caplog):
  """What the command sets to its default cannot be told from what it does not set."""
  config = evaluate.get_config()
  config.eval.checkpoint = str(run)
  with caplog.at_level("INFO", logger="absl"):
    evaluation.build(config_lib.resolve(config))
  assert f"images as {run} has them: source=synthetic, eval_split=test" in caplog.text


def test_a_record_of_an_earlier_version_is_read(run, tmp_path):
  """Settings that came later have the defaults that do what was done then."""
  copy = shutil.copytree(run, tmp_path / "copy")
  record = json.loads((copy / "config.json").read_text())
  for name in ("checkpoint", "linear", "linear_solver", "fewshot", "fewshot_seeds", "save_features"):
    del record["eval"][name]
  del record["optim"]["layer_decay"]
  (copy / "config.json").write_text(json.dumps(record))
  restored = restore.restore_run(copy)
  assert params_sha256(restored.params) == runs.summary(run)["params_sha256"]
  assert restored.config.optim.layer_decay == 1.0
  assert main.main(["dtm", *runs.options(copy, eval__knn=True)]) == 0  # complete, and the same run


@pytest.mark.parametrize(
  ("name", "kind"),
  [("student_tiny", "student"), ("finetune_tiny", "classifier"), ("clip_vision_tiny", "clip_vision")],
)
def test_weights_files_on_named_data(tmp_path, name, kind):
  data = {"data__source": "synthetic", "data__num_workers": 0}
  path = GOLDEN / f"{name}.pth"
  assert main.main(arguments(path, tmp_path, **data, **LIMITS, **only("knn"), eval__save_features=True)) == 0
  summary = runs.summary(tmp_path)
  assert (summary["kind"], summary["step"]) == (kind, 0)
  assert 0 < summary["knn_top1"] <= 1


def test_a_sweep_of_learning_rates(run, tmp_path):
  settings = {"eval__linear_solver": "lars", "eval__linear_epochs": 2, "eval__linear_batch_size": 16}
  assert main.main(arguments(run, tmp_path, **LIMITS, **only("linear"), **settings)) == 0
  summary = runs.summary(tmp_path)
  assert summary["linear"]["solver"] == "lars"
  assert {float(rate) for rate in summary["linear"]["held_out_top1"]} <= {*LEARNING_RATES["lars"]}
  assert "knn_top1" not in summary and "fewshot_top1" not in summary


def test_a_stop_is_between_batches_or_results(run, tmp_path):
  """It leaves no summary, and the same command comes to its end."""
  settings = evaluate.get_config()
  settings.eval.update(checkpoint=str(run), batch_size=24, max_train_images=64, max_test_images=32, linear=False)
  settings.eval.fewshot = ()
  config = config_lib.resolve(settings)
  for polls in (2, 5):  # three batches of training images, two of test images, one result
    asked = iter(range(100))
    assert not evaluation.run(config, tmp_path, "test", lambda asked=asked, polls=polls: next(asked) >= polls)
    assert not (tmp_path / "summary.json").exists()
  assert evaluation.run(config, tmp_path, "test", lambda: False)
  assert runs.summary(tmp_path)["knn_top1"] == runs.summary(run)["knn_top1"]
  assert len(runs.rows(tmp_path)) == 1


def test_a_classifier_gives_what_its_head_is_given():
  """Its features times the head's kernel are its logits."""
  kind, sizes, params = load_torch(GOLDEN / "finetune_tiny.pth")
  model = Classifier(**sizes, layer_scale=0.0)
  size = sizes["grid"][0] * sizes["patch_size"]
  images = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), np.uint8)
  config = config_lib.Config(task="evaluate")
  features = make_feature_fn(config, model)(params, images)
  logits = model.apply({"params": params}, normalize(images, config.data.mean, config.data.std))
  np.testing.assert_allclose(features @ params["head"]["kernel"] + params["head"]["bias"], logits, atol=1e-6)
