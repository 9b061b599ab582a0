"""Attention with an additive bias, and the bias: relative positions on a rectangular grid."""

import jax
import jax.numpy as jnp

# cuDNN's fused attention trains with a bias only at even lengths; padding to a
# multiple of 8 also keeps its rows aligned.
_CUDNN_LENGTH_MULTIPLE = 8


def dot_product_attention(
  query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None, implementation: str
) -> jax.Array:
  """softmax(q k^T / sqrt(d) + bias) v, with softmax in float32.

  Args:
    query, key, value: [B, T, H, d].
    bias: float32 [H, T, T], added to the logits, or None.
    implementation: "matmul" is batched products with heads ahead of tokens,
      the fastest on CPU; "xla" and "cudnn" are `jax.nn.dot_product_attention`'s
      (cudnn is for GPUs and 16-bit types).

  Returns:
    [B, T, H, d], dtype of `value`.
  """
  if implementation == "matmul":
    return _matmul_attention(query, key, value, bias)
  bias = None if bias is None else bias[None]
  if implementation == "cudnn":
    return _cudnn_attention(query, key, value, bias)
  return jax.nn.dot_product_attention(query, key, value, bias, implementation=implementation)


def _matmul_attention(query, key, value, bias):
  scale = query.shape[-1] ** -0.5
  query, key, value = (x.swapaxes(1, 2) for x in (query * scale, key, value))
  logits = jnp.matmul(query, key.swapaxes(2, 3), preferred_element_type=jnp.float32)
  weights = jax.nn.softmax(logits if bias is None else logits + bias, axis=-1)
  return jnp.matmul(weights.astype(value.dtype), value).swapaxes(1, 2)


def _cudnn_attention(query, key, value, bias):
  if bias is None:
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
  length = query.shape[1]
  padding = -length % _CUDNN_LENGTH_MULTIPLE
  query, key, value = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (query, key, value))
  bias = jnp.pad(bias, ((0, 0), (0, 0), (0, padding), (0, padding))).astype(query.dtype)
  lengths = jnp.full((query.shape[0],), length, jnp.int32)
  attended = jax.nn.dot_product_attention(
    query, key, value, bias, key_value_seq_lengths=lengths, implementation="cudnn"
  )
  return attended[:, :length]


def num_relative_positions(grid: tuple[int, int]) -> int:
  """Rows of a bias table: every offset on the grid, then class-to-token, token-to-class, class-to-class."""
  return (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3


def relative_position_bias(table: jax.Array, grid: tuple[int, int]) -> jax.Array:
  """Looks up the bias of each pair of tokens (BEiT's table layout).

  Args:
    table: [num_relative_positions(grid), heads]; row (dy + down - 1) * (2 * across - 1) + dx + across - 1
      is for a query dy below and dx right of its key.
    grid: patches (down, across).

  Returns:
    [heads, 1 + N, 1 + N], query by key, class token first.
  """
  (down, across), heads = grid, table.shape[-1]
  # One-hot products rather than a gather, whose gradient is a scatter-add:
  # slow on TPUs, and summed in random order on GPUs, so not reproducible.
  offsets = table[:-3].T.reshape(heads, 2 * down - 1, 2 * across - 1)
  tokens = jnp.einsum(
    "hrs,ikr,jls->hijkl", offsets, _offset_one_hot(down), _offset_one_hot(across), precision=jax.lax.Precision.HIGHEST
  ).reshape(heads, down * across, down * across)
  to_token, to_class, class_to_class = table[-3:, :, None, None]
  first_row = jnp.concatenate([class_to_class, jnp.broadcast_to(to_token, (heads, 1, down * across))], axis=2)
  first_column = jnp.broadcast_to(to_class, (heads, down * across, 1))
  return jnp.concatenate([first_row, jnp.concatenate([first_column, tokens], axis=2)], axis=1)


def _offset_one_hot(size: int) -> jax.Array:
  """[size, size, 2 size - 1]: query i and key k along one side -> one-hot of i - k + size - 1."""
  position = jnp.arange(size)
  return jax.nn.one_hot(position[:, None] - position[None, :] + size - 1, 2 * size - 1)
