"""Schedule, decay mask, clipping and AdamW against recordings and against torch."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dtm_jax.config import OptimConfig
from dtm_jax.models.vit import ViT
from dtm_jax.optim import clip_by_global_norm, create_optimizer, decay_mask, warmup_cosine


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
def test_steps_equal_torch_adamw_with_clipping(max_norm):
  torch = pytest.importorskip("torch")
  rng = np.random.default_rng(0)
  start = {"kernel": rng.normal(size=(3, 4)).astype(np.float32), "bias": rng.normal(size=4).astype(np.float32)}
  grads = [{name: rng.normal(size=v.shape).astype(np.float32) for name, v in start.items()} for _ in range(5)]
  rates = [0.0, 1e-2, 2e-2, 1e-2, 5e-3]

  theirs = {name: torch.nn.Parameter(torch.tensor(v)) for name, v in start.items()}
  groups = [{"params": [theirs["kernel"]], "weight_decay": 0.1}, {"params": [theirs["bias"]], "weight_decay": 0.0}]
  adamw = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-8)
  optimizer = create_optimizer(OptimConfig(weight_decay=0.1, clip_norm=max_norm), lambda step: jnp.asarray(rates)[step])
  params, state = start, optimizer.init(start)
  for rate, grad in zip(rates, grads, strict=True):
    for name, parameter in theirs.items():
      parameter.grad = torch.tensor(grad[name])
    torch.nn.utils.clip_grad_norm_(theirs.values(), max_norm)
    for group in adamw.param_groups:
      group["lr"] = rate
    adamw.step()
    updates, state = optimizer.update(grad, state, params)
    params = optax.apply_updates(params, updates)
  expected = {name: parameter.detach().numpy() for name, parameter in theirs.items()}
  chex.assert_trees_all_close(params, expected, atol=1e-6)  # measured 1.2e-7


def test_clipping_divides_by_the_norm_plus_torchs_epsilon():
  grads = {"x": jnp.array([3e-6, 4e-6])}
  clipped, _ = clip_by_global_norm(1e-6).update(grads, optax.EmptyState())
  np.testing.assert_allclose(clipped["x"], np.array([3e-6, 4e-6]) / 6, rtol=1e-5)
  unchanged, _ = clip_by_global_norm(1.0).update(grads, optax.EmptyState())
  np.testing.assert_array_equal(unchanged["x"], grads["x"])
