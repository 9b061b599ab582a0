"""The README's commands run, and what it says of the code is there."""

import gzip
import itertools
import os
import pathlib
import re
import shlex
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import runs

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
# (marker, language, text)
BLOCKS = re.findall(r"(<!-- ci: \w+ -->\n)?```(\w*)\n(.*?)```", README, flags=re.DOTALL)
# Those marked for CI install the project first: .ci/run runs them.
SHELL_LINES = [
  line for marker, language, text in BLOCKS if language == "sh" and not marker for line in text.splitlines() if line
]
PROGRAMS = {"python": sys.executable, "launch/local.sh": "launch/local.sh"}
PYTHON = [text for _, language, text in BLOCKS if language == "python"]


def test_nothing_is_left_to_fill_in():
  assert not re.findall(r"@[A-Z_]+@", README)


def test_ci_runs_the_two_set_up_commands():
  assert re.findall(r"<!-- ci: (\w+) -->", README) == ["quickstart", "tests"]


def test_links_and_named_files_exist():
  targets = re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r"`((?:tests|configs|benchmarks)/[\w./]+)`", README)
  local = [target for target in targets if "://" not in target]
  assert len(local) > 8
  assert not [target for target in local if not (ROOT / target).exists()]


@pytest.mark.parametrize("text", PYTHON)
def test_python_examples_run(text):
  exec(text, {})


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
  """What a user has, in small: images, Fashion-MNIST's files, weights; and folders for what commands write."""
  images, idx, data, runs = (tmp_path_factory.mktemp(name) for name in ("images", "idx", "data", "runs"))
  rng = np.random.default_rng(0)
  for i in range(24):
    folder = images / f"class_{i % 2}"
    folder.mkdir(exist_ok=True)
    Image.fromarray(rng.integers(256, size=(40, 50, 3), dtype=np.uint8)).save(folder / f"{i}.jpg")
  for split, count in (("train", 40), ("t10k", 24)):
    pixels, labels = rng.integers(256, size=(count, 28, 28), dtype=np.uint8), np.arange(count, dtype=np.uint8) % 10
    for name, magic, array in (("images-idx3", 0x803, pixels), ("labels-idx1", 0x801, labels)):
      header = struct.pack(f">{1 + array.ndim}i", magic, *array.shape)
      (idx / f"{split}-{name}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
  folders = {"IMAGES": str(images), "/usr/share/datasets/fashion-mnist": str(idx), "data": str(data)}
  named = re.findall(r"runs/[\w.]+", " ".join(SHELL_LINES))
  written = {name: str(runs / pathlib.Path(name).name) for name in named}
  there = {"runs/quickstart": written["runs/short"], "beit.pth": str(ROOT / "tests/golden/student_tiny.pth")}
  return folders | written | there


def in_small(arguments: list[str], stand_ins: dict[str, str], workdir: pathlib.Path) -> list[str]:
  """The same command on the stand-ins, as two steps of a tiny student: everything else is as the README has it."""
  arguments = ["=".join(stand_ins.get(part, part) for part in argument.split("=")) for argument in arguments]
  is_small = any(":smoke" in argument or "evaluate.py" in argument for argument in arguments)
  if "dtm_jax.main" not in arguments or is_small:
    return arguments
  unnamed = [] if any("--workdir=" in argument for argument in arguments) else [f"--workdir={workdir}"]
  if not any("--config=" in argument for argument in arguments):
    return [*arguments, *unnamed]
  arguments = [f"{a}{',' if ':' in a else ':'}smoke" if a.startswith("--config=") else a for a in arguments]
  if not any("data.source" in argument for argument in arguments):
    is_named = any("data.path" in argument for argument in arguments)
    arguments.insert(3, f"--config.data.source={'tfds' if is_named else 'synthetic'}")
  return [*arguments, "--config.eval.knn_k=5", *unnamed]


@pytest.mark.slow
def test_shell_lines_run(stand_ins, tmp_path):
  lines = [line for line in SHELL_LINES if not line.startswith("tfds ")]  # it needs TensorFlow and ImageNet
  assert len(lines) >= 8
  for i, line in enumerate(lines):
    words = shlex.split(line, comments=True)
    variables = dict(word.split("=") for word in itertools.takewhile(lambda word: "=" in word, words))
    program, *arguments = words[len(variables) :]
    assert program in PROGRAMS, line
    command = [PROGRAMS[program], *in_small(arguments, stand_ins, tmp_path / str(i))]
    environment = os.environ | {"PYTHON": sys.executable, "XLA_FLAGS": runs.QUICKLY_COMPILED} | variables
    assert subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0, line
