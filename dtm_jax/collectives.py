"""What devices say to each other in a compiled program, read from its text."""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

OPERATIONS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

_BITS = {"pred": 8, "token": 0}  # others end with their number of bits
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+)[a-z0-9]*\[([\d,]*)\]")
_INSTRUCTION = re.compile(
  rf"^ *(?:ROOT )?%?[\w.-]+ = (?P<shape>.+?) (?P<operation>{'|'.join(OPERATIONS)})(?P<start>-start)?\((?P<rest>.*)$"
)
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{ *$")
_CALLED = re.compile(
  r"(?:body|to_apply|calls|called_computations|branch_computations)=\{?(%?[\w.-]+(?:, ?%?[\w.-]+)*)\}?"
)
_CONDITION = re.compile(r"condition=%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BODY = re.compile(r"body=%?([\w.-]+)")
# The condition of a scan, or of a ring: its counter, which begins at 0, is below a constant.
_BELOW = re.compile(r"ROOT .* compare\(%?(?P<counter>[\w.-]+), %?(?P<limit>[\w.-]+)\), direction=LT")
_PLACE = re.compile(r"get-tuple-element\(.*\), index=(\d+)")
_RESULTS = re.compile(r"ROOT .* tuple\(([^()]*)\)")
_SUM = re.compile(r" add\(%?([\w.-]+), %?([\w.-]+)\)")
_CONSTANT = re.compile(r" constant\((\d+)\)")
_EXPLICIT_GROUP = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_IOTA_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_SCATTER = "all-reduce-scatter"  # how XLA names the fusion in which TPUs scatter what they reduce


class Collective(NamedTuple):
  """One collective operation of a program.

  Attributes:
    operation: one of `OPERATIONS`.
    bytes: of the whole array that it is about: the reduced, gathered or still unscattered one, of one group.
    group_size: devices that take part together.
    count: how often it runs in a call of the program, or None in a loop of which the program does not tell how long
      it runs.
  """

  operation: str
  bytes: int
  group_size: int
  count: int | None

  @property
  def sent(self) -> float:
    """Bytes that a device sends each time, at the least: an all-reduce is a reduce-scatter and an all-gather."""
    others = (self.group_size - 1) / self.group_size
    share = {"all-reduce": 2 * others, "collective-permute": 1.0}
    return self.bytes * share.get(self.operation, others)


def find(hlo: str, num_devices: int) -> list[Collective]:
  """The collectives of a compiled program.

  Args:
    hlo: what `compiled.as_text()` gives.
    num_devices: of the program, for operations among all of them.
  """
  computations, entry = _computations(hlo)
  counts = _counts(computations, entry)
  found: dict[str | int, Collective] = {}
  for name, lines in computations.items():
    for match in filter(None, map(_INSTRUCTION.match, lines)):
      one = _read(match, name, num_devices, counts.get(name))
      channel = _CHANNEL.search(match["rest"])
      key = channel[1] if channel else len(found)
      # TPUs' compiler writes a gather that goes on beside others once into each of them, and those may be in loops.
      if key not in found or _times(one) < _times(found[key]):
        found[key] = one
  return [one for one in found.values() if one.count != 0]


def _times(one: Collective) -> float:
  return math.inf if one.count is None else one.count


def _read(match: re.Match, computation: str, num_devices: int, count: int | None) -> Collective:
  operation, rest = match["operation"], match["rest"]
  sizes = _sizes(match["shape"])
  if match["start"] and operation == "all-gather":  # (operands, results): several arrays may be gathered at once
    sizes = sizes[len(sizes) // 2 :]
  elif match["start"] and operation != "all-reduce":  # (operand, result, ...): the larger one is the whole array
    sizes = [max(sizes)]
  group = _group_size(rest, num_devices)
  size = sum(sizes) * (group if operation == "reduce-scatter" and not match["start"] else 1)
  if operation == "all-reduce" and _SCATTER in computation:
    operation = "reduce-scatter"
  return Collective(operation, size, group, count)


def _sizes(shapes: str) -> list[int]:
  """Bytes of each array of a (tuple's) shape."""
  return [
    _BITS.get(kind, int(re.sub(r"\D", "", kind) or 0)) * math.prod(map(int, filter(None, sides.split(",")))) // 8
    for kind, sides in _SHAPE.findall(re.sub(r"\{[^}]*\}", "", shapes))
  ]


def _group_size(attributes: str, num_devices: int) -> int:
  if match := _EXPLICIT_GROUP.search(attributes):
    return match[1].count(",") + 1
  match = _IOTA_GROUPS.search(attributes)
  return int(match[2]) if match else num_devices


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
  """Lines by computation, and the name of the one that runs."""
  computations, entry, name = {}, "", ""
  for line in hlo.splitlines():
    if match := _COMPUTATION.match(line):
      name = match["name"]
      computations[name] = []
      entry = name if match["entry"] else entry
    elif name:
      computations[name].append(line)
  return computations, entry


def _counts(computations: dict[str, list[str]], entry: str) -> dict[str, int | None]:
  """How often each computation runs."""
  counts = {}

  def visit(name: str, times: int | None) -> None:
    if name not in computations:
      return
    known = counts.get(name, 0)
    counts[name] = None if known is None or times is None else known + times
    for line in computations[name]:
      condition, body = _CONDITION.search(line), _BODY.search(line)
      rounds = _rounds(line, computations[condition[1]], computations[body[1]]) if condition and body else 1
      for called in _called(line):
        visit(called, None if times is None or rounds is None else times * rounds)

  visit(entry, 1)
  return counts


def _rounds(loop: str, condition: list[str], body: list[str]) -> int | None:
  """How often the body of a loop runs, or None where it is not told."""
  if match := _TRIPS.search(loop):
    return int(match[1])
  below, results = _first(_BELOW, condition), _first(_RESULTS, body)
  if not below or not results:
    return None
  place = _PLACE.search(_definition(below["counter"], condition))
  names = re.findall(r"[\w.-]+", re.sub(r"/\*.*?\*/", "", results[1]))
  added = _SUM.search(_definition(names[int(place[1])], body)) if place else None
  # Not always by 1: TPUs' compiler unrolls the rings in which shards go around.
  steps = [step for name in added.groups() if (step := _constant(name, body))] if added else []
  limit = _constant(below["limit"], condition)
  return math.ceil(limit / steps[0]) if limit and steps else None


def _constant(name: str, lines: list[str]) -> int | None:
  match = _CONSTANT.search(_definition(name, lines))
  return int(match[1]) if match else None


def _definition(name: str, lines: list[str]) -> str:
  """The line that begins with a name; empty where there is none."""
  match = _first(re.compile(rf"^ *(?:ROOT )?%?{re.escape(name)} = "), lines)
  return match.string if match else ""


def _first(pattern: re.Pattern, lines: list[str]) -> re.Match | None:
  return next((match for line in lines if (match := pattern.search(line))), None)


def _called(line: str) -> Iterable[str]:
  names = [name.strip().lstrip("%") for match in _CALLED.finditer(line) for name in match[1].split(",")]
  condition = _CONDITION.search(line)
  return [*names, *([condition[1]] if condition else [])]
