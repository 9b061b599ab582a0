"""Writes PyTorch's zip format without PyTorch: tensors in nested dicts, for `torch.load(weights_only=True)`.

`data.pkl` is a pickle that calls torch's tensor builder by name. CPython's
pickler would import what it names, so the few opcodes are put together here.
Entries are stored, each at a multiple of 64 bytes, which `torch.load(mmap=True)` needs.
"""

import math
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from dtm_jax.convert.torch_file import DTYPES

_STORAGES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
_TOP = "archive"  # torch names the folder after the file; any name is read
_ALIGNMENT = 64
_LOCAL_HEADER_BYTES = 30  # zip APPNOTE 4.3.7, before the name
_PADDING = struct.Struct("<2sH")  # id and size of an extra field


class _Global(NamedTuple):
  """Something that the reader knows by name."""

  module: str
  name: str


def _call(function: _Global, arguments: bytes) -> bytes:
  return _dump(function, {}) + pickle.MARK + arguments + pickle.TUPLE + pickle.REDUCE


def write_torch(path: pathlib.Path, saved: Mapping) -> None:
  """Writes nested dicts of arrays; the same input gives the same bytes.

  Args:
    path: Of the file.
    saved: Names -> arrays or more dicts. An array that occurs twice is written
      once, and its tensors share a storage.

  Raises:
    OSError: it cannot be written.
  """
  storages: dict[int, tuple[int, np.ndarray]] = {}
  program = pickle.PROTO + b"\x02" + _dump(saved, storages) + pickle.STOP
  with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
    _add(archive, "data.pkl", program)
    _add(archive, "byteorder", b"little")
    for key, array in storages.values():
      _add(archive, f"data/{key}", array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    _add(archive, "version", b"3\n")


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
  info = zipfile.ZipInfo(f"{_TOP}/{name}")
  start = archive.fp.tell() + _LOCAL_HEADER_BYTES + len(info.filename) + _PADDING.size
  padding = -start % _ALIGNMENT
  info.extra = _PADDING.pack(b"FB", padding) + b"Z" * padding
  archive.writestr(info, data)


def _dump(
  value: Mapping | np.ndarray | _Global | tuple | str | int, storages: dict[int, tuple[int, np.ndarray]]
) -> bytes:
  match value:
    case Mapping():
      items = b"".join(_dump(part, storages) for item in value.items() for part in item)
      return _EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS
    case _Global():
      return pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode()
    case str():
      text = value.encode()
      return pickle.BINUNICODE + struct.pack("<I", len(text)) + text
    case int():
      digits = pickle.encode_long(value)
      return pickle.LONG1 + bytes([len(digits)]) + digits
    case tuple():
      return pickle.MARK + b"".join(_dump(part, storages) for part in value) + pickle.TUPLE
    case np.ndarray():
      return _dump_tensor(value, storages)
  raise TypeError(type(value))


def _dump_tensor(array: np.ndarray, storages: dict[int, tuple[int, np.ndarray]]) -> bytes:
  """A call of torch's builder: storage, offset, shape, strides, requires_grad, hooks."""
  key, _ = storages.setdefault(id(array), (len(storages), array))
  storage = ("storage", _Global("torch", _STORAGES[array.dtype]), str(key), "cpu", array.size)
  strides = tuple(math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim))
  arguments = b"".join(_dump(part, storages) for part in (0, array.shape, strides))
  arguments = _dump(storage, storages) + pickle.BINPERSID + arguments + pickle.NEWFALSE + _EMPTY_DICT
  return _call(_Global("torch._utils", "_rebuild_tensor_v2"), arguments)


_EMPTY_DICT = _call(_Global("collections", "OrderedDict"), b"")
