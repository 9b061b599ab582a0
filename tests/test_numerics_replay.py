"""Recorded PyTorch runs replayed by the command, and traces that are refused."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from dtm_jax.numerics import report
from dtm_jax.numerics import trace as trace_lib
from dtm_jax.numerics.__main__ import main
from dtm_jax.numerics.replay import Replayed, Tolerances, describe, summarize
from dtm_jax.numerics.trace import Trace, read_trace

GOLDEN = pathlib.Path(__file__).parent / "golden"
PRETRAIN = [f"--student={GOLDEN}/student_tiny.pth", f"--teacher={GOLDEN}/clip_vision_tiny.pth"]
FINETUNE = [f"--model={GOLDEN}/finetune_tiny.pth"]


def run(capsys, *words) -> tuple[int, str, str]:
  """Exit code, standard output and standard error of the command."""
  code = main(["numerics", *map(str, words)])
  return code, *capsys.readouterr()


def exact() -> tuple[Trace, Replayed]:
  """A recorded run, and a replay without any error."""
  trace = read_trace(GOLDEN / "pretrain_trajectory.npz")
  return trace, Replayed(trace["losses"], trace["grad_norms"], trace.final)


def write_changed(path: pathlib.Path, name: str = "pretrain_trajectory", **changes) -> pathlib.Path:
  """A copy of a recorded trace with some arrays changed; None leaves one out."""
  arrays = dict(np.load(GOLDEN / f"{name}.npz")) | changes
  np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
  return path


# Asked are 1e-5, 1e-4 and 2e-5.
@pytest.mark.parametrize(
  ("name", "weights", "steps", "loss", "grad_norm", "param"),
  [
    ("pretrain_trajectory", PRETRAIN, 10, 3e-6, 2.5e-6, 2.4e-6),  # measured 3.3e-7, 2.9e-7, 2.4e-7
    ("finetune_trajectory", FINETUNE, 6, 1.8e-6, None, 4.8e-6),  # measured 1.8e-7, none recorded, 4.8e-7
  ],
)
def test_recorded_runs_are_repeated(capsys, tmp_path, name, weights, steps, loss, grad_norm, param):
  file = tmp_path / "figures.json"
  code, out, _ = run(capsys, "replay", f"--trace={GOLDEN}/{name}.npz", *weights, f"--json={file}")
  assert code == 0
  assert f"XLA repeats the recorded run: {steps} steps" in out
  figures = json.loads(file.read_text())
  assert figures["steps"] == steps == len(figures["per_step"]["loss"])
  assert figures["max_loss_rel_error"] < loss
  assert figures["max_param_abs_error"] < param
  if grad_norm is None:
    assert figures["max_grad_norm_rel_error"] is None
  else:
    assert figures["max_grad_norm_rel_error"] < grad_norm
  recorded = np.load(GOLDEN / f"{name}.npz")
  names = {row["name"] for row in figures["per_tensor"]}
  assert names == {name.removeprefix("final/") for name in recorded if name.startswith("final/")}
  np.testing.assert_array_equal([row["recorded"] for row in figures["per_step"]["loss"]], recorded["losses"])
  assert {"device", "dtype", "matmul_precision", "versions"} <= figures.keys()


def test_what_is_off_stands_first_and_fails():
  trace, replayed = exact()
  name, largest = "blocks.1.mlp.fc2.weight", 3e-5
  final = dict(trace.final) | {name: trace.final[name] + largest * (np.arange(192) == 7)}
  losses = trace["losses"] * np.where(np.arange(10) == 4, 1 + 2e-5, 1)
  off = Trace(trace.path, trace.kind, dict(trace.arrays) | {"losses": losses}, final)
  summary = summarize(off, replayed, Tolerances())
  assert not summary["within_tolerance"]
  assert summary["per_tensor"][0]["name"] == name
  assert summary["max_param_abs_error"] == pytest.approx(largest, rel=0.01)
  errors = [row["rel_error"] for row in summary["per_step"]["loss"]]
  assert np.argmax(errors) == 4
  assert errors[4] == pytest.approx(2e-5, rel=0.01)
  text = describe(summary)
  assert "BEYOND TOLERANCE" in text
  assert text.index(name) < text.index("cls_token")
  assert "... 47 more with smaller errors" in text
  assert len(re.findall(r"^\S+\.(?:weight|bias)", describe(summary, all_tensors=True), re.MULTILINE)) > 30
  assert summarize(off, replayed, Tolerances(loss_rtol=3e-5, param_atol=4e-5))["within_tolerance"]


def test_a_loss_that_is_not_finite_here_is_beyond_any_tolerance(tmp_path):
  trace, replayed = exact()
  losses = np.where(np.arange(10) < 9, replayed.losses, np.nan)
  broken = Replayed(losses, replayed.grad_norms, replayed.final)
  summary = summarize(trace, broken, Tolerances(loss_rtol=1e30))
  assert not summary["within_tolerance"]
  report.write_json(tmp_path / "figures.json", summary)
  read = json.loads((tmp_path / "figures.json").read_text(), parse_constant=pytest.fail)
  assert read["max_loss_rel_error"] == "inf"
  assert read["per_step"]["loss"][9]["here"] == "nan"


def test_exit_codes_of_the_process_without_pytorch(tmp_path):
  program = "import runpy, sys; sys.modules['torch'] = None; runpy.run_module('dtm_jax.numerics', run_name='__main__')"

  def start(*words):
    environment = os.environ | {"PYTHONPATH": str(GOLDEN.parents[1])}  # this checkout, installed or not
    command = [sys.executable, "-c", program, *words]
    return subprocess.run(command, text=True, capture_output=True, cwd=tmp_path, env=environment, check=False)

  final = np.load(GOLDEN / "finetune_trajectory.npz")["final/head.bias"] + 1e-3
  trace = write_changed(tmp_path / "off.npz", "finetune_trajectory", **{"final/head.bias": final})
  done = start("replay", f"--trace={trace}", *FINETUNE)
  assert done.returncode == 1, done.stderr
  assert "BEYOND TOLERANCE" in done.stdout
  done = start("replay", f"--trace={GOLDEN}/loss.npz", *FINETUNE, "--json=figures.json")
  assert done.returncode == 2
  assert len(done.stderr.strip().splitlines()) == 1
  assert not (tmp_path / "figures.json").exists()


# ------------------------------------------------------------ bad traces


def shorter(name: str, axis: int) -> np.ndarray:
  array = np.load(GOLDEN / "pretrain_trajectory.npz")[name]
  return array.take(range(array.shape[axis] - 1), axis)


CHANGES = {
  "missing": ({"masks": None, "lr": None, "kind": None}, "lacks kind, lr; docs"),
  "missing_of_kind": ({"masks": None, "lr": None, "distance": None}, "lacks lr, masks, distance; docs"),
  "unknown_kind": ({"kind": "distil"}, "kind is 'distil', not one of pretrain, finetune"),
  "steps": ({"losses": shorter("losses", 0)}, r"losses has shape \[9\], not \[S\] with S = 10"),
  "mask_shape": ({"masks": shorter("masks", 1)}, r"masks has shape \[10, 3, 64\], not \[S, B, N\] with S = 10, B = 4"),
  "patches": ({"masks": shorter("masks", 2)}, "masks are of 63 patches, the images have 64"),
  "rank": (
    {"per_iteration": np.zeros(10, int)},
    r"per_iteration has shape \[10\], not \[S, L\] or \[S, B, L\] with S = 10, B = 4",
  ),
  "mask_type": ({"masks": np.zeros((10, 4, 64), int)}, "masks is int64, not booleans"),
  "draw_type": ({"iterations": np.ones((10, 2))}, "iterations is float64, not integers"),
  "draws": ({"iterations": np.zeros((10, 2), int)}, "iterations must be from 1 to 10000"),
  "many_draws": ({"iterations": np.full((10, 2), 2**31)}, "iterations must be from 1 to 10000"),
  "many_merges": ({"per_iteration": np.full((10, 2), 65)}, "per_iteration must be from 0 to 64"),
  "split": ({"split": "halves"}, "split is 'halves', not 'alternate' or 'random'"),
  "seed_of_split": ({"split": "random"}, "has drop_path or a random split without the seed"),
  "seed_of_drop_path": ({"drop_path": 0.1}, "has drop_path or a random split without the seed"),
  "drop_path": ({"drop_path": 1.0, "seed": 0}, "config.model.drop_path=1.0 must be in"),
  "seed": ({"split": "random", "seed": -1}, "config.run.seed=-1 must be in"),
  "layer_decay": ({"layer_decay": 1.5}, "config.optim.layer_decay=1.5 must be in"),
  "distance": ({"distance": "cosine"}, "distance is 'cosine', not one of smooth_l1, l1"),
  "patch_size": ({"patch_size": 7}, "patch_size 7 does not divide images of 64 pixels"),
  "nan": ({"losses": np.full(10, np.nan)}, "losses hold NaN or infinity"),
  "nan_final": ({"final/norm.bias": np.full(48, np.inf, np.float32)}, "final/norm.bias hold NaN or infinity"),
  "empty": ({"images_nchw": np.zeros((0, 4, 3, 64, 64))}, r"images_nchw has shape \[0, 4, 3, 64, 64\]"),
  "pickled": ({"lr": np.array([None] * 10, object)}, "cannot be read as a trace .*pickle"),
  "betas": ({"betas": np.array([1.5, 0.9])}, "does not describe a run that can be: config.optim.betas"),
  "final_lacks": ({"final/norm.bias": None}, "lacks final/norm.bias: it is not of a run that began with"),
  "final_unknown": ({"final/fc_norm.bias": np.zeros(3)}, "has unknown final/fc_norm.bias"),
  "final_shape": ({"final/norm.bias": np.zeros(7)}, "has another shape of final/norm.bias"),
  "targets_too": ({"target_tokens": np.zeros((10, 4, 64, 32))}, "holds its target tokens; leave out --teacher"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_bad_traces_are_refused_in_one_line(capsys, tmp_path, case):
  changes, message = CHANGES[case]
  trace = write_changed(tmp_path / "bad.npz", **changes)
  code, _, err = run(capsys, "replay", f"--trace={trace}", *PRETRAIN, f"--json={tmp_path}/figures.json")
  assert code == 2
  assert re.fullmatch(rf"error: .*{message}.*\n", err), err
  assert [path.name for path in tmp_path.iterdir()] == ["bad.npz"]


def npy(header: str) -> bytes:
  return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


DAMAGED_MEMBERS = {
  "no_npy": b"3.5",
  "broken_header": npy("{'descr': '<f4', (((\n"),
  "huge_shape": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000000,)}\n"),
  "huge_product": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999999, 7)}\n"),
  "unknown_type": npy("{'descr': 'spam', 'fortran_order': False, 'shape': (3,)}\n"),
}


def test_files_that_are_no_traces_are_refused(capsys, tmp_path):
  whole = (GOLDEN / "finetune_trajectory.npz").read_bytes()
  files = {"text": b"losses", "nothing": b"", "truncated": whole[:-5000], "flipped": whole[:2000] + b"x" + whole[2001:]}
  for name, content in files.items():
    (tmp_path / name).write_bytes(content)
    code, _, err = run(capsys, "replay", f"--trace={tmp_path / name}", *FINETUNE)
    assert (code, err.count("\n")) == (2, 1), name
    assert "cannot be read as a trace" in err, name
  for name, member in DAMAGED_MEMBERS.items():
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
      archive.writestr("lr.npy", member)
    code, _, err = run(capsys, "replay", f"--trace={tmp_path / name}", *FINETUNE)
    assert (code, err.count("\n")) == (2, 1), name
    assert "cannot be read as a trace" in err, name
  locked = bytearray((tmp_path / "no_npy").read_bytes())
  for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
    locked[locked.index(signature) + flags] |= 1  # encrypted
  (tmp_path / "locked").write_bytes(locked)
  assert "encrypted" in run(capsys, "replay", f"--trace={tmp_path}/locked", *FINETUNE)[2]
  np.save(tmp_path / "array.npy", np.zeros(3))
  assert "not a .npz file" in run(capsys, "replay", f"--trace={tmp_path}/array.npy", *FINETUNE)[2]
  np.savez_compressed(tmp_path / "bomb.npz", images_nchw=np.zeros((1, 1, 3, 2048, 2048)))
  assert "would unpack to" in run(capsys, "replay", f"--trace={tmp_path}/bomb.npz", *FINETUNE)[2]
  assert "does not exist" in run(capsys, "replay", f"--trace={tmp_path}/none.npz", *FINETUNE)[2]


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["--student", "clip_vision_tiny.pth"], "holds a clip_vision; a pretrain trace begins with a student"),
    (["--student", "student_tiny.pth"], "holds no target_tokens; give its CLIP teacher's weights as --teacher"),
    (["--student", "student_tiny.pth", "--teacher", "student_tiny.pth"], "holds a student, not a CLIP vision tower"),
    ([], "give the weights that it began with as --student"),
    (["--model", "finetune_tiny.pth", "--student", "student_tiny.pth"], "is a pretrain trace, which has no --model"),
    (["--students", "x"], "'--students' is not an option of replay"),
  ],
)
def test_weights_that_do_not_fit_are_refused(capsys, monkeypatch, words, message):
  monkeypatch.chdir(GOLDEN)
  code, _, err = run(capsys, "replay", "--trace=pretrain_trajectory.npz", *words)
  assert (code, err.count("\n")) == (2, 1)
  assert message in err


def test_weights_of_other_patches_are_refused(capsys, tmp_path):
  images = np.zeros((10, 4, 3, 32, 32), np.float32)
  changes = {"images_nchw": images, "masks": np.zeros((10, 4, 16), bool), "per_iteration": np.ones((10, 2), int)}
  trace = write_changed(tmp_path / "small.npz", **changes)
  assert "has grid (8, 8)" in run(capsys, "replay", f"--trace={trace}", *PRETRAIN)[2]


def test_an_option_of_the_other_kind_is_named(capsys):
  trace = f"--trace={GOLDEN}/finetune_trajectory.npz"
  assert "trace, which has no --student" in run(capsys, "replay", trace, *FINETUNE, "--student=x")[2]
  assert "trace, which has no --teacher" in run(capsys, "replay", trace, *FINETUNE, "--teacher=x")[2]


def test_targets_in_the_way_are_told_before_the_work(capsys, tmp_path):
  words = ["replay", "--trace=none.npz", *FINETUNE]
  assert "is a folder" in run(capsys, *words, f"--json={tmp_path}")[2]
  assert "is not a folder" in run(capsys, *words, f"--json={GOLDEN}/loss.npz/figures.json")[2]


def test_a_name_too_long_is_told_in_one_line(capsys):
  code, _, err = run(capsys, "replay", f"--trace={'x' * 300}.npz", *FINETUNE)
  assert (code, err.count("\n")) == (2, 1)
  assert "File name too long" in err


def test_an_interrupt_is_told_in_one_line(capsys, monkeypatch):
  # Not by a timer: Python drops an exception that falls into a callback of its garbage collector, and JAX has one.
  monkeypatch.setattr(trace_lib, "read_trace", lambda path: signal.raise_signal(signal.SIGINT))
  before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
  try:
    code, _, err = run(capsys, "replay", f"--trace={GOLDEN}/pretrain_trajectory.npz", *PRETRAIN)
  finally:
    signal.signal(signal.SIGINT, before)
  assert (code, err) == (130, "interrupted\n")


@pytest.mark.parametrize("command", ["record", "compare"])
def test_what_needs_pytorch_says_how_to_install_it(capsys, monkeypatch, tmp_path, command):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setitem(sys.modules, "torch", None)  # which is how Python marks what cannot be imported
  code, _, err = run(capsys, command, *(["--out=t.npz"] if command == "record" else []))
  assert (code, err.count("\n")) == (2, 1)
  assert "pip install -e '.[test]'" in err
  assert not [*tmp_path.iterdir()]
