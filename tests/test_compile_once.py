"""One program serves every draw of the schedule."""

import contextlib
import logging

import jax
import numpy as np
import pytest

from configs import quickstart
from dtm_jax import config as config_lib
from dtm_jax import pretraining
from dtm_jax.data.pipeline import train_batches
from dtm_jax.steps.pretrain import draw_schedules

NUM_STEPS = 50


@contextlib.contextmanager
def compilations_logged():
  """Lists what jax says it compiles."""
  messages = []
  handler = logging.Handler()
  handler.emit = lambda record: messages.append(record.getMessage())
  logger = logging.getLogger("jax")
  logger.addHandler(handler)
  try:
    with jax.log_compiles():
      yield messages
  finally:
    logger.removeHandler(handler)


@pytest.mark.parametrize("granularity", ["batch", pytest.param("image", marks=pytest.mark.slow)])
def test_fifty_draws_compile_once(granularity):
  settings = quickstart.get_config("smoke")
  settings.morphing.granularity = granularity
  settings.data.image_size = 32  # 64 tokens: enough for fifty draws to differ
  parts = pretraining.build(config_lib.resolve(settings))
  batches = train_batches(parts.config, parts.train_source, start_step=0)
  state = parts.create_state()
  with compilations_logged() as messages, contextlib.closing(batches):
    for _ in range(NUM_STEPS):
      state, _ = parts.train_step(state, parts.place(next(batches)))
  assert parts.jitted_step._cache_size() == 1
  assert len([message for message in messages if message.startswith("Compiling jit(train_step)")]) == 1
  merges, iterations = jax.jit(jax.vmap(lambda step: draw_schedules(parts.config, step)))(np.arange(NUM_STEPS))
  draws = np.concatenate([merges.reshape(NUM_STEPS, -1), iterations.reshape(NUM_STEPS, -1)], axis=1)
  assert len(np.unique(draws, axis=0)) == NUM_STEPS  # else one program would prove little
