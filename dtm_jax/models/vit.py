"""The student: a BEiT-style ViT with mask tokens and relative position bias."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dtm_jax.models.attention import dot_product_attention, num_relative_positions, relative_position_bias
from dtm_jax.models.layers import Dense, LayerNorm, PatchEmbed, gelu

_EPSILON = 1e-6
_INIT_STD = 0.02
_MLP_RATIO = 4


def truncated_normal(divisor: float = 1.0) -> nn.initializers.Initializer:
  """Normal of std 0.02 cut at one std (not rescaled, as in BEiT), over `divisor`."""

  def init(key, shape, dtype=jnp.float32):
    return jax.random.truncated_normal(key, -1, 1, shape, dtype) * (_INIT_STD / divisor)

  return init


class Attention(nn.Module):
  """Multi-head self-attention; q and v have biases, k has none. [B, T, D] -> [B, T, D]."""

  heads: int
  grid: tuple[int, int]
  depth_divisor: float
  dtype: jnp.dtype
  implementation: str

  @nn.compact
  def __call__(self, x: jax.Array, shared_table: jax.Array) -> jax.Array:
    batch, length, width = x.shape
    table = self.param("rel_pos_bias", nn.initializers.zeros, (num_relative_positions(self.grid), self.heads))

    def heads_of(name: str, use_bias: bool) -> jax.Array:
      dense = Dense(width, use_bias=use_bias, dtype=self.dtype, kernel_init=truncated_normal(), name=name)
      return dense(x).reshape(batch, length, self.heads, width // self.heads)

    query, key, value = heads_of("q", True), heads_of("k", False), heads_of("v", True)
    bias = relative_position_bias(table + shared_table, self.grid)
    attended = dot_product_attention(query, key, value, bias, self.implementation).reshape(x.shape)
    return Dense(width, dtype=self.dtype, kernel_init=truncated_normal(self.depth_divisor), name="proj")(attended)


class Mlp(nn.Module):
  """Two layers with exact GELU between. [B, T, D] -> [B, T, D]."""

  depth_divisor: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    width = x.shape[-1]
    x = gelu(Dense(_MLP_RATIO * width, dtype=self.dtype, kernel_init=truncated_normal(), name="fc1")(x))
    return Dense(width, dtype=self.dtype, kernel_init=truncated_normal(self.depth_divisor), name="fc2")(x)


class Block(nn.Module):
  """Pre-LN transformer block with layer scale; the residual stream stays float32."""

  layer: int  # from 1; divides the initial output kernels by sqrt(2 * layer)
  heads: int
  grid: tuple[int, int]
  layer_scale: float
  dtype: jnp.dtype
  attention: str

  @nn.compact
  def __call__(self, x: jax.Array, shared_table: jax.Array, branch_scale: jax.Array | None) -> jax.Array:
    """Args: x float32 [B, T, D]; shared_table [rows, heads]; branch_scale [2, B], stochastic depth's 0 or 1 / keep."""
    depth_divisor = (2 * self.layer) ** 0.5
    attention = Attention(self.heads, self.grid, depth_divisor, self.dtype, self.attention, name="attn")
    mlp = Mlp(depth_divisor, self.dtype, name="mlp")
    branches = (
      ("norm1", "gamma_1", lambda y: attention(y, shared_table)),
      ("norm2", "gamma_2", mlp),
    )
    for i, (norm, gamma, branch) in enumerate(branches):
      scale = self.param(gamma, nn.initializers.constant(self.layer_scale), (x.shape[-1],))
      if branch_scale is not None:
        scale = scale * branch_scale[i, :, None, None]
      x = x + scale * branch(LayerNorm(_EPSILON, self.dtype, name=norm)(x))
    return x


class ViT(nn.Module):
  """Vision Transformer that predicts a target token at every patch, masked or not.

  Parameters are one leaf per layer whether layers are scanned or not, so a
  checkpoint fits both.
  """

  width: int
  depth: int
  heads: int
  layer_scale: float
  patch_size: int  # pixels
  grid: tuple[int, int]  # patches (down, across)
  out_dim: int  # width of the target tokens
  drop_path: float = 0.0  # of the last block, linear from 0 at the first
  dtype: jnp.dtype = jnp.float32  # of matrix products
  attention: str = "matmul"
  scan_layers: bool = False
  remat: bool = False

  def setup(self):
    rows = num_relative_positions(self.grid)
    self.cls_token = self.param("cls_token", truncated_normal(), (1, 1, self.width))
    self.mask_token = self.param("mask_token", truncated_normal(), (1, 1, self.width))
    self.rel_pos_bias = self.param("rel_pos_bias", nn.initializers.zeros, (rows, self.heads))
    self.patch_embed = PatchEmbed(self.width, self.patch_size, kernel_init=truncated_normal(), dtype=self.dtype)
    self.block = [
      Block(i + 1, self.heads, self.grid, self.layer_scale, self.dtype, self.attention) for i in range(self.depth)
    ]
    self.norm = LayerNorm(_EPSILON, jnp.float32)
    self.head = Dense(self.out_dim, dtype=self.dtype, kernel_init=truncated_normal())

  def __call__(self, images: jax.Array, mask: jax.Array, image_keys: jax.Array | None = None) -> jax.Array:
    """Predicted target tokens.

    Args:
      images: float32 [B, H, W, 3], normalised.
      mask: bool [B, N], True where the patch is replaced by the mask token.
      image_keys: PRNG keys [B] for stochastic depth; None turns it off.

    Returns:
      float32 [B, N, out_dim], without the class token.
    """
    tokens = self._encode(images, mask, image_keys)
    return self.head(tokens[:, 1:]).astype(jnp.float32)

  def features(self, images: jax.Array) -> jax.Array:
    """float32 [B, H, W, 3] -> float32 [B, 1 + N, D]: class and patch tokens after the final norm, nothing masked."""
    return self._encode(images, None, None)

  def _encode(self, images, mask, image_keys):
    x = self.patch_embed(images).astype(jnp.float32)
    if mask is not None:
      x = jnp.where(mask[..., None], self.mask_token, x)
    x = jnp.concatenate([jnp.broadcast_to(self.cls_token, (x.shape[0], 1, self.width)), x], axis=1)
    return self.norm(self._blocks(x, self._branch_scales(image_keys)))

  def _branch_scales(self, image_keys):
    """[depth, 2, B] factors of stochastic depth, one draw per image, layer and branch; or None per layer."""
    if image_keys is None or not self.drop_path:
      return [None] * self.depth
    keep = 1 - jnp.linspace(0, self.drop_path, self.depth)[:, None]
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, keep, (self.depth, 2)))(image_keys)
    return jnp.moveaxis(kept / keep, 0, -1)

  def _blocks(self, x, branch_scales):
    if self.is_initializing():
      for block in self.block:
        x = block(x, self.rel_pos_bias, None)
      return x

    # Blocks differ in their initial values only, so one stands for all.
    block = self.block[0].clone(parent=None)

    def layer(x, inputs):
      params, branch_scale = inputs
      return block.apply({"params": params}, x, self.rel_pos_bias, branch_scale), None

    if self.remat:
      layer = jax.checkpoint(layer, prevent_cse=not self.scan_layers)
    params = [b.variables["params"] for b in self.block]
    if not self.scan_layers:
      for inputs in zip(params, branch_scales, strict=True):
        x, _ = layer(x, inputs)
      return x
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    scales = None if branch_scales[0] is None else branch_scales
    return jax.lax.scan(layer, x, (stacked, scales))[0]
