"""The fine-tuning step: what it makes of a batch, on one device and on eight, in one piece and in several.

The replay of a recorded PyTorch run is in test_numerics_replay.py.
"""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dtm_jax import config as config_lib
from dtm_jax.augment import mix, random_erase
from dtm_jax.axes import Stream
from dtm_jax.models.vit import Classifier
from dtm_jax.optim import averaged_params, create_optimizer, layer_scales
from dtm_jax.steps.finetune import augment, make_train_step
from dtm_jax.train_state import create_train_state, image_keys, stream_key

SIZES = {"width": 24, "depth": 2, "heads": 2, "layer_scale": 1.0, "patch_size": 8, "grid": (4, 4), "num_classes": 5}
NUM_CLASSES = SIZES["num_classes"]
OFF = {"finetune__erase_prob": 0.0, "finetune__mixup": 0.0, "finetune__cutmix": 0.0, "finetune__label_smoothing": 0.0}


def make_config(**changes) -> config_lib.Config:
  """A tiny run; `changes` by dotted name, double underscores for dots."""
  config = config_lib.with_form(config_lib.base(), "smoke")
  config.model.patch_size = 8
  config.task = "finetune"
  config.data.update(image_size=32, color_jitter=0.0, num_masked=0)
  config.optim.layer_decay = 0.5
  config.run.seed = 3
  config.finetune.update(erase_prob=0.5, cutmix=0.3)
  config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
  return config_lib.resolve(config)


def make_batch(config: config_lib.Config) -> dict[str, np.ndarray]:
  rng, data = np.random.default_rng(0), config.data
  images = rng.integers(256, size=(data.batch_size, data.image_size, data.image_size, 3), dtype=np.uint8)
  return {"image": images, "label": rng.integers(5, size=data.batch_size, dtype=np.int32)}


@functools.cache
def first_params():
  params = jax.jit(Classifier(**SIZES).init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
  params["head"]["kernel"] *= 1e3  # a new head gives every class the same score
  return params


def build(config: config_lib.Config, prepare):
  """The first state and the step."""
  model = Classifier(**SIZES, drop_path=config.model.drop_path)
  optimizer = create_optimizer(config.optim, schedule := lambda step: 1e-3)
  return create_train_state(first_params(), optimizer), make_train_step(config, model, optimizer, schedule, prepare)


def compile_on(num_devices: int, function, tree, batch):
  """A jitted function of something that each device has and of rows that devices share, as a run compiles it."""
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((num_devices,), ("data",), axis_types=auto, devices=jax.devices()[:num_devices])
  shardings = [jax.NamedSharding(mesh, spec) for spec in (jax.P(), jax.P("data"))]
  return jax.jit(function, in_shardings=shardings).lower(tree, batch).compile()


def call(compiled, *arguments):
  return jax.device_get(compiled(*jax.device_put(arguments, compiled.input_shardings[0])))


def run_steps(config: config_lib.Config, num_devices: int = 1):
  """State and losses after two steps on one batch."""
  state, step = build(config, functools.partial(augment, config, NUM_CLASSES))
  batch, losses = make_batch(config), []
  compiled = compile_on(num_devices, step, state, batch)
  for _ in range(2):
    state, metrics = call(compiled, state, batch)
    assert metrics.keys() == {"loss", "grad_norm", "lr"}
    losses.append(float(metrics["loss"]))
  return state, losses


@pytest.mark.slow
def test_micro_batches_on_eight_devices_equal_the_big_batch_on_one():
  changes = {"data__batch_size": 16, "model__drop_path": 0.5, "optim__ema_decay": 0.9}
  whole, losses = run_steps(make_config(**changes))
  split, split_losses = run_steps(make_config(**changes, optim__accumulate_steps=2), num_devices=8)
  assert split_losses == pytest.approx(losses, rel=1.5e-6)  # measured 1.5e-7, the most of 12 draws
  # Adam's first steps divide by the gradient's size, which makes much of the rounding where it is close to 0.
  chex.assert_trees_all_close(split.params, whole.params, rtol=0, atol=4e-5)  # 4.3e-6
  averages = [averaged_params(state.opt_state) for state in (split, whole)]
  chex.assert_trees_all_close(*averages, rtol=0, atol=4e-5)  # 4.3e-6


def test_each_step_prepares_its_batch_and_draws_stochastic_depth_anew():
  config = make_config(model__drop_path=0.5)
  batch = {"image": np.float32(make_batch(config)["image"] / 255), "target": np.eye(8, NUM_CLASSES, dtype=np.float32)}
  # The loss is in proportion to the step, but for the draws.
  state, step = build(config, lambda step, batch: (batch["image"], step * batch["target"]))
  jitted = jax.jit(step)
  losses = [float(jitted(state.replace(step=jnp.int32(i)), batch)[1]["loss"]) for i in (0, 1, 1, 7)]
  assert losses[0] == 0
  assert losses[1] == losses[2] > 0
  assert losses[3] != pytest.approx(7 * losses[1], rel=1e-4)
  assert losses[3] == pytest.approx(7 * losses[1], rel=0.5)


# ------------------------------------------------------------ what a step makes of a batch


@functools.cache
def compile_augment(config: config_lib.Config, num_devices: int):
  return compile_on(num_devices, functools.partial(augment, config, NUM_CLASSES), jnp.int32(0), make_batch(config))


def prepared(config: config_lib.Config, step: int, num_devices: int = 1) -> tuple[np.ndarray, np.ndarray]:
  """Images and targets of one step."""
  return call(compile_augment(config, num_devices), jnp.int32(step), make_batch(config))


def test_with_everything_off_images_are_normalised_and_targets_are_the_classes():
  config = make_config(**OFF)
  images, targets = prepared(config, 0)
  batch = make_batch(config)
  expected = (batch["image"] / 255.0 - config.data.mean) / config.data.std
  np.testing.assert_allclose(images, expected, rtol=0, atol=3e-6)  # measured 6.8e-7
  np.testing.assert_array_equal(targets, np.eye(NUM_CLASSES)[batch["label"]])


def test_a_step_erases_then_mixes_with_numbers_of_its_own():
  """Images are erased whole, and mixed afterwards: a hole is as deep as its image's share."""
  config, step = make_config(), 6  # one that cuts, at a place where the draw of the share shows

  @jax.jit
  def expect(images, targets):
    keys = image_keys(stream_key(3, Stream.ERASE, step), len(images))
    erased, key = random_erase(keys, images, 0.5), stream_key(3, Stream.MIX, step)
    return mix(key, erased, 0.9 * targets + 0.1 / NUM_CLASSES, mixup=0.8, cutmix=0.3, cutmix_prob=0.5)

  expected, actual = jax.device_get(expect(*prepared(make_config(**OFF), 0))), prepared(config, step)
  chex.assert_trees_all_close(actual, expected, rtol=0, atol=4e-6)  # measured 4.8e-7
  chex.assert_trees_all_equal(prepared(config, step), actual)
  for before, after in zip(actual, prepared(config, step + 1), strict=True):
    assert np.abs(before - after).max() > 1e-3


def test_eight_devices_prepare_what_one_prepares():
  """An image's partner is the row as far from the other end, on another device."""
  config = make_config()
  classes, rest = make_batch(config)["label"], 0.1 / NUM_CLASSES
  pairs = np.flatnonzero(classes != classes[::-1])
  whole_pixels = []
  for step in range(8):
    one, eight = prepared(config, step), prepared(config, step, num_devices=8)
    chex.assert_trees_all_close(one, eight, rtol=0, atol=2e-6)  # measured 2.4e-7
    shares = (eight[1][pairs, classes[pairs]] - rest) / 0.9
    others = (eight[1][pairs, classes[::-1][pairs]] - rest) / 0.9
    np.testing.assert_allclose(shares + others, 1, rtol=0, atol=1e-6)  # measured 1.2e-7
    np.testing.assert_allclose(shares, shares[0], rtol=0, atol=1e-6)
    whole_pixels.append(abs(shares[0] * 32**2 - round(shares[0] * 32**2)) < 2e-3)
  assert 0 < sum(whole_pixels) < 8  # some steps cut, some blend


def test_devices_send_each_other_the_partners_and_no_more():
  program = compile_augment(make_config(), 8).as_text()
  found = re.findall(r"= (\S+?)(?:\{\S*)? (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", program)
  assert sorted(found) == [("f32[1,32,32,3]", "collective-permute"), ("f32[1,5]", "collective-permute")]


def test_learning_rates_fall_with_the_distance_from_the_head(golden):
  recorded = golden("finetune_trajectory")
  model = Classifier(**SIZES | {"depth": 3})
  params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
  scales = layer_scales(params | {"mask_token": 0, "pos_embed": 0}, float(recorded["layer_decay"]))
  assert scales["mask_token"] == scales["pos_embed"] == scales["cls_token"]
  expected = dict(zip(recorded["names"].tolist(), recorded["lr_scale"], strict=True))
  pairs = {
    "cls_token": scales["cls_token"],
    "patch_embed.proj.weight": scales["patch_embed"]["kernel"],
    "blocks.0.attn.relative_position_bias_table": scales["block_0"]["attn"]["rel_pos_bias"],
    "blocks.2.gamma_1": scales["block_2"]["gamma_1"],
    "fc_norm.weight": scales["fc_norm"]["scale"],
    "head.bias": scales["head"]["bias"],
  }
  assert pairs == {name: pytest.approx(expected[name], rel=1e-6) for name in pairs}
  assert len(set(pairs.values())) == 4
