"""A trained model in use: uint8 images in, features or class probabilities out; and one file that does the same."""

import contextlib
import dataclasses
import functools
import hashlib
import os
import pathlib
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from dtm_jax import sharding
from dtm_jax.augment import normalize
from dtm_jax.config import ATTENTIONS, DTYPES, MeshConfig
from dtm_jax.data.transforms import UnreadableImageError, eval_image
from dtm_jax.errors import InputError
from dtm_jax.files import replacing
from dtm_jax.restore import Checkpoint, data_settings, open_checkpoint

CHECKPOINTS = ("last", "best")
PLATFORMS = ("cpu", "cuda", "tpu")  # that an exported file runs on

AnyImage = bytes | str | os.PathLike | Image.Image | np.ndarray
_SINGLE = (bytes, bytearray, str, os.PathLike, Image.Image)
# Ends an exported file, where `jax.export` does not read: the model's `crop`, and SHA-256 of all before.
_CROP, _DIGEST_SIZE = struct.Struct("<d"), hashlib.sha256().digest_size


class Features(NamedTuple):
  """What a model makes of n images.

  Attributes:
    pooled: float32 [n, D], one vector per image, that evaluation uses: of a student the mean of its tokens, of a
      classifier what its head is given, of CLIP its image embedding.
    tokens: float32 [n, N, D], one per patch in row-major order, without the class token: after the last norm and, of
      CLIP, the projection.
  """

  pooled: np.ndarray
  tokens: np.ndarray


# ------------------------------------------------------------ models


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Model:
  """A trained model on all devices of this machine; `load` makes it.

  Attributes:
    checkpoint: what it is and where it is from.
    mean, std: by which images are normalised, of RGB in [0, 1].
    crop: see `preprocess`; that of the run's evaluations.
    batch_size: images per call of the compiled program, a multiple of the devices.
    mesh: the devices.
  """

  checkpoint: Checkpoint
  mean: tuple[float, float, float]
  std: tuple[float, float, float]
  crop: float
  batch_size: int
  mesh: Mesh

  def __repr__(self) -> str:
    head = "" if self.num_classes is None else f", {self.num_classes:,} classes"
    return f"<{self.checkpoint.kind} from {self.checkpoint.path}: {self.image_size} px{head}>"

  @property
  def image_size(self) -> int:
    """Pixels, square."""
    return self.checkpoint.image_size

  @property
  def num_classes(self) -> int | None:
    """None where it has no classifier's head."""
    return self.checkpoint.model.num_classes or None if self.checkpoint.kind == "classifier" else None

  @property
  def class_names(self) -> list[str] | None:
    """In the order of `classify`'s probabilities; None where the model is not of a run, or its data had no names."""
    return self.checkpoint.class_names

  def preprocess(self, images: Iterable[AnyImage]) -> np.ndarray:
    """`preprocess` for this model: uint8 [n, S, S, 3]."""
    return preprocess(images, self.image_size, self.crop)

  def features(self, images: np.ndarray | jax.Array) -> Features:
    """Features of uint8 [n, S, S, 3], for any n. Raises InputError for other images."""
    return Features(**self._run("features", images))

  def classify(self, images: np.ndarray | jax.Array) -> np.ndarray:
    """Class probabilities float32 [n, C] of uint8 [n, S, S, 3], for any n.

    Raises:
      InputError: other images, or the model has no classifier's head.
    """
    return self._run("classify", images)

  def export(self, path: str | os.PathLike, what: str = "features") -> None:
    """Writes `lower(what)` and a checksum: a StableHLO file, whole or not at all, for `load_exported`.

    Raises:
      InputError: see `lower`; or it cannot be written.
    """
    content = self.lower(what).serialize() + _CROP.pack(self.crop)
    with replacing(pathlib.Path(path).expanduser()) as unfinished, unfinished.open("wb") as file:
      file.write(content)
      file.write(hashlib.sha256(content).digest())

  def lower(self, what: str) -> jax.export.Exported:
    """One of this model's methods with its weights inside, uint8 [b, S, S, 3] for any b > 0, for one of `PLATFORMS`.

    Args:
      what: "features", of which a dict comes, or "classify".

    Raises:
      InputError: no such method, or not of this model; or attention that only one platform has.
    """
    function = self._function(what)
    if self.checkpoint.model.attention == "cudnn":
      raise InputError("attention='cudnn' runs on GPUs alone and cannot be exported; load the model with 'matmul'")
    (batch,) = jax.export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, self.image_size, self.image_size, 3), np.uint8)
    program = jax.jit(functools.partial(function, self.checkpoint.params))
    with jax.default_matmul_precision("float32"), _file_names_only():
      return jax.export.export(program, platforms=PLATFORMS)(images)

  def _function(self, what: str) -> Callable[[Any, jax.Array], Any]:
    """`(params, images uint8 [b, S, S, 3]) -> outputs`."""
    if what not in _OUTPUTS:
      raise InputError(f"what={what!r} is not one of {', '.join(_OUTPUTS)}")
    if what == "classify" and self.num_classes is None:
      kind = self.checkpoint.kind
      raise InputError(f"{self.checkpoint.path} is a {kind} without classes; fine-tune it, or take its features")
    module = self.checkpoint.model
    return lambda params, images: _OUTPUTS[what](module, params, normalize(images, self.mean, self.std))

  def _run(self, what: str, images: np.ndarray | jax.Array) -> Any:
    images, compiled = _checked(images, self.image_size), self._compiled(what)
    split = sharding.batch_sharding(self.mesh)
    # As in training and evaluation: float32 means float32, on TPUs and GPUs too.
    with jax.default_matmul_precision("float32"):
      return _in_batches(lambda rows: compiled(sharding.to_global(rows, split)), images, self.batch_size)

  def _compiled(self, what: str) -> Callable[[jax.Array], Any]:
    if what not in self._jitted:
      split, replicated = sharding.batch_sharding(self.mesh), sharding.replicated(self.mesh)
      self._jitted[what] = jax.jit(self._function(what), in_shardings=(replicated, split))
    return functools.partial(self._jitted[what], self._placed_params)

  @functools.cached_property
  def _jitted(self) -> dict[str, Callable]:
    return {}

  @functools.cached_property
  def _placed_params(self) -> Any:
    return jax.device_put(self.checkpoint.params, sharding.replicated(self.mesh))


def _features(module: nn.Module, params: Any, images: jax.Array) -> dict[str, jax.Array]:
  pooled, tokens = module.apply({"params": params}, images, method="pooled_and_tokens")
  return {"pooled": pooled.astype(jnp.float32), "tokens": tokens}


def _probabilities(module: nn.Module, params: Any, images: jax.Array) -> jax.Array:
  return jax.nn.softmax(module.apply({"params": params}, images))


# Of normalised images. Plain dicts and arrays, so that an exported file is read without this package, too.
_OUTPUTS = {"features": _features, "classify": _probabilities}


def load(
  path: str | os.PathLike,
  *,
  checkpoint: str = "last",
  averaged: bool = False,
  dtype: str | None = None,
  attention: str = "matmul",
  batch_size: int = 64,
  mean: tuple[float, float, float] | None = None,
  std: tuple[float, float, float] | None = None,
) -> Model:
  """Opens a trained model.

  Args:
    path: the work folder of a pre-training or fine-tuning run, a weights file, or a Hugging Face model folder.
    checkpoint: of a work folder: the "last", or of a fine-tuning run the "best" by its accuracy.
    averaged: take the moving average of the weights that a fine-tuning run keeps.
    dtype: of matrix products, "float32" or "bfloat16"; None is the run's own, and float32 for weights.
    attention: one of `config.ATTENTIONS`.
    batch_size: images per call of the compiled program, rounded up to a multiple of the devices. More images are done
      in as many calls, fewer are filled up, so that one compile serves all.
    mean, std: by which images are normalised, of RGB in [0, 1]; None is the run's own and, for weights, what a Hugging
      Face folder says, else CLIP's own for CLIP and ImageNet's for the rest.

  Raises:
    InputError: it is not there, no model, or without such a checkpoint or average; or an option is wrong.
  """
  _check_options(checkpoint, dtype, attention, batch_size)
  found = open_checkpoint(path, best=checkpoint == "best", averaged=averaged, attention=attention)
  if dtype is not None:
    found = dataclasses.replace(found, model=found.model.clone(dtype=np.dtype(dtype)))
  mesh, data = sharding.create_mesh(MeshConfig()), data_settings(found)
  model = Model(
    found,
    _checked_colors("mean", data.mean if mean is None else mean),
    _checked_colors("std", data.std if std is None else std),
    data.eval_crop,
    sharding.round_up(batch_size, mesh),
    mesh,
  )
  _ = model.image_size  # told now if it has none
  return model


def _check_options(checkpoint: str, dtype: str | None, attention: str, batch_size: int) -> None:
  for name, value, choices in (
    ("checkpoint", checkpoint, CHECKPOINTS),
    ("dtype", dtype, (None, *DTYPES)),
    ("attention", attention, ATTENTIONS),
  ):
    if value not in choices:
      raise InputError(f"{name}={value!r} is not one of {', '.join(map(str, choices))}")
  if attention == "cudnn" and jax.default_backend() != "gpu":
    raise InputError("attention='cudnn' needs a GPU; choose 'xla' or 'matmul'")
  if batch_size < 1:
    raise InputError(f"batch_size={batch_size} must be positive")


def _checked_colors(name: str, values: tuple[float, float, float]) -> tuple[float, float, float]:
  values = tuple(float(value) for value in values)
  if len(values) != 3 or (name == "std" and min(values) <= 0):
    raise InputError(f"{name}={values} must be three {'positive ' if name == 'std' else ''}numbers: red, green, blue")
  return values


# ------------------------------------------------------------ exported files


@contextlib.contextmanager
def _file_names_only() -> Iterator[None]:
  """A program tells of which line each operation is; in which folders of this machine the files lie is left out."""
  name = "jax_hlo_source_file_canonicalization_regex"
  before = getattr(jax.config, name)
  jax.config.update(name, ".*/")
  try:
    yield
  finally:
    jax.config.update(name, before)


@dataclasses.dataclass(frozen=True, eq=False)
class ExportedModel:
  """A method of a model from its file; `load_exported` makes it.

  Attributes:
    exported: what `jax.export` has read.
    crop: see `preprocess`.
  """

  exported: jax.export.Exported
  crop: float

  def __repr__(self) -> str:
    return f"<exported {self.exported.fun_name}: {self.image_size} px>"

  @property
  def image_size(self) -> int:
    """Pixels, square."""
    return self.exported.in_avals[0].shape[1]

  def preprocess(self, images: Iterable[AnyImage]) -> np.ndarray:
    """`preprocess` for this model: uint8 [n, S, S, 3]."""
    return preprocess(images, self.image_size, self.crop)

  def __call__(self, images: np.ndarray | jax.Array) -> Features | np.ndarray:
    """What the exported method gives for uint8 [n, S, S, 3], any n: on one device, compiled anew for another n.

    Raises:
      InputError: other images.
    """
    images = _checked(images, self.image_size)
    outputs = _in_batches(self._jitted, images, max(len(images), 1))
    return Features(**outputs) if isinstance(outputs, dict) else outputs

  @functools.cached_property
  def _jitted(self) -> Callable[[jax.Array], Any]:
    return jax.jit(self.exported.call)


def load_exported(path: str | os.PathLike) -> ExportedModel:
  """Reads a file that `Model.export` has written.

  Raises:
    InputError: it is not there, damaged, of something else, or of a version of jax that this one does not read.
  """
  path = pathlib.Path(path).expanduser()
  try:
    whole = path.read_bytes()
  except OSError as error:
    raise InputError(f"cannot read {path} ({error.strerror}); name a file that Model.export has written") from error
  content, digest = memoryview(whole)[:-_DIGEST_SIZE], whole[-_DIGEST_SIZE:]
  if hashlib.sha256(content).digest() != digest:
    raise InputError(f"{path} is damaged, or no file that Model.export has written; export the model again")
  try:
    return ExportedModel(jax.export.deserialize(bytearray(content)), *_CROP.unpack(content[-_CROP.size :]))
  except (ValueError, NotImplementedError) as error:
    raise InputError(f"{path} is of another version of jax ({error}); export the model again with this one") from error


# ------------------------------------------------------------ images


def preprocess(images: Iterable[AnyImage], size: int, crop: float) -> np.ndarray:
  """Images as evaluation shows them to a model: the shorter side resized, the centre cropped.

  Args:
    images: of any sizes: encoded bytes, paths of files, Pillow's images, or uint8 arrays [H, W] or [H, W, 3].
    size: side of the results in pixels.
    crop: side of the square that is taken over the image's shorter side.

  Returns:
    uint8 [n, size, size, 3], RGB.

  Raises:
    InputError: a single image instead of several, or one that cannot be read.
  """
  if isinstance(images, _SINGLE) or getattr(images, "ndim", 4) != 4:
    raise InputError("preprocess takes several images; put a single one into a list")
  crops = [_preprocess_one(i, image, size, crop) for i, image in enumerate(images)]
  return np.array(crops, np.uint8).reshape(-1, size, size, 3)


def _preprocess_one(i: int, image: AnyImage, size: int, crop: float) -> np.ndarray:
  name = f"image {i}"
  try:
    if isinstance(image, (str, os.PathLike)):
      name = os.fspath(image)
      image = pathlib.Path(image).expanduser().read_bytes()
    elif not isinstance(image, _SINGLE):
      image = _from_array(np.asarray(image), name)
    return eval_image(image, size=size, crop=crop)
  except (UnreadableImageError, OSError) as error:
    raise InputError(f"{name} cannot be read as an image ({error}); leave it out, or mend it") from error


def _from_array(pixels: np.ndarray, name: str) -> Image.Image:
  if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (3,)) or not pixels.size:
    raise InputError(f"{name} is {pixels.dtype} {list(pixels.shape)} instead of uint8 [H, W, 3] or [H, W]; convert it")
  return Image.fromarray(pixels)


def _checked(images: np.ndarray | jax.Array, size: int) -> np.ndarray:
  """The same images, numpy, if they are uint8 [n, size, size, 3]."""
  shape, dtype = getattr(images, "shape", None), getattr(images, "dtype", None)
  if dtype != np.uint8 or len(shape) != 4 or tuple(shape[1:]) != (size, size, 3):
    given = type(images).__name__ if shape is None else f"{dtype} {list(shape)}"
    raise InputError(
      f"the model takes uint8 [n, {size}, {size}, 3], not {given}; its preprocess(images) makes that of any images"
    )
  return np.asarray(images)


def _in_batches(function: Callable[[np.ndarray], Any], images: np.ndarray, batch_size: int) -> Any:
  """Applies a function of `batch_size` images to any number: the last call is filled up, and no image makes one."""
  outputs = []
  for start in range(0, max(len(images), 1), batch_size):
    rows = images[start : start + batch_size]
    filled = np.pad(rows, [(0, batch_size - len(rows)), (0, 0), (0, 0), (0, 0)])
    outputs.append(jax.tree.map(np.asarray, function(filled)))
  return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(images)], *outputs)
