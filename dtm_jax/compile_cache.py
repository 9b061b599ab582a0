"""Compiled programs are kept from one run to the next."""

import contextlib
import copy
import hashlib
import os
import pathlib
import platform
import time
import types
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import logging

# The public module has only a part of it.
from jax._src import compilation_cache, compiler
from jax._src.lru_cache import LRUCache

from dtm_jax import distributed

_SHORTEST = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
_HIT = "/jax/compilation_cache/cache_hits"


def enable() -> None:
  """Keeps compiled programs in the user's cache folder, unless jax was told where, or to keep none.

  JAX_COMPILATION_CACHE_DIR names another folder, or with an empty value none. A folder that cannot be written is
  a warning: the run compiles as it would without.
  """
  compilation_cache.LRUCache = _Cache
  if _SHORTEST not in os.environ:
    # jax keeps what takes a second to compile; a run has some twenty programs that take less.
    jax.config.update(_SHORTEST.lower(), 0.0)
  if distributed.count() > 1 and jax.default_backend() == "cpu":
    _keep_those_of_all_processes()
  if jax.config.jax_compilation_cache_dir is not None:
    return
  try:
    folder = default_folder()
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
      raise PermissionError(f"no permission to write to {folder}")
  except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
    logging.warning("compiled programs are not kept (%s); JAX_COMPILATION_CACHE_DIR names another folder", error)
    return
  jax.config.update("jax_compilation_cache_dir", str(folder))


def _keep_those_of_all_processes() -> None:
  """JAX keeps what process 0 compiles. By their keys, programs for CPUs are of one process: others would find none."""
  as_first = copy.copy(compiler.distributed.global_state)
  as_first.process_id = 0
  compiler.distributed = types.SimpleNamespace(global_state=as_first)


class _Cache(LRUCache):
  """jax's cache, in which programs appear whole, and half ones, left by others or before, are removed.

  jax would warn of such an entry in every run and compile, but never replace it.
  """

  def put(self, key: str, value: bytes) -> None:
    """Under another name first: runs beside this one may look for the program, and a kill may come."""
    if self.eviction_enabled:  # jax counts what it keeps by name, and locks the folder meanwhile
      super().put(key, value)
      return
    part = self.path / f"{key}-{uuid.uuid4().hex}.part"
    try:
      part.write_bytes(value)
      part.replace(self.path / f"{key}-cache")
    finally:  # it is there no more, unless writing failed
      part.unlink(missing_ok=True)

  def get(self, key: str) -> bytes | None:
    content = super().get(key)
    if content is None or _is_whole(content):
      return content
    (self.path / f"{key}-cache").unlink(missing_ok=True)
    return None


def _is_whole(entry: bytes) -> bool:
  try:
    compilation_cache.decompress_executable(entry)
  except Exception:  # zlib's or that of one of two zstd packages
    return False
  return True


def default_folder() -> pathlib.Path:
  """One for each kind of processor: programs for CPUs are machine code, and homes are shared by machines."""
  caches = os.environ.get("XDG_CACHE_HOME") or pathlib.Path("~/.cache").expanduser()
  return pathlib.Path(caches) / "dtm_jax" / "compiled" / f"{platform.machine()}-{_cpu_features()}"


def _cpu_features() -> str:
  """A short digest of what the processor can do; the same for those that run each other's programs."""
  cpuinfo = pathlib.Path("/proc/cpuinfo")
  lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
  told = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])
  return hashlib.sha256(" ".join(sorted(told.split())).encode()).hexdigest()[:8]


def told(step: Callable[..., Any]) -> Callable[..., Any]:
  """The same step, which logs how long its first call took to be ready, and whether its program was kept."""
  is_ready = False

  def tell(*arguments: Any) -> Any:
    nonlocal is_ready
    if is_ready:
      return step(*arguments)
    is_ready = True
    start = time.perf_counter()
    with _hits() as hits:
      result = step(*arguments)  # returns as soon as its work is handed to the devices
    how = "from the compile cache" if hits else "compiled"
    logging.info("step %s in %.1f s", how, time.perf_counter() - start)
    return result

  return tell


@contextlib.contextmanager
def disabled() -> Iterator[None]:
  """Programs are neither read nor kept meanwhile."""
  before = jax.config.jax_enable_compilation_cache
  try:
    _enable(False)
    yield
  finally:
    _enable(before)


def _enable(is_enabled: bool) -> None:
  jax.config.update("jax_enable_compilation_cache", is_enabled)
  compilation_cache.reset_cache()  # what was decided at the first compile is decided again


@contextlib.contextmanager
def _hits() -> Iterator[list[str]]:
  """Lists what of jax's programs is found in its cache meanwhile."""
  hits = []

  def listen(event: str, **details: Any) -> None:
    if event == _HIT:
      hits.append(event)

  jax.monitoring.register_event_listener(listen)
  try:
    yield hits
  finally:
    jax.monitoring.unregister_event_listener(listen)
