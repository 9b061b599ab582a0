"""Task "finetune" from start to end: where it begins, what it keeps, and how its accuracy is counted."""

import dataclasses
import functools
import itertools
import json
import logging
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import runs
from configs import evaluate, finetune_quickstart, quickstart
from dtm_jax import config as config_lib
from dtm_jax import convert, evaluation, finetuning, main, pretraining, restore, sharding
from dtm_jax.augment import normalize
from dtm_jax.convert.transfer import resize_tables, to_classifier, with_new_head
from dtm_jax.data.sources import Example, open_source
from dtm_jax.data.transforms import eval_image
from dtm_jax.errors import InputError
from dtm_jax.evaluate.accuracy import accuracies
from dtm_jax.train_state import params_sha256

NUM_STEPS, EVALUATE_EVERY = 5, 2
NUM_TEST, TEST_BATCH = 21, 16  # the last batch is not full, and no multiple of the devices


def settings(init="", **changes):
  config = finetune_quickstart.get_config("smoke")
  config.run.update(steps=NUM_STEPS, checkpoint_every_steps=2)
  config.finetune.init = str(init)
  config.eval.update(every_epochs=EVALUATE_EVERY / 64, batch_size=TEST_BATCH, max_test_images=NUM_TEST)  # of 64 steps
  with config.unlocked():
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
  return config_lib.resolve(config)


def run(workdir, init="", *, stop_after=None, **changes) -> bool:
  asked = itertools.count()
  stop = (lambda: False) if stop_after is None else (lambda: next(asked) >= stop_after)
  return finetuning.run(settings(init, **changes), workdir, "test", stop)


@pytest.fixture(scope="module", autouse=True)
def built_once():
  with runs.built_once(finetuning):
    yield


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
  """The work folder of two steps of pre-training."""
  workdir = tmp_path_factory.mktemp("pretrained")
  config = quickstart.get_config("smoke")
  config.eval.update(knn=False, figure_images=0)
  assert pretraining.run(config_lib.resolve(config), workdir, "test", lambda: False)
  return workdir


@pytest.fixture(scope="module")
def finetuned(pretrained, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("finetuned")
  assert run(workdir, pretrained)
  return workdir


@pytest.fixture(scope="module")
def stopped(pretrained, tmp_path_factory):
  """Before its first evaluation: asked before three steps, and before the first of two batches."""
  workdir = tmp_path_factory.mktemp("stopped")
  assert not run(workdir, pretrained, stop_after=3)
  return workdir


@pytest.fixture
def again(stopped, tmp_path):
  """A copy of it to go on with."""
  return shutil.copytree(stopped, tmp_path / "again")


# ------------------------------------------------------------ what a run leaves


def test_a_run_leaves_its_accuracy_pictures_and_checkpoints(finetuned):
  summary = runs.summary(finetuned)
  evaluated = [row for row in runs.rows(finetuned) if "top1" in row]
  assert [row["step"] for row in evaluated] == [2, 4, 5]
  assert all({"top1", "top5", "ema_top1", "ema_top5"} <= row.keys() for row in evaluated)
  assert summary["best_is_ema"] is False or summary["best_top1"] > max(row["top1"] for row in evaluated)
  assert {name: summary[name] for name in ("top1", "ema_top5")} == {n: evaluated[-1][n] for n in ("top1", "ema_top5")}
  assert (summary["num_classes"], summary["steps"]) == (8, NUM_STEPS)
  assert runs.checkpoints(finetuned)[-1] == NUM_STEPS
  assert {path.name for path in (finetuned / "figures").iterdir()} == {"loss.png", "accuracy.png"}
  assert params_sha256(restore.restore_run(finetuned).params) == summary["params_sha256"]


def test_the_best_checkpoint_is_the_one_of_the_highest_score(finetuned):
  summary = runs.summary(finetuned)
  scores = {row["step"]: max(row["top1"], row["ema_top1"]) for row in runs.rows(finetuned) if "top1" in row}
  best = restore.restore_run(finetuned, folder="best")
  assert summary["best_top1"] == max(scores.values())
  assert best.step == summary["best_step"] == min(step for step in scores if scores[step] == max(scores.values()))


def test_the_average_is_of_the_weights_and_not_the_same(finetuned):
  run = restore.restore_run(finetuned)
  assert jax.tree.structure(run.averaged) == jax.tree.structure(run.params)
  assert params_sha256(run.averaged) != params_sha256(run.params)


def test_resume_equals_an_uninterrupted_run(pretrained, finetuned, again):
  assert run(again, pretrained)
  assert runs.rows(again) == runs.rows(finetuned)
  assert runs.summary(again)["params_sha256"] == runs.summary(finetuned)["params_sha256"]
  assert restore.restore_run(again, folder="best").step == runs.summary(finetuned)["best_step"]


def test_a_stop_inside_an_evaluation_makes_it_again(pretrained, finetuned, tmp_path):
  """Asked before three steps, before the first of two batches, and before the second."""
  assert not run(tmp_path, pretrained, stop_after=3 + 1)
  assert [row["step"] for row in runs.rows(tmp_path) if "top1" in row] == []
  assert run(tmp_path, pretrained)
  assert runs.rows(tmp_path) == runs.rows(finetuned)


def test_the_weights_it_began_with_may_be_gone_or_elsewhere(pretrained, again, tmp_path):
  copy = tmp_path / "copy"
  assert not run(again, copy, stop_after=0)
  copy.symlink_to(pretrained)
  assert not run(again, copy, stop_after=0)


@pytest.mark.parametrize("init", ["finetuned", ""])
def test_other_weights_than_it_began_with_are_refused(pretrained, finetuned, again, init):
  with pytest.raises(
    InputError, match=f"the run began with config.finetune.init='{pretrained}', and '.*' is something"
  ):
    run(again, finetuned if init else "")


def test_other_weights_to_begin_with_are_refused_before_the_first_checkpoint_too(again):
  """A run that was killed there has logged losses of what it began with."""
  shutil.rmtree(again / "checkpoints")
  with pytest.raises(InputError, match="was begun with init_sha256="):
    run(again, "")


def test_a_record_without_the_weights_it_began_with_is_of_none(tmp_path):
  """Records before fine-tuning had no such entry."""
  assert not run(tmp_path, stop_after=0)
  record = json.loads((tmp_path / "config.json").read_text())
  del record["init_sha256"]
  (tmp_path / "config.json").write_text(json.dumps(record))
  assert not run(tmp_path, stop_after=0)


# ------------------------------------------------------------ accuracy


def test_every_image_is_counted_once(finetuned):
  """Against logits of the images one by one, on one device."""
  config, checkpoint = settings(), restore.restore_run(finetuned)
  source = open_source(config.data, "eval")
  chosen = finetuning.build(config).evaluation_images(NUM_TEST)
  everything = {eval_image(source[i].image, size=16).tobytes(): source[i].label for i in range(len(source))}
  labels = np.array([everything[image.tobytes()] for image in chosen])
  images = normalize(chosen, config.data.mean, config.data.std)
  logits = np.concatenate([checkpoint.model.apply({"params": checkpoint.params}, image[None]) for image in images])
  order = np.argsort(-logits, axis=1)
  evaluated = next(row for row in runs.rows(finetuned) if row["step"] == NUM_STEPS and "top1" in row)
  assert evaluated["top1"] == np.mean(order[:, 0] == labels)
  assert evaluated["top5"] == np.mean((order[:, :5] == labels[:, None]).any(axis=1))


def test_accuracy_is_the_same_on_one_device(finetuned):
  """The mesh of the tests has eight."""
  parts = finetuning.build(settings())
  devices = np.array(jax.devices()[:1]).reshape(1, 1, 1)
  mesh = jax.sharding.Mesh(devices, parts.mesh.axis_names)
  alone = dataclasses.replace(parts, mesh=mesh, model=parts.model.clone(constrain=sharding.constrain_to(mesh)))
  state = jax.device_put(parts.create_state(), sharding.replicated(alone.mesh))
  assert alone.evaluate(state, lambda: False) == parts.evaluate(parts.create_state(), lambda: False)


@pytest.mark.parametrize(("choice", "step"), [({}, NUM_STEPS), ({"averaged": True}, NUM_STEPS), ({"best": True}, None)])
def test_task_evaluate_finds_the_same_accuracy(finetuned, tmp_path, choice, step):
  config = evaluate.get_config()
  config.eval.update(checkpoint=str(finetuned), classify=True, knn=False, linear=False, fewshot=(), **choice)
  config.eval.update(batch_size=TEST_BATCH, max_test_images=NUM_TEST)
  assert evaluation.run(config_lib.resolve(config), tmp_path, "test", lambda: False)
  step = step or runs.summary(finetuned)["best_step"]
  logged = next(row for row in runs.rows(finetuned) if row["step"] == step and "top1" in row)
  assert runs.summary(tmp_path)["top1"] == logged["ema_top1" if "averaged" in choice else "top1"]


def test_class_names_are_recorded_and_others_told(finetuned, tmp_path, caplog):
  for i in range(80):
    folder = tmp_path / "images" / f"kind{i % 8}"
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), 3 * i, np.uint8)).save(folder / f"{i:02d}.png")
  data = {"data__source": "folder", "data__path": str(tmp_path / "images")}
  assert finetuning.build(settings(**data)).record()["class_names"] == [f"kind{i}" for i in range(8)]
  config = evaluate.get_config()
  config.data.update(source="folder", path=str(tmp_path / "images"))
  config.eval.update(checkpoint=str(tmp_path / "run"), classify=True, knn=False, linear=False, fewshot=())
  shutil.copytree(finetuned, tmp_path / "run")
  record = json.loads((tmp_path / "run" / "config.json").read_text())
  for names, is_told in ([f"kind{i}" for i in range(8)], False), ([*"abcdefgh"], True), (None, False):
    (tmp_path / "run" / "config.json").write_text(json.dumps(record | {"class_names": names}))
    caplog.clear()
    with caplog.at_level("WARNING", logger="absl"):
      evaluation.build(config_lib.resolve(config))
    assert ("the classes of the test images have other names than those of" in caplog.text) == is_told


def test_top_5_needs_more_classes_than_five():
  top = np.array([[2, 0, 1], [1, 2, 0]])
  assert accuracies(top, np.array([2, 0])) == {"top1": 0.5}


# ------------------------------------------------------------ where it begins


def begun(init, **changes):
  parts = finetuning.build(settings(init, **changes))
  state, sha256 = parts.begin()
  return jax.tree.map(np.asarray, state.params), sha256, parts


def assert_same(params, expected):
  jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize("tables", config_lib.BIAS_TABLES)
def test_begins_as_the_student(pretrained, tables):
  student = restore.restore_run(pretrained)
  params, sha256, _ = begun(pretrained, finetune__bias_tables=tables)
  assert_same(params, to_classifier(student.params, 8, tables=tables, seed=0))
  assert sha256 == student.sha256


def test_a_weights_file_is_as_good_as_the_work_folder(pretrained, tmp_path):
  convert.save_torch(tmp_path / "student.pth", "student", restore.restore_run(pretrained).params)
  assert_same(begun(tmp_path / "student.pth")[0], begun(pretrained)[0])


def test_begins_as_a_classifier_of_as_many_classes(finetuned):
  assert_same(begun(finetuned)[0], restore.restore_run(finetuned).params)


def test_other_classes_get_a_new_head_and_that_is_said(finetuned, caplog):
  classifier = restore.restore_run(finetuned)
  config = settings()
  model = finetuning.build(config).model.clone(num_classes=5)
  with caplog.at_level(logging.INFO, logger="absl"):
    params = finetuning.transfer(classifier, config, model)
  assert_same(params, with_new_head(classifier.params, 5, seed=0))
  assert "new head: its 8 classes are not the data's 5" in caplog.text


def test_larger_images_resize_the_tables(pretrained, caplog):
  with caplog.at_level(logging.INFO, logger="absl"):
    params, _, parts = begun(pretrained, data__image_size=24)
  assert "bias tables resized from 4 x 4 to 6 x 6 patches" in caplog.text
  student = restore.restore_run(pretrained)
  assert_same(params, resize_tables(to_classifier(student.params, 8), (4, 4), (6, 6)))
  assert parts.model.apply({"params": params}, np.zeros((1, 24, 24, 3), np.float32)).shape == (1, 8)


def test_from_scratch_differs_by_seed():
  first, sha256, _ = begun("")
  assert sha256 == ""
  assert params_sha256(first) != params_sha256(begun("", run__seed=1)[0])
  assert params_sha256(first) == params_sha256(begun("")[0])


# ------------------------------------------------------------ bad input


def test_another_backbone_is_refused_before_anything_is_written(pretrained, tmp_path):
  with pytest.raises(InputError, match=r"width 96, and config\.model asks for 384; set config\.model\.variant"):
    run(tmp_path / "run", pretrained, model__variant="S")
  assert not (tmp_path / "run").exists()


def test_clip_is_refused():
  with pytest.raises(InputError, match="is CLIP's tower; give a student or classifier"):
    begun(runs.ROOT / "tests/golden/clip_vision_tiny.pth")


def test_no_such_checkpoint():
  with pytest.raises(InputError, match="nowhere does not exist; name the work folder of a run, or a weights file"):
    begun("nowhere")


def test_images_without_classes(tmp_path):
  for i in range(12):
    Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / f"{i:02d}.png")
  with pytest.raises(InputError, match="no classes to learn"):
    begun("", data__source="folder", data__path=str(tmp_path))


def test_a_label_that_is_no_class():
  parts = finetuning.build(settings())
  batch = {"image": np.zeros((8, 16, 16, 3), np.uint8), "label": np.array([0, 1, 2, 3, 8, 5, 6, 7])}
  with pytest.raises(InputError, match=r"1 training labels outside 0\.\.7, such as 8"):
    parts.place(batch)


@pytest.mark.parametrize("setting", [{"data__color_jitter": 0.4}, {"data__num_masked": 3}])
def test_settings_of_pretraining_are_refused(setting):
  with pytest.raises(InputError, match=r"set config\.data\.color_jitter=0 and num_masked=0"):
    settings(**setting)


class _Mislabelled:
  """A source with one label that is no class."""

  def __init__(self, source, index: int):
    self._source, self._index = source, index

  def __getattr__(self, name):
    return getattr(self._source, name)

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index) -> Example:
    example = self._source[index]
    return Example(example.image, 8) if index == self._index else example


@pytest.mark.parametrize("index", [0, 1])
def test_an_evaluation_label_that_is_no_class(index):
  """Told before training where it is among the first looks, and at the evaluation in any case."""
  parts = finetuning.build(settings(eval__max_test_images=None))
  parts = dataclasses.replace(parts, eval_source=_Mislabelled(parts.eval_source, index))
  message = r"1 evaluation labels outside 0\.\.7, such as 8"
  if index == 0:
    with pytest.raises(InputError, match=message):
      parts.begin()
  else:
    state, _ = parts.begin()
    with pytest.raises(InputError, match=message):
      parts.evaluate(state, lambda: False)


# How ml_collections reads a config file.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize(
  ("problem", "message"),
  [
    ({"model.variant": "S"}, "has width 96, and config.model asks for 384; set config.model.variant and patch_size"),
    ({"finetune.init": "nowhere"}, "nowhere does not exist; name the work folder of a run, or a weights file"),
    ("labels", "labels outside 0..7, such as 8; mend them"),
  ],
)
def test_what_does_not_fit_is_one_line_and_exit_2(pretrained, tmp_path, capsys, monkeypatch, problem, message):
  changes = {"finetune.init": pretrained}
  if problem == "labels":
    opened = finetuning.experiment.open_source
    bad = {split: _Mislabelled(opened(settings().data, split), 0) for split in ("train", "eval")}
    build = functools.partial(finetuning.experiment.open_setup, open_source=lambda data, split: bad[split])
    monkeypatch.setattr(finetuning.experiment, "open_setup", build)
  else:
    changes |= problem
  words = [f"--config={runs.ROOT}/configs/finetune_quickstart.py:smoke", f"--workdir={tmp_path / 'run'}"]
  assert main.main(["dtm", *words, *(f"--config.{name}={value}" for name, value in changes.items())]) == 2
  stderr = capsys.readouterr().err
  assert message in stderr.splitlines()[-1] and stderr.splitlines()[-1].startswith("error: ")
  assert "Traceback" not in stderr
  assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_head_for_classes_of_other_names_is_kept_and_told(finetuned, tmp_path, caplog):
  shutil.copytree(finetuned, tmp_path / "run")
  record = json.loads((tmp_path / "run" / "config.json").read_text())
  for names, is_told in (([*"abcdefgh"], True), ([*"hgfedcba"], False)):
    (tmp_path / "run" / "config.json").write_text(json.dumps(record | {"class_names": names}))
    parts = finetuning.build(settings(tmp_path / "run"))
    source = _Mislabelled(parts.train_source, -1)
    source.class_names = [*"hgfedcba"]
    caplog.clear()
    dataclasses.replace(parts, train_source=source).begin()
    assert ("is kept, though its classes have other names than the data's" in caplog.text) == is_told


def test_an_unfinished_run_to_begin_with_is_told_and_so_is_none(pretrained, tmp_path, caplog):
  shutil.copytree(pretrained, tmp_path / "run")
  record = json.loads((tmp_path / "run" / "config.json").read_text())
  for total, is_told in ((record["total_steps"], False), (99, True)):
    (tmp_path / "run" / "config.json").write_text(json.dumps(record | {"total_steps": total}))
    caplog.clear()
    restore.open_checkpoint(tmp_path / "run")
    assert (f"is at step {record['total_steps']} of 99: the run is not complete" in caplog.text) == is_told
  with caplog.at_level(logging.INFO, logger="absl"):
    finetuning.build(settings("")).begin()
  assert "beginning from scratch: config.finetune.init names no run" in caplog.text


def test_that_the_average_was_the_best_is_told(finetuned, tmp_path, caplog):
  shutil.copytree(finetuned, tmp_path / "run")
  summary = json.loads((tmp_path / "run" / "summary.json").read_text())
  for is_ema, averaged in ((True, False), (False, False), (True, True)):
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary | {"best_is_ema": is_ema}))
    caplog.clear()
    restore.open_checkpoint(tmp_path / "run", best=True, averaged=averaged)
    assert ("is that of the averaged weights" in caplog.text) == (is_ema and not averaged)
