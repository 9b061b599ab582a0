"""What every teacher is to the rest of the program."""

from typing import Any, Protocol

import jax

Params = Any  # a pytree of arrays; {} where a teacher has none


class Teacher(Protocol):
  """Gives one target token per patch of an image. Frozen: no gradient, no state, nothing in checkpoints.

  Attributes:
    out_dim: D, the width of target tokens.
    weights_sha256: Of the weights file, in hex; "" where there is none.
  """

  @property
  def out_dim(self) -> int: ...

  @property
  def weights_sha256(self) -> str: ...

  def apply(self, params: Params, images: jax.Array) -> jax.Array:
    """Target tokens; pure, to be called inside `jit`.

    Args:
      params: What `create_teacher` gave, possibly sharded since.
      images: float32 [B, H, W, 3], RGB in [0, 1]. Teachers normalise for themselves.

    Returns:
      float32 [B, N, D], patches in row-major order.
    """
