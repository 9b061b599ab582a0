"""The training step's switches against each other; test_numerics_replay.py holds it against a recorded run."""

import functools
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dtm_jax import config as config_lib
from dtm_jax import networks, sharding
from dtm_jax.convert import load_torch
from dtm_jax.models.clip import ClipVision
from dtm_jax.models.vit import ViT
from dtm_jax.optim import create_optimizer
from dtm_jax.steps.pretrain import draw_schedules, make_loss, make_train_step, row_keys
from dtm_jax.teachers import ClipTeacher, PixelsTeacher
from dtm_jax.train_state import NEVER, create_train_state, params_sha256

GOLDEN = pathlib.Path(__file__).parent / "golden"


def make_config(**changes) -> config_lib.Config:
  """A tiny run; `changes` by dotted name, double underscores for dots."""
  config = config_lib.with_form(config_lib.base(), "smoke")
  config.model.patch_size = 8
  config.data.image_size = 32
  config.data.color_jitter = 0.0
  config.model.drop_path = 0.0
  config.teacher.kind = "pixels"
  config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
  return config_lib.resolve(config)


def random_batch(config: config_lib.Config) -> dict:
  rng, data = np.random.default_rng(0), config.data
  images = rng.integers(256, size=(data.batch_size, data.image_size, data.image_size, 3), dtype=np.uint8)
  mask = np.arange(config.num_tokens) < data.num_masked
  return {"image": images, "mask": rng.permuted(np.tile(mask, (data.batch_size, 1)), axis=1)}


def create_student(config: config_lib.Config, out_dim: int) -> ViT:
  """As configured, but so small that it compiles in a second."""
  return networks.create_student(config, out_dim).clone(width=24, depth=2, heads=2)


@functools.cache
def build(config: config_lib.Config, average: sharding.Average = sharding.by_compiler):
  """A function that makes the first state, and the jitted step; kept, because tests share configs."""
  teacher = PixelsTeacher(config.model.patch_size)
  student = create_student(config, teacher.out_dim)
  optimizer = create_optimizer(config.optim, schedule := lambda step: 1e-3)
  draw = functools.partial(draw_schedules, config)
  step = jax.jit(make_train_step(config, student, teacher, optimizer, schedule, draw, average))
  return jax.jit(lambda: create_train_state(networks.init_params(config, student), optimizer)), step


def run_steps(config: config_lib.Config, mesh: jax.sharding.Mesh | None = None, average=sharding.by_compiler):
  """State and metrics after two steps on the same batch."""
  create_state, step = build(config, average)
  batch = random_batch(config)
  if mesh is not None:
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
  state, history = create_state(), []
  for _ in range(2):
    state, metrics = step(state, {}, batch)
    history.append(jax.tree.map(float, metrics))
  return state, history


@pytest.mark.parametrize(
  "changes",
  [
    {"morphing__granularity": "group", "morphing__group_size": 2, "data__color_jitter": 0.4, "model__drop_path": 0.5},
    *(
      pytest.param(changes, marks=pytest.mark.slow)
      for changes in ({}, {"morphing__split": "random", "morphing__loss_on": "masked"}, {"morphing__enabled": False})
    ),
  ],
  ids=str,
)
def test_micro_batches_equal_the_big_batch(changes):
  whole, history = run_steps(make_config(**changes))
  split, split_history = run_steps(make_config(optim__accumulate_steps=4, **changes))
  assert history == [pytest.approx(metrics, rel=2e-5) for metrics in split_history]
  chex.assert_trees_all_close(whole.params, split.params, atol=5e-5)


@pytest.mark.parametrize("granularity", ["batch", pytest.param("image", marks=pytest.mark.slow)])
def test_eight_devices_equal_one(granularity):
  config = make_config(morphing__granularity=granularity)
  one, history = run_steps(config)
  eight, eight_history = run_steps(config, sharding.create_mesh(config.mesh))
  assert history == [pytest.approx(metrics, rel=1e-5) for metrics in eight_history]
  chex.assert_trees_all_close(one.params, eight.params, atol=5e-5)


@pytest.mark.slow
def test_eight_devices_that_compute_on_their_own_rows_equal_one():
  """As CPUs of several processes do; with all that is random, in micro-batches."""
  random = {"morphing__granularity": "image", "morphing__split": "random", "model__drop_path": 0.5}
  changes = random | {"data__color_jitter": 0.4, "morphing__loss_on": "masked", "optim__accumulate_steps": 2}
  config = make_config(data__batch_size=16, **changes)
  one, history = run_steps(config)
  mesh = sharding.create_mesh(config.mesh)
  eight, eight_history = run_steps(config, mesh, functools.partial(sharding.mean_of_devices, mesh=mesh))
  assert history == [pytest.approx(metrics, rel=1e-5) for metrics in eight_history]
  chex.assert_trees_all_close(one.params, eight.params, atol=5e-5)


def test_draws_follow_granularity():
  config = make_config(morphing__granularity="group", morphing__group_size=4, morphing__draws=3)
  merges, iterations = draw_schedules(config, 5)
  assert merges.shape == iterations.shape == (8, 3)
  np.testing.assert_array_equal(iterations[:4], np.broadcast_to(iterations[0], (4, 3)))
  assert (iterations[0] != iterations[4]).any() or (merges[0] != merges[4]).any()
  assert draw_schedules(make_config(), 5)[0].shape == (2,)
  many = jnp.stack([draw_schedules(make_config(), step)[1] for step in range(20)])
  assert len(np.unique(many, axis=0)) > 10  # a new draw each step


def test_seed_and_step_alone_decide_a_step():
  changes = {"morphing__split": "random", "model__drop_path": 0.5, "data__color_jitter": 0.4}
  config = make_config(**changes)
  digests = [params_sha256(run_steps(config)[0].params) for _ in range(2)]
  assert digests[0] == digests[1]
  drawn = [step_draws(make_config(**changes, run__seed=seed), step) for seed, step in ((0, 5), (1, 5), (0, 6))]
  assert drawn[0].keys() == {"schedules", "jitter_keys", "drop_path_keys", "split_keys"}
  for name in drawn[0]:
    assert not any(np.array_equal(drawn[0][name], other[name]) for other in drawn[1:]), name


def step_draws(config: config_lib.Config, step: int) -> dict[str, np.ndarray]:
  """All that is random in a step, as numbers."""
  keys = {name: jax.random.key_data(keys) for name, keys in row_keys(config, step).items()}
  return {"schedules": np.stack(draw_schedules(config, step)), **keys}


def test_state_stays_as_it_was_from_the_first_non_finite_step_on():
  config = make_config()
  create_state, step = build(config)
  good = random_batch(config)
  good = good | {"image": good["image"].astype(np.float32) / 255}
  bad = good | {"image": good["image"] * np.nan}
  states = [create_state()]
  for batch in (good, bad, good):
    states.append(step(states[-1], {}, batch)[0])
  assert [int(s.nonfinite_step) for s in states] == [NEVER, NEVER, 1, 1]
  assert [int(s.step) for s in states] == [0, 1, 1, 1]
  chex.assert_trees_all_equal(states[1].params, states[3].params)
  chex.assert_trees_all_equal(states[1].opt_state, states[3].opt_state)


def test_no_gradient_flows_to_the_teacher():
  _, sizes, teacher_params = load_torch(GOLDEN / "clip_vision_tiny.pth")
  config = make_config(data__image_size=64, data__num_masked=20)
  teacher = ClipTeacher(ClipVision(**sizes), config.data.mean, config.data.std, "")
  student = create_student(config, teacher.out_dim)
  merges, iterations = draw_schedules(config, 0)
  rows = random_batch(config) | {"merges": merges, "iterations": iterations}

  @jax.jit
  def grads(params, teacher_params):
    loss = make_loss(config, student, teacher)
    return jax.grad(lambda *both: loss(*both, rows)[0], argnums=(0, 1))(params, teacher_params)

  to_student, to_teacher = grads(networks.init_params(config, student), teacher_params)
  assert all(np.abs(leaf).max() == 0 for leaf in jax.tree.leaves(to_teacher))
  assert np.abs(to_student["head"]["kernel"]).max() > 0


def test_batches_that_devices_cannot_share_are_refused():
  mesh = sharding.create_mesh(config_lib.MeshConfig())
  sharding.check_batch_size(16, mesh, "config.data.batch_size")
  with pytest.raises(config_lib.InputError, match="config.data.batch_size=12 is not divisible by 8 devices; 8 or 16"):
    sharding.check_batch_size(12, mesh, "config.data.batch_size")
  with pytest.raises(config_lib.InputError, match="does not fit the number of devices, 8"):
    sharding.create_mesh(config_lib.MeshConfig(data=3))
