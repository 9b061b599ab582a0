"""Finds a teacher's weights: a file, a model folder, or a Hugging Face hub name."""

import pathlib
import re

from absl import logging

from dtm_jax.convert.configs import CONFIG_FILES
from dtm_jax.convert.state_dict import WEIGHTS_FILES, file_sha256, weights_file
from dtm_jax.errors import InputError

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
_REMEDY = "download it by hand and give the file or folder as config.teacher.weights"


def locate_weights(weights: str) -> pathlib.Path:
  """The weights file that `config.teacher.weights` means; fetched from the hub where it is no local path.

  Raises:
    InputError: no such file, or the hub does not give it.
  """
  path = pathlib.Path(weights).expanduser()
  if path.exists() or path.suffix in _SUFFIXES or not _HUB_NAME.fullmatch(weights):
    return weights_file(path)
  try:
    return _from_hub(weights)
  except ImportError as error:
    raise InputError(f"{weights} is no local path; to fetch it, pip install huggingface_hub, or {_REMEDY}") from error
  except (OSError, ValueError) as error:
    if isinstance(error, InputError):
      raise
    reason = str(error).strip().splitlines()[0]
    raise InputError(f"{weights} is no local path, and Hugging Face does not give it ({reason}); {_REMEDY}") from error


def _from_hub(name: str) -> pathlib.Path:
  import huggingface_hub

  for file in WEIGHTS_FILES:  # what is there needs no network, on which compute nodes often are not
    cached = huggingface_hub.try_to_load_from_cache(name, file)
    if isinstance(cached, str):
      return pathlib.Path(cached)
  logging.info("fetching %s from the Hugging Face hub", name)
  huggingface_hub.utils.logging.set_verbosity_error()  # it warns of each of many tries; what fails is told once, by us
  for file in CONFIG_FILES:  # `load_torch` looks for them beside the weights
    _fetch(name, file)
  for file in WEIGHTS_FILES:
    fetched = _fetch(name, file)
    if fetched is not None:
      return fetched
  raise InputError(f"Hugging Face's {name} has none of {', '.join(WEIGHTS_FILES)}; {_REMEDY}")


def _fetch(name: str, file: str) -> pathlib.Path | None:
  """Downloads one file of a hub repository; None where the repository does not have it."""
  import huggingface_hub
  from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

  try:
    return pathlib.Path(huggingface_hub.hf_hub_download(name, file))
  except LocalEntryNotFoundError:  # no connection: a kind of EntryNotFoundError that says nothing about the repository
    raise
  except EntryNotFoundError:
    return None


def sha256(file: pathlib.Path) -> str:
  """SHA-256 of a file in hex, also logged, so that two runs can be known to have had the same teacher."""
  digest = file_sha256(file)
  logging.info("teacher weights %s sha256 %s", file, digest)
  return digest
