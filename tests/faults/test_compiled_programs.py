"""A compiled program that is being written is whole or none for others, and no burden for the next run."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import compilation_cache  # of which the public module has only a part

from dtm_jax import compile_cache


@pytest.fixture
def folder(tmp_path):
  """jax's cache of this test alone."""
  before = jax.config.jax_compilation_cache_dir
  jax.config.update("jax_compilation_cache_dir", str(tmp_path))
  compile_cache.enable()
  compilation_cache.reset_cache()
  yield tmp_path
  jax.config.update("jax_compilation_cache_dir", before)
  compilation_cache.reset_cache()


@pytest.mark.fault("compiled program half written", "at the next run")
@pytest.mark.parametrize("left", [0, 100, -1], ids=["nothing", "100_bytes", "all_but_a_byte"])
def test_half_a_program_is_compiled_and_kept_anew(folder, left, outcome):
  """Without a warning, which would be an error here."""
  x = jnp.eye(3)
  jax.jit(lambda x: jnp.tanh(x) @ x)(x)
  [entry] = [path for path in folder.iterdir() if "lambda" in path.name and path.name.endswith("-cache")]
  whole = entry.read_bytes()
  entry.write_bytes(whole[:left])
  result = jax.jit(lambda x: jnp.tanh(x) @ x)(x)
  assert (result == jnp.tanh(x) @ x).all()
  assert len(entry.read_bytes()) > len(whole) // 2 > 100
  outcome("compiled and kept anew, no warning")


@pytest.mark.fault("compiled program being written", "when another run looks for it")
def test_a_program_appears_whole(folder, outcome):
  jax.jit(lambda x: x + 1)(jnp.eye(3))
  value, entry = np.random.default_rng(0).bytes(200_000_000), folder / "large-cache"
  writer = threading.Thread(target=compilation_cache._cache.put, args=("large", value))
  writer.start()
  while not entry.exists():
    assert writer.is_alive() or entry.exists()
  assert entry.stat().st_size == len(value)
  writer.join()
  assert [path.name for path in folder.glob("large*")] == [entry.name]
  outcome("there is none, or the whole")
