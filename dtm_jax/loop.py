"""The one training loop: next batch, step, and what is due at intervals. It knows no task."""

import collections
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import logging

from dtm_jax import console, distributed, stopping
from dtm_jax.errors import StoppedError
from dtm_jax.train_state import NEVER, TrainState

HostBatch = dict[str, np.ndarray]


class NonFiniteError(Exception):
  """The loss, a gradient or a parameter was not finite; the last good checkpoint is kept.

  Attributes:
    step: whose batch led to it; -1 where training began so.
  """

  def __init__(self, message: str, step: int):
    super().__init__(message)
    self.step = step


@dataclasses.dataclass(frozen=True)
class Loop:
  """How to train, whatever the task.

  Attributes:
    train_step: jitted `(state, batch) -> (state, metrics)`.
    place: puts a host batch on the devices.
    num_steps: where training ends.
    batch_size: images per step, for images/s.
    log_every: steps between logs; metrics come to the host only then.
    save_every: steps between checkpoints.
    evaluate_every: steps between evaluations, from step 0 on.
    log: called with (step, metrics).
    save: called with the state; may return before the save is complete.
    evaluate: called with the state before its step; once more where the run was stopped there. May raise StoppedError.
    stop_requested: asked before each step; True saves and returns.
  """

  train_step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]
  place: Callable[[HostBatch], Any]
  num_steps: int
  batch_size: int
  log_every: int
  save_every: int
  evaluate_every: int
  log: Callable[[int, dict[str, float]], None]
  save: Callable[[TrainState], None]
  evaluate: Callable[[TrainState], None]
  stop_requested: Callable[[], bool]

  def run(self, state: TrainState, batches: Iterator[HostBatch]) -> TrainState:
    """Trains from the state's step to `num_steps`, or until asked to stop.

    Raises:
      NonFiniteError: names the step and the source indices of its batch.
    """
    start = int(state.step)
    timer = _Timer(self.batch_size)
    unchecked = collections.deque()  # (step, indices) since the state was last looked at
    metrics = None
    with _progress_bar(start, self.num_steps) as bar:
      for step in range(start, self.num_steps):
        due = step % self.evaluate_every == 0
        if self.stop_requested() or (due and not self._evaluated(state, timer, unchecked)):
          break
        with timer.waiting(metrics):
          batch = next(batches)
        unchecked.append((step, batch["index"]))
        previous, (state, metrics) = metrics, self.train_step(state, self.place(batch))
        stopping.note_progress()
        # One step ahead of the device and no more: enough to keep it busy.
        jax.block_until_ready(previous)
        bar.update()
        done = step + 1
        if done % self.log_every == 0 or done == self.num_steps:
          _check_finite(state, unchecked)
          values = {name: float(value) for name, value in metrics.items()} | timer.lap(len(unchecked))
          unchecked.clear()
          self._show(bar, done, values)
          self.log(done, values)
        if done % self.save_every == 0:
          _check_finite(state, unchecked)
          self.save(state)
    _check_finite(state, unchecked)
    self.save(state)
    return state

  def _evaluated(self, state: TrainState, timer: "_Timer", unchecked: collections.deque) -> bool:
    """Evaluates the state; False where it was asked to stop."""
    _check_finite(state, unchecked)
    try:
      with timer.apart():
        self.evaluate(state)
    except StoppedError:
      return False
    return True

  def _show(self, bar: tqdm.tqdm, step: int, values: dict[str, float]) -> None:
    """On the bar, or where the output is no terminal, as a line."""
    if not bar.disable:
      bar.set_postfix_str(_progress(values), refresh=False)
      return
    seconds_left = (self.num_steps - step) * self.batch_size / values["images_per_second"]
    time_left = tqdm.tqdm.format_interval(seconds_left)
    logging.info("step %d/%d, %s, %s left", step, self.num_steps, _progress(values), time_left)


def _progress_bar(start: int, num_steps: int) -> tqdm.tqdm:
  """Fits into 80 columns with the text of `_progress`; none where stderr is no terminal."""
  layout = "{l_bar}{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"
  return console.progress_bar(total=num_steps, initial=start, bar_format=layout, mininterval=1, smoothing=0.1)


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
  return jax.tree.reduce(jnp.logical_and, jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), tree), jnp.bool_(True))


def _check_finite(state: TrainState, unchecked: collections.deque) -> None:
  # A finite loss may have made parameters that are not, which the next step would tell too late. From a bad step on
  # the state stays what it was, so that they are of the step before it.
  if not _all_finite(state.params):
    made_by = int(state.step) - 1
    told = f"after step {made_by}; lower the learning rate" if made_by >= 0 else "before the first step"
    raise NonFiniteError(f"parameters not finite {told}", made_by)
  bad = int(state.nonfinite_step)
  if bad != NEVER:
    indices = [i for share in distributed.gather(dict(unchecked)[bad].tolist()) for i in share]
    raise NonFiniteError(f"loss or gradient not finite at step {bad}; its batch is of source indices {indices}", bad)


def _progress(values: dict[str, float]) -> str:
  return (
    f"loss {values['loss']:.4f}, lr {values['lr']:.1e}, {values['images_per_second']:.0f} images/s,"
    f" {values['percent_waiting']:.0f}% waiting"
  )


class _Timer:
  """Wall time between logs, and the share of it in which the devices had nothing to do until a batch was there."""

  def __init__(self, batch_size: int):
    self._batch_size = batch_size
    self._waited, self._start = 0.0, time.perf_counter()

  @contextlib.contextmanager
  def waiting(self, running: Any) -> Iterator[None]:
    """For what is waiting for data; it counts from when the devices are ready with `running`, their last arrays."""
    ended: list[float] = []
    threading.Thread(target=_note_end, args=(running, ended), daemon=True).start()
    yield
    now = time.perf_counter()
    self._waited += sum(max(0.0, now - end) for end in ended)

  @contextlib.contextmanager
  def apart(self) -> Iterator[None]:
    """For what is not training."""
    start = time.perf_counter()
    yield
    self._start += time.perf_counter() - start

  def lap(self, steps: int) -> dict[str, float]:
    seconds = time.perf_counter() - self._start
    rates = {"images_per_second": steps * self._batch_size / seconds, "percent_waiting": 100 * self._waited / seconds}
    self._waited, self._start = 0.0, time.perf_counter()
    return rates


def _note_end(running: Any, ended: list[float]) -> None:
  """Appends the time at which the arrays are there."""
  with contextlib.suppress(jax.errors.JaxRuntimeError):  # told where they are used
    jax.block_until_ready(running)
  ended.append(time.perf_counter())
