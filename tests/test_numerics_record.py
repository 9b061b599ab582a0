"""Traces made here: by the command, and by the recorder that docs/recording.md gives to paste."""

import pathlib
import re
import shlex

import numpy as np
import pytest
import torch

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


def test_the_pasted_recorder_makes_a_trace_that_is_repeated(tmp_path):
  pasted = {}
  exec(code_after("recorder"), pasted)  # noqa: S102
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
def test_a_config_without_training_is_refused(capsys, monkeypatch, tmp_path, words):
  monkeypatch.chdir(tmp_path)
  assert main(["numerics", *words, f"--config={ROOT}/configs/evaluate.py", "--config.eval.checkpoint=x"]) == 2
  assert "config.task='evaluate' has no training step" in capsys.readouterr().err
  assert not [*tmp_path.iterdir()]
