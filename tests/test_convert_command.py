"""`python -m dtm_jax.convert`."""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch

from dtm_jax import networks, restore
from dtm_jax.checkpoint import CheckpointStore
from dtm_jax.config import Config, DataConfig, ModelConfig, to_json
from dtm_jax.convert import __main__ as command
from dtm_jax.convert import load_torch, writing
from dtm_jax.convert.layouts import flatten
from dtm_jax.convert.transfer import resize_tables, to_classifier
from dtm_jax.optim import create_optimizer
from dtm_jax.train_state import create_train_state, params_sha256

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
STUDENT = GOLDEN / "student_tiny.pth"


def convert(*arguments) -> int:
  return command.main(["convert", *map(str, arguments)])


def sha256(path: pathlib.Path) -> str:
  return hashlib.sha256(path.read_bytes()).hexdigest()


def assert_same(actual: dict, expected: dict) -> None:
  actual, expected = flatten(actual), flatten(expected)
  assert actual.keys() == expected.keys()
  for path, value in expected.items():
    np.testing.assert_array_equal(actual[path], value, err_msg=path)


def test_there_and_back_in_a_process_without_torch(tmp_path):
  """The user's way: two commands, and the tensors of the first file again."""
  for pair in ((STUDENT, tmp_path / "hf"), (tmp_path / "hf", tmp_path / "back.pth")):
    run = [sys.executable, "-X", "importtime", "-m", "dtm_jax.convert", *map(str, pair)]
    child = subprocess.run(run, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    assert not re.search(r"\| +(torch|transformers|jax)$", child.stderr, re.MULTILINE)
    source, target = (path / "model.safetensors" if path.name == "hf" else path for path in pair)
    assert re.findall(r"sha256 (\w{64})", child.stdout) == [sha256(source), sha256(target)]
  expected = torch.load(STUDENT, weights_only=True)["model"]
  actual = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
  assert actual.keys() == expected.keys()
  assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_the_report_names_what_is_not_simply_loaded(tmp_path, capsys):
  state = torch.load(STUDENT, weights_only=True)["model"]
  state = {name: tensor for name, tensor in state.items() if ".attn.relative_position" not in name}
  extra = {"cls_pt_layers.0.gamma_1": torch.ones(1), "ema": torch.ones(1), "cls_token": state["cls_token"][0]}
  torch.save({"model": state | extra}, tmp_path / "in.pth")
  assert convert(tmp_path / "in.pth", tmp_path / "out.pth") == 2
  error = capsys.readouterr().err
  assert "in.pth has other axes of length 1: cls_token; " in error
  assert error.endswith("python -m dtm_jax.convert --lenient makes a clean file of it\n")
  assert convert(tmp_path / "in.pth", tmp_path / "out.pth", "--lenient") == 0
  lines = capsys.readouterr().out.splitlines()
  rows = {line[6:28].strip(): line[28:].split(maxsplit=1) for line in lines[2:7]}
  tables = "blocks.0.attn.relative_position_bias_table, blocks.1.attn.relative_position_bias_table"
  assert rows == {
    "loaded": ["54"],
    "absent, taken as zeros": ["3", f"{tables}, blocks.2.attn.relative_position_bias_table"],
    "left out": ["1", "cls_pt_layers.0.gamma_1"],
    "unknown, left out": ["1", "ema"],
    "reshaped": ["1", "cls_token"],
  }


def test_a_fine_tuning_model_for_larger_images(tmp_path):
  options = ("--num_classes=5", "--tables=shared", "--image_size=96", "--seed=2", "--to=release")
  assert convert(STUDENT, tmp_path / "fine.bin", *options) == 0
  kind, model, params = load_torch(tmp_path / "fine.bin")
  assert (kind, model["grid"], model["num_classes"]) == ("classifier", (12, 12), 5)
  student = resize_tables(load_torch(STUDENT)[2], (8, 8), (12, 12))
  assert_same(params, to_classifier(student, 5, tables="shared", seed=2))


def work_folder(workdir: pathlib.Path) -> None:
  """As a run leaves it, of random parameters: training would take ten times as long."""
  data = DataConfig(source="synthetic", image_size=32, num_masked=8)
  config = Config(data=data, model=ModelConfig(variant="tiny", patch_size=8))
  student = networks.create_student(config, 24)
  shapes = jax.eval_shape(lambda: networks.init_params(config, student))
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
  state = create_train_state(params, create_optimizer(config.optim, lambda step: 0.0))
  with contextlib.closing(CheckpointStore(workdir, keep=1)) as store:
    store.save(state)
  (workdir / "config.json").write_text(json.dumps(to_json(config) | {"target_dim": 24}))


def test_a_work_folder(tmp_path, capsys):
  work_folder(tmp_path / "run")
  assert convert(tmp_path / "run", tmp_path / "out.pth") == 0
  run = restore.restore_run(tmp_path / "run")
  student, params = run.model, run.params
  assert params_sha256(params) in capsys.readouterr().out
  kind, model, written = load_torch(tmp_path / "out.pth")
  assert kind == "student"
  assert model == {name: getattr(student, name) for name in model}
  assert_same(written, params)


@pytest.mark.parametrize(
  ("arguments", "complaint"),
  [
    (["absent.pth", "out.pth"], "weights file absent.pth does not exist"),
    ([STUDENT], "the following arguments are required: OUT"),
    ([STUDENT, "out.pth", "--to=onnx"], "invalid choice"),
    ([STUDENT, "out.pth", "--tables=own"], "give --num_classes too"),
    ([STUDENT, "out.pth", "--image_size=100"], "a multiple of its patches (8 pixels)"),
    ([STUDENT, "out.pth", "--num_classes=0"], "at least one"),
    ([GOLDEN / "finetune_tiny.pth", "out.pth", "--num_classes=3"], "needs a pre-training student"),
    ([GOLDEN / "clip_vision_tiny.pth", "out"], "no Hugging Face layout"),
    ([STUDENT, "taken.pth"], "taken.pth is there already; --overwrite replaces it"),
    ([STUDENT, "taken.pth", "--to=huggingface"], "taken.pth is a file"),
    ([STUDENT, "folder"], "config.json is there already"),
    ([STUDENT, "folder", "--to=release"], "folder is a folder"),
    ([STUDENT, "taken.pth/out.pth"], "cannot write taken.pth/out.pth"),
    (["run", "out.pth"], "run holds no checkpoint of a run"),
    (["listed", "out.pth"], "config.json is not the record of a training run"),
    (["no_width", "out.pth"], "config.json is not the record of a training run"),
    ([STUDENT, "out.safetensors"], "--to=huggingface makes a folder"),
    ([STUDENT, "out.onnx"], "out.onnx is no name for what is written: --to=release writes a file for PyTorch"),
    ([STUDENT, "out.pth", "--num_classes=3", "--seed=-1"], "seed=-1 is negative"),
    ([STUDENT, "out.pth", f"--num_classes={10**15}"], "at most 1000000"),
    ([STUDENT, "out.pth", f"--image_size={8 * 10**9}"], "1 to 128 to a side"),
    (["n" * 300, "out.pth"], "name too long"),
    ([STUDENT, f"{'n' * 300}.pth"], "name too long"),
    ([STUDENT, "/"], "cannot write /: it is no file or folder"),
  ],
)
def test_bad_input_is_told_in_one_line_and_nothing_is_written(tmp_path, monkeypatch, capsys, arguments, complaint):
  monkeypatch.chdir(tmp_path)
  pathlib.Path("taken.pth").write_text("old")
  pathlib.Path("folder").mkdir()
  pathlib.Path("folder/config.json").write_text("{}")
  for name, record in {"run": None, "listed": "[]", "no_width": "{}"}.items():
    (pathlib.Path(name) / "checkpoints" / "3").mkdir(parents=True)
    if record is not None:
      (pathlib.Path(name) / "config.json").write_text(record)
  before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
  assert convert(*arguments) == 2
  output, error = capsys.readouterr()
  assert output == ""
  assert error.startswith("error: ") and error.count("\n") == 1
  assert complaint in error
  assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_an_interrupt_is_told_in_one_line_and_nothing_is_left(tmp_path, monkeypatch, capsys):
  def write_half(path: pathlib.Path, state) -> None:
    path.write_bytes(b"half")
    signal.raise_signal(signal.SIGINT)

  monkeypatch.setattr(writing, "write_torch", write_half)
  before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
  try:
    assert convert(STUDENT, tmp_path / "out.pth") == 130
  finally:
    signal.signal(signal.SIGINT, before)
  assert capsys.readouterr() == ("", "error: interrupted\n")
  assert not list(tmp_path.iterdir())


def test_overwrite_replaces_the_file_even_with_itself(tmp_path):
  (tmp_path / "model.pth").write_bytes(STUDENT.read_bytes())
  (tmp_path / "hf-1.0").mkdir()
  (tmp_path / "hf-1.0" / "config.json").write_text("{}")
  (tmp_path / "hf-1.0" / "preprocessor_config.json").write_text("{}")
  assert convert(tmp_path / "model.pth", tmp_path / "model.pth", "--overwrite") == 0
  assert convert(tmp_path / "model.pth", tmp_path / "hf-1.0", "--overwrite") == 0
  assert json.loads((tmp_path / "hf-1.0" / "config.json").read_text())["model_type"] == "beit"
  assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
    "config.json",
    "model.pth",
    "model.safetensors",
    "preprocessor_config.json",
  ]
