"""Traces made here: by the command, and by the recorder that docs/recording.md gives to paste."""

import pathlib
import re
import shlex

import numpy as np
import pytest
import torch

from dtm_jax.convert import load_torch
from dtm_jax.models.variants import VARIANTS
from dtm_jax.numerics import torch_models, torch_reference
from dtm_jax.numerics.__main__ import main
from dtm_jax.numerics.case import part_ties
from dtm_jax.numerics.replay import Tolerances, describe, replay, summarize
from dtm_jax.numerics.trace import read_trace

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
SMOKE = f"--config={ROOT}/configs/quickstart.py:smoke"

pytestmark = pytest.mark.filterwarnings("ignore:.*load_module:DeprecationWarning")


def code_after(marker: str) -> str:
  """The fenced block that follows a marker in docs/recording.md."""
  text = (ROOT / "docs" / "recording.md").read_text()
  return re.search(rf"<!-- test: {marker} -->\n```python\n(.*?)```", text, re.DOTALL)[1]


def fitted_teacher(file: pathlib.Path, grid: tuple[int, int]) -> torch_models.ClipVision:
  """The reference tower, its 8 x 8 position embeddings resized by PyTorch."""
  state = torch.load(file, weights_only=True)
  (name,) = [name for name in state if name.endswith("positional_embedding")]
  stored = state[name][1:].T.reshape(1, -1, 8, 8)
  resized = torch.nn.functional.interpolate(stored, grid, mode="bicubic", align_corners=False)
  state[name] = torch.cat([state[name][:1], resized.flatten(2)[0].T])
  return torch_models.load_clip(state)


def test_a_recorded_config_is_repeated(capsys, tmp_path):
  out = tmp_path / "a trace.npz"
  settings = {
    "data.color_jitter": 0.4,  # on the device: recorded as the student saw it
    "run.seed": 3,
    "model.drop_path": 0.5,
    "morphing.split": "random",
    "morphing.granularity": "image",
    "morphing.loss_on": "masked",
    "morphing.protect_first": False,
    "morphing.draws": 1,
    "teacher.normalize_targets": True,
    "optim.accumulate_steps": 2,
    "optim.clip_norm": 0.1,
    "optim.layer_decay": 0.65,
    "optim.warmup_epochs": 0.0,
  }
  words = [f"--config.{name}={value}" for name, value in settings.items()]
  assert main(["numerics", "record", SMOKE, f"--out={out}", "--steps=2", *words]) == 0
  printed = capsys.readouterr().out
  assert "hog tokens with 10% of noise" in printed
  trace = read_trace(out)
  assert trace["per_iteration"].shape == (2, 8, 1)
  assert len(np.unique(trace["per_iteration"])) > 2
  assert trace["target_tokens"].shape == (2, 8, 16, 27)
  assert (trace["layer_decay"], trace.drop_path, trace.split, trace["seed"]) == (0.65, 0.5, "random", 3)
  assert trace["target_tokens"].min() < 0  # histograms are not: this is the noise
  replay_words = re.search(r"replay it: python -m dtm_jax.numerics (.*)", printed)[1]
  measured_times_ten = ["--loss_rtol=2e-6", "--grad_norm_rtol=1e-6", "--param_atol=2.6e-6"]
  assert main(["numerics", *shlex.split(replay_words), *measured_times_ten]) == 0
  assert sorted(path.name for path in tmp_path.iterdir()) == ["a trace.npz", "a trace.student.pth"]
  before = out.read_bytes()
  assert main(["numerics", "record", SMOKE, f"--out={out}"]) == 2
  assert "a trace.npz is there already; --overwrite replaces it" in capsys.readouterr().err
  assert out.read_bytes() == before


@pytest.mark.slow
def test_a_recorded_fine_tuning_is_repeated(capsys, tmp_path):
  size = VARIANTS["tiny"]
  torch.manual_seed(1)
  student = torch_models.Student(size, grid=(4, 4), patch_size=4, out_dim=27)
  torch.save({"model": student.state_dict()}, tmp_path / "student.pth")
  settings = {
    "finetune.init": tmp_path / "student.pth",
    "finetune.mixup": 0.8,
    "finetune.cutmix": 1.0,
    "finetune.erase_prob": 0.5,
    "model.drop_path": 0.5,
    "run.seed": 3,
    "optim.accumulate_steps": 2,
    "optim.base_lr": 0.005,
    "optim.clip_norm": 1.0,
    "optim.layer_decay": 0.65,
    "optim.warmup_epochs": 0.0,
  }
  words = [f"--config.{name}={value}" for name, value in settings.items()]
  config = f"--config={ROOT}/configs/finetune_quickstart.py:smoke"
  assert main(["numerics", "record", config, f"--out={tmp_path}/t.npz", "--steps=3", *words]) == 0
  trace, start = read_trace(tmp_path / "t.npz"), load_torch(tmp_path / "t.model.pth")[2]
  np.testing.assert_allclose(trace["targets"].sum(axis=-1), 1, rtol=1e-6)
  assert ((trace["targets"] > 0.2).sum(axis=-1) == 2).any()  # mixed
  assert (trace["layer_decay"], trace["max_grad_norm"], trace.drop_path, trace["seed"]) == (0.65, 1, 0.5, 3)
  assert trace["grad_norms"].max() > 1
  np.testing.assert_array_equal(start["cls_token"], student.cls_token.detach())
  assert np.abs(trace.final["cls_token"] - start["cls_token"]).max() > 1e-5
  replay_words = re.search(r"replay it: python -m dtm_jax.numerics (.*)", capsys.readouterr().out)[1]
  assert f"--model {tmp_path}/t.model.pth" in replay_words
  # Measured 3.4e-7, 5.5e-7, 5.2e-6: Adam divides small gradients by themselves.
  measured_times_ten = ["--loss_rtol=3.4e-6", "--grad_norm_rtol=5.5e-6", "--param_atol=2e-5"]
  code = main(["numerics", *shlex.split(replay_words), *measured_times_ten])
  assert code == 0, capsys.readouterr().out


def test_the_pasted_recorder_makes_a_trace_that_is_repeated(tmp_path):
  pasted = {}
  exec(code_after("recorder"), pasted)
  torch.manual_seed(0)
  student = torch_models.Student(torch_models.Variant(48, 1, 3, 0.1), grid=(4, 4), patch_size=8, out_dim=32)
  teacher = fitted_teacher(GOLDEN / "clip_vision_tiny.pth", (4, 4))
  settings = {"betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.05}
  optimizer = torch_reference.make_optimizer(student, **settings)
  fixed = {"kind": "pretrain", "distance": "smooth_l1", "patch_size": 8, "max_grad_norm": 0.05}
  recorder = pasted["Recorder"](student, **fixed, **settings)
  recorder.save_start(tmp_path / "start.pth")
  rng = np.random.default_rng(0)
  for step in range(3):
    images = torch.from_numpy(rng.normal(size=(4, 3, 32, 32)).astype(np.float32))
    mask = torch.from_numpy(rng.random((4, 16)) < 0.4)
    draws = {"per_iteration": [3, 4 * step], "iterations": [5, 2]}
    lr = 1e-3 * (step + 1)
    loss, grad_norm = torch_reference.train_step(
      student, teacher, optimizer, images, mask, *draws.values(), lr=lr, max_grad_norm=0.05
    )
    recorder.add(images_nchw=images, masks=mask, **draws, lr=lr, losses=loss, grad_norms=grad_norm)
  recorder.save(tmp_path / "trace.npz")
  trace = read_trace(tmp_path / "trace.npz")
  replayed = replay(trace, tmp_path / "start.pth", GOLDEN / "clip_vision_tiny.pth")
  measured_times_ten = Tolerances(loss_rtol=4.7e-6, param_atol=2e-5, grad_norm_rtol=3.3e-6)
  summary = summarize(trace, replayed, measured_times_ten)
  assert summary["within_tolerance"], describe(summary)


def test_the_pasted_recorder_needs_numpy_and_torch_alone():
  code = code_after("recorder")
  assert re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE) == ["numpy", "torch"]
  assert len(code.splitlines()) < 35


def test_weights_of_a_fine_tuning_are_its_configs(capsys, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  config = f"--config={ROOT}/configs/finetune_quickstart.py:smoke"
  assert main(["numerics", "record", config, "--out=t.npz", f"--student={GOLDEN}/student_tiny.pth"]) == 2
  assert "fine-tuning has no --student and no --teacher; set config.finetune.init" in capsys.readouterr().err
  assert not [*tmp_path.iterdir()]


def test_fine_tuning_is_not_compared(capsys, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  assert main(["numerics", "compare", f"--config={ROOT}/configs/finetune_quickstart.py:smoke"]) == 2
  assert "for fine-tuning there are record and replay" in capsys.readouterr().err
  assert not [*tmp_path.iterdir()]


def test_noise_parts_what_ties_beyond_rounding():
  tokens = np.tile(np.linspace(0, 1, 27, dtype=np.float32), (2, 16, 1)) * np.arange(1, 17)[:, None]
  noisy = part_ties(tokens.astype(np.float32)).astype(np.float64)
  unit = noisy / np.linalg.norm(noisy, axis=-1, keepdims=True)
  scores = np.sort((unit @ unit.swapaxes(1, 2))[:, *np.tril_indices(16, -1)], axis=-1)
  assert np.diff(scores).min() > 1e-6  # measured 6.6e-6; rounding is 1e-7


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["--steps=0"], "--steps=0 must be at least 1"),
    (["--out=trace.np"], "--out=trace.np must end in .npz"),
    (["--config.data.batchsize=3"], "config.data.batchsize does not exist"),
    (["--workdir=x"], "'workdir'"),
    ([f"--student={GOLDEN}/student_tiny.pth"], "has patch_size 8, the config asks for 4"),
    ([f"--student={GOLDEN}/clip_vision_tiny.pth"], "holds a clip_vision, not a pre-training student"),
    ([f"--teacher={GOLDEN}/clip_vision_tiny.pth"], "the teacher's patches have 8 pixels"),
    ([f"--out={GOLDEN}/loss.npz"], "loss.npz is there already; --overwrite replaces it"),
    ([f"--out={GOLDEN}/loss.npz/t.npz"], "loss.npz is not a folder"),
    (["--teacher=none.pt"], "weights file none.pt does not exist"),
  ],
)
def test_what_cannot_be_recorded_is_told_in_one_line(capsys, monkeypatch, tmp_path, words, message):
  monkeypatch.chdir(tmp_path)
  assert main(["numerics", "record", SMOKE, "--out=trace.npz", *words]) == 2
  err = capsys.readouterr().err
  assert err.count("\n") == 1
  assert message in err
  assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["trace.npz", "trace.student.pth"])
def test_a_folder_in_the_way_is_told_before_the_work(capsys, monkeypatch, tmp_path, name):
  monkeypatch.chdir(tmp_path)
  (tmp_path / name).mkdir()
  assert main(["numerics", "record", SMOKE, "--out=trace.npz", "--overwrite", "--teacher=none.pt"]) == 2
  assert f"error: {name} is a folder" in capsys.readouterr().err
  assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("words", [["record", "--out=trace.npz"], ["compare"]])
def test_a_config_that_pytorch_has_no_step_for_is_refused(capsys, monkeypatch, tmp_path, words):
  monkeypatch.chdir(tmp_path)
  assert main(["numerics", *words, f"--config={ROOT}/configs/evaluate.py", "--config.eval.checkpoint=x"]) == 2
  assert "config.task='evaluate' has no training step" in capsys.readouterr().err
  assert main(["numerics", *words, SMOKE, "--config.optim.name=sgd"]) == 2
  assert "config.optim.name='sgd' has no reference in PyTorch here" in capsys.readouterr().err
  assert not [*tmp_path.iterdir()]
