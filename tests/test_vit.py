"""The student against the released code's recorded outputs and gradients; its switches against each other."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dtm_jax import config
from dtm_jax.convert import from_state_dict, load_torch
from dtm_jax.models.attention import dot_product_attention, num_relative_positions, relative_position_bias
from dtm_jax.models.layers import Dense, PatchEmbed, gelu, layer_norm, patchify
from dtm_jax.models.variants import VARIANTS
from dtm_jax.models.vit import ViT, truncated_normal

GOLDEN = pathlib.Path(__file__).parent / "golden"
TINY = {"width": 48, "depth": 3, "heads": 3, "layer_scale": 0.1, "patch_size": 8, "grid": (8, 8), "out_dim": 32}
SWITCHES = [
  {},
  {"attention": "xla"},
  {"scan_layers": True},
  {"remat": True},
  {"scan_layers": True, "remat": True},
]

# 224 px, patch 16, a 512-wide head. Counted by hand for B:
#   block 12 D^2 + 11 D + D (gammas: 2 D, LayerNorms: 4 D, biases: q v proj fc1 fc2 = 8 D) + 732 * heads
PARAMETER_COUNTS = {"tiny": 582_596, "S": 21_849_224, "B": 86_165_264, "L": 303_943_104}


@pytest.fixture(scope="module")
def params():
  kind, _, params = load_torch(GOLDEN / "student_tiny.pth")
  assert kind == "student"
  return params


def nhwc(images):
  return images.transpose(0, 2, 3, 1)


def relative_errors(actual, expected):
  return jax.tree.map(lambda a, e: np.linalg.norm(a - e) / np.linalg.norm(e), actual, expected)


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_tokens_and_gradients_equal_the_recorded_ones(golden, params, switches):
  recorded = golden("student_tiny_io")
  images, mask, student = nhwc(recorded["image_nchw"]), recorded["mask"], ViT(**TINY, **switches)

  @functools.partial(jax.value_and_grad, has_aux=True)
  def product(params):
    tokens = student.apply({"params": params}, images, mask)
    return jnp.sum(tokens * recorded["cotangent"]), tokens

  (_, tokens), grads = jax.jit(product)(params)
  np.testing.assert_allclose(tokens, recorded["tokens"], atol=1e-6)  # measured 1.2e-7
  expected = recorded_gradients(recorded)
  assert grads.keys() == expected.keys()
  worst = max(jax.tree.leaves(relative_errors(grads, expected)))
  assert worst < 9e-6  # measured 9e-7


def recorded_gradients(recorded):
  """The recorded gradients in this project's names: gradients convert like the weights that they are of."""
  grads = {name.removeprefix("grad/"): recorded[name] for name in recorded if name.startswith("grad/")}
  return from_state_dict(grads).params


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_features_equal_the_recorded_ones(golden, params, switches):
  recorded = golden("student_tiny_features")
  student = ViT(**TINY, **switches)
  features = jax.jit(functools.partial(student.apply, method="features"))(
    {"params": params}, nhwc(recorded["image_nchw"])
  )
  np.testing.assert_allclose(features, recorded["features"], atol=1.5e-5)  # measured 2e-6


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_counts(name):
  student = ViT(**VARIANTS[name]._asdict(), patch_size=16, grid=(14, 14), out_dim=512)
  shapes = jax.eval_shape(student.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)), jnp.zeros((1, 196), bool))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == PARAMETER_COUNTS[name]


def test_config_offers_exactly_these_variants():
  assert set(config.VARIANTS) == set(VARIANTS)


def test_initial_values_follow_the_recipe():
  student = ViT(**TINY | {"width": 96})
  params = jax.jit(student.init)(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), jnp.zeros((1, 64), bool))["params"]
  cut_std = 0.02 * 0.53956  # of a normal cut at one standard deviation
  for i in range(3):
    block = params[f"block_{i}"]
    for kernel, divisor in (
      (block["attn"]["q"]["kernel"], 1),
      (block["mlp"]["fc1"]["kernel"], 1),
      (block["attn"]["proj"]["kernel"], np.sqrt(2 * (i + 1))),
      (block["mlp"]["fc2"]["kernel"], np.sqrt(2 * (i + 1))),
    ):
      assert np.abs(kernel).max() <= 0.02 / divisor
      np.testing.assert_allclose(np.std(kernel), cut_std / divisor, rtol=0.03)
    np.testing.assert_array_equal(block["attn"]["rel_pos_bias"], 0)
    np.testing.assert_array_equal(block["gamma_1"], np.float32(0.1))
  assert np.abs(params["mask_token"]).max() > 0
  assert "bias" not in params["block_0"]["attn"]["k"]


def test_rectangular_grids_tell_the_two_sides_apart():
  student = ViT(**TINY | {"grid": (4, 8)})
  images = jax.random.normal(jax.random.key(0), (2, 32, 64, 3))
  mask = jnp.zeros((2, 32), bool)
  params = jax.jit(student.init)(jax.random.key(1), images, mask)["params"]
  assert params["rel_pos_bias"].shape == (7 * 15 + 3, 3)
  assert student.apply({"params": params}, images, mask).shape == (2, 32, 32)


@pytest.mark.parametrize("grid", [(3, 5), (5, 3), (1, 4)])
def test_relative_position_bias_equals_the_index_of_transformers(grid):
  pytest.importorskip("transformers")
  from transformers.models.beit import modeling_beit as beit

  index = beit.BeitRelativePositionBias.generate_relative_position_index(grid).numpy()
  table = np.random.default_rng(0).normal(size=(num_relative_positions(grid), 2)).astype(np.float32)
  actual = jax.jit(relative_position_bias, static_argnums=1)(table, grid)
  np.testing.assert_array_equal(actual, np.moveaxis(table[index], -1, 0))


def test_masked_patches_do_not_reach_the_output(params):
  student, mask = ViT(**TINY), jnp.arange(64)[None, :] % 3 == 0
  apply = jax.jit(student.apply)
  images = jax.random.normal(jax.random.key(0), (1, 64, 64, 3))
  hidden = jnp.repeat(jnp.repeat(mask.reshape(1, 8, 8, 1), 8, axis=1), 8, axis=2)
  tokens = [apply({"params": params}, jnp.where(hidden, value, images), mask) for value in (0, 9)]
  np.testing.assert_array_equal(*tokens)
  seen = apply({"params": params}, jnp.where(hidden, images, 9), mask)
  assert (seen != tokens[0]).any()


def test_stochastic_depth_drops_whole_branches_of_images_at_the_asked_rate(params):
  student = ViT(**TINY, drop_path=0.6)
  keys = jax.random.split(jax.random.key(0), 20_000)
  scales = np.asarray(ViT.branch_scales(student, keys))
  assert scales.shape == (3, 2, 20_000)
  for layer, rate in enumerate((0, 0.3, 0.6)):
    np.testing.assert_allclose((scales[layer] == 0).mean(-1), rate, atol=0.02)
    np.testing.assert_allclose(np.unique(scales[layer])[-1], 1 / (1 - rate), rtol=1e-6)
  images, mask = jax.random.normal(jax.random.key(1), (4, 64, 64, 3)), jnp.zeros((4, 64), bool)
  outputs = [
    jax.jit(ViT(**TINY, drop_path=0.6, scan_layers=scan).apply)({"params": params}, images, mask, keys[:4])
    for scan in (False, True)
  ]
  np.testing.assert_allclose(*outputs, atol=2e-6)
  alone = student.apply({"params": params}, images[2:3], mask[2:3], keys[2:3])
  np.testing.assert_allclose(outputs[0][2:3], alone, atol=2e-6)  # an image's draw is its own


@pytest.mark.parametrize("attention", ["matmul", "xla"])
def test_bfloat16_stays_close_and_leaves_parameters_float32(golden, params, attention):
  recorded = golden("student_tiny_io")
  student = ViT(**TINY, dtype=jnp.bfloat16, attention=attention)
  tokens = jax.jit(student.apply)({"params": params}, nhwc(recorded["image_nchw"]), recorded["mask"])
  error = np.linalg.norm(tokens - recorded["tokens"]) / np.linalg.norm(recorded["tokens"])
  assert tokens.dtype == jnp.float32 and 1e-4 < error < 0.02  # measured 3e-3


def test_attention_implementations_agree_in_values_and_gradients():
  keys = jax.random.split(jax.random.key(0), 4)
  query, key, value = (jax.random.normal(k, (2, 7, 3, 8)) for k in keys[:3])
  bias = jax.random.normal(keys[3], (3, 7, 7))

  def attend(implementation, *inputs):
    return jnp.sin(dot_product_attention(*inputs, implementation)).sum()

  value_and_grad = jax.jit(jax.value_and_grad(attend, argnums=(1, 2, 3, 4)), static_argnums=0)
  results = [value_and_grad(name, query, key, value, bias) for name in ("matmul", "xla")]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *results)


def test_layer_norm_equals_torch():
  torch = pytest.importorskip("torch")
  rng = np.random.default_rng(0)
  x, grad = rng.normal(3, 2, (2, 5, 16)).astype(np.float32), rng.normal(size=(2, 5, 16)).astype(np.float32)
  scale, bias = rng.normal(size=(2, 16)).astype(np.float32)
  inputs = [torch.tensor(v, requires_grad=True) for v in (x, scale, bias)]
  expected = torch.nn.functional.layer_norm(inputs[0], (16,), inputs[1], inputs[2], 1e-5)
  expected.backward(torch.tensor(grad))
  actual, pullback = jax.vjp(lambda *v: layer_norm(*v, 1e-5), x, scale, bias)
  np.testing.assert_allclose(actual, expected.detach(), atol=2e-6)
  for ours, theirs in zip(pullback(grad), inputs, strict=True):
    np.testing.assert_allclose(ours, theirs.grad, atol=1e-5)


def test_gelu_equals_torch():
  torch = pytest.importorskip("torch")
  x = np.linspace(-6, 6, 1001, dtype=np.float32)
  theirs = torch.tensor(x, requires_grad=True)
  expected = torch.nn.functional.gelu(theirs)
  expected.sum().backward()
  np.testing.assert_allclose(gelu(x), expected.detach(), atol=2e-6)
  np.testing.assert_allclose(jax.vmap(jax.grad(gelu))(x), theirs.grad, atol=2e-6)


def test_patchify_keeps_patches_whole_and_in_row_major_order():
  images = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
  patches = patchify(images, 2)
  assert patches.shape == (2, 6, 12)
  np.testing.assert_array_equal(patches[1, 4].reshape(2, 2, 3), images[1, 2:4, 2:4])


def test_truncated_normal_is_cut_at_one_std():
  values = truncated_normal()(jax.random.key(0), (100_000,))
  assert 0.0199 < np.abs(values).max() <= 0.02


@pytest.mark.parametrize(
  ("layer", "shape"),
  [(Dense(8, dtype=jnp.bfloat16), (64, 64, 4)), (PatchEmbed(8, 2, dtype=jnp.bfloat16), (64, 16, 16, 3))],
)
def test_bias_gradients_are_summed_in_float32(layer, shape):
  x = jax.random.normal(jax.random.key(0), shape)
  output, vjp = jax.vjp(layer.apply, layer.init(jax.random.key(1), x), x)
  # Mostly cancels, as gradients do: a sum in bfloat16 is 3e-2 off.
  cotangent = jax.random.normal(jax.random.key(2), output.shape, output.dtype)
  expected = np.asarray(cotangent, np.float64).reshape(-1, 8).sum(axis=0)
  np.testing.assert_allclose(vjp(cotangent)[0]["params"]["bias"], expected, rtol=1e-5)
