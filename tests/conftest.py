"""Eight CPU devices for every test, and strict jax: set before jax is imported anywhere."""

import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import numpy as np
import pytest

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden():
  """Loads a recorded reference by name."""
  return lambda name: np.load(GOLDEN / f"{name}.npz")
