"""What is written, against torch's own reader and the models of `numerics`; and back, bit for bit."""

import functools
import os
import pathlib
import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest
import torch

from dtm_jax.convert import load_torch, save_hugging_face, save_torch, to_state_dict
from dtm_jax.convert.layouts import flatten, relative_position_index
from dtm_jax.errors import InputError
from dtm_jax.models.variants import Variant
from dtm_jax.numerics import torch_models

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
FILES = ("student_tiny.pth", "finetune_tiny.pth", "clip_vision_tiny.pth")


@functools.cache
def golden(name: str) -> tuple[str, dict, dict]:
  return load_torch(GOLDEN / name)


def torch_state(path: pathlib.Path, **options) -> dict[str, torch.Tensor]:
  saved = torch.load(path, weights_only=True, **options)
  return saved.get("model", saved)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("mmap", [False, True])
def test_the_files_tensors_come_back_bit_for_bit(tmp_path, name, mmap):
  kind, _, params = golden(name)
  save_torch(tmp_path / "out.pth", kind, params)
  expected, actual = torch_state(GOLDEN / name), torch_state(tmp_path / "out.pth", mmap=mmap)
  assert actual.keys() == expected.keys()
  for key, tensor in expected.items():
    assert actual[key].dtype == tensor.dtype, key
    assert torch.equal(actual[key], tensor), key


@pytest.mark.parametrize("name", FILES)
def test_parameters_come_back_bit_for_bit(tmp_path, name):
  kind, model, params = golden(name)
  save_torch(tmp_path / "out.pth", kind, params)
  assert load_torch(tmp_path / "out.pth")[:2] == (kind, model)
  actual, expected = flatten(load_torch(tmp_path / "out.pth")[2]), flatten(params)
  assert actual.keys() == expected.keys()
  for path, value in expected.items():
    np.testing.assert_array_equal(actual[path], value, err_msg=path)


@pytest.mark.parametrize(
  ("name", "module", "outputs"),
  [
    ("student_tiny.pth", torch_models.Student, "out_dim"),
    ("finetune_tiny.pth", torch_models.Classifier, "num_classes"),
  ],
)
def test_the_reference_models_take_all_of_it(tmp_path, name, module, outputs):
  kind, model, params = golden(name)
  save_torch(tmp_path / "out.pth", kind, params)
  size = Variant(model["width"], model["depth"], model["heads"], layer_scale=0.1)
  reference = module(size, model["grid"], model["patch_size"], model[outputs])
  reference.load_state_dict(torch_state(tmp_path / "out.pth"), strict=True)


def test_entries_are_stored_aligned_and_the_same_every_time(tmp_path):
  kind, _, params = golden("student_tiny.pth")
  for name in ("a.pth", "b.pth"):
    save_torch(tmp_path / name, kind, params)
  data = (tmp_path / "a.pth").read_bytes()
  assert data == (tmp_path / "b.pth").read_bytes()
  with zipfile.ZipFile(tmp_path / "a.pth") as archive:
    assert archive.testzip() is None  # checksums
    for info in archive.infolist():
      assert info.compress_type == zipfile.ZIP_STORED
      name_bytes, extra_bytes = np.frombuffer(data[info.header_offset + 26 :][:4], "<u2")
      assert (info.header_offset + 30 + int(name_bytes) + int(extra_bytes)) % 64 == 0, info.filename


@pytest.mark.parametrize(
  "order",
  [np.ascontiguousarray, np.asfortranarray, lambda x: np.repeat(x, 2, axis=0)[::2]],
  ids=["rows", "columns", "every other"],
)
def test_arrays_in_any_memory_order_and_jax_arrays_are_written(tmp_path, order):
  kind, _, params = golden("student_tiny.pth")
  odd = jax.tree.map(order, params)
  odd["norm"] = jax.device_put(params["norm"])
  save_torch(tmp_path / "odd.pth", kind, odd)
  save_torch(tmp_path / "plain.pth", kind, params)
  assert (tmp_path / "odd.pth").read_bytes() == (tmp_path / "plain.pth").read_bytes()


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (8, 8)])
def test_index_of_the_bias_tables(grid):
  """Against offsets written out pair by pair."""
  down, across = grid
  patches = [(y, x) for y in range(down) for x in range(across)]
  index, last = relative_position_index(grid), (2 * down - 1) * (2 * across - 1)
  assert (index[0, 0], *np.unique(index[0, 1:]), *np.unique(index[1:, 0])) == (last + 2, last, last + 1)
  for i, (y, x) in enumerate(patches):
    for j, (v, u) in enumerate(patches):
      assert index[1 + i, 1 + j] == (y - v + down - 1) * (2 * across - 1) + x - u + across - 1


def changed(params: dict, path: str, value: np.ndarray | None) -> dict:
  """A copy with one leaf replaced, or without it."""
  branch, _, rest = path.partition("/")
  new = changed(params.get(branch, {}), rest, value) if rest else value
  return {name: part for name, part in (params | {branch: new}).items() if part is not None}


@pytest.mark.parametrize(
  ("path", "value", "complaint"),
  [
    ("norm/bias", np.full(48, np.nan, np.float32), "norm/bias has values that are NaN"),
    ("block_1/mlp/fc1/bias", np.ones(191, np.float32), r"block_1/mlp/fc1/bias of shape \[192\] is not among"),
    ("block_1/gamma_1", None, "block_1/gamma_1 of shape"),
    ("pos_embed", np.ones(3, np.float32), "that no student has: pos_embed"),
    ("cls_token", None, "cls_token of shape"),
    ("patch_embed/kernel", None, "patch_embed/kernel with 4 dimensions"),
  ],
)
@pytest.mark.parametrize("save", [save_torch, save_hugging_face])
def test_parameters_of_something_else_are_refused_and_nothing_is_written(tmp_path, path, value, complaint, save):
  params = changed(golden("student_tiny.pth")[2], path, value)
  with pytest.raises(InputError, match=complaint):
    save(tmp_path / "out.pth", "student", params)
  assert not list(tmp_path.iterdir())


def test_a_grid_that_is_not_square_is_refused(tmp_path):
  kind, _, params = golden("finetune_tiny.pth")
  for i in range(3):
    params = changed(params, f"block_{i}/attn/rel_pos_bias", np.ones((7 * 15 + 3, 3), np.float32))
  with pytest.raises(InputError, match="108 rows is not for a square grid"):
    save_torch(tmp_path / "out.pth", kind, params)


def test_other_kinds_are_refused(tmp_path):
  with pytest.raises(InputError, match="'teacher' is not a kind"):
    to_state_dict("teacher", {})
  with pytest.raises(InputError, match="no Hugging Face layout"):
    save_hugging_face(tmp_path / "out", "clip_vision", golden("clip_vision_tiny.pth")[2])


@pytest.mark.parametrize("save", [save_torch, save_hugging_face])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, save):
  """A limit on file sizes stands for the disk; in a child, because it cannot be taken back."""
  kind, _, params = golden("student_tiny.pth")
  out = tmp_path / "out"
  save(out, kind, params)
  before = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
  program = f"""
import resource, signal, sys
from dtm_jax.convert import load_torch, {save.__name__}
kind, _, params = load_torch({str(GOLDEN / "student_tiny.pth")!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
  {save.__name__}({str(out)!r}, kind, params)
except Exception as error:
  sys.exit(f"{{type(error).__name__}}: {{error}}")
"""
  child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment())
  assert child.returncode == 1
  assert child.stderr.startswith(f"InputError: cannot write {out} (")
  assert {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def environment() -> dict[str, str]:
  return os.environ | {"PYTHONPATH": str(ROOT)}
