"""Schedule, decay mask, clipping, AdamW and the average of weights against recordings, torch and plain NumPy."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dtm_jax.checkpoint import CheckpointStore
from dtm_jax.config import OptimConfig
from dtm_jax.models.vit import ViT
from dtm_jax.optim import (
  average_params,
  averaged_params,
  clip_by_global_norm,
  create_optimizer,
  decay_mask,
  warmup_cosine,
)
from dtm_jax.train_state import apply_gradients, create_train_state


def test_learning_rates_equal_the_recorded_ones(golden):
  recorded = golden("lr_schedule")
  warmup_steps, total_steps = (
    int(recorded[name] * recorded["steps_per_epoch"]) for name in ("warmup_epochs", "epochs")
  )
  schedule = warmup_cosine(float(recorded["base"]), float(recorded["final"]), warmup_steps, total_steps)
  rates = jax.vmap(schedule)(jnp.arange(total_steps))
  np.testing.assert_allclose(rates, recorded["lr"], rtol=2e-6, atol=1e-9)  # measured 4e-7
  assert rates[0] == 0


@pytest.mark.parametrize(("warmup_steps", "total_steps"), [(0, 4), (1, 4), (4, 4)])
def test_short_schedules_are_finite_and_within_bounds(warmup_steps, total_steps):
  rates = jax.vmap(warmup_cosine(1.0, 0.1, warmup_steps, total_steps))(jnp.arange(total_steps))
  assert np.isfinite(rates).all() and (rates >= 0).all() and (rates <= 1).all()


def torch_names(golden, key):
  return set(golden("pretrain_trajectory")[key].tolist())


def test_decayed_parameters_are_the_recorded_ones(golden):
  student = ViT(48, 3, 3, 0.1, patch_size=8, grid=(8, 8), out_dim=32)
  params = jax.eval_shape(student.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)), jnp.zeros((1, 64), bool))[
    "params"
  ]
  mask = {
    jax.tree_util.keystr(path, simple=True, separator="."): v
    for path, v in jax.tree.leaves_with_path(decay_mask(params))
  }
  decayed = {name for name, is_decayed in mask.items() if is_decayed}
  expected = {"mask_token", "patch_embed.kernel", "rel_pos_bias", "head.kernel"}
  for i in range(3):
    names = ("attn.q.kernel", "attn.k.kernel", "attn.v.kernel", "attn.proj.kernel", "attn.rel_pos_bias")
    expected |= {f"block_{i}.{name}" for name in (*names, "mlp.fc1.kernel", "mlp.fc2.kernel")}
  assert decayed == expected
  # The release stacks q, k and v in one tensor: two names fewer for each block.
  assert len(decayed) - 2 * 3 == len(torch_names(golden, "decay_names"))
  assert len(mask) - len(decayed) == len(torch_names(golden, "no_decay_names"))


@pytest.mark.parametrize("max_norm", [0.3, 1e3])
@pytest.mark.parametrize(("name", "decay"), [("adamw", 0.1), ("sgd", 0.0)])
def test_steps_equal_torchs_with_clipping(name, decay, max_norm):
  torch = pytest.importorskip("torch")
  rng = np.random.default_rng(0)
  start = {"kernel": rng.normal(size=(3, 4)).astype(np.float32), "bias": rng.normal(size=4).astype(np.float32)}
  grads = [{name: rng.normal(size=v.shape).astype(np.float32) for name, v in start.items()} for _ in range(5)]
  rates = [0.0, 1e-2, 2e-2, 1e-2, 5e-3]

  theirs = {name: torch.nn.Parameter(torch.tensor(v)) for name, v in start.items()}
  groups = [{"params": [theirs["kernel"]], "weight_decay": decay}, {"params": [theirs["bias"]], "weight_decay": 0.0}]
  kind, settings = {
    "adamw": (torch.optim.AdamW, {"betas": (0.9, 0.98), "eps": 1e-8}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
  }[name]
  reference = kind(groups, lr=0.0, **settings)
  config = OptimConfig(name=name, weight_decay=decay, clip_norm=max_norm)
  optimizer = create_optimizer(config, lambda step: jnp.asarray(rates)[step])
  params, state = start, optimizer.init(start)
  for rate, grad in zip(rates, grads, strict=True):
    for key, parameter in theirs.items():
      parameter.grad = torch.tensor(grad[key])
    torch.nn.utils.clip_grad_norm_(theirs.values(), max_norm)
    for group in reference.param_groups:
      group["lr"] = rate
    reference.step()
    updates, state = optimizer.update(grad, state, params)
    params = optax.apply_updates(params, updates)
  expected = {key: parameter.detach().numpy() for key, parameter in theirs.items()}
  chex.assert_trees_all_close(params, expected, atol=1e-6)  # measured 1.2e-7


def test_the_decay_of_sgd_is_not_gathered_in_its_momentum():
  optimizer = create_optimizer(OptimConfig(name="sgd", weight_decay=0.1), lambda step: 0.5)
  params, state = PARAMS, optimizer.init(PARAMS)
  for _ in range(3):
    updates, state = optimizer.update(jax.tree.map(np.zeros_like, PARAMS), state, params)
    params = optax.apply_updates(params, updates)
  np.testing.assert_allclose(params["kernel"], PARAMS["kernel"] * 0.95**3, rtol=1e-6)
  np.testing.assert_array_equal(params["bias"], PARAMS["bias"])


def test_clipping_divides_by_the_norm_plus_torchs_epsilon():
  grads = {"x": jnp.array([3e-6, 4e-6])}
  clipped, _ = clip_by_global_norm(1e-6).update(grads, optax.EmptyState())
  np.testing.assert_allclose(clipped["x"], np.array([3e-6, 4e-6]) / 6, rtol=1e-5)
  unchanged, _ = clip_by_global_norm(1.0).update(grads, optax.EmptyState())
  np.testing.assert_array_equal(unchanged["x"], grads["x"])


# ------------------------------------------------------------ average of weights

PARAMS = {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.ones(3, np.float32)}


@functools.cache
def averaging():
  """An optimizer with an average, and its jitted update: (state, loss, gradients) -> state."""
  optimizer = create_optimizer(OptimConfig(ema_decay=0.6), lambda step: 0.1 / (1 + step))

  def update(state, loss, grads):
    return apply_gradients(state, loss, grads, optimizer)[0]

  return optimizer, jax.jit(update, donate_argnums=0)


def random_grads(rng: np.random.Generator):
  return jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), PARAMS)


def run_averaging(num_updates: int):
  """The state after some updates with random gradients, and the parameters before and after each."""
  optimizer, update = averaging()
  rng, history = np.random.default_rng(0), [PARAMS]
  state = create_train_state(jax.tree.map(jnp.array, PARAMS), optimizer)
  for _ in range(num_updates):
    state = update(state, 1.0, random_grads(rng))
    history.append(jax.device_get(state.params))
  return state, history


def test_the_average_equals_a_plain_loop():
  """The warm-up's decays pass 0.6 at the 13th of 20 updates."""
  state, history = run_averaging(20)
  expected = {name: value.astype(np.float64) for name, value in PARAMS.items()}
  for t, params in enumerate(history[1:]):
    decay = min(0.6, (1 + t) / (10 + t))
    expected = {name: decay * value + (1 - decay) * params[name] for name, value in expected.items()}
  average = averaged_params(state.opt_state)
  chex.assert_trees_all_close(average, expected, rtol=0, atol=2e-6)  # measured 2.2e-7
  assert np.abs(average["kernel"] - state.params["kernel"]).max() > 1e-3


def test_an_average_begins_with_the_parameters_and_changes_no_update():
  params = jax.tree.map(jnp.array, PARAMS)
  optimizer, plain = (create_optimizer(OptimConfig(ema_decay=decay), lambda step: 0.1) for decay in (0.6, None))
  opt_state = optimizer.init(params)
  chex.assert_trees_all_equal(averaged_params(opt_state), PARAMS)
  grads = random_grads(np.random.default_rng(1))
  updates = [each.update(grads, each.init(params), params)[0] for each in (optimizer, plain)]
  chex.assert_trees_all_equal(*updates)
  # A run without an average has the state, and so the checkpoints, of one before there were any.
  assert jax.tree.structure(plain.init(params)) == jax.tree.structure(opt_state[:-1])


def test_long_averages_are_not_rounded():
  """1 - 0.9999 in float32 is off by 2e-4."""
  average = average_params(0.9999)
  late = average.init({"x": jnp.zeros(1)})._replace(count=jnp.int32(10**6))
  _, state = jax.jit(average.update)({"x": jnp.zeros(1)}, late, {"x": jnp.ones(1)})
  assert float(state.average["x"][0]) == pytest.approx(1e-4, rel=1e-6)
  assert int(state.count) == 10**6 + 1


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_step_that_is_not_finite_leaves_the_average(broken):
  _, update = averaging()
  state, _ = run_averaging(3)
  before = jax.device_get(state.opt_state)
  grads = random_grads(np.random.default_rng(2))
  loss = np.nan if broken == "loss" else 1.0
  if broken == "gradient":
    grads["bias"][1] = np.inf
  state = update(state, loss, grads)
  assert int(state.nonfinite_step) == 3
  chex.assert_trees_all_equal(jax.device_get(state.opt_state), before)
  state = update(state, 1.0, random_grads(np.random.default_rng(3)))  # nor does a later one change it
  chex.assert_trees_all_equal(jax.device_get(state.opt_state), before)


def test_checkpoints_keep_the_average(tmp_path):
  """Restored and gone on with, it is what it would have been without a stop."""
  (optimizer, update), (state, _) = averaging(), run_averaging(3)
  store = CheckpointStore(tmp_path, keep=1)
  store.save(state)
  store.wait()
  like = create_train_state(jax.tree.map(jnp.array, PARAMS), optimizer)
  restored = store.restore(3, like)
  store.close()
  chex.assert_trees_all_equal(averaged_params(restored.opt_state), averaged_params(state.opt_state))
  grads = random_grads(np.random.default_rng(4))
  chex.assert_trees_all_equal(update(restored, 1.0, grads), update(state, 1.0, grads))
