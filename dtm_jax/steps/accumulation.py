"""Gradients of a big batch, a micro-batch at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Rows = dict[str, jax.Array]  # arrays whose leading axis is the (micro-)batch
Metrics = dict[str, jax.Array]


def accumulate(loss_and_grads: Callable[[Rows], Any], rows: Rows, num_micro_batches: int) -> Any:
  """Means of `loss_and_grads` over equal micro-batches, one at a time: equals one call on all rows."""
  if num_micro_batches == 1:
    return loss_and_grads(rows)
  # Micro-batch j takes rows j, j + k, ...: each device keeps its own rows.
  micro_batches = jax.tree.map(lambda x: x.reshape(-1, num_micro_batches, *x.shape[1:]).swapaxes(0, 1), rows)

  def add(total, rows):
    return jax.tree.map(jnp.add, total, loss_and_grads(rows)), None

  first = jax.tree.map(lambda x: x[0], micro_batches)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(loss_and_grads, first))
  total, _ = jax.lax.scan(add, zeros, micro_batches)
  return jax.tree.map(lambda x: x / num_micro_batches, total)
