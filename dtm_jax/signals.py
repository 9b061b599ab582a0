"""SIGTERM and SIGINT as a question that a long job asks when it can stop."""

import contextlib
import signal
import threading
from collections.abc import Iterator


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
