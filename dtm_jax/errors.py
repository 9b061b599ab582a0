"""What the user can mend, how its message tells names, and that the user wants to stop."""

import errno
from collections.abc import Iterable

OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"  # in the message of jax's error
LESS_MEMORY = (
  "take more devices or a smaller config.data.batch_size (of an evaluation, config.eval.batch_size), or set"
  " config.mesh.fsdp, optim.accumulate_steps or model.remat=True"
)
_SHOWN_NAMES = 3
_OF_NETWORKS = {
  *(errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.ENOTCONN),
  *(errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH),
}


class InputError(ValueError):
  """Wrong usage, config, data or weights.

  The message is a single line that names the thing and the remedy. Commands
  print it without a traceback and leave with exit code 2.
  """


class TransientError(RuntimeError):
  """What may pass, such as a network's file system that does not answer.

  The message is a single line. Commands print it and leave with exit code 1, by
  which schedulers try again.
  """


class StoppedError(Exception):
  """The user asked to stop before all images were seen."""


def is_of_network(number: int | None) -> bool:
  """Whether a system's error number (`OSError.errno`) tells of a network's file system that does not answer."""
  return number in _OF_NETWORKS


def shown(text: str) -> str:
  """What a file says, for a message: one short line, whatever is in it."""
  return text if text.isprintable() and len(text) <= 100 else ascii(text)[:100]


def some_of(names: Iterable[str]) -> str:
  """The first names, and how many more."""
  names = list(names)
  more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
  return ", ".join(map(shown, names[:_SHOWN_NAMES])) + more
