"""The CLIP tower against recorded outputs and transformers. Measured errors stand beside the tolerances."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dtm_jax.convert import load_torch
from dtm_jax.models.clip import ClipVision, resize_positions

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def recorded():
  return np.load(GOLDEN / "clip_vision_tiny_io.npz")


def nhwc(recorded) -> np.ndarray:
  return recorded["image_nchw"].transpose(0, 2, 3, 1)


def load_tower(**options) -> tuple[ClipVision, dict]:
  _, model, params = load_torch(GOLDEN / "clip_vision_tiny.pth")
  return ClipVision(**model, **options), params


@pytest.mark.parametrize("attention", ["matmul", "xla"])
def test_tower_equals_the_recorded_tokens(recorded, attention):
  tower, params = load_tower(attention=attention)
  tokens, pooled = jax.jit(tower.apply)({"params": params}, nhwc(recorded))
  np.testing.assert_allclose(tokens, recorded["tokens"], rtol=0, atol=1.5e-5)  # measured 2.2e-6
  np.testing.assert_allclose(pooled, recorded["pooled"], rtol=0, atol=1e-5)  # measured 1.1e-6


def test_tokens_before_the_projection_equal_the_recorded_ones(recorded):
  tower, params = load_tower()
  _, state = tower.apply(
    {"params": params}, nhwc(recorded), capture_intermediates=lambda module, _: module.name == "ln_post"
  )
  (normed,) = state["intermediates"]["ln_post"]["__call__"]
  np.testing.assert_allclose(normed[:, 1:], recorded["tokens_preproj"], rtol=0, atol=1e-5)  # measured 2.2e-6


def test_bfloat16_products_stay_close_and_give_float32(recorded):
  tower, params = load_tower(dtype=jnp.bfloat16)
  tokens, pooled = jax.jit(tower.apply)({"params": params}, nhwc(recorded))
  assert tokens.dtype == pooled.dtype == jnp.float32
  np.testing.assert_allclose(tokens, recorded["tokens"], rtol=0, atol=0.15)  # measured 0.020, values up to 4


def test_parameters_are_the_same_tree_as_a_new_tower(recorded):
  tower, params = load_tower()
  fresh = jax.eval_shape(lambda: tower.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3))))["params"]
  assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(np.shape, params)


@pytest.mark.parametrize("size", [(96, 64), (48, 80), (32, 32)])
def test_other_sizes_interpolate_positions_as_transformers_does(size):
  """A rectangle catches a swap of the sides; transformers uses torch's bicubic."""
  transformers = pytest.importorskip("transformers")
  config = transformers.CLIPVisionConfig(
    hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=8
  )
  torch.manual_seed(0)
  embeddings = transformers.models.clip.modeling_clip.CLIPVisionEmbeddings(config)
  positions = embeddings.position_embedding.weight
  with torch.no_grad():
    expected = embeddings.interpolate_pos_encoding(torch.zeros(1, 2, 128), *size)[0, 1:]
  actual = resize_positions(jnp.asarray(positions.detach().numpy()[1:]), (8, 8), (size[0] // 8, size[1] // 8))
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1.5e-5)  # measured 1.9e-6, values up to 4
