"""The one exception that means "the user can mend this"."""


class InputError(ValueError):
  """Wrong usage, config, data or weights.

  The message is a single line that names the thing and the remedy. Commands
  print it without a traceback and leave with exit code 2.
  """
