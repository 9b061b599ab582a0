"""Losses and their gradients against what the released code recorded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dtm_jax import config
from dtm_jax.losses import DISTANCES, dtm_loss, normalize_tokens, token_loss

RECORDED = {"smoothl1": "smooth_l1", "l1": "l1", "l2": "l2", "negcosine": "negative_cosine"}


def load_case(golden, case):
  recorded = golden("loss")
  schedule = jnp.asarray(recorded[f"{case}/per_iteration"]), jnp.asarray(recorded[f"{case}/iterations"])
  return recorded, recorded[f"{case}/online"], recorded[f"{case}/target"], *schedule


def test_config_offers_exactly_these_distances():
  assert set(config.DISTANCES) == set(DISTANCES)


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("case", range(4))
def test_loss_and_gradient_equal_the_recorded_ones(golden, case, name):
  recorded, online, target, merges, iterations = load_case(golden, case)
  assert recorded["num_cases"] == 4

  def loss(online):
    return dtm_loss(online, target, merges, iterations, distance=RECORDED[name])

  value, grad = jax.jit(jax.value_and_grad(loss))(online)
  np.testing.assert_allclose(value, recorded[f"{case}/{name}/loss"], rtol=1e-6)  # measured 2e-7
  expected = recorded[f"{case}/{name}/grad_online"]
  assert np.linalg.norm(grad - expected) / np.linalg.norm(expected) < 1e-6  # measured 1e-7


def test_no_gradient_flows_to_the_target(golden):
  _, online, target, merges, iterations = load_case(golden, 0)
  grad = jax.grad(lambda target: dtm_loss(online, target, merges, iterations))(target)
  np.testing.assert_array_equal(grad, 0)


def test_schedules_per_image_equal_each_image_alone(golden):
  _, online, target, *_ = load_case(golden, 0)
  merges, iterations = jnp.array([[2, 8], [0, 3], [5, 1]]), jnp.array([[3, 5], [1, 14], [2, 9]])
  together = dtm_loss(online, target, merges, iterations)
  alone = [dtm_loss(online[i : i + 1], target[i : i + 1], merges[i], iterations[i]) for i in range(3)]
  np.testing.assert_allclose(together, np.mean(alone), rtol=1e-6)


def test_no_merges_is_the_token_wise_loss(golden):
  _, online, target, *_ = load_case(golden, 1)
  none = jnp.zeros(2, jnp.int32)
  np.testing.assert_allclose(dtm_loss(online, target, none, none + 5), token_loss(online, target), rtol=1e-5)


def test_only_masked_positions_count(golden):
  _, online, target, merges, iterations = load_case(golden, 0)
  mask = jnp.arange(online.shape[1])[None, :] < jnp.array([[3], [10], [0]])
  full = token_loss(online, target, mask=mask)
  rows = jnp.abs(online - target)
  rows = jnp.where(rows < 2, rows**2 / 4, rows - 1).mean(-1)
  np.testing.assert_allclose(full, (rows[0, :3].sum() + rows[1, :10].sum()) / 13, rtol=1e-6)
  grad = jax.grad(lambda x: token_loss(x, target, mask=mask))(online)
  assert (np.abs(grad).sum(-1) > 0).tolist() == mask.tolist()
  assert dtm_loss(online, target, merges, iterations, mask=mask) != dtm_loss(online, target, merges, iterations)


def test_random_split_gives_each_draw_and_image_its_own_groups(golden):
  _, online, target, *_ = load_case(golden, 0)
  schedule = jnp.array([4, 4]), jnp.array([3, 3])
  target = jnp.broadcast_to(target[:1], target.shape)
  online = jnp.broadcast_to(online[:1], online.shape)
  keys = jax.random.split(jax.random.key(0), 3)

  @jax.jit
  def loss(keys):
    return dtm_loss(online, target, *schedule, split="random", image_keys=keys)

  assert loss(keys) == loss(keys)
  same_keys = jnp.stack([keys[0]] * 3)
  assert loss(keys) != loss(same_keys)


def test_normalized_tokens_have_mean_0_and_unbiased_variance_1():
  tokens = np.random.default_rng(0).normal(3, 5, (4, 16)).astype(np.float32)
  normal = normalize_tokens(tokens)
  np.testing.assert_allclose(normal.mean(-1), 0, atol=1e-6)
  np.testing.assert_allclose(np.var(normal, axis=-1, ddof=1), 1, rtol=1e-5)


@pytest.mark.parametrize("name", DISTANCES)
def test_gradients_are_finite_at_zero(name):
  zeros = jnp.zeros((1, 4, 8))
  grad = jax.grad(lambda x: token_loss(x, zeros, distance=name))(zeros)
  assert np.isfinite(grad).all()
