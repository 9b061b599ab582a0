"""A recorded training run in one `.npz` file: its format, its check, reading and writing."""

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping
from typing import BinaryIO, NamedTuple

import numpy as np

from dtm_jax.errors import InputError, some_of
from dtm_jax.files import replacing
from dtm_jax.losses import DISTANCES

FINAL = "final/"  # before the name of each parameter after the last step
_MAX_EXPANSION = 200  # bytes in memory over bytes on disk; beyond it the file is no trace but a zip bomb
_MOST_ITERATIONS = 10_000  # of matching; the tokens of an image have long been merged by then
_KIND_NAMES = {"f": "numbers", "i": "integers", "b": "booleans", "U": "text"}


class _Field(NamedTuple):
  kind: str  # a key of _KIND_NAMES
  axes: str = ""  # a letter is one length throughout a trace; "|" parts alternatives


_SHARED = {
  "kind": _Field("U"),
  "images_nchw": _Field("f", "S B 3 P P"),
  "losses": _Field("f", "S"),
  "lr": _Field("f", "S"),
  "betas": _Field("f", "2"),
  "eps": _Field("f"),
  "weight_decay": _Field("f"),
  "max_grad_norm": _Field("f"),
  "patch_size": _Field("i"),
}
_REQUIRED = {
  "pretrain": _SHARED
  | {
    "masks": _Field("b", "S B N"),
    "per_iteration": _Field("i", "S L | S B L"),
    "iterations": _Field("i", "S L | S B L"),
    "distance": _Field("U"),
  },
  "finetune": _SHARED | {"targets": _Field("f", "S B C"), "layer_decay": _Field("f")},
}
_OPTIONAL = {
  "grad_norms": _Field("f", "S"),
  "recorded_with": _Field("U"),
  "target_tokens": _Field("f", "S B N D"),
  "normalize_targets": _Field("b"),
  "protect_first": _Field("b"),
  "loss_on": _Field("U"),
  "layer_decay": _Field("f"),
  "drop_path": _Field("f"),
  "split": _Field("U"),
  "seed": _Field("i"),
}
KINDS = tuple(_REQUIRED)


@dataclasses.dataclass(frozen=True)
class Trace:
  """A run of S steps on B images, checked. docs/recording.md says what each array is.

  Attributes:
    path: the file.
    kind: "pretrain" or "finetune".
    arrays: by name, without the final parameters.
    final: parameters after the last step, by their PyTorch names.
  """

  path: pathlib.Path
  kind: str
  arrays: Mapping[str, np.ndarray]
  final: Mapping[str, np.ndarray]

  def __getitem__(self, name: str) -> np.ndarray:
    return self.arrays[name]

  def __contains__(self, name: str) -> bool:
    return name in self.arrays

  def __len__(self) -> int:
    """Steps, S."""
    return len(self.arrays["losses"])

  @property
  def image_size(self) -> int:
    """Pixels of a side."""
    return self.arrays["images_nchw"].shape[-1]

  @property
  def patch_size(self) -> int:
    """Pixels of a side."""
    return int(self.arrays["patch_size"])

  @property
  def drop_path(self) -> float:
    """Rate of stochastic depth in the last block."""
    return float(self["drop_path"]) if "drop_path" in self else 0.0

  @property
  def split(self) -> str:
    """How groups are split, "alternate" or "random"."""
    return str(self["split"]) if "split" in self else "alternate"

  @property
  def grid(self) -> tuple[int, int]:
    """Patches (down, across)."""
    return (self.image_size // self.patch_size,) * 2


def read_trace(path: pathlib.Path) -> Trace:
  """Reads and checks a trace.

  Raises:
    InputError: it cannot be read, lacks arrays, or they are of the wrong type or shape, or not finite.
  """
  arrays = _read_arrays(path)
  final = {name.removeprefix(FINAL): value for name, value in arrays.items() if name.startswith(FINAL)}
  trace = Trace(path, str(arrays.get("kind")), {n: v for n, v in arrays.items() if not n.startswith(FINAL)}, final)
  try:
    _check_names(trace)
    _check_shapes(trace)
    _check_values(trace)
  except InputError as error:
    raise InputError(f"{path}: {error}; docs/recording.md describes the format") from error
  return trace


def write_trace(path: pathlib.Path, arrays: Mapping[str, np.ndarray], final: Mapping[str, np.ndarray]) -> None:
  """Writes a trace in one piece.

  Args:
    path: ends in `.npz`.
    arrays: see `Trace`.
    final: see `Trace`.

  Raises:
    InputError: the file cannot be written.
  """
  with replacing(path) as unfinished, unfinished.open("wb") as stream:
    np.savez(stream, **arrays, **{FINAL + name: value for name, value in final.items()})


def _read_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The arrays that a trace is made of; others stay unread."""
  if not path.is_file():
    raise InputError(f"trace {path} does not exist; docs/recording.md shows how to make one")
  try:
    with path.open("rb") as stream, _open_archive(stream) as archive:
      names = [name for name in archive.files if name.startswith(FINAL) or name in _known_fields()]
      return {name: _read_array(archive, name) for name in names}
  except Exception as error:  # of zipfile, zlib and numpy, also a MemoryError at a header that claims terabytes
    reason = " ".join(str(error).split()) or type(error).__name__
    raise InputError(
      f"{path} cannot be read as a trace ({reason}); it is damaged, too large for this machine's memory, or was "
      "not made by np.savez"
    ) from error


def _read_array(archive: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
  array = archive[name]
  if not isinstance(array, np.ndarray):  # what does not begin as an .npy file does comes back as bytes
    raise ValueError(f"{name} is not an array")
  return array


def _open_archive(stream: BinaryIO) -> np.lib.npyio.NpzFile:
  size, start = stream.seek(0, os.SEEK_END), stream.seek(0)
  if stream.read(2) != b"PK":
    raise ValueError("not a .npz file")
  stream.seek(start)
  archive = np.load(stream, allow_pickle=False)
  unpacked = sum(member.file_size for member in archive.zip.infolist())
  if unpacked > _MAX_EXPANSION * size:
    raise ValueError(f"it would unpack to {unpacked} bytes")
  return archive


def _known_fields() -> set[str]:
  return {*_OPTIONAL}.union(*_REQUIRED.values())


def _check_names(trace: Trace) -> None:
  required = _REQUIRED.get(trace.kind, _SHARED)
  missing = [name for name in required if name not in trace]
  if not trace.final:
    missing.append(f"{FINAL}*")
  if missing:
    raise InputError(f"lacks {', '.join(missing)}")
  if trace.kind not in KINDS:
    raise InputError(f"kind is {trace.kind!r}, not one of {', '.join(KINDS)}")


def _check_shapes(trace: Trace) -> None:
  lengths: dict[str, int] = {}
  for name, field in (_REQUIRED[trace.kind] | _OPTIONAL).items():
    if name in trace:
      _check_kind(name, trace[name], field.kind)
      lengths |= _match_axes(name, trace[name], field.axes, lengths)
  for name, value in trace.final.items():
    _check_kind(FINAL + name, value, "f")


def _check_kind(name: str, value: np.ndarray, kind: str) -> None:
  if value.dtype.kind not in {"f": "fiu", "i": "iu"}.get(kind, kind):
    raise InputError(f"{name} is {value.dtype}, not {_KIND_NAMES[kind]}")


def _match_axes(name: str, value: np.ndarray, axes: str, lengths: Mapping[str, int]) -> dict[str, int]:
  """The length of each of the value's axes; `lengths` are those known from other arrays."""
  for alternative in axes.split("|"):
    letters = alternative.split()
    wanted = [int(letter) if letter.isdigit() else lengths.get(letter) for letter in letters]
    sizes = dict(zip(letters, value.shape, strict=False))
    fits = value.ndim == len(letters) and [*value.shape] == [sizes[letter] for letter in letters]
    if fits and all(want in (None, size) for want, size in zip(wanted, value.shape, strict=True)):
      if 0 in [size for letter, size in sizes.items() if letter != "L"]:  # no draws is a run without morphing
        break
      return sizes
  known = ", ".join(f"{letter} = {size}" for letter, size in lengths.items() if letter in axes)
  expected = " or ".join(f"[{', '.join(alternative.split())}]" for alternative in axes.split("|"))
  raise InputError(f"{name} has shape {list(value.shape)}, not {expected}" + (f" with {known}" if known else ""))


def _check_values(trace: Trace) -> None:
  everything = trace.arrays | {FINAL + name: value for name, value in trace.final.items()}
  bad = [name for name, value in everything.items() if value.dtype.kind == "f" and not _is_sound(name, value)]
  if bad:
    raise InputError(f"{some_of(bad)} hold NaN or infinity")
  if trace.patch_size < 1 or trace.image_size % trace.patch_size:
    raise InputError(f"patch_size {trace.patch_size} does not divide images of {trace.image_size} pixels")
  _check_choice(trace, "split", "alternate", "random")
  if "seed" not in trace and (trace.drop_path or trace.split == "random"):
    raise InputError("has drop_path or a random split without the seed that they are drawn from")
  if trace.kind == "pretrain":
    _check_pretrain(trace)


def _is_sound(name: str, value: np.ndarray) -> bool:
  # No clipping is recorded as an infinite norm.
  return not np.isnan(value).any() if name == "max_grad_norm" else bool(np.isfinite(value).all())


def _check_pretrain(trace: Trace) -> None:
  num_tokens = math.prod(trace.grid)
  if trace["masks"].shape[2] != num_tokens:
    raise InputError(f"masks are of {trace['masks'].shape[2]} patches, the images have {num_tokens}")
  if trace["per_iteration"].shape != trace["iterations"].shape:
    raise InputError("per_iteration and iterations are of different shapes")
  for name, least, most in (("per_iteration", 0, num_tokens), ("iterations", 1, _MOST_ITERATIONS)):
    if (trace[name] < least).any() or (trace[name] > most).any():
      raise InputError(f"{name} must be from {least} to {most}")
  if str(trace["distance"]) not in DISTANCES:
    raise InputError(f"distance is {str(trace['distance'])!r}, not one of {', '.join(DISTANCES)}")
  _check_choice(trace, "loss_on", "all", "masked")


def _check_choice(trace: Trace, name: str, *choices: str) -> None:
  if name in trace and str(trace[name]) not in choices:
    raise InputError(f"{name} is {str(trace[name])!r}, not {' or '.join(map(repr, choices))}")
