"""Reads PyTorch weight files without PyTorch, and without running anything that they ask for.

A `.pt`/`.pth` file is a zip archive: `data.pkl` describes the objects, and each
tensor's bytes lie uncompressed in an entry of their own, so arrays are views of
the mapped file. A pickle is a program; here it is run by `_Machine`, which knows
only what tensors and plain containers need.
"""

import mmap
import pathlib
import pickletools
import struct
import zipfile
from collections.abc import Callable
from typing import Any

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
_MOST_ARGUMENTS = 8  # of a tensor
_PUSHED = {  # opcodes whose argument is the value
  *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT"),
  *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
  *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}
_RESAVE = "re-save the state dict alone: torch.save(model.state_dict(), path)"


class Attributes:
  """An object's attributes, none of its code."""


class TorchModule(Attributes):
  """A TorchScript module."""


def map_torch(path: pathlib.Path) -> tuple[object, mmap.mmap]:
  """Reads what `torch.save` (1.6 or newer) or `torch.jit.save` wrote.

  Args:
    path: The file. It must stay in place and unchanged while arrays are in use.

  Returns:
    saved: The saved object: dicts, lists, numbers and strings as they are
      (but for keys other than strings and integers, which become "<tuple>" and
      the like), tensors as read-only numpy views of the file, TorchScript
      modules as `TorchModule`.
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


def _unpickle(archive: _Archive) -> object:
  program = bytes(archive.read("data.pkl"))
  if len(program) > _MAX_PICKLE_BYTES:
    raise InputError(f"{archive.path} is refused: data.pkl has {len(program)} bytes, too many for weights; {_RESAVE}")
  try:
    return _Machine(archive).run(program)
  except (InputError, MemoryError):
    raise
  except Exception as error:  # a damaged program may fail anywhere
    reason = shown(f"{type(error).__name__}: {error}")
    raise InputError(f"{archive.path} is truncated or damaged, its pickle does not read ({reason})") from error


class _Machine:
  """Runs a pickle: a stack, the outer stacks that marks have put aside, and a memo.

  Every value that it makes is of this module or a plain container, and work and
  memory grow with the length of the program: what pickles can do beyond that,
  `torch.save` does not need.
  """

  def __init__(self, archive: _Archive):
    self._archive = archive
    self._stack, self._outer, self._memo = [], [], {}

  def run(self, program: bytes) -> object:
    """What the program leaves at its end."""
    for opcode, argument, _ in pickletools.genops(program):
      self._step(opcode.name, argument)
    return self._stack.pop()

  def _step(self, opcode: str, argument: Any) -> None:
    match opcode:
      case _ if opcode in _PUSHED:
        self._push(argument)
      case "PUT" | "BINPUT" | "LONG_BINPUT":
        self._memo[argument] = self._stack[-1]
      case "MEMOIZE":
        self._memo[len(self._memo)] = self._stack[-1]
      case "GET" | "BINGET" | "LONG_BINGET":
        self._push(self._memo[argument])
      case "MARK":
        self._outer.append(self._stack)
        self._stack = []
      case "NONE" | "NEWTRUE" | "NEWFALSE":
        self._push({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
      case "EMPTY_TUPLE":
        self._push(())
      case "TUPLE1" | "TUPLE2" | "TUPLE3":
        self._push(tuple(self._take(int(opcode[-1]))))
      case "TUPLE":
        self._push(tuple(self._since_mark()))
      case "EMPTY_LIST":
        self._push([])
      case "LIST":
        self._push(self._since_mark())
      case "APPEND" | "APPENDS":
        self._extend(self._take(1) if opcode == "APPEND" else self._since_mark())
      case "EMPTY_DICT":
        self._push({})
      case "DICT":
        self._update(self._since_mark(), {})
      case "SETITEM" | "SETITEMS":
        self._update(self._take(2) if opcode == "SETITEM" else self._since_mark(), self._stack.pop())
      case "GLOBAL":
        self._look_up(*argument.split(" ", 1))
      case "STACK_GLOBAL":
        self._look_up(*self._take(2))
      case "REDUCE" | "NEWOBJ":
        self._call(*self._take(2))
      case "BUILD":
        self._build(self._stack[-2], self._stack.pop())
      case "BINPERSID":
        self._push(self._storage(*self._stack.pop()))
      case "PROTO" | "FRAME" | "STOP":
        pass
      case _:
        raise self._refused(f"uses {opcode}")

  def _refused(self, what: str) -> InputError:
    return InputError(f"{self._archive.path} is refused: its pickle {what}, which no weights file needs; {_RESAVE}")

  def _push(self, value: object) -> None:
    self._stack.append(value)  # looked up now: marks change which stack it is

  def _since_mark(self) -> list:
    values, self._stack = self._stack, self._outer.pop()
    return values

  def _take(self, count: int) -> list:
    return [self._stack.pop() for _ in range(count)][::-1]

  def _extend(self, values: list) -> None:
    if not isinstance(self._stack[-1], list):
      raise ValueError("items for what is no list")
    self._stack[-1].extend(values)

  def _update(self, entries: list, target: object) -> None:
    if not isinstance(target, dict):
      raise ValueError("entries for what is no dict")
    for key, value in zip(entries[0::2], entries[1::2], strict=True):
      target[_key(key)] = value
    self._push(target)

  def _look_up(self, module: str, name: str) -> None:
    if not (isinstance(module, str) and isinstance(name, str)):
      raise ValueError("a name that is no text")
    if (module, name) in _FUNCTIONS:
      self._push(_FUNCTIONS[module, name])
    elif module == "torch" and name in DTYPES:
      self._push(name)
    elif module == "torch.jit._pickle":  # TorchScript's lists, each with a type that does not matter here
      self._push(_first)
    elif module.partition(".")[0] == "__torch__":
      self._push(TorchModule)
    else:
      raise self._refused(f"asks for {shown(f'{module}.{name}')}")

  def _call(self, function: Callable, arguments: tuple) -> None:
    if not callable(function) or not isinstance(arguments, tuple) or len(arguments) > _MOST_ARGUMENTS:
      raise ValueError("a call of what cannot be called so")
    self._push(function(*arguments))

  def _build(self, value: object, state: object) -> None:
    if isinstance(value, Attributes) and isinstance(state, dict):
      vars(value).update({str(name): entry for name, entry in state.items()})
    elif not isinstance(value, dict):  # the `_metadata` of a state dict is not needed
      raise ValueError("a state for what has none")

  def _storage(self, kind: str, storage: str, key: str, _: str, numel: int) -> np.ndarray:
    if kind != "storage" or not (isinstance(storage, str) and isinstance(key, str) and isinstance(numel, int)):
      raise ValueError("a persistent id that is not of a storage")
    dtype = np.dtype(DTYPES[storage])
    data = self._archive.read(f"data/{key}")
    if not 0 <= numel * dtype.itemsize <= len(data):
      raise InputError(f"{self._archive.path} is truncated or damaged at its entry 'data/{key}'")
    return np.frombuffer(data, dtype, count=numel)


def _tensor(storage: np.ndarray, offset: int, shape: tuple, strides: tuple, *_) -> np.ndarray:
  """A view of `storage`; numpy itself refuses one that leaves the buffer.

  An expanded tensor (stride 0) could claim any size, and weights are never expanded.
  """
  itemsize = storage.itemsize
  tensor = np.ndarray(shape, storage.dtype, storage, offset * itemsize, tuple(s * itemsize for s in strides))
  if tensor.size > storage.size:
    raise ValueError(f"a tensor of shape {shape} on a storage of {storage.size} elements")
  return tensor


def _first(value: object, *_) -> object:
  return value


def _key(value: object) -> str | int:
  """A key of a dict: a small program can make tuples that take for ever to hash, and huge integers that collide."""
  is_small = type(value) is int and value.bit_length() <= 64
  return value if is_small or type(value) is str else f"<{type(value).__name__}>"


def _empty_dict() -> dict:
  return {}


_FUNCTIONS = {
  ("collections", "OrderedDict"): _empty_dict,
  ("torch._utils", "_rebuild_tensor"): _tensor,
  ("torch._utils", "_rebuild_tensor_v2"): _tensor,
  ("torch._utils", "_rebuild_parameter"): _first,
  ("torch", "Size"): _first,
  ("argparse", "Namespace"): Attributes,  # training scripts save their command line beside the weights
}
