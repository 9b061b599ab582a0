"""Flat state dicts in files: where they lie, and their tensors one by one."""

import hashlib
import json
import mmap
import pathlib
from collections.abc import Iterable, Iterator, Mapping

import ml_dtypes
import numpy as np
import safetensors

from dtm_jax.convert.torch_file import TorchModule, map_torch
from dtm_jax.errors import InputError

# Keys under which training scripts keep the weights.
_WRAPPERS = ("model", "state_dict", "module")
# Names that weights have in a Hugging Face or open_clip folder.
WEIGHTS_FILES = (
  "model.safetensors",
  "open_clip_model.safetensors",
  "pytorch_model.bin",
  "open_clip_pytorch_model.bin",
)
_SAFETENSORS_DTYPES = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "I64": np.int64,
  "I32": np.int32,
  "I16": np.int16,
  "I8": np.int8,
  "U8": np.uint8,
  "BOOL": np.bool_,
}


class StateDict:
  """Tensors by name, which stay in the file until they are read.

  Attributes:
    views: Views of the mapped file, or arrays in memory: for shapes and dtypes.
    others: Names of entries beside them that are no tensors.
  """

  def __init__(self, views: Mapping[str, np.ndarray], others: Iterable[str] = (), mapped: mmap.mmap | None = None):
    self.views, self.others, self._mapped = dict(views), tuple(others), mapped

  def read(self, name: str) -> np.ndarray:
    """A copy: the file may change or go, under a view that ends the process. The tensor's own dtype."""
    tensor = np.array(self.views[name])
    if self._mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
      self._mapped.madvise(mmap.MADV_DONTNEED)  # or the file would stay in memory beside its copy
    return tensor


def weights_file(path: pathlib.Path) -> pathlib.Path:
  """The weights file that `path` is, or that lies in the model folder `path`.

  Raises:
    InputError: there is none.
  """
  if path.is_dir():
    found = [path / name for name in WEIGHTS_FILES if (path / name).is_file()]
    if not found:
      raise InputError(f"{path} holds no weights: it needs one of {', '.join(WEIGHTS_FILES)}")
    return found[0]
  if not path.is_file():
    raise InputError(f"weights file {path} does not exist; give a .pt, .pth or .safetensors file or a model folder")
  return path


def file_sha256(path: pathlib.Path) -> str:
  """SHA-256 of a file, in hex; read piece by piece."""
  with path.open("rb") as stream:
    return hashlib.file_digest(stream, "sha256").hexdigest()


def read_state_dict(path: pathlib.Path) -> StateDict:
  """The tensors of a `.safetensors`, `.pt`, `.pth`, `.bin` or TorchScript file.

  Raises:
    InputError: the file cannot be read or holds no tensors.
  """
  if path.suffix == ".safetensors":
    (views, mapped), others = _map_safetensors(path), []
  else:
    saved, mapped = map_torch(path)
    try:
      views, others = _flatten(saved)
    except RecursionError as error:
      raise InputError(f"{path} is refused: its containers hold themselves") from error
  if not views:
    raise InputError(f"{path} holds no named tensors: not the weights of a model")
  if all(name.startswith("module.") for name in views):  # saved from DistributedDataParallel
    views = {name.removeprefix("module."): view for name, view in views.items()}
    others = [name.removeprefix("module.") for name in others]
  return StateDict(views, others, mapped)


def _map_safetensors(path: pathlib.Path) -> tuple[dict[str, np.ndarray], mmap.mmap]:
  """Views of the file: 8 bytes of header length, a JSON header, then the tensors."""
  try:
    with safetensors.safe_open(path, "numpy"):  # checks the header and every offset
      pass
    with path.open("rb") as file:
      mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    start = 8 + int.from_bytes(mapped[:8], "little")
    header = json.loads(mapped[8:start])
    header.pop("__metadata__", None)
    views = {}
    for name, entry in header.items():
      dtype, (begin, end) = _SAFETENSORS_DTYPES[entry["dtype"]], entry["data_offsets"]
      data = memoryview(mapped)[start + begin : start + end]
      views[name] = np.frombuffer(data, dtype).reshape(entry["shape"]) if len(data) else np.empty(entry["shape"], dtype)
    return views, mapped
  except KeyError as error:
    raise InputError(f"{path} holds tensors of dtype {error}; save them as float32") from error
  except (safetensors.SafetensorError, OSError, ValueError) as error:
    raise InputError(f"{path} is truncated or not a safetensors file ({error})") from error


def _flatten(saved: object) -> tuple[dict[str, np.ndarray], list[str]]:
  """Tensors by name, and the names of what lies in the same dict and is none."""
  if isinstance(saved, TorchModule):
    return dict(_attributes(saved, "", set())), []  # beside its tensors a module has settings of its own
  if not isinstance(saved, dict):
    return {}, []
  for key in _WRAPPERS:
    if isinstance(saved.get(key), dict):
      return _flatten(saved[key])
  views = {name: value for name, value in saved.items() if isinstance(name, str) and isinstance(value, np.ndarray)}
  others = [name if isinstance(name, str) else f"<{type(name).__name__}>" for name in saved if name not in views]
  return views, others


def _attributes(module: TorchModule, prefix: str, seen: set[int]) -> Iterator[tuple[str, np.ndarray]]:
  if id(module) in seen:  # a few modules that hold one another many times would have names without end
    return
  seen.add(id(module))
  for name, value in vars(module).items():
    if isinstance(value, TorchModule):
      yield from _attributes(value, f"{prefix}{name}.", seen)
    elif isinstance(value, np.ndarray):
      yield prefix + name, value
