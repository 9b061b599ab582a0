"""Schedule, grouping and group means against the recorded ones, and their options against their definitions."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dtm_jax.morphing import group_tokens, matching, merges_per_iteration, morph, sample_schedule

NUM_CASES = 28


@pytest.fixture(scope="module")
def group_images():
  return jax.jit(jax.vmap(group_tokens, in_axes=(0, None, None)))


def random_tokens(seed: int, *shape: int) -> jax.Array:
  return jax.random.normal(jax.random.key(seed), shape)


def group_count(labels: jax.Array) -> int:
  return len(np.unique(labels))


def test_merges_per_iteration_is_the_whole_recorded_table(golden):
  recorded = golden("schedule")
  num_merged, iterations = recorded["num_merged"][:, None], recorded["iterations"][None, :]
  table = jax.jit(merges_per_iteration, static_argnums=2)(num_merged, iterations, int(recorded["budget"]))
  assert table.shape == (197, 14) and table.dtype == jnp.int32
  np.testing.assert_array_equal(table, recorded["per_iteration"])


@pytest.mark.parametrize("case", range(NUM_CASES))
def test_labels_and_means_equal_the_recorded_ones(golden, group_images, case):
  recorded = golden("morphing")
  assert recorded["num_cases"] == NUM_CASES
  tokens = recorded[f"{case}/tokens"]
  labels = group_images(tokens, int(recorded[f"{case}/per_iteration"]), int(recorded[f"{case}/iterations"]))
  assert labels.dtype == jnp.int32
  np.testing.assert_array_equal(labels, recorded[f"{case}/labels"])
  morphed = jax.vmap(morph)(tokens, labels)
  np.testing.assert_allclose(morphed, recorded[f"{case}/morphed"], atol=3e-6)  # measured 7e-7


def test_labels_on_accelerators_equal_those_on_cpu(golden, monkeypatch):
  recorded = golden("morphing")
  monkeypatch.setattr(matching, "_add_rows_by_scatter", matching._add_rows_by_product)
  group = jax.jit(jax.vmap(group_tokens.__wrapped__, in_axes=(0, None, None)))
  cases = [i for i in range(NUM_CASES) if recorded[f"{i}/tokens"].shape[1] == 196]
  for case in cases:
    labels = group(
      recorded[f"{case}/tokens"], int(recorded[f"{case}/per_iteration"]), int(recorded[f"{case}/iterations"])
    )
    np.testing.assert_array_equal(labels, recorded[f"{case}/labels"])


def test_no_floats_are_scattered_on_accelerators():
  group = jax.jit(jax.vmap(group_tokens, in_axes=(0, None, None)))
  traced = group.trace(jax.ShapeDtypeStruct((2, 196, 32), jnp.float32), 3, 4)
  floats_scattered = {
    platform: bool(
      re.search(r"stablehlo\.scatter.*\n.*tensor<f32>", traced.lower(lowering_platforms=(platform,)).as_text())
    )
    for platform in ("cpu", "cuda", "tpu")
  }
  assert floats_scattered == {"cpu": True, "cuda": False, "tpu": False}


def test_one_compilation_serves_every_schedule(golden):
  tokens = golden("morphing")["20/tokens"]

  @jax.jit
  @chex.assert_max_traces(n=1)
  def group(tokens, merges, iterations):
    return jax.vmap(group_tokens, in_axes=(0, None, None))(tokens, merges, iterations)

  counts = [group_count(group(tokens, r, k)[0]) for r, k in ((0, 1), (1, 1), (3, 5), (50, 14))]
  assert counts == sorted(counts, reverse=True) and len(set(counts)) == len(counts)


def test_schedules_may_differ_between_images_and_draws():
  tokens = random_tokens(0, 2, 49, 16)
  merges, iterations = jnp.array([[3, 0, 24], [7, 1, 2]]), jnp.array([[4, 3, 1], [2, 14, 5]])
  over_draws = jax.vmap(group_tokens, in_axes=(None, 0, 0))
  labels = jax.jit(jax.vmap(over_draws))(tokens, merges, iterations)
  for image, draw in np.ndindex(merges.shape):
    alone = group_tokens(tokens[image], merges[image, draw], iterations[image, draw])
    np.testing.assert_array_equal(labels[image, draw], alone)


def test_first_token_stays_alone_only_where_protected():
  tokens = random_tokens(1, 16, 8).at[1].set(0)
  tokens = tokens.at[1].set(tokens[0])  # token 0's best partner, at cosine 1
  protected = group_tokens(tokens, 1, 1)
  free = group_tokens(tokens, 1, 1, protect_first=False)
  assert np.sum(protected == protected[0]) == 1
  assert free[1] == free[0] == 0


@pytest.mark.parametrize(("protect_first", "num_groups"), [(True, [9, 5, 3, 2, 2]), (False, [8, 4, 2, 1, 1])])
def test_merges_are_capped_by_what_a_round_can_merge(protect_first, num_groups):
  tokens = random_tokens(2, 16, 8)
  counts = [group_count(group_tokens(tokens, 99, k, protect_first=protect_first)) for k in range(1, 6)]
  assert counts == num_groups


def test_label_is_the_smallest_member():
  labels = np.asarray(group_tokens(random_tokens(3, 49, 8), 6, 5))
  for label in np.unique(labels):
    assert np.flatnonzero(labels == label)[0] == label


def test_ties_go_to_the_first():
  # Blank patches are all alike: token 2 is the first that may merge, and token 1 its first partner.
  assert group_tokens(jnp.zeros((8, 4)), 1, 1).tolist() == [0, 1, 1, 3, 4, 5, 6, 7]
  assert group_tokens(jnp.ones((8, 4)), 2, 1).tolist() == [0, 1, 1, 3, 1, 5, 6, 7]


def test_zero_tokens_give_labels_and_finite_means():
  # Blank patches have zero histograms of gradients.
  tokens = random_tokens(4, 16, 8).at[::3].set(0)
  labels = group_tokens(tokens, 5, 3)
  assert group_count(labels) == 4  # 16 - 5 - 5 - min(5, (6 - 1) // 2)
  assert np.isfinite(morph(tokens, labels)).all()


def test_random_split_depends_on_the_key_and_merges_as_many():
  tokens = random_tokens(5, 49, 8)
  group = jax.jit(functools.partial(group_tokens, merges=5, iterations=4, split="random"))
  labels = [np.asarray(group(tokens, key=jax.random.key(seed))) for seed in (0, 0, 1)]
  np.testing.assert_array_equal(labels[0], labels[1])
  assert (labels[0] != labels[2]).any()
  assert [group_count(x) for x in labels] == [49 - 20] * 3
  assert all(np.sum(x == 0) == 1 for x in labels)  # token 0 is protected here too


def test_random_split_can_pair_tokens_that_alternation_never_compares():
  # Tokens 0 and 2 are alike and both in set A of the alternate split.
  tokens = jnp.eye(8)[jnp.array([0, 1, 0, 3, 4, 5, 6, 7])]

  def joins(key):
    labels = group_tokens(tokens, 1, 1, protect_first=False, split="random", key=key)
    return labels[2] == labels[0]

  assert group_tokens(tokens, 1, 1, protect_first=False)[2] == 2
  share = jax.vmap(joins)(jax.random.split(jax.random.key(0), 400)).mean()
  assert 0.45 < share < 0.70  # they land on different sides in 4 of 7 splits


@pytest.mark.parametrize("arguments", [{"split": "halves"}, {"split": "random"}, {"key": jax.random.key(0)}])
def test_split_and_key_go_together(arguments):
  with pytest.raises(ValueError, match="split"):
    group_tokens(random_tokens(6, 4, 2), 1, 1, **arguments)


def test_morph_spreads_the_gradient_over_a_group():
  labels = jnp.array([0, 1, 0, 3])
  grad = jax.grad(lambda x: morph(x, labels)[0].sum())(jnp.ones((4, 2)))
  np.testing.assert_allclose(grad[:, 0], [0.5, 0, 0.5, 0], atol=1e-6)


def test_drawn_schedules_cover_their_ranges_evenly():
  keys = jax.random.split(jax.random.key(0), 20_000)
  # With one iteration, merges per round are n itself.
  num_merged, _ = jax.vmap(functools.partial(sample_schedule, budget=196, fixed_iterations=1))(keys)
  _, iterations = jax.vmap(functools.partial(sample_schedule, budget=196))(keys)
  for values, low, high in ((num_merged, 0, 196), (iterations, 1, 14)):
    counts = np.bincount(np.ravel(values), minlength=high + 1)[low:]
    expected = values.size / (high - low + 1)
    assert len(counts) == high - low + 1
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)
  assert abs(np.corrcoef(num_merged[:, 0], num_merged[:, 1])[0, 1]) < 0.03  # draws are independent


def test_fixed_schedules_are_kept():
  merges, iterations = sample_schedule(jax.random.key(0), draws=3, fixed_num_merged=98, fixed_iterations=7)
  np.testing.assert_array_equal(merges, [14, 14, 14])
  np.testing.assert_array_equal(iterations, [7, 7, 7])
