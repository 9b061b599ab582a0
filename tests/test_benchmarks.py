"""The benchmarks run, and both sides of each do the same work. Their times are nobody's test."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"


def run(script: str, tmp_path: pathlib.Path, *options: str) -> dict:
  """What a benchmark writes."""
  file = tmp_path / "results.json"
  command = [sys.executable, BENCHMARKS / f"{script}.py", "--rounds=1", f"--json={file}", *options]
  # One device, as users have it, and this checkout, installed or not. PyTorch's threads spin where cores are taken.
  environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(BENCHMARKS.parent), "OMP_NUM_THREADS": "1"}
  subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
  return json.loads(file.read_text())


@pytest.mark.slow
@pytest.mark.long
def test_step_has_the_losses_memory_and_flops_of_pytorch(tmp_path):
  # A third step, the first that tells whether the warm-up has left moments behind.
  options = ("--variant=S", "--batch=1", "--rounds=2", "--torch", "eager", "--morphing_share=1", "--peak_tflops=0.5")
  results = run("torch_vs_xla", tmp_path, *options)["results"]
  rows = {row["contender"]: row for row in results["steps"]}
  assert list(rows) == ["XLA", "PyTorch eager", "PyTorch eager SDPA"]
  assert max(row["loss_difference"] for row in rows.values()) < 1e-6  # measured 1.4e-7 over three steps; asked 1e-5
  xla, eager, _ = rows.values()
  # What XLA counts beyond the formula is the bias tables and all that is no matrix product.
  assert 1 < xla["counted_flops"] / results["model_flops"] < 1.05  # measured 1.029
  assert xla["mfu"] * xla["seconds"] * 0.5e12 == pytest.approx(results["model_flops"])
  # The same weights, moments and batch; PyTorch has its index buffers beside.
  assert 0 < eager["state_gigabytes"] / xla["state_gigabytes"] - 1 < 0.01
  gradients = 0.087  # GB, of 21.8 M parameters
  assert all(gradients < row["temporary_gigabytes"] < 4 * gradients for row in rows.values())  # 0.26, 0.10, 0.10
  assert results["morphing_share"]["alone"] > 0


@pytest.mark.slow
def test_morphing_has_the_groups_of_pytorch(tmp_path):
  (row,) = run("morphing", tmp_path, "--batch", "4")["results"]
  assert (row["differ"], row["groupings"]) == (0, 8)


@pytest.mark.slow
def test_records_say_where_they_come_from(tmp_path):
  record = run("host_pipeline", tmp_path)
  assert all(record[name] for name in ("command", "date", "cpu", "cores", "load_average"))
  assert {"dtm_jax", "python", "numpy", "pillow"} <= record["versions"].keys()
