"""SIGTERM and SIGINT as a question that a long job asks when it can stop, and as a message to a thread."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def noted() -> Iterator[threading.Event]:
  """SIGTERM and SIGINT set the event instead of ending the process; a second Ctrl-C ends it."""
  stop = threading.Event()

  def note(number, frame):
    stop.set()
    signal.signal(signal.SIGINT, signal.SIG_DFL)

  previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield stop
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


@contextlib.contextmanager
def heard() -> Iterator[Callable[[], int | None]]:
  """A function for a thread: waits for the next SIGTERM or SIGINT that has a handler in Python; None at the end.

  Handlers run in the main thread, and not while that is inside of a compiler; the number of a signal is there at once.
  """
  reader, writer = os.pipe()
  os.set_blocking(writer, False)  # as `set_wakeup_fd` wants it
  previous = signal.set_wakeup_fd(writer)
  try:
    yield lambda: _next_stop(reader)
  finally:
    signal.set_wakeup_fd(previous)
    os.close(writer)


def _next_stop(reader: int) -> int | None:
  with open(reader, "rb", buffering=0) as numbers:
    while number := numbers.read(1):
      if number[0] in (signal.SIGTERM, signal.SIGINT):
        return number[0]
  return None
