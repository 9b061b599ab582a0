"""Runs the cells of a study, each in a process of its own, as soon as what they need is there."""

import contextlib
import dataclasses
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from absl import logging

from dtm_jax import metrics
from dtm_jax import workdir as workdirs
from dtm_jax.config import to_json
from dtm_jax.console import EXIT_SIGNAL
from dtm_jax.errors import InputError
from dtm_jax.study.plan import Cell

DONE_FILE = "cell.json"  # the settings of a cell that is complete
LOG_FILE = "log.txt"
COMPILED = "compiled"  # programs that cells of one kind share
_BEGAN_WITH = ("teacher_sha256", "init_sha256", "params_sha256")  # entries of the record, of a task each
_POLL_SECONDS = 0.1
_MAX_CPU_JOBS = 8  # each takes about a GiB of memory
# On CPUs, XLA maps a step's temporary memory anew in each step, which in small pages takes a good part of its time
# (benchmarks/huge_pages.py).
_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


@dataclasses.dataclass(frozen=True)
class Slot:
  """What one of the processes that run at a time has for itself.

  Attributes:
    environment: variables; which GPU it sees.
    cores: of the CPU, by number; empty for all of them.
  """

  environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
  cores: frozenset[int] = frozenset()


def find_slots(jobs: int | None) -> list[Slot]:
  """One slot for each GPU or, where CPUs compute, for each core; one for a TPU, which serves one process.

  Args:
    jobs: how many instead.
  """
  # Not in this process: it would keep the GPUs' memory.
  question = "import jax; print(jax.default_backend(), jax.local_device_count())"
  answer = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True, check=False)
  if answer.returncode:
    raise InputError(f"JAX does not start here: {_last_line(answer.stderr)}; mend the installation or JAX_PLATFORMS")
  backend, count = answer.stdout.split()
  if backend == "gpu":
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(int(count))))
    return gpu_slots(visible.split(","), jobs)
  if backend == "cpu" and hasattr(os, "sched_getaffinity"):  # Linux
    return cpu_slots(sorted(os.sched_getaffinity(0)), jobs)
  return [Slot()] * (jobs or 1)


def gpu_slots(gpus: Sequence[str], jobs: int | None) -> list[Slot]:
  """GPUs in turn; several processes on one take memory as they need it."""
  jobs = jobs or len(gpus)
  shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if jobs > len(gpus) else {}
  return [Slot({"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)], **shared}) for i in range(jobs)]


def cpu_slots(cores: Sequence[int], jobs: int | None) -> list[Slot]:
  """Cores dealt out: small models train faster one to a core than one after the other on all of them."""
  jobs = jobs or min(len(cores), _MAX_CPU_JOBS)
  return [Slot(cores=frozenset(cores[i % len(cores) :: jobs])) for i in range(jobs)]


@contextlib.contextmanager
def _confined_to(cores: frozenset[int]) -> Iterator[None]:
  """Processes that this thread starts here have these cores only; JAX makes a thread for each."""
  if not cores:
    yield
    return
  before = os.sched_getaffinity(0)
  os.sched_setaffinity(0, cores)
  try:
    yield
  finally:
    os.sched_setaffinity(0, before)


@dataclasses.dataclass
class _Running:
  cell: Cell
  process: subprocess.Popen
  slot: Slot
  start: float


@dataclasses.dataclass
class Runner:
  """The state of a study that is being run.

  Attributes:
    folder: of the study.
    slots: of the processes at a time, see `find_slots`.
    lock: file descriptor of the folder's lock, which cells hold, too.
    stop: set, it stops the cells under way, which save.
    done: names of cells that are complete.
    failed: names of cells that are not, and of those that need them.
  """

  folder: pathlib.Path
  slots: Sequence[Slot]
  lock: int
  stop: threading.Event
  done: set[str] = dataclasses.field(default_factory=set)
  failed: set[str] = dataclasses.field(default_factory=set)

  def run(self, cells: Sequence[Cell], on_end: Callable[[], None]) -> None:
    """Runs all that are not complete; `on_end` is called after each. What fails is told."""
    self.done |= complete(self.folder, cells)
    if self.done:
      logging.info("%d of %d cells are complete already", len(self.done), len(cells))
    waiting, free, running = [cell for cell in cells if cell.name not in self.done], [*self.slots], []
    try:
      while running or (waiting and not self.stop.is_set()):
        self._drop_hopeless(waiting)
        while free and not self.stop.is_set() and (cell := self._next(waiting)):
          waiting.remove(cell)
          running.append(self._start(cell, free.pop()))
        for ended in [one for one in running if one.process.poll() is not None]:
          running.remove(ended)
          free.append(ended.slot)
          self._note(ended, f"{len(self.done) + 1}/{len(cells)}")
          on_end()
        if self.stop.wait(_POLL_SECONDS) and running:
          self._end(running)
    finally:
      self._end(running)

  def _next(self, waiting: Sequence[Cell]) -> Cell | None:
    """The first cell whose needs are met."""
    return next((cell for cell in waiting if not cell.needs or cell.needs in self.done), None)

  def _drop_hopeless(self, waiting: list[Cell]) -> None:
    for cell in [cell for cell in waiting if cell.needs in self.failed]:
      logging.info("%s: left out, %s failed", cell.name, cell.needs)
      waiting.remove(cell)
      self.failed.add(cell.name)

  def _start(self, cell: Cell, slot: Slot) -> _Running:
    workdir = self.folder / cell.name
    workdirs.create(workdir)
    defaults = _HUGE_PAGES | {"JAX_COMPILATION_CACHE_DIR": str(self.folder / COMPILED)}
    (workdir / DONE_FILE).unlink(missing_ok=True)
    with (workdir / LOG_FILE).open("a") as log, _confined_to(slot.cores):
      process = subprocess.Popen(
        [sys.executable, "-m", "dtm_jax.main", *cell.arguments, f"--workdir={workdir}"],
        env=defaults | os.environ | slot.environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        pass_fds=(self.lock,),
        start_new_session=True,  # Ctrl-C is for the study, which passes it on
      )
    return _Running(cell, process, slot, time.perf_counter())

  def _note(self, ended: _Running, count: str) -> None:
    cell, code = ended.cell, ended.process.returncode
    workdir, seconds = self.folder / cell.name, time.perf_counter() - ended.start
    if code == 0 and not _is_up_to_date(self.folder, cell):
      self.failed.add(cell.name)
      told = "%s: FAILED: it is complete, and began from another %s than there is now; remove %s"
      logging.info(told, cell.name, cell.needs, workdir)
    elif code == 0:
      workdirs.write_json(workdir / DONE_FILE, to_json(cell.config))
      self.done.add(cell.name)
      logging.info("%s %s: %.0f s%s", count, cell.name, seconds, _scores(workdir))
    elif code == EXIT_SIGNAL and self.stop.is_set():
      logging.info("%s: stopped", cell.name)
    else:
      self.failed.add(cell.name)
      log = workdir / LOG_FILE
      logging.info("%s: FAILED (exit code %d): %s; see %s", cell.name, code, _last_line(log.read_text()), log)

  def _end(self, running: Sequence[_Running]) -> None:
    """Has the cells under way save and end."""
    for one in running:
      one.process.terminate()
    for one in running:
      one.process.wait()


def complete(folder: pathlib.Path, cells: Sequence[Cell]) -> set[str]:
  """Names of the cells that are complete, with these very settings, and so is what they began from.

  With other settings, a cell's own run decides what it makes of them.
  """
  names = set()
  for cell in cells:  # those that others need come first
    is_done = workdirs.read_json(folder / cell.name / DONE_FILE) == to_json(cell.config)
    if is_done and (not cell.needs or cell.needs in names) and _is_up_to_date(folder, cell):
      names.add(cell.name)
  return names


def _is_up_to_date(folder: pathlib.Path, cell: Cell) -> bool:
  """Whether a cell that has run began from what the one that it needs has left, which may have been trained again."""
  if not cell.needs:
    return True
  record = workdirs.read_json(folder / cell.name / workdirs.CONFIG_FILE) or {}
  summary = workdirs.read_json(folder / cell.needs / workdirs.SUMMARY_FILE) or {}
  return summary.get("params_sha256", "") in [record[name] for name in _BEGAN_WITH if name in record]


def _scores(workdir: pathlib.Path) -> str:
  summary = workdirs.read_json(workdir / workdirs.SUMMARY_FILE)
  scores = {name: summary[name] for name in ("top1", "knn_top1", "linear_top1", "fewshot_top1") if name in summary}
  return f", {metrics.told(scores)}" if scores else ""


def _last_line(text: str) -> str:
  *_, last = ("no output", *(line.strip() for line in text.splitlines() if line.strip()))
  return last
