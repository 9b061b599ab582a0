"""A run that is asked to stop ends in time, also where it cannot listen: in a long compilation or step.

Python looks at signals between its own instructions only, and the compiler is one of them. A thread hears them at once.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

from absl import logging

from dtm_jax import console, distributed, signals

GRACE_SECONDS = 45  # schedulers give a minute
_NOTHING_LOST_SECONDS = 3  # for files that are being written
_FIRST_LAST_SECONDS = 5  # of several processes the first ends last: jax ends those that have lost it

_has_progress = threading.Event()


def note_progress() -> None:
  """From now on, ending at once would lose steps."""
  _has_progress.set()


@contextlib.contextmanager
def requests(newest_step: Callable[[], int]) -> Iterator[Callable[[], bool]]:
  """Asked whether a signal wants the run to stop; who does not ask is ended after a while.

  Args:
    newest_step: of the checkpoints, for the message.
  """
  with contextlib.ExitStack() as stack:
    if distributed.count() > 1:
      stop_requested = stack.enter_context(distributed.stop_requests())
    else:
      stop_requested = stack.enter_context(signals.noted()).is_set
    yield stack.enter_context(in_time(stop_requested, newest_step))


@contextlib.contextmanager
def in_time(stop_requested: Callable[[], bool], newest_step: Callable[[], int]) -> Iterator[Callable[[], bool]]:
  """The same question, which after a signal has to be asked in time: else the process ends with exit code 143.

  Args:
    stop_requested: whether a signal wants the run to stop.
    newest_step: of the checkpoints, for the message.
  """
  _has_progress.clear()
  is_heard = threading.Event()

  def ask() -> bool:
    if stop_requested():
      is_heard.set()
    return is_heard.is_set()

  def watch() -> None:
    is_alone = distributed.count() == 1  # else another may have made the first step
    leaves_last = distributed.is_first() and not is_alone
    wait_for_signal()
    if _has_progress.is_set() and not is_heard.is_set():
      logging.info("asked to stop: the run will at the next chance")
    if is_alone and not is_heard.wait(_NOTHING_LOST_SECONDS) and not _has_progress.is_set():
      _leave("asked to stop before there was anything to save")
    if not is_heard.wait(GRACE_SECONDS + leaves_last * _FIRST_LAST_SECONDS):
      _leave(f"asked to stop, and could not save for {GRACE_SECONDS} s; the newest checkpoint is {newest_step()}")

  with _arrival(is_heard) as wait_for_signal:
    threading.Thread(target=watch, daemon=True).start()
    try:
      yield ask
    finally:
      is_heard.set()


@contextlib.contextmanager
def _arrival(is_over: threading.Event) -> Iterator[Callable[[], None]]:
  """A function that waits until there is SIGTERM, of several processes to any of them, or SIGINT."""
  if distributed.count() > 1:  # jax listens, and not by Python
    yield lambda: _poll(distributed.is_preempted, is_over)
    return
  with signals.heard() as next_stop:
    yield next_stop


def _poll(has_come: Callable[[], bool], is_over: threading.Event) -> None:
  while not has_come() and not is_over.wait(1):
    pass


def _leave(message: str) -> NoReturn:
  logging.info("%s", message)
  distributed.leave(console.EXIT_SIGNAL)
