"""The loop alone, on a step that is not a model's: what is done when, and what is never saved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dtm_jax.errors import StoppedError
from dtm_jax.loop import Loop, NonFiniteError
from dtm_jax.train_state import NEVER, TrainState


def new_state(step: int = 0) -> TrainState:
  return TrainState(jnp.int32(step), {"w": jnp.float32(step)}, (), jnp.int32(NEVER))


def run(state, train_step, *, stop_after=100, num_steps=10, evaluate=lambda state: None):
  """Steps that were logged, and the (step, w) that were saved, when they end or fail."""
  logged, saved, asked = [], [], iter(range(10**6))
  loop = Loop(
    train_step=train_step,
    place=lambda batch: batch["index"],
    num_steps=num_steps,
    batch_size=2,
    log_every=4,
    save_every=3,
    evaluate_every=4,
    log=lambda step, metrics: logged.append((step, metrics["loss"])),
    save=lambda state: saved.append((int(state.step), float(state.params["w"]))),
    evaluate=evaluate,
    stop_requested=lambda: next(asked) >= stop_after,
  )
  batches = ({"index": np.array([2 * i, 2 * i + 1])} for i in range(int(state.step), 10**6))
  error = None
  try:
    loop.run(state, batches)
  except NonFiniteError as caught:
    error = str(caught)
  return logged, saved, error


@jax.jit
def count(state, index):
  """Adds one; the loss is the sum of the batch's indices."""
  state = state.replace(step=state.step + 1, params={"w": state.params["w"] + 1})
  return state, {"loss": index.sum(), "lr": jnp.float32(0)}


def test_logs_and_saves_at_intervals_and_at_the_end():
  logged, saved, error = run(new_state(), count)
  assert logged == [(4, 13), (8, 29), (10, 37)]  # of steps 3, 7 and 9: 2 i + 2 i + 1
  assert saved == [(3, 3), (6, 6), (9, 9), (10, 10)]
  assert error is None


def test_goes_on_from_the_step_of_the_state():
  logged, saved, _ = run(new_state(5), count)
  assert [step for step, _ in logged] == [8, 10]
  assert saved == [(6, 6), (9, 9), (10, 10)]


def test_evaluates_at_intervals_from_the_first_step_on():
  evaluated = []
  run(new_state(), count, evaluate=lambda state: evaluated.append((int(state.step), float(state.params["w"]))))
  assert evaluated == [(0, 0), (4, 4), (8, 8)]


def test_a_stop_in_an_evaluation_saves_where_it_is():
  """So that the evaluation comes again when the run goes on."""

  def evaluate(state):
    if int(state.step) == 4:
      raise StoppedError

  assert run(new_state(), count, evaluate=evaluate)[1] == [(3, 3), (4, 4)]
  evaluated = []
  run(new_state(4), count, evaluate=lambda state: evaluated.append(int(state.step)))
  assert evaluated == [4, 8]


def test_a_stop_saves_where_it_is():
  assert run(new_state(), count, stop_after=5)[1] == [(3, 3), (5, 5)]


def test_a_bad_step_is_named_with_its_batch_and_not_saved():
  def fail_at_4(state, index):
    new, metrics = count(state, index)
    is_good = (state.step != 4) & (state.nonfinite_step == NEVER)
    return jax.tree.map(lambda a, b: jnp.where(is_good, a, b), new, state.replace(nonfinite_step=jnp.int32(4))), metrics

  _, saved, error = run(new_state(), jax.jit(fail_at_4))
  assert "at step 4; its batch is of source indices [8, 9]" in error
  assert saved == [(3, 3)]


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_parameters_that_are_not_finite_are_not_saved(value):
  def spoil_at_5(state, index):
    new, metrics = count(state, index)
    return new.replace(params={"w": jnp.where(state.step == 5, value, new.params["w"])}), metrics

  _, saved, error = run(new_state(), jax.jit(spoil_at_5))
  assert error == "parameters not finite after step 5; lower the learning rate"
  assert saved == [(3, 3)]
