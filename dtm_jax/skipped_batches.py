"""`config.run.on_nonfinite=rollback`: which batches of the data a run goes on without, as its metrics tell."""

import dataclasses
from collections.abc import Iterator
from typing import TypeVar

from dtm_jax.loop import NonFiniteError
from dtm_jax.metrics import MetricWriter

MAX_SKIPPED = 10  # batches of a run; more are no accident
_SKIPPED = "skipped_batch"  # entry of a row, at the step that was not finite with it

B = TypeVar("B")


@dataclasses.dataclass(frozen=True)
class SkippedBatches:
  """The batches that a run skips: rows of its metrics, so that a resumed run skips them, too."""

  writer: MetricWriter

  @property
  def numbers(self) -> list[int]:
    """Of the batches in the stream of the data."""
    return [row[_SKIPPED] for row in self.writer.rows if _SKIPPED in row]

  def check_may_skip(self, error: NonFiniteError) -> None:
    """Raises NonFiniteError where no batch is to blame, or skipping has not helped."""
    if error.step < 0:
      raise error
    if self.writer.find(error.step, _SKIPPED) is not None:
      raise NonFiniteError(f"{error}, and skipping a batch there has not helped", error.step)
    if len(self.numbers) == MAX_SKIPPED:
      raise NonFiniteError(f"{error}, and {MAX_SKIPPED} batches of the run are skipped already", error.step)

  def add(self, bad_step: int, *, back_at: int) -> int:
    """From now on the batch of step `bad_step` is skipped, by a run that has gone back to step `back_at`.

    Returns:
      The batch's number.
    """
    number = self.number_of(bad_step)
    self.writer.write(bad_step, {_SKIPPED: number, "rolled_back_to": back_at})
    return number

  def number_of(self, step: int) -> int:
    """Which batch of the data a step takes: the `step`-th of those that are not skipped."""
    number = step
    for other in sorted(self.numbers):
      number += other <= number
    return number

  def left_out(self, batches: Iterator[B], first: int) -> Iterator[B]:
    """The same batches of the data, of which the first has the number `first`, without those that are skipped."""
    numbers = self.numbers
    return (batch for number, batch in enumerate(batches, first) if number not in numbers)
