"""Iterated bipartite matching of one image's tokens into groups, at fixed shapes.

`merges` and `iterations` are traced, so one compilation serves every schedule,
and `vmap` serves images and draws. Groups sit in positions 0..active-1 of
arrays with room for more; what lies beyond is stale and masked out. Rooms
shrink in a few fixed steps: once the groups fit, the rounds go on in the next
smaller one.
"""

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Scores decide who merges, so they must not be rounded to TF32 or bfloat16.
_PRECISION = jax.lax.Precision.HIGHEST

# Rooms beside the first, as shares of N. Each is compiled once more; these three save a quarter of the time at
# N = 196. With few tokens there is nothing to save.
_NEXT_ROOMS = (0.75, 0.5, 0.25)
_SMALLEST_ROOM = 32


class _Groups(NamedTuple):
  """A partition in progress.

  A group's features and size live in the row of one of its tokens (its home)
  and are updated in place; only `home`, the order of the groups, is rebuilt.
  """

  sums: jax.Array  # float32 [room, D], features summed over members, by home row
  home: jax.Array  # int32 [room], row of the group at each position
  position: jax.Array  # int32 [N], position of each token's group
  active: jax.Array  # int32 [], number of groups


@functools.partial(jax.jit, static_argnames=("protect_first", "split"))
def group_tokens(
  tokens: jax.Array,
  merges: jax.typing.ArrayLike,
  iterations: jax.typing.ArrayLike,
  *,
  protect_first: bool = True,
  split: str = "alternate",
  key: jax.Array | None = None,
) -> jax.Array:
  """Groups similar tokens of one image (Bolya et al. 2023's matching, iterated as in DTM).

  Every round splits the groups into sets A and B, gives each of A its most
  similar partner in B (cosine of the group means), and merges the `merges`
  closest pairs. Groups of A that stay come first in the next round's order,
  then all of B.

  Args:
    tokens: [N, D], one image's target tokens; computed in float32. To be `vmap`ped.
    merges: int32 [], merges per round, may be traced; capped at (groups - 1) // 2.
    iterations: int32 [], number of rounds, may be traced.
    protect_first: token 0 never merges (the released code protects a class
      token that is not there). False raises the cap to groups // 2.
    split: "alternate" puts even positions in A and odd ones in B (the released
      code); "random" shuffles the order first (the paper's text), from `key`.
    key: PRNG key, for split="random".

  Returns:
    int32 [N]: each token's group, named by the smallest token index in it.

  Raises:
    ValueError: an unknown split, or a random one without a key.
  """
  if split not in ("alternate", "random"):
    raise ValueError(f"split={split!r} is neither 'alternate' nor 'random'")
  if (split == "random") != (key is not None):
    raise ValueError("split='random' goes with a key, and only it does")
  num_tokens = tokens.shape[0]
  index = jnp.arange(num_tokens, dtype=jnp.int32)
  merges = jnp.asarray(merges, jnp.int32)
  iterations = jnp.where(merges > 0, iterations, 0)
  groups = _Groups(jax.lax.stop_gradient(tokens).astype(jnp.float32), index, index, jnp.int32(num_tokens))

  def round_(i, groups):
    if key is not None:
      groups = _shuffle(groups, split_priorities(key, i, num_tokens), protect_first)
    return _merge_closest(groups, merges, protect_first)

  i = jnp.int32(0)
  next_rooms = [math.ceil(share * num_tokens) for share in _NEXT_ROOMS]
  rooms = [num_tokens, *(room for room in next_rooms if room >= _SMALLEST_ROOM)]
  for room, next_room in itertools.pairwise([*rooms, 0]):
    groups = _move(groups, room)
    i, groups = jax.lax.while_loop(
      lambda state, next_room=next_room: (state[0] < iterations) & (state[1].active > next_room),
      lambda state: (state[0] + 1, round_(*state)),
      (i, groups),
    )
  smallest = jax.ops.segment_min(index, groups.position, num_tokens)
  return smallest[groups.position]


def split_priorities(key: jax.Array, iteration: jax.typing.ArrayLike, num_tokens: int) -> jax.Array:
  """What split="random" draws in an iteration, from 0: float32 [N]. The groups, in their order, are sorted by the
  first of them, as many as there are groups."""
  return jax.random.uniform(jax.random.fold_in(key, iteration), (num_tokens,))


def _move(groups: _Groups, room: int) -> _Groups:
  """The first `room` positions in arrays of that size, every group at home in its position."""
  return groups._replace(sums=groups.sums[groups.home[:room]], home=jnp.arange(room, dtype=jnp.int32))


def _merge_closest(groups: _Groups, merges: jax.Array, protect_first: bool) -> _Groups:
  """One round: match A to B, merge the closest pairs, rebuild the order."""
  room = groups.home.size
  index = jnp.arange(room, dtype=jnp.int32)
  in_a, in_b = index[0::2], index[1::2]
  if not in_b.size:
    return groups
  similarity, partner = _best_partners(groups, in_a < groups.active, in_b < groups.active)
  if protect_first:
    similarity = jnp.where(in_a == 0, -jnp.inf, similarity)
  merges = jnp.minimum(merges, (groups.active - protect_first) // 2)
  merged = _rank_descending(similarity) < merges

  home_a, home_b = groups.home[0::2], groups.home[1::2]
  sums = jax.lax.platform_dependent(
    groups.sums, home_a, home_b[partner], merged, cpu=_add_rows_by_scatter, default=_add_rows_by_product
  )

  stays = (in_a < groups.active) & ~merged
  num_stays = jnp.sum(stays, dtype=jnp.int32)
  moved_b = num_stays + jnp.arange(in_b.size, dtype=jnp.int32)
  moved_a = jnp.where(merged, moved_b[partner], jnp.cumsum(stays, dtype=jnp.int32) - 1)
  moved = jnp.stack([moved_a, jnp.pad(moved_b, (0, in_a.size - in_b.size))], axis=1).reshape(-1)[:room]
  dropped = room
  home = groups.home.at[jnp.where(stays, moved_a, dropped)].set(home_a, mode="drop")
  home = home.at[moved_b].set(home_b, mode="drop")
  return _Groups(sums, home, moved[groups.position], groups.active - merges)


def _best_partners(groups: _Groups, is_active_a: jax.Array, is_active_b: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Cosine to, and index in B of, the most similar partner of each of A; -inf for what is not a group."""
  # The mean and the sum of a group point the same way, so sums serve.
  a, b = groups.sums[groups.home[0::2]], groups.sums[groups.home[1::2]]
  cosine = jnp.matmul(a, b.T, precision=_PRECISION) * _inverse_norm(a)[:, None] * _inverse_norm(b)
  scores = jnp.where(is_active_b, cosine, -jnp.inf)
  return jnp.where(is_active_a, scores.max(axis=-1), -jnp.inf), scores.argmax(axis=-1).astype(jnp.int32)


def _inverse_norm(sums: jax.Array) -> jax.Array:
  """1 / |x| of each row; a zero group is like no other, whatever this gives."""
  return 1 / jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(sums), axis=-1)), jnp.finfo(jnp.float32).tiny)


def _add_rows_by_scatter(sums: jax.Array, source: jax.Array, target: jax.Array, chosen: jax.Array) -> jax.Array:
  """Adds the chosen rows `source` of [room, D] to rows `target`; the others add zero."""
  return sums.at[target].add(jnp.where(chosen[:, None], sums[source], 0))


def _add_rows_by_product(sums: jax.Array, source: jax.Array, target: jax.Array, chosen: jax.Array) -> jax.Array:
  """The same for accelerators, as a product with zeros and ones: scatters are slow on TPUs, and on GPUs they add in
  an order that changes from run to run. On CPU this takes half as long again for the whole grouping."""
  is_target = (jnp.arange(len(sums))[:, None] == target) & chosen
  return sums + jnp.matmul(is_target.astype(sums.dtype), sums[source], precision=_PRECISION)


def _rank_descending(values: jax.Array) -> jax.Array:
  """Rank of each value, 0 the largest, ties by index: all pairs compared, which is faster here than a sort."""
  index = jnp.arange(values.size)
  ahead = (values[None, :] > values[:, None]) | (
    (values[None, :] == values[:, None]) & (index[None, :] < index[:, None])
  )
  return jnp.sum(ahead, axis=-1, dtype=jnp.int32)


def _shuffle(groups: _Groups, priorities: jax.Array, protect_first: bool) -> _Groups:
  """Puts the groups in random order, except that a protected token 0 stays first."""
  index = jnp.arange(groups.home.size, dtype=jnp.int32)
  priorities = jnp.where(index < groups.active, priorities[: index.size], 2.0)
  if protect_first:
    priorities = priorities.at[0].set(-1.0)
  order = jnp.argsort(priorities)
  moved = jnp.zeros_like(index).at[order].set(index)
  return groups._replace(home=groups.home[order], position=moved[groups.position])
