"""Flat PyTorch state dicts: where they lie in a file, and an account of every name in them."""

import pathlib
import re
from collections.abc import Iterable, Iterator

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors asks for by name
import numpy as np
import safetensors
from safetensors.numpy import load_file

from dtm_jax.convert.torch_file import TorchModule, read_torch
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


def read_state_dict(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The tensors of a `.safetensors`, `.pt`, `.pth` or TorchScript file by name.

  Raises:
    InputError: the file cannot be read or holds no tensors.
  """
  if path.suffix == ".safetensors":
    try:
      tensors = load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
      raise InputError(f"{path} is truncated or not a safetensors file ({error})") from error
  else:
    try:
      tensors = _flatten(read_torch(path))
    except RecursionError as error:
      raise InputError(f"{path} is refused: its containers hold themselves") from error
  if not tensors:
    raise InputError(f"{path} holds no named tensors: not the weights of a model")
  if all(name.startswith("module.") for name in tensors):  # saved from DistributedDataParallel
    tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
  return tensors


def _flatten(saved: object) -> dict[str, np.ndarray]:
  if isinstance(saved, TorchModule):
    return dict(_attributes(saved, ""))
  if not isinstance(saved, dict):
    return {}
  for key in _WRAPPERS:
    if isinstance(saved.get(key), dict):
      return _flatten(saved[key])
  return {str(name): value for name, value in saved.items() if isinstance(value, np.ndarray)}


def _attributes(module: TorchModule, prefix: str) -> Iterator[tuple[str, np.ndarray]]:
  for name, value in vars(module).items():
    if isinstance(value, TorchModule):
      yield from _attributes(value, f"{prefix}{name}.")
    elif isinstance(value, np.ndarray):
      yield prefix + name, value


class StateDict:
  """Hands out tensors by name, and accounts for every name at the end."""

  def __init__(self, tensors: dict[str, np.ndarray], path: pathlib.Path):
    self._tensors, self.path = tensors, path
    self._left = set(tensors)
    self._missing: list[str] = []
    self._misshapen: list[str] = []

  def shape(self, name: str, rank: int) -> tuple[int, ...]:
    """Shape of a tensor that the model's sizes are read from.

    Raises:
      InputError: it is missing or has another rank.
    """
    if name not in self._tensors:
      raise InputError(f"{self.path} lacks {name}; is it complete?")
    shape = self._tensors[name].shape
    if len(shape) != rank or 0 in shape:
      raise InputError(f"{self.path}: {name} has shape {list(shape)}, not {rank} positive dimensions")
    return shape

  def count(self, pattern: str) -> int:
    """How many different numbers the group of `pattern` matches at the start of names.

    Not the largest number: with one missing, `check` then names what is out of line.
    """
    matches = (re.match(pattern, name) for name in self._tensors)
    return len({match[1] for match in matches if match})

  def take(self, name: str, *shape: int) -> np.ndarray:
    """A float32 copy of the tensor; zeros in the place of one that `check` will name."""
    self._left.discard(name)
    tensor = self._tensors.get(name)
    if tensor is None:
      self._missing.append(name)
    elif tensor.shape != shape:
      self._misshapen.append(f"{name} {list(tensor.shape)} instead of {list(shape)}")
    else:
      return np.array(tensor, np.float32)
    return np.broadcast_to(np.float32(0), shape)  # takes no memory, whatever sizes a damaged file gives

  def check(self, ignorable: Iterable[str]) -> None:
    """Accounts for every name.

    Args:
      ignorable: Patterns of whole names that have no place in the model.

    Raises:
      InputError: names were missing, of another shape, or not asked for.
    """
    known = re.compile("|".join(ignorable))
    unexpected = sorted(name for name in self._left if not known.fullmatch(name))
    problems = {"lacks": self._missing, "has wrong shapes:": self._misshapen, "has unknown": unexpected}
    for problem, names in problems.items():
      if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise InputError(f"{self.path} {problem} {', '.join(names[:3])}{more}; it holds another model or is damaged")


def dense(weights: StateDict, name: str, inputs: int, outputs: int) -> dict[str, np.ndarray]:
  """A torch Linear layer as a Flax Dense one: `kernel [inputs, outputs]`, `bias [outputs]`."""
  return {"kernel": weights.take(f"{name}.weight", outputs, inputs).T, "bias": weights.take(f"{name}.bias", outputs)}


def layer_norm(weights: StateDict, name: str, width: int) -> dict[str, np.ndarray]:
  """A torch LayerNorm as a Flax one: `scale [width]`, `bias [width]`."""
  return {"scale": weights.take(f"{name}.weight", width), "bias": weights.take(f"{name}.bias", width)}


def patch_kernel(weights: StateDict, name: str, patch_size: int, width: int) -> np.ndarray:
  """A torch Conv2d weight `[D, 3, p, p]` as a Flax kernel `[p, p, 3, D]`."""
  return weights.take(name, width, 3, patch_size, patch_size).transpose(2, 3, 1, 0)
