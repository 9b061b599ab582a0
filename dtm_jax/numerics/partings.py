"""Where two groupings of nearly the same tokens part, and by how little."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from dtm_jax.morphing import group_tokens
from dtm_jax.numerics import torch_reference

# (target tokens [B, N, D], merges [B, L], iterations [B, L], protect_first) -> labels int [B, L, N]; a group is named
# by its smallest token.
Group = Callable[[np.ndarray, np.ndarray, np.ndarray, bool], np.ndarray]
_Groups = list[np.ndarray]  # members of each group, groups in the order of the matching


def group_in_torch(
  tokens: np.ndarray,
  merges: np.ndarray,
  iterations: np.ndarray,
  protect_first: bool,
  priorities: np.ndarray | None = None,
) -> np.ndarray:
  """The reference's groups; see `Group`, and `priorities` float32 [B, L, K, N] for a random split."""
  images, labels = torch.from_numpy(np.array(tokens)), np.empty((*merges.shape, tokens.shape[1]), np.int64)
  for draw, schedules in enumerate(np.stack([merges, iterations], axis=-1).swapaxes(0, 1)):
    for schedule in np.unique(schedules, axis=0):
      rows = (schedules == schedule).all(axis=-1)
      split = None if priorities is None else torch.from_numpy(priorities[rows, draw])
      group, _ = torch_reference.group_tokens(
        images[rows], *schedule.tolist(), protect_first=protect_first, priorities=split
      )
      labels[rows, draw] = torch_reference.smallest_member(group)
  return labels


def group_in_xla(
  tokens: np.ndarray,
  merges: np.ndarray,
  iterations: np.ndarray,
  protect_first: bool,
  keys: jax.Array | None = None,
) -> np.ndarray:
  """The groups of `dtm_jax.group_tokens`; see `Group`, and PRNG `keys` [B, L] for a random split."""
  return np.asarray(_group_in_xla(tokens, jnp.asarray(merges), jnp.asarray(iterations), protect_first, keys))


@functools.partial(jax.jit, static_argnums=3)
def _group_in_xla(tokens, merges, iterations, protect_first, keys):
  split = "alternate" if keys is None else "random"

  def group(tokens, merges, iterations, key):
    return group_tokens(tokens, merges, iterations, protect_first=protect_first, split=split, key=key)

  return jax.vmap(jax.vmap(group, (None, 0, 0, 0)))(tokens, merges, iterations, keys)


def compare_groups(
  reference: tuple[np.ndarray, Group],
  other: tuple[np.ndarray, Group],
  merges: np.ndarray,
  iterations: np.ndarray,
  protect_first: bool,
  priorities: np.ndarray | None = None,
) -> list[dict[str, Any]]:
  """How far two groupings agree, and why the images that part do so.

  Args:
    reference: target tokens [B, N, D] and how they are grouped.
    other: the same of the other framework.
    merges: int [L] or [B, L], per iteration.
    iterations: as `merges`.
    protect_first: see `group_tokens`.
    priorities: float32 [B, L, K, N], what a random split draws; None where there is none.

  Returns:
    For each draw `merges` and `iterations` (all that occur), `tokens_equal` and `images_equal` (shares), and
    `partings`, one for each image that parts: `image`; `iteration`, from 1, the first that merges differently;
    `margin`, by how much the reference's scores prefer what it did to what the other did (between two partners of one
    group, or between the last edge that merges and the first that does not); and `score_difference`, by how much the
    scores of these groups differ between the two sets of tokens.
  """
  shape = (len(reference[0]), merges.shape[-1])
  merges, iterations = (np.broadcast_to(draw, shape) for draw in (merges, iterations))
  if not shape[1]:
    return []

  def labels(side: tuple[np.ndarray, Group], most: int) -> np.ndarray:
    tokens, group = side
    return group(tokens, merges, np.minimum(iterations, most), protect_first)

  last = int(iterations.max())
  equal = labels(reference, last) == labels(other, last)
  wanted = range(1, 1 + (0 if equal.all() else last))
  history = [(labels(reference, most), labels(other, most)) for most in wanted]

  def explain(image: int, draw: int) -> dict[str, Any]:
    order = _in_order if priorities is None else functools.partial(_shuffle, priorities[image, draw], protect_first)
    pairs = [(a[image, draw], b[image, draw]) for a, b in history]
    return {"image": image} | _explain(reference[0][image], other[0][image], pairs, order)

  rows = []
  for draw in range(shape[1]):
    partings = [explain(i, draw) for i in np.flatnonzero(~equal[:, draw].all(axis=-1)).tolist()]
    rows.append(
      {
        "merges": sorted({*merges[:, draw].tolist()}),
        "iterations": sorted({*iterations[:, draw].tolist()}),
        "tokens_equal": float(equal[:, draw].mean()),
        "images_equal": 1 - len(partings) / shape[0],
        "partings": partings,
      }
    )
  return rows


def _explain(
  tokens: np.ndarray,
  other: np.ndarray,
  history: list[tuple[np.ndarray, np.ndarray]],
  order: Callable[[int, _Groups], _Groups],
) -> dict[str, Any]:
  """The first difference in a history of labels [N], of both sides after each iteration; there is one.

  `order` puts the groups in the order of an iteration.
  """
  groups = [np.array([i]) for i in range(len(tokens))]
  parted = next(i for i, (labels, other_labels) in enumerate(history) if not np.array_equal(labels, other_labels))
  for i, (labels, _) in enumerate(history[:parted]):
    groups = _merge(order(i, groups), labels)
  groups = order(parted, groups)
  labels, other_labels = history[parted]
  scores, other_scores = _scores(tokens, groups), _scores(other, groups)
  margin, rows = _margin(scores, _partners(groups, labels), _partners(groups, other_labels))
  apart = np.abs(scores[rows] - other_scores[rows]).max()
  return {"iteration": parted + 1, "margin": float(margin), "score_difference": float(apart)}


def _in_order(iteration: int, groups: _Groups) -> _Groups:
  del iteration
  return groups


def _shuffle(priorities: np.ndarray, protect_first: bool, iteration: int, groups: _Groups) -> _Groups:
  """The groups in a random split's order; priorities [K, N]."""
  of_groups = torch.from_numpy(priorities[None, iteration, : len(groups)])
  return [groups[i] for i in torch_reference.random_order(of_groups, protect_first)[0]]


def _scores(tokens: np.ndarray, groups: _Groups) -> np.ndarray:
  """Cosines of the groups' sums: those at even positions by those at odd ones, float64."""
  sums = np.stack([tokens[members].sum(axis=0, dtype=np.float64) for members in groups])
  unit = sums / np.maximum(np.linalg.norm(sums, axis=-1, keepdims=True), np.finfo(np.float64).tiny)
  return unit[0::2] @ unit[1::2].T


def _partners(groups: _Groups, labels: np.ndarray) -> np.ndarray:
  """For each group at an even position the one at an odd position that it has merged into, or -1."""
  names = np.array([labels[members[0]] for members in groups])
  same = names[0::2, None] == names[None, 1::2]
  return np.where(same.any(axis=1), same.argmax(axis=1), -1)


def _merge(groups: _Groups, labels: np.ndarray) -> _Groups:
  """The groups after an iteration: unmerged ones of even positions, then those of odd positions with their gains."""
  partners, targets = _partners(groups, labels), groups[1::2]
  sources = groups[0::2]
  gains = [[sources[a] for a in np.flatnonzero(partners == b)] for b in range(len(targets))]
  kept = [sources[a] for a in np.flatnonzero(partners < 0)]
  return kept + [np.concatenate([target, *gain]) for target, gain in zip(targets, gains, strict=True)]


def _margin(scores: np.ndarray, partners: np.ndarray, other_partners: np.ndarray) -> tuple[float, np.ndarray]:
  """The largest preference that has to be overcome, and the rows of `scores` that are decided differently."""
  rows = np.flatnonzero(partners != other_partners)
  both = rows[(partners[rows] >= 0) & (other_partners[rows] >= 0)]
  margins = [scores[a, partners[a]] - scores[a, other_partners[a]] for a in both]
  best = scores.max(axis=1)
  merged, other_merged = best[rows[other_partners[rows] < 0]], best[rows[partners[rows] < 0]]
  if merged.size and other_merged.size:
    margins.append(merged.max() - other_merged.min())
  return max(margins), rows
