"""Reads PyTorch weight files without PyTorch, and without running anything that they ask for.

A `.pt`/`.pth` file is a zip archive: `data.pkl` describes the objects, and each
tensor's bytes lie uncompressed in an entry of their own, so arrays are views of
the mapped file. A pickle is a program; here it can only name what `_Unpickler`
knows, and each of these names stands for something inert of this module.
"""

import collections
import io
import mmap
import pathlib
import pickle
import pickletools
import struct
import zipfile

import ml_dtypes
import numpy as np

from dtm_jax.errors import InputError, shown

DTYPES = {
  "FloatStorage": np.float32,
  "HalfStorage": np.float16,
  "BFloat16Storage": ml_dtypes.bfloat16,
  "DoubleStorage": np.float64,
  "LongStorage": np.int64,
  "IntStorage": np.int32,
  "ShortStorage": np.int16,
  "CharStorage": np.int8,
  "ByteStorage": np.uint8,
  "BoolStorage": np.bool_,
}
# torch.save before 1.6 wrote a pickled magic number first.
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # magic, name length, extra length (zip APPNOTE 4.3.7)
_MAX_PICKLE_BYTES = 64 << 20  # a ViT-L with its optimiser state is under 1 MB
_RESAVE = "re-save the state dict alone: torch.save(model.state_dict(), path)"


class TorchModule:
  """A TorchScript module: its attributes, none of its code."""


def map_torch(path: pathlib.Path) -> tuple[object, mmap.mmap]:
  """Reads what `torch.save` (1.6 or newer) or `torch.jit.save` wrote.

  Args:
    path: The file. It must stay in place and unchanged while arrays are in use.

  Returns:
    saved: The saved object: dicts, lists, numbers and strings as they are,
      tensors as read-only numpy views of the file, TorchScript modules as
      `TorchModule`.
    mapped: The file.

  Raises:
    InputError: a missing, truncated, compressed, pre-1.6 or otherwise foreign
      file, or a pickle that asks for anything but tensors and plain containers.
  """
  try:
    with path.open("rb") as file:
      mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if mapped[: len(_LEGACY_MAGIC)] == _LEGACY_MAGIC:
      raise InputError(f"{path} is in PyTorch's format before 1.6; torch.load and torch.save it once with a newer one")
    return _unpickle(_Archive(path, mapped)), mapped
  except InputError:
    raise
  except (OSError, ValueError, NotImplementedError, struct.error, zipfile.BadZipFile) as error:
    raise InputError(f"{path} is missing, truncated or not a PyTorch weights file ({error})") from error


class _Archive:
  """The uncompressed entries of a mapped zip file, by their names below the top folder."""

  def __init__(self, path: pathlib.Path, mapped: mmap.mmap):
    self.path = path
    with zipfile.ZipFile(path) as archive:
      infos = archive.infolist()
    entries = [info for info in infos if info.filename.partition("/")[2] == "data.pkl"]
    if not entries:
      raise InputError(f"{path} is a zip file without data.pkl: not a PyTorch weights file")
    top = entries[0].filename.removesuffix("data.pkl")
    self._entries = {info.filename.removeprefix(top): info for info in infos}
    self._mapped = mapped
    if "byteorder" in self._entries and bytes(self.read("byteorder")) != b"little":
      raise InputError(f"{path} holds big-endian tensors; re-save it on a little-endian machine")

  def read(self, name: str) -> memoryview:
    """The bytes of an entry, in place."""
    if name not in self._entries:
      raise InputError(f"{self.path} is damaged: it has no entry '{shown(name)}'")
    info = self._entries[name]
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
      raise InputError(f"{self.path} is refused: its entry {name!r} is compressed, which PyTorch never does; {_RESAVE}")
    header = self._mapped[info.header_offset : info.header_offset + _LOCAL_HEADER.size]
    magic, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    start = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    if magic != b"PK\x03\x04" or start + info.file_size > len(self._mapped):
      raise InputError(f"{self.path} is truncated or damaged at its entry {name!r}")
    return memoryview(self._mapped)[start : start + info.file_size]


def _unpickle(archive: _Archive):
  program = bytes(archive.read("data.pkl"))
  if len(program) > _MAX_PICKLE_BYTES:
    raise InputError(f"{archive.path} is refused: data.pkl has {len(program)} bytes, too many for weights; {_RESAVE}")
  try:
    _check_memo(program)
    return _Unpickler(archive, program).load()
  except InputError:
    raise
  except Exception as error:  # pickle's own documentation: damaged input raises anything
    reason = shown(f"{type(error).__name__}: {error}")
    raise InputError(f"{archive.path} is truncated or damaged, its pickle does not read ({reason})") from error


def _check_memo(program: bytes) -> None:
  """Refuses a memo index that no honest pickle of this size has: CPython allocates that many slots."""
  for opcode, argument, _ in pickletools.genops(program):
    if opcode.name in ("PUT", "LONG_BINPUT") and argument > len(program):
      raise ValueError(f"memo index {argument} in a pickle of {len(program)} bytes")


class _Unpickler(pickle.Unpickler):
  """Knows tensors and plain containers, and never looks anything up in a real module.

  What `find_class` returns is made afresh for each call (or is a plain string):
  a hostile pickle can change attributes of the objects it gets, so none of them
  may outlive the load.
  """

  def __init__(self, archive: _Archive, program: bytes):
    super().__init__(io.BytesIO(program))
    self._archive = archive

  def find_class(self, module: str, name: str):
    if (module, name) == ("collections", "OrderedDict"):
      return collections.OrderedDict
    if (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor")):
      return lambda *arguments: _tensor(*arguments)
    if (module, name) == ("torch._utils", "_rebuild_parameter"):
      return lambda tensor, *_: tensor
    if module == "torch.jit._pickle":  # TorchScript's lists, each with a type that does not matter here
      return lambda items, *_: items
    if (module, name) == ("torch", "Size"):
      return lambda items: tuple(items)
    if module == "torch" and name in DTYPES:
      return name
    if module.partition(".")[0] == "__torch__":
      return type(name, (TorchModule,), {})
    if (module, name) == ("argparse", "Namespace"):  # training scripts save their command line beside the weights
      return type(name, (), {})
    raise InputError(
      f"{self._archive.path} is refused: its pickle asks for {shown(f'{module}.{name}')}, which no weights file needs;"
      f" {_RESAVE}"
    )

  def persistent_load(self, pid: tuple) -> np.ndarray:
    kind, storage, key, _, numel = pid
    if kind != "storage":
      raise ValueError(f"unknown persistent id {kind!r}")
    dtype = np.dtype(DTYPES[storage])
    data = self._archive.read(f"data/{key}")
    if not 0 <= numel * dtype.itemsize <= len(data):
      raise InputError(f"{self._archive.path} is truncated or damaged at its entry 'data/{key}'")
    return np.frombuffer(data, dtype, count=numel)


def _tensor(storage: np.ndarray, offset: int, shape: tuple, strides: tuple, *_) -> np.ndarray:
  """A view of `storage`; numpy itself refuses one that leaves the buffer.

  An expanded tensor (stride 0) could claim any size, and weights are never expanded.
  """
  if np.prod(shape, dtype=object) > storage.size:
    raise ValueError(f"a tensor of shape {shape} on a storage of {storage.size} elements")
  itemsize = storage.itemsize
  return np.ndarray(shape, storage.dtype, storage, offset * itemsize, tuple(s * itemsize for s in strides))
