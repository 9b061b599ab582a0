"""The restricted reader of torch.save files, against what torch itself saves, and against files that mean harm."""

import argparse
import collections
import io
import os
import pathlib
import pickle
import re
import struct
import zipfile

import numpy as np
import pytest
import torch

from dtm_jax.convert import torch_file
from dtm_jax.convert.torch_file import TorchModule, map_torch
from dtm_jax.errors import InputError


def read_torch(path: pathlib.Path):
  return map_torch(path)[0]


@pytest.fixture
def path(tmp_path) -> pathlib.Path:
  return tmp_path / "weights.pt"


def write_archive(path: pathlib.Path, program: bytes, compression=zipfile.ZIP_STORED, **entries: bytes) -> None:
  """A file in torch.save's layout around any pickle."""
  with zipfile.ZipFile(path, "w", compression) as archive:
    archive.writestr("archive/data.pkl", program)
    for name, data in entries.items():
      archive.writestr(f"archive/data/{name}", data)


def tensor_program(numel: int, shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> bytes:
  """The pickle of one float32 tensor on the storage `data/s`, with any claims about it."""

  class Storage:
    pass

  class Pickler(pickle.Pickler):
    def persistent_id(self, obj):
      return ("storage", torch.FloatStorage, "s", "cpu", numel) if isinstance(obj, Storage) else None

  class Tensor:
    def __reduce__(self):
      arguments = (Storage(), offset, shape, strides, False, collections.OrderedDict())
      return torch._utils._rebuild_tensor_v2, arguments

  stream = io.BytesIO()
  Pickler(stream, protocol=2).dump(Tensor())
  return stream.getvalue()


def refusal(path: pathlib.Path) -> str:
  with pytest.raises(InputError) as caught:
    read_torch(path)
  message = str(caught.value)
  assert "\n" not in message
  assert str(path) in message
  return message.replace(str(path), "FILE")  # pytest's folder has words of the test's name


@pytest.mark.parametrize(
  "name", ["float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"]
)
def test_every_dtype_comes_back_bit_for_bit(path, name):
  torch.manual_seed(0)
  saved = (torch.randn(3, 5) * 3).to(getattr(torch, name))
  torch.save({"x": saved}, path)
  actual = read_torch(path)["x"]
  assert actual.dtype.name == name
  np.testing.assert_array_equal(actual.astype(np.float64), saved.to(torch.float64).numpy())


def test_views_share_a_storage_and_keep_their_strides(path):
  base = torch.arange(60.0).reshape(5, 12)
  views = {"base": base, "transposed": base.T, "slice": base[1:4, 2::3], "row": base[3], "scalar": base[2, 7]}
  torch.save(views | {"empty": base[:0]}, path)
  read = read_torch(path)
  for name, view in views.items():
    np.testing.assert_array_equal(read[name], view.numpy(), err_msg=name)
  assert read["empty"].shape == (0, 12)
  assert np.shares_memory(read["base"], read["slice"])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_containers_numbers_and_parameters(path, protocol):
  saved = {
    "state": collections.OrderedDict(w=torch.nn.Parameter(torch.ones(2, 3))),
    "epoch": 7,
    "best": 1.5,
    "names": ["a", ("b", None)],
    "size": torch.ones(4, 2).size(),
    "args": argparse.Namespace(lr=0.1),
  }
  torch.save(saved, path, pickle_protocol=protocol)
  read = read_torch(path)
  np.testing.assert_array_equal(read["state"]["w"], np.ones((2, 3)))
  assert (read["epoch"], read["best"], read["names"], read["size"]) == (7, 1.5, ["a", ("b", None)], (4, 2))
  assert read["args"].lr == 0.1
  assert not isinstance(read["args"], argparse.Namespace)


def test_state_dict_of_a_module_with_its_metadata(path):
  module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
  torch.save(module.state_dict(), path)
  read = read_torch(path)
  assert list(read) == list(module.state_dict())
  np.testing.assert_array_equal(read["0.weight"], module[0].weight.detach())


class Inner(torch.nn.Module):
  def __init__(self):
    super().__init__()
    self.linear = torch.nn.Linear(3, 2).half()
    self.register_buffer("steps", torch.tensor(5))
    self.sizes = [1, 2]

  def forward(self, x):
    return self.linear(x)


class Outer(torch.nn.Module):
  def __init__(self):
    super().__init__()
    self.inner = Inner()
    self.scale = torch.nn.Parameter(torch.ones(2))
    self.resolution = 224

  def forward(self, x):
    return self.inner(x) * self.scale


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_modules_become_their_attributes(path):
  module = Outer()
  torch.jit.save(torch.jit.script(module), path)
  read = read_torch(path)
  assert isinstance(read, TorchModule)
  assert (read.resolution, read.inner.sizes, int(read.inner.steps)) == (224, [1, 2], 5)
  np.testing.assert_array_equal(read.inner.linear.weight, module.inner.linear.weight.detach())
  np.testing.assert_array_equal(read.scale, [1, 1])


@pytest.mark.parametrize(
  ("victim", "name"),
  [
    (os.system, r"(posix|nt)\.system"),
    (eval, r"(builtins|__builtin__)\.eval"),
    (getattr, r"(builtins|__builtin__)\.getattr"),
    (torch.load, r"torch\.serialization\.load"),
    (np.fromfile, r"numpy(\.[\w.]+)?\.fromfile"),
  ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_hostile_pickle_is_refused_by_name_and_does_nothing(path, tmp_path, victim, name, protocol):
  mark = tmp_path / "executed"

  class Hostile:
    def __reduce__(self):
      return victim, (f"touch {mark}",)

  write_archive(path, pickle.dumps({"model": Hostile()}, protocol))
  assert re.search(f"asks for {name},", refusal(path))
  assert not mark.exists()


def test_a_hostile_name_stays_one_short_line(path):
  name = "\n\x1b[2J" + "x" * 9999
  program = b"\x80\x04\x8c\x02os" + b"X" + struct.pack("<I", len(name)) + name.encode() + b"\x93."
  write_archive(path, program)
  message = refusal(path)
  assert r"asks for 'os.\n\x1b[2Jxxx" in message
  assert len(message) < 400
  write_archive(
    path, b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x04\x00\x00\x00a\nb\nX\x03\x00\x00\x00cpuK\x01tQ."
  )
  assert r"has no entry ''data/a\nb\n''" in refusal(path)


def test_dotted_names_do_not_reach_through_an_allowed_class(path):
  write_archive(path, b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93.")
  assert "asks for collections.OrderedDict.fromkeys" in refusal(path)


@pytest.mark.parametrize(
  ("name", "lasting"),
  [("torch._utils _rebuild_tensor_v2", torch_file._tensor), ("__torch__ Module", TorchModule)],
)
def test_a_pickle_cannot_change_what_the_next_load_uses(path, name, lasting):
  """BUILD with slot state sets attributes on whatever it gets: here on a tensor's builder, and on a class."""
  module, attribute = name.encode().split()
  write_archive(path, b"\x80\x02c%s\n%s\n(N}X\x07\x00\x00\x00plantedK\x01stb." % (module, attribute))
  assert "a state for what has none" in refusal(path)
  assert not hasattr(lasting, "planted")


def nested(levels: int = 100) -> bytes:
  """Leaves a tuple of two references to a tuple of two references to ...: a walk through it never ends."""
  return b")q\x00" + b"h\x00\x86q\x00" * levels


ORDERED_DICT = b"ccollections\nOrderedDict\n"


@pytest.mark.parametrize(
  ("program", "message"),
  [
    (b"\x8f(" + nested() + b"\x90", "uses EMPTY_SET"),
    (ORDERED_DICT + b"](" + nested() + b"N\x86e\x85R", "does not read"),
    (nested() + b"X\x01\x00\x00\x00x\x93", "a name that is no text"),
    (b"(" + nested() + b"\x8c\x01a\x8c\x01aNK\x01tQ", "not of a storage"),
    (b"(\x8c\x07storage" + nested() + b"\x8c\x01aNK\x01tQ", "not of a storage"),
    (b"(\x8c\x07storage\x8c\x0cFloatStorage" + nested() + b"NK\x01tQ", "not of a storage"),
    (b"(\x8c\x07storage\x8c\x0cFloatStorage\x8c\x01aNNtQ", "not of a storage"),
    (ORDERED_DICT + nested() + b"R", "does not read"),
    (ORDERED_DICT + b"(" + b"N" * 9 + b"tR", "cannot be called so"),
    (b"NK\x01\x85R", "cannot be called so"),
    (b"]N2", "uses DUP"),
    (b"NNa", "items for what is no list"),
    (b"NNNs", "entries for what is no dict"),
    (b"\x8b\x01\x00\x00\x00\x01", "uses LONG4"),
    (b"h\x05", "KeyError"),
    (b"NNb", "a state for what has none"),
  ],
)
def test_programs_that_no_weights_need_end_in_one_line(path, program, message):
  write_archive(path, b"\x80\x04" + program + b".")
  assert message in refusal(path)


@pytest.mark.parametrize("program", [b"}%sNs", b"}(%sNu", b"(%sNd"])
def test_keys_that_take_for_ever_to_hash_are_not_hashed(path, program):
  write_archive(path, b"\x80\x02" + program.replace(b"%s", nested()) + b".")
  assert read_torch(path) == {"<tuple>": None}


def test_keys_that_are_neither_text_nor_small_integers_are_told_by_their_type(path):
  torch.save({"a": 1, 2: 3, (4, "b"): 5, 1 << 70: 6, None: 7}, path)
  assert read_torch(path) == {"a": 1, 2: 3, "<tuple>": 5, "<int>": 6, "<NoneType>": 7}


def test_a_huge_memo_index_takes_no_memory(path):
  write_archive(path, b"\x80\x02Nr\xff\xff\xff\xef.")
  assert read_torch(path) is None


@pytest.mark.parametrize(
  ("numel", "shape", "strides", "offset"),
  [
    pytest.param(4, (5,), (1,), 0, id="longer than its storage"),
    pytest.param(4, (2,), (3,), 2, id="steps out of its storage"),
    pytest.param(4, (2,), (1,), -1, id="starts before its storage"),
    pytest.param(4, (2,), (-2,), 0, id="steps before its storage"),
    pytest.param(400, (2,), (1,), 0, id="storage longer than its entry"),
    pytest.param(-1, (2,), (1,), 0, id="negative storage"),
    pytest.param(4, (1 << 40,), (0,), 0, id="expanded without end"),
    pytest.param(4, (1 << 40, 1 << 40), (0, 0), 0, id="size overflows"),
  ],
)
def test_tensors_that_leave_their_storage_are_refused(path, numel, shape, strides, offset):
  write_archive(path, tensor_program(numel, shape, strides, offset), s=np.arange(4, dtype=np.float32).tobytes())
  assert "damaged" in refusal(path)


def test_honest_tensor_of_the_same_making_is_read(path):
  """The case above fails for what it claims, not for how it is written."""
  write_archive(path, tensor_program(4, (2,), (2,), 1), s=np.arange(4, dtype=np.float32).tobytes())
  np.testing.assert_array_equal(read_torch(path), [1, 3])


def test_compressed_entries_are_refused_before_they_grow(path):
  write_archive(path, pickle.dumps("x" * (1 << 20), 2), zipfile.ZIP_DEFLATED)
  assert "compressed" in refusal(path)


def test_missing_storage_is_named(path):
  write_archive(path, tensor_program(4, (2,), (1,)))
  assert "'data/s'" in refusal(path)


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
def test_truncated_file(path, kept):
  torch.save({"w": torch.ones(1000)}, path)
  data = path.read_bytes()
  path.write_bytes(data[: kept if kept >= 1 else int(kept * len(data))])
  assert "truncated" in refusal(path)


def test_entry_that_claims_to_lie_outside_the_file(path):
  torch.save({"w": torch.ones(1000)}, path)
  data = bytearray(path.read_bytes())
  entry = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02"))  # the first central record: data.pkl
  size = len(data) * 2
  data[entry + 20 : entry + 28] = struct.pack("<II", size, size)
  path.write_bytes(data)
  assert "damaged" in refusal(path)


def test_damaged_pickle(path):
  write_archive(path, b"\x80\x02}q\x00X\xff")
  assert "damaged" in refusal(path)


def test_other_files_are_refused(path, tmp_path):
  path.write_bytes(b"\x89PNG" + bytes(100))
  assert "not a PyTorch weights file" in refusal(path)
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("a.txt", b"hello")
  assert "without data.pkl" in refusal(path)
  assert "missing" in refusal(tmp_path / "absent.pt")
  assert "missing" in refusal(tmp_path)


def test_format_before_1_6_is_refused_with_the_remedy(path):
  torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
  assert re.search(r"before 1\.6; torch\.load and torch\.save it once", refusal(path))


def test_big_endian_file_is_refused(path):
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
    archive.writestr("archive/byteorder", b"big")
  assert "big-endian" in refusal(path)
