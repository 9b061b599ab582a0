"""Eight CPU devices for every test, and one folder of compiled programs: set before jax is imported anywhere."""

import importlib.util
import os
import pathlib
import tempfile

import numpy as np
import pytest
from matplotlib.figure import Figure

import runs

os.environ["JAX_PLATFORMS"] = "cpu"
# A busy machine may keep one of eight devices on two cores waiting for longer than XLA's 40 seconds.
os.environ["XLA_FLAGS"] = (
  "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=600"
  f" {runs.QUICKLY_COMPILED}"
)
# Much is compiled again and again. pytest's workers share the folder, and processes that tests start; it is not kept,
# for what is tested may be what is compiled.
if "PYTEST_XDIST_WORKER" not in os.environ:
  COMPILED = tempfile.TemporaryDirectory(prefix="dtm_jax_compiled_")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

# The extra `test` brings torch. Without it (no CPU build for some Pythons) what compares with it is left out.
if importlib.util.find_spec("torch") is None:
  tests = pathlib.Path(__file__).parent.glob("test_*.py")
  collect_ignore = [path.name for path in tests if "\nimport torch\n" in path.read_text()]

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden():
  """Loads a recorded reference by name."""
  return lambda name: np.load(GOLDEN / f"{name}.npz")


@pytest.fixture(scope="session", autouse=True)
def programs_appear_whole():
  """For the tests' own process, what `dtm_jax.main` does for its own."""
  from dtm_jax import compile_cache  # jax reads the environment once, when it is imported

  compile_cache.enable()


@pytest.fixture(scope="session")
def compile_cache():
  """The folder of compiled programs, for processes whose environment a test makes itself."""
  return pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"])


@pytest.fixture
def saved_figures(monkeypatch):
  """A list of matplotlib's figures, as they were when written."""
  seen, savefig = [], Figure.savefig

  def spy(figure, *args, **settings):
    seen.append(figure)
    savefig(figure, *args, **settings)

  monkeypatch.setattr(Figure, "savefig", spy)
  return seen


@pytest.fixture(autouse=True)
def no_process_is_left():
  yield
  runs.end_all()
