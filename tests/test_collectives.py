"""What devices say to each other in a training step: gradients and metrics, never images or tokens."""

import functools
import re

import jax
import numpy as np
import pytest

from dtm_jax import config as config_lib
from dtm_jax import networks, sharding
from dtm_jax.models.clip import ClipVision
from dtm_jax.optim import create_optimizer
from dtm_jax.steps.pretrain import draw_schedules, make_train_step
from dtm_jax.teachers import ClipTeacher
from dtm_jax.train_state import create_train_state

NUM_DEVICES = 8
COLLECTIVE = re.compile(
  r" = (.+?) (all-reduce|all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter)(?:-start)?\("
)
TOWER = ClipVision(patch_size=16, width=64, depth=1, heads=1, grid=(4, 4), out_dim=24)


def make_config(**changes) -> config_lib.Config:
  """A tiny run with all that is random on the device; `changes` by dotted name, double underscores for dots."""
  config = config_lib.with_form(config_lib.base(), "smoke")
  config.data.batch_size = 2 * NUM_DEVICES
  config.model.drop_path = 0.5
  config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
  return config_lib.resolve(config)


def make_inputs(config: config_lib.Config):
  """The step, and its arguments on the host."""
  teacher = ClipTeacher(TOWER, config.data.mean, config.data.std, weights_sha256="")
  student = networks.create_student(config, teacher.out_dim).clone(depth=1)
  optimizer = create_optimizer(config.optim, schedule := lambda step: 1e-3)
  step = make_train_step(config, student, teacher, optimizer, schedule, functools.partial(draw_schedules, config))
  rng, size = np.random.default_rng(0), config.data.image_size
  batch = {
    "image": rng.integers(256, size=(config.data.batch_size, size, size, 3), dtype=np.uint8),
    "mask": rng.random((config.data.batch_size, config.num_tokens)) < 0.5,
  }
  state = jax.jit(lambda: create_train_state(networks.init_params(config, student), optimizer))()
  teacher_params = jax.jit(TOWER.init)(jax.random.key(1), np.zeros((1, size, size, 3), np.float32))["params"]
  return step, jax.device_get((state, teacher_params)) + (batch,)


def compile_on(num_devices: int, step, inputs):
  """The step as a run compiles it, for the first devices."""
  auto = (jax.sharding.AxisType.Auto,) * 3
  mesh = jax.make_mesh((num_devices, 1, 1), sharding.MESH_AXES, axis_types=auto, devices=jax.devices()[:num_devices])
  replicated, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
  jitted = jax.jit(step, in_shardings=(replicated, replicated, split), out_shardings=replicated, donate_argnums=0)
  return jitted.lower(*inputs).compile()


def losses(compiled, inputs, num_steps: int = 3) -> list[float]:
  state, teacher_params, batch = inputs
  values = []
  for _ in range(num_steps):
    arguments = jax.device_put((state, teacher_params, batch), compiled.input_shardings[0])
    state, metrics = compiled(*arguments)
    values.append(float(metrics["loss"]))
  return values


def collectives(hlo: str) -> set[tuple[str, bool, str]]:
  """(operation, whether it runs in the loops, its result's shape) of each collective of a compiled program."""
  found = set()
  for computation in hlo.split("\n\n"):
    is_in_loop = not computation.lstrip().startswith("ENTRY")
    for shape, operation in COLLECTIVE.findall(computation):
      found.add((operation, is_in_loop, re.sub(r"\{[^}]*\}", "", shape)))
  return found


@pytest.mark.parametrize(
  ("changes", "in_loops"),
  [
    ({}, set()),
    # Where images have schedules of their own, devices agree before each round whether it is the last.
    ({"morphing__granularity": "image", "morphing__split": "random", "morphing__loss_on": "masked"}, {"pred[]"}),
  ],
  ids=["batch", "image"],
)
def test_devices_exchange_gradients_and_never_tokens(changes, in_loops):
  step, inputs = make_inputs(make_config(**changes))
  compiled = compile_on(NUM_DEVICES, step, inputs)
  found = collectives(compiled.as_text())
  assert {operation for operation, _, _ in found} == {"all-reduce"}
  assert {shape for _, is_in_loop, shape in found if is_in_loop} == in_loops
  one_device = compile_on(1, step, inputs)
  np.testing.assert_allclose(losses(compiled, inputs), losses(one_device, inputs), rtol=0, atol=7e-7)  # measured 7.5e-8


def test_micro_batches_stay_on_their_devices():
  step, inputs = make_inputs(make_config(optim__accumulate_steps=2))
  found = collectives(compile_on(NUM_DEVICES, step, inputs).as_text())
  assert {operation for operation, _, _ in found} == {"all-reduce"}
