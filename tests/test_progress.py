"""What the user watches: a bar on a terminal, lines in a file, and log messages that do not break the bar."""

import contextlib
import dataclasses
import fcntl
import io
import logging as python_logging
import os
import pty
import re
import struct
import termios
import time

import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from dtm_jax import console, loop, metrics
from dtm_jax.train_state import NEVER, TrainState

NUM_STEPS = 6


def open_terminal(columns: int) -> tuple[int, int]:
  """File descriptors of a terminal of so many columns: what reads it, and what it shows."""
  master, slave = pty.openpty()
  fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
  return master, slave


def read_all(master: int) -> str:
  """What a terminal was sent, after its other end was closed."""
  chunks = []
  with os.fdopen(master, "rb", buffering=0) as file, contextlib.suppress(OSError):  # the end is an OSError
    while chunk := file.read(4096):
      chunks.append(chunk)
  return b"".join(chunks).decode()


def train(
  *,
  wait=0.0,
  evaluating=0.0,
  log=lambda step, values: None,
  start=0,
  log_every=2,
  evaluate_every=2,
  compute_loss=lambda: jnp.float32(0.25),
) -> TrainState:
  """A loop whose steps only have a loss; each batch is waited for, and every other state takes its time to evaluate."""

  def train_step(state, batch):
    metrics = {"loss": compute_loss(), "lr": jnp.float32(1e-3)}
    return state.replace(step=state.step + 1), metrics

  def batches():
    while True:
      time.sleep(wait)
      yield {"index": np.arange(4)}

  training = loop.Loop(
    train_step=train_step,
    place=lambda batch: batch,
    num_steps=NUM_STEPS,
    batch_size=4,
    log_every=log_every,
    save_every=100,
    evaluate_every=evaluate_every,
    log=log,
    save=lambda state: None,
    evaluate=lambda state: time.sleep(evaluating),
    stop_requested=lambda: False,
  )
  return training.run(TrainState(jnp.int32(start), {}, (), jnp.int32(NEVER)), batches())


@pytest.fixture
def plain_log(monkeypatch):
  console.log_plainly()
  yield
  logging.set_verbosity(logging.WARNING)
  python_logging.root.removeHandler(console.LINES)


def test_a_terminal_gets_a_bar_of_eighty_columns(monkeypatch, plain_log):
  master, slave = open_terminal(columns=80)
  with os.fdopen(slave, "w") as file, monkeypatch.context() as patch:
    patch.setattr("sys.stderr", file)
    train(wait=0.3, log=lambda step, values: python_logging.warning("message at %d", step))
  redraws = re.split(r"[\r\n]+", read_all(master))
  bars = [text for text in redraws if "left, loss" in text]
  assert re.search(r"\d+%\|.*\| [246]/6, [\d:?]+ left, loss 0.2500, lr 1.0e-03, \d+ images/s, \d+% waiting$", bars[-1])
  assert max(map(len, bars)) <= 80
  messages = [text for text in redraws if "message" in text]
  assert [re.sub(r"^\d\d:\d\d:\d\d ", "", text) for text in messages] == [f"message at {n}" for n in (2, 4, 6)]


def test_a_file_gets_a_line_for_each_log(monkeypatch, plain_log):
  output = io.StringIO()
  monkeypatch.setattr("sys.stderr", output)
  train(wait=0.05, start=2)
  *lines, last = output.getvalue().split("\n")
  assert last == ""
  assert len(lines) == 2
  pattern = r"\d\d:\d\d:\d\d step {}/6, loss 0.2500, lr 1.0e-03, \d+ images/s, \d+% waiting, 00:0\d left"
  for line, step in zip(lines, (4, 6), strict=True):
    assert re.fullmatch(pattern.format(step), line)


def test_waiting_and_speed_are_what_they_were():
  """Evaluation is no part of them: with it, there would be 9 images a second."""
  rows = {}
  train(wait=0.2, evaluating=0.5, log=rows.__setitem__)
  assert [*rows] == [2, 4, 6]
  assert rows[6]["percent_waiting"] > 70  # steps take nothing
  assert 10 < rows[6]["images_per_second"] <= 4 / 0.2


@dataclasses.dataclass(frozen=True)
class Working:
  """A loss that a device is at work on until a time."""

  end: float

  def block_until_ready(self):
    time.sleep(max(0.0, self.end - time.perf_counter()))
    return self

  def __float__(self):
    self.block_until_ready()
    return 0.25


@pytest.mark.parametrize(
  ("wait", "low", "high"),
  [(0.05, 0, 5), (0.22, 2, 30), (0.6, 50, 85)],  # beside steps of 0.2 s: devices are idle for 0, 9 and 67 % of the time
)
def test_waiting_is_what_devices_do_not_what_goes_on_beside_their_work(wait, low, high):
  rows, free = {}, [0.0]

  def start_step():
    free[0] = max(free[0], time.perf_counter()) + 0.2
    return Working(free[0])

  train(wait=wait, log=rows.__setitem__, log_every=NUM_STEPS, evaluate_every=100, compute_loss=start_step)
  seconds = NUM_STEPS * 4 / rows[NUM_STEPS]["images_per_second"]
  waited = seconds * rows[NUM_STEPS]["percent_waiting"] / 100 - wait  # the first is waited for in any case
  assert low <= 100 * waited / seconds <= high


def test_scores_are_told_in_percent():
  values = {
    "steps": 400,
    "loss": 0.0055672,
    "knn_top1_before": 0.48057,
    "ema_top5": 1.0,
    "a/mce": 0.5,
    "seconds": 123456.78,
  }
  told = "steps 400, loss 0.005567, knn_top1_before 48.1 %, ema_top5 100.0 %, a/mce 50.0 %, seconds 123457"
  assert metrics.told(values) == told


def test_libraries_are_heard_only_when_they_warn(monkeypatch, plain_log):
  output = io.StringIO()
  monkeypatch.setattr("sys.stderr", output)
  library = python_logging.getLogger("another_package")
  library.setLevel(python_logging.DEBUG)
  library.info("chatter")
  library.warning("worth knowing")
  try:
    raise OSError("disk full")
  except OSError:
    library.exception("a background thread failed")
  assert [line[9:] for line in output.getvalue().splitlines()] == ["worth knowing"]
