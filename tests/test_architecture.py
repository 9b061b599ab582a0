"""The rules of the house, read from the code: who imports whom, and what the library half never imports."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "dtm_jax"

# A module imports from lower ranks, or from its own folder.
RANKS = {
  **dict.fromkeys(("axes", "errors"), -2),
  "files": -1,
  **dict.fromkeys(("console", "signals"), -1),
  "config": 0,
  **dict.fromkeys(("data", "distributed"), 1),
  "models": 2,
  "stopping": 2,
  "convert": 2,
  "augment": 2,
  "morphing": 3,
  **dict.fromkeys(("teachers", "losses"), 4),
  **dict.fromkeys(("optim", "sharding", "train_state", "roofline", "compile_cache", "collectives"), 5),
  **dict.fromkeys(("steps", "networks"), 6),
  **dict.fromkeys(("checkpoint", "metrics"), 7),
  "loop": 8,
  **dict.fromkeys(("evaluate", "figures", "workdir", "skipped_batches"), 9),
  "restore": 10,
  "experiment": 11,
  "command_line": 11,
  **dict.fromkeys(("pretraining", "finetuning", "evaluation", "inference"), 12),
  **dict.fromkeys(("numerics", "export", "study", "ahead_of_time"), 13),
  "main": 14,
  "__main__": 15,
}
# Entry points that hand over to what they start, and the lazy public names.
FREE = {"__init__"}


def room(path: pathlib.Path) -> str:
  """The folder or module of the package that has the rank; commands may call anything."""
  if path.name == "__main__.py":
    return "__main__"
  return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: pathlib.Path) -> set[str]:
  rooms = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "dtm_jax":
      parts = node.module.split(".")[1:]
      rooms |= {parts[0]} if parts else {alias.name for alias in node.names if alias.name in RANKS}
    elif isinstance(node, ast.Import):
      rooms |= {name.split(".")[1] for alias in node.names if (name := alias.name).startswith("dtm_jax.")}
  return rooms


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if room(path) not in FREE)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
  own = room(path)
  assert own in RANKS, f"{own} has no rank: give it one above"
  upward = {other for other in imported_rooms(path) if other != own and RANKS[other] >= RANKS[own]}
  assert not upward, f"{path} imports {upward}"


def test_the_library_half_imports_without_data_or_torch_packages():
  program = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
  def find_spec(self, name, path=None, target=None):
    refused = ("tensorflow_datasets", "tensorflow", "grain", "array_record", "torch", "torchvision", "transformers")
    if name.split(".")[0] in refused:
      raise ImportError(f"{name} must not be imported")

sys.meta_path.insert(0, Refuse())
import dtm_jax
from dtm_jax import augment, config, convert, losses, morphing, optim, sharding, teachers, train_state
from dtm_jax.models import clip, vit
from dtm_jax.steps import pretrain
[getattr(dtm_jax, name) for name in dtm_jax.__all__]
"""
  subprocess.run([sys.executable, "-c", program], check=True, cwd=PACKAGE.parent)


def test_a_run_does_not_import_what_it_has_no_use_for(tmp_path):
  """PyTorch would cost it a second and 200 MB, SciPy half a second: both are installed here."""
  pytest.importorskip("torch")
  program = f"""
import pathlib, sys
from dtm_jax import evaluation, finetuning, metrics, pretraining

metrics.MetricWriter(pathlib.Path({str(tmp_path)!r})).write(1, {{"loss": 0.5}})
assert not {{"torch", "scipy", "sklearn", "transformers"}} & sys.modules.keys()
__import__("torch")
"""
  subprocess.run([sys.executable, "-c", program], check=True, cwd=PACKAGE.parent)


def test_what_data_workers_run_does_not_import_jax():
  program = "import sys; from dtm_jax.data import masking, sources, transforms; assert 'jax' not in sys.modules"
  subprocess.run([sys.executable, "-c", program], check=True, cwd=PACKAGE.parent)


def test_no_tensorflow():
  for path in PACKAGE.parent.rglob("*.py"):
    if path == pathlib.Path(__file__) or any(part.startswith(".") or part == "build" for part in path.parts):
      continue
    text = path.read_text()
    assert "import tensorflow\n" not in text and "import tensorflow as" not in text, path
