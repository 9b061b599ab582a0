"""What a run writes down while it goes: `metrics.jsonl` and TensorBoard."""

import contextlib
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dtm_jax import distributed
from dtm_jax.errors import InputError
from dtm_jax.files import replacing

FILE = "metrics.jsonl"
_SHARES = ("top1", "top5", "mce")  # in the names of scores


class Score(NamedTuple):
  """A value that was logged."""

  step: int
  name: str
  value: float


class MetricWriter:
  """Appends one JSON object per step to `metrics.jsonl`, and the same numbers to TensorBoard.

  A resumed run repeats steps that were logged after its checkpoint. They come
  out the same, so a row whose keys are all there for its step is not written
  again, and half a line, left by a kill, is cut off.

  Of several processes the first reads and writes; all know what was logged.
  """

  def __init__(self, workdir: pathlib.Path):
    self._path = workdir / FILE
    self.rows = distributed.from_first(lambda: read_rows(workdir))
    self._tensorboard = None
    if distributed.is_first():
      # It imports PyTorch where there is one, which takes a second and 200 MB, for tensors that a run does not have.
      with _as_if_missing("torch"):
        from tensorboardX import SummaryWriter

      if self._path.exists():
        _cut_half_line(self._path)
      self._tensorboard = SummaryWriter(str(workdir / "tensorboard"))

  def write(self, step: int, values: dict[str, Any]) -> None:
    """Writes numbers, or short lists of them, of one step."""
    if any(row["step"] == step and values.keys() <= row.keys() for row in self.rows):
      return
    row = {"step": step, **values}
    self.rows.append(row)
    if self._tensorboard is None:
      return
    with self._path.open("a") as file:
      file.write(json.dumps(row) + "\n")
      file.flush()
      os.fsync(file.fileno())  # a batch that is skipped is known from here only
    for name, value in values.items():
      if isinstance(value, (int, float)):
        self._tensorboard.add_scalar(name, value, step)
    self._tensorboard.flush()

  def forget_after(self, step: int) -> None:
    """Removes the rows of all later steps, which will not come out the same."""
    self.rows = [row for row in self.rows if row["step"] <= step]
    if self._tensorboard is not None and self._path.exists():
      with replacing(self._path) as unfinished:
        unfinished.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

  def find(self, step: int, name: str) -> Any | None:
    """The value logged under a name at a step, or None."""
    return next((row[name] for row in self.rows if row["step"] == step and name in row), None)

  def series(self, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one name, in order."""
    pairs = sorted((row["step"], row[name]) for row in self.rows if name in row)
    return [step for step, _ in pairs], [value for _, value in pairs]

  def best(self, names: Sequence[str], *, until: int) -> Score:
    """The highest of the named values logged up to a step, the first such; there is one."""
    rows = sorted((row for row in self.rows if row["step"] <= until), key=lambda row: row["step"])
    scores = [Score(row["step"], name, row[name]) for row in rows for name in names if name in row]
    return max(scores, key=lambda score: score.value)

  def close(self) -> None:
    if self._tensorboard is not None:
      self._tensorboard.close()


def told(values: Mapping[str, Any]) -> str:
  """Values by name for people: scores in percent, other numbers with four digits."""
  return ", ".join(f"{name} {_told(name, value)}" for name, value in values.items())


def _told(name: str, value: Any) -> str:
  if not isinstance(value, float):
    return str(value)
  if any(share in name for share in _SHARES):
    return f"{100 * value:.1f} %"
  return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def read_rows(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """All complete rows of a work folder's `metrics.jsonl`. Raises InputError where one cannot be read."""
  path = workdir / FILE
  if not path.exists():
    return []
  lines = path.read_text(errors="replace").splitlines(keepends=True)
  return [_read_row(path, number, line) for number, line in enumerate(lines, 1) if line.endswith("\n")]


def _read_row(path: pathlib.Path, number: int, line: str) -> dict[str, Any]:
  try:
    return json.loads(line)
  except ValueError as error:
    raise InputError(f"line {number} of {path} is damaged; remove it, or choose another --workdir") from error


@contextlib.contextmanager
def _as_if_missing(module: str) -> Iterator[None]:
  """An import of this module fails inside, unless it has been imported already."""
  if module in sys.modules:
    yield
    return
  sys.modules[module] = None
  try:
    yield
  finally:
    del sys.modules[module]


def _cut_half_line(path: pathlib.Path) -> None:
  content = path.read_bytes()
  with path.open("rb+") as file:
    file.truncate(content.rfind(b"\n") + 1)
