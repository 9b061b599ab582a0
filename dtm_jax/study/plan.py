"""From a study's page to its cells: ordinary runs of this program, some of which begin from what others leave."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence

from ml_collections import ConfigDict

from dtm_jax import command_line
from dtm_jax.config import Config, resolve
from dtm_jax.errors import InputError

EVALUATE = "evaluate"
TRAIN = "train"
TEACHER = "teacher"
# Where a run of each task is told what it begins from.
_BEGINS_FROM = {"pretrain": "teacher.weights", "finetune": "finetune.init", "evaluate": "eval.checkpoint"}

ReadRun = Callable[[str], tuple[tuple[str, ...], ConfigDict]]  # from a run's name to its arguments and settings


@dataclasses.dataclass(frozen=True)
class Cell:
  """A run of `dtm_jax.main`.

  Attributes:
    name: also its work folder's, under the study's: "TEACHER/ARM/seed0/train".
    arguments: of the command line, but for the work folder.
    config: what they come to.
    needs: the name of the cell whose checkpoint it begins from, "" for none.
  """

  name: str
  arguments: tuple[str, ...]
  config: Config
  needs: str


@dataclasses.dataclass(frozen=True)
class Study:
  """What a page asks for at a scale.

  Attributes:
    title: the page and the scale.
    folder: of the study.
    seeds: of every arm.
    teachers: names.
    arms: ways of pre-training, by name.
    untrained: name of the students before their first step, "" where they are left out.
    baseline: the arm that others are compared with, seed by seed.
    labels: kinds of fine-tuning, by name.
    shots: labelled images per class, of few-shot.
    data_hint: what to do where the data are missing.
    cells: those that others need come first.
  """

  title: str
  folder: pathlib.Path
  seeds: tuple[int, ...]
  teachers: tuple[str, ...]
  arms: tuple[str, ...]
  untrained: str
  baseline: str
  labels: tuple[str, ...]
  shots: tuple[int, ...]
  data_hint: str
  cells: tuple[Cell, ...]

  def students(self, teacher: str) -> list[tuple[str, str]]:
    """(arm, folder) of every row of a teacher's table."""
    untrained = [(self.untrained, self.untrained)] if self.untrained else []
    return untrained + [(arm, f"{teacher}/{arm}") for arm in self.arms]


def read_study(page: str, scale: str, overrides: Sequence[str], folder: pathlib.Path) -> Study:
  """Reads a page and resolves all its runs.

  A page's `get_config(SCALE)` gives a ConfigDict with the entries of `Study` from `seeds` to `labels`, `data_hint`, and
  `runs`, a ConfigDict for each of: every teacher that has to be trained ("TEACHER/teacher"), every pre-training
  ("TEACHER/ARM"), the untrained student, every kind of fine-tuning, and "evaluate". `get_config("SCALE/RUN")` gives one
  of them. Seeds and paths between runs are added here.

  Args:
    page: the config file.
    scale: one that the page knows.
    overrides: `--config.path.to.key=value`, of all runs.
    folder: of the study.

  Raises:
    InputError: the page cannot be loaded, or a run's settings are wrong.
  """
  plan = command_line.parse_config(["study", f"--config={page}:{scale}"])
  if "runs" not in plan:
    raise InputError(f"--config={page} is the page of one run, not of a study; run it with dtm_jax.main")

  if any(override.startswith("--config.run.seed") for override in overrides):
    raise InputError(f"the seeds are the page's, {plan.seeds}; leave --config.run.seed out or change them in {page}")

  @functools.cache
  def read_run(run):
    arguments = (f"--config={page}:{scale}/{run}", *overrides)
    return arguments, command_line.parse_config(["study", *arguments])

  names = ("seeds", "teachers", "arms", "untrained", "baseline", "labels", "data_hint")
  named = {name: plan[name] for name in names}
  study = Study(f"{page}:{scale}", folder, **named, shots=plan.runs[EVALUATE].eval.fewshot, cells=())
  cells = (_make_cell(read_run, folder, *cell) for cell in _cells(study, plan.runs))
  return dataclasses.replace(study, cells=tuple(cells))


def _cells(study: Study, runs: ConfigDict) -> Iterator[tuple[str, str, str, int | None]]:
  """(name, run, needs, seed) of all cells; a whole seed comes before the next."""
  trained = {teacher: f"{teacher}/{TEACHER}/{TRAIN}" for teacher in study.teachers if f"{teacher}/{TEACHER}" in runs}
  for teacher, cell in trained.items():
    yield cell, f"{teacher}/{TEACHER}", "", None
    yield f"{teacher}/{TEACHER}/{EVALUATE}", EVALUATE, cell, None
  for seed in study.seeds:
    students = {student: teacher for teacher in study.teachers for _, student in study.students(teacher)}
    for student, teacher in students.items():
      needs = "" if student == study.untrained else trained.get(teacher, "")
      yield f"{student}/seed{seed}/{TRAIN}", student, needs, seed
      for readout in (EVALUATE, *study.labels):
        yield f"{student}/seed{seed}/{readout}", readout, f"{student}/seed{seed}/{TRAIN}", seed


def _make_cell(read_run: ReadRun, folder: pathlib.Path, name: str, run: str, needs: str, seed: int | None) -> Cell:
  arguments, settings = read_run(run)
  changes = {} if seed is None else {"run.seed": seed}
  if needs:
    changes[_BEGINS_FROM[settings.task]] = str(folder / needs)
  settings = settings.copy_and_resolve_references()
  settings.update_from_flattened_dict(changes)
  arguments += tuple(f"--config.{setting}={value}" for setting, value in changes.items())
  return Cell(name, arguments, resolve(settings), needs)
