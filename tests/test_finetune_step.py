"""The fine-tuning step against a recorded PyTorch run, and its switches against each other."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dtm_jax import config as config_lib
from dtm_jax.models.vit import Classifier
from dtm_jax.optim import create_optimizer, layer_scales
from dtm_jax.steps.finetune import augment, make_train_step
from dtm_jax.train_state import create_train_state

SIZES = {"width": 24, "depth": 2, "heads": 2, "layer_scale": 1.0, "patch_size": 8, "grid": (4, 4), "num_classes": 5}


def make_config(**changes) -> config_lib.Config:
  """A tiny run; `changes` by dotted name, double underscores for dots."""
  config = config_lib.with_form(config_lib.base(), "smoke")
  config.model.patch_size = 8
  config.data.image_size = 32
  config.optim.layer_decay = 0.5
  config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
  return config_lib.resolve(config)


def make_batch(config: config_lib.Config) -> dict[str, np.ndarray]:
  rng, data = np.random.default_rng(0), config.data
  images = rng.integers(256, size=(data.batch_size, data.image_size, data.image_size, 3), dtype=np.uint8)
  return {"image": images, "label": rng.integers(5, size=data.batch_size, dtype=np.int32)}


def build(config: config_lib.Config):
  """The first state and the jitted step."""
  model = Classifier(**SIZES, drop_path=config.model.drop_path)
  optimizer = create_optimizer(config.optim, schedule := lambda step: 1e-3)
  params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
  params["head"]["kernel"] *= 1e3  # a new head gives every class the same score
  prepare = functools.partial(augment, config, SIZES["num_classes"])
  return create_train_state(params, optimizer), jax.jit(make_train_step(config, model, optimizer, schedule, prepare))


def test_micro_batches_equal_the_big_batch():
  states, losses = [], []
  for accumulate_steps in (1, 4):
    config = make_config(model__drop_path=0.5, optim__accumulate_steps=accumulate_steps)
    (state, step), batch = build(config), make_batch(config)
    _, later = step(state.replace(step=jnp.int32(7)), batch)
    states.append(step(*step(state, batch)[:1], batch)[0])
    losses.append([float(metrics["loss"]) for metrics in (step(state, batch)[1], later)])
  assert losses[0] == pytest.approx(losses[1], rel=2e-6)
  chex.assert_trees_all_close(states[0].params, states[1].params, atol=5e-5)
  assert losses[0][0] != pytest.approx(losses[0][1], rel=1e-4)  # stochastic depth draws anew


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
