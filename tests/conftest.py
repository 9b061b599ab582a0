"""Eight CPU devices for every test, and strict jax: set before jax is imported anywhere."""

import importlib.util
import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

# The extra `test` brings torch. Without it (no CPU build for some Pythons) what compares with it is left out.
if importlib.util.find_spec("torch") is None:
  tests = pathlib.Path(__file__).parent.glob("test_*.py")
  collect_ignore = [path.name for path in tests if "\nimport torch\n" in path.read_text()]

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden():
  """Loads a recorded reference by name."""
  return lambda name: np.load(GOLDEN / f"{name}.npz")


@pytest.fixture(scope="session")
def compile_cache(tmp_path_factory):
  """A folder that keeps compiled programs, for tests that build the same run again and again."""
  folder = tmp_path_factory.mktemp("compile_cache")
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  compilation_cache.reset_cache()  # what was decided at the first compile is decided again
  return folder
