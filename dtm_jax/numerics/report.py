"""What the commands print and write: aligned tables, whole files, and where a figure comes from."""

import importlib.metadata
import json
import math
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from dtm_jax import __version__
from dtm_jax.files import replacing

_PACKAGES = ("jax", "jaxlib", "flax", "numpy")


def table(heading: Sequence[str], rows: Sequence[Sequence[str]], groups: Sequence[str] = ()) -> str:
  """Text with the first column flush left and the others flush right.

  Args:
    heading: of each column.
    rows: of cells.
    groups: titles above equal shares of all columns but the first.
  """
  columns = list(zip(heading, *rows, strict=True))
  widths = [max(map(len, column)) for column in columns]
  share = (len(widths) - 1) // max(1, len(groups))
  for i, title in enumerate(groups):  # the last column of a share makes room for its title
    missing = len(title) - (sum(widths[1 + i * share : 1 + (i + 1) * share]) + 2 * (share - 1))
    widths[(i + 1) * share] += max(0, missing)
  lines = []
  if groups:
    spans = [sum(widths[1 + i * share : 1 + (i + 1) * share]) + 2 * (share - 1) for i in range(len(groups))]
    titles = (title.rjust(span) for title, span in zip(groups, spans, strict=True))
    lines.append("  ".join([" " * widths[0], *titles]))
  for first, *others in [heading, *rows]:
    cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
    lines.append("  ".join([first.ljust(widths[0]), *cells]))
  return "\n".join(line.rstrip() for line in lines)


def environment() -> dict[str, Any]:
  """Device and versions of the XLA side."""
  device = jax.devices()[0]
  return {
    "device": f"{device.platform} ({device.device_kind})",
    "versions": {"dtm_jax": __version__, "python": platform.python_version()}
    | {name: importlib.metadata.version(name) for name in _PACKAGES},
  }


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
  """Writes in one piece. Figures that are not finite, which JSON does not have, are text: "nan", "inf", "-inf".

  Raises:
    InputError: the file cannot be written.
  """
  with replacing(path) as unfinished:
    unfinished.write_text(json.dumps(_valid(content), indent=2, allow_nan=False) + "\n")


def _valid(content: Any) -> Any:
  if isinstance(content, Mapping):
    return {name: _valid(value) for name, value in content.items()}
  if isinstance(content, (list, tuple)):
    return [_valid(value) for value in content]
  return str(content) if isinstance(content, float) and not math.isfinite(content) else content
