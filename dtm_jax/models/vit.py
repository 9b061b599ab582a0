"""BEiT-style ViTs with relative position bias: the student of pre-training, and the classifier of fine-tuning."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from dtm_jax.axes import BATCH, HEADS, MLP, OUT
from dtm_jax.models.attention import dot_product_attention, num_relative_positions, relative_position_bias
from dtm_jax.models.layers import Constrain, Dense, LayerNorm, PatchEmbed, gelu, unconstrained

_EPSILON = 1e-6
_INIT_STD = 0.02
_MLP_RATIO = 4
_HEAD_INIT_SCALE = 0.001  # of a new classifier's head (BEiT's `init_scale`)

KernelInit = Callable[[float], nn.initializers.Initializer]  # divisor -> initialiser


def truncated_normal(divisor: float = 1.0) -> nn.initializers.Initializer:
  """Normal of std 0.02 cut at one std (not rescaled, as in BEiT), over `divisor`."""

  def init(key, shape, dtype=jnp.float32):
    return jax.random.truncated_normal(key, -1, 1, shape, dtype) * (_INIT_STD / divisor)

  return init


def normal(divisor: float = 1.0) -> nn.initializers.Initializer:
  """Normal of std 0.02, over `divisor`: BEiT's fine-tuning model cuts it at +-2, a hundred times its std."""
  return nn.initializers.normal(_INIT_STD / divisor)


class Attention(nn.Module):
  """Multi-head self-attention; q and v have biases, k has none. [B, T, D] -> [B, T, D]."""

  heads: int
  grid: tuple[int, int]
  depth_divisor: float
  dtype: jnp.dtype
  implementation: str
  kernel_init: KernelInit
  constrain: Constrain

  @nn.compact
  def __call__(self, x: jax.Array, shared_table: jax.Array | None) -> jax.Array:
    batch, length, width = x.shape
    table = self.param("rel_pos_bias", nn.initializers.zeros, (num_relative_positions(self.grid), self.heads))
    table = table if shared_table is None else table + shared_table
    dense = functools.partial(Dense, width, dtype=self.dtype, constrain=self.constrain)

    def heads_of(name: str, use_bias: bool) -> jax.Array:
      features = dense(use_bias=use_bias, kernel_init=self.kernel_init(1.0), axes=(None, HEADS), name=name)(x)
      features = features.reshape(batch, length, self.heads, width // self.heads)
      return self.constrain(features, (BATCH, None, HEADS, None))

    query, key, value = heads_of("q", True), heads_of("k", False), heads_of("v", True)
    bias = relative_position_bias(table, self.grid)
    attended = dot_product_attention(query, key, value, bias, self.implementation).reshape(x.shape)
    return dense(kernel_init=self.kernel_init(self.depth_divisor), axes=(HEADS, None), name="proj")(attended)


class Mlp(nn.Module):
  """Two layers with exact GELU between. [B, T, D] -> [B, T, D]."""

  depth_divisor: float
  dtype: jnp.dtype
  kernel_init: KernelInit
  constrain: Constrain

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    width = x.shape[-1]
    dense = functools.partial(Dense, dtype=self.dtype, constrain=self.constrain)
    x = dense(_MLP_RATIO * width, kernel_init=self.kernel_init(1.0), axes=(None, MLP), name="fc1")(x)
    x = gelu(self.constrain(x, (BATCH, None, MLP)))
    return dense(width, kernel_init=self.kernel_init(self.depth_divisor), axes=(MLP, None), name="fc2")(x)


class Block(nn.Module):
  """Pre-LN transformer block with layer scale; the residual stream stays float32."""

  layer: int  # from 1; divides the initial output kernels by sqrt(2 * layer)
  heads: int
  grid: tuple[int, int]
  layer_scale: float
  dtype: jnp.dtype
  attention: str
  kernel_init: KernelInit
  constrain: Constrain

  @nn.compact
  def __call__(self, x: jax.Array, shared_table: jax.Array | None, branch_scale: jax.Array | None) -> jax.Array:
    """Args: x float32 [B, T, D]; shared_table [rows, heads]; branch_scale [2, B], stochastic depth's 0 or 1 / keep."""
    depth_divisor = (2 * self.layer) ** 0.5
    shared = (depth_divisor, self.dtype)
    attention = Attention(
      *(self.heads, self.grid, *shared, self.attention), self.kernel_init, self.constrain, name="attn"
    )
    mlp = Mlp(*shared, self.kernel_init, self.constrain, name="mlp")
    branches = (
      ("norm1", "gamma_1", lambda y: attention(y, shared_table)),
      ("norm2", "gamma_2", mlp),
    )
    for i, (norm, gamma, branch) in enumerate(branches):
      scale = self.param(gamma, nn.initializers.constant(self.layer_scale), (x.shape[-1],))
      if branch_scale is not None:
        scale = scale * branch_scale[i, :, None, None]
      x = x + scale * branch(LayerNorm(_EPSILON, self.dtype, name=norm)(x))
      x = self.constrain(x, (BATCH, None, None))
    return x


class Backbone(nn.Module):
  """What both tasks share: patches and class token through the blocks.

  Parameters are one leaf per layer whether layers are scanned or not, so a
  checkpoint fits both. Where they are not scanned, `residual_stream` in the
  collection "intermediates" is what enters the first block and leaves each.
  """

  width: int
  depth: int
  heads: int
  layer_scale: float
  patch_size: int  # pixels
  grid: tuple[int, int]  # patches (down, across)
  drop_path: float = 0.0  # of the last block, linear from 0 at the first
  dtype: jnp.dtype = jnp.float32  # of matrix products
  attention: str = "matmul"
  scan_layers: bool = False
  remat: bool = False
  constrain: Constrain = unconstrained  # where there is a mesh, `sharding.constrain_to(mesh)`

  kernel_init = staticmethod(truncated_normal)  # a KernelInit

  def setup(self):
    init = self.kernel_init
    self.cls_token = self.param("cls_token", init(1.0), (1, 1, self.width))
    self.patch_embed = PatchEmbed(self.width, self.patch_size, kernel_init=init(1.0), dtype=self.dtype)
    sizes = (self.heads, self.grid, self.layer_scale, self.dtype, self.attention)
    self.block = [Block(i + 1, *sizes, init, self.constrain) for i in range(self.depth)]

  def _embed(self, images, mask=None, mask_token=None):
    """Class token, then patches, masked ones replaced by the mask token."""
    x = self.patch_embed(images)
    if mask is not None:
      x = jnp.where(mask[..., None], mask_token, x)
    x = jnp.concatenate([jnp.broadcast_to(self.cls_token, (x.shape[0], 1, self.width)), x], axis=1)
    x = self.constrain(x, (BATCH, None, None))
    self.sow("intermediates", "residual_stream", x)
    return x

  def branch_scales(self, image_keys: jax.Array | None) -> jax.Array | list[None]:
    """[depth, 2, B] factors of stochastic depth, one draw per image, layer and branch; or None per layer."""
    if image_keys is None or not self.drop_path:
      return [None] * self.depth
    keep = 1 - jnp.linspace(0, self.drop_path, self.depth)[:, None]
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, keep, (self.depth, 2)))(image_keys)
    return jnp.moveaxis(kept / keep, 0, -1)

  def _blocks(self, x, image_keys, shared_table=None):
    if self.is_initializing():
      for block in self.block:
        x = block(x, shared_table, None)
      return x

    # Blocks differ in their initial values only, so one stands for all.
    block = self.block[0].clone(parent=None)

    def layer(x, inputs):
      params, branch_scale = inputs
      return block.apply({"params": params}, x, shared_table, branch_scale), None

    if self.remat:
      layer = jax.checkpoint(layer, prevent_cse=not self.scan_layers)
    params, branch_scales = [b.variables["params"] for b in self.block], self.branch_scales(image_keys)
    if not self.scan_layers:
      for inputs in zip(params, branch_scales, strict=True):
        x, _ = layer(x, inputs)
        self.sow("intermediates", "residual_stream", x)
      return x
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    scales = None if branch_scales[0] is None else branch_scales
    return jax.lax.scan(layer, x, (stacked, scales))[0]


class ViT(Backbone, kw_only=True):
  """The student: predicts a target token at every patch, masked or not."""

  out_dim: int  # width of the target tokens

  def setup(self):
    super().setup()
    self.mask_token = self.param("mask_token", truncated_normal(), (1, 1, self.width))
    rows = num_relative_positions(self.grid)
    self.rel_pos_bias = self.param("rel_pos_bias", nn.initializers.zeros, (rows, self.heads))
    self.norm = LayerNorm(_EPSILON, jnp.float32)
    self.head = Dense(
      self.out_dim, dtype=self.dtype, kernel_init=truncated_normal(), constrain=self.constrain, axes=(None, OUT)
    )

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
    return self.constrain(self.head(tokens[:, 1:]), (BATCH, None, None)).astype(jnp.float32)

  def features(self, images: jax.Array) -> jax.Array:
    """float32 [B, H, W, 3] -> float32 [B, 1 + N, D]: class and patch tokens after the final norm, nothing masked."""
    return self._encode(images, None, None)

  def patch_tokens(self, images: jax.Array) -> jax.Array:
    """float32 [B, H, W, 3] -> float32 [B, N, D]: `features` without the class token."""
    return self.features(images)[:, 1:]

  def pooled(self, images: jax.Array) -> jax.Array:
    """float32 [B, H, W, 3] -> float32 [B, D]: the mean of `patch_tokens`."""
    return self.pooled_and_tokens(images)[0]

  def pooled_and_tokens(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`pooled` and `patch_tokens` of the same images, in one pass."""
    tokens = self.patch_tokens(images)
    return tokens.mean(axis=1), tokens

  def _encode(self, images, mask, image_keys):
    return self.norm(self._blocks(self._embed(images, mask, self.mask_token), image_keys, self.rel_pos_bias))


class Classifier(Backbone, kw_only=True):
  """The fine-tuning model: a bias table per block only, and the mean of the patch tokens decides."""

  num_classes: int

  kernel_init = staticmethod(normal)

  def setup(self):
    super().setup()
    self.fc_norm = LayerNorm(_EPSILON, self.dtype)
    # A division by 1 / scale: the head starts near zero.
    init = normal(1 / _HEAD_INIT_SCALE)
    self.head = Dense(self.num_classes, dtype=self.dtype, kernel_init=init, constrain=self.constrain, axes=(None, OUT))

  def __call__(self, images: jax.Array, image_keys: jax.Array | None = None) -> jax.Array:
    """Class scores.

    Args:
      images: float32 [B, H, W, 3], normalised.
      image_keys: PRNG keys [B] for stochastic depth; None turns it off.

    Returns:
      float32 [B, num_classes], logits.
    """
    pooled = self._pool(self._blocks(self._embed(images), image_keys))
    return self.constrain(self.head(pooled), (BATCH, None)).astype(jnp.float32)

  def features(self, images: jax.Array) -> jax.Array:
    """float32 [B, H, W, 3] -> float32 [B, 1 + N, D]: class and patch tokens after the last block."""
    return self._blocks(self._embed(images), None)

  def patch_tokens(self, images: jax.Array) -> jax.Array:
    """float32 [B, H, W, 3] -> float32 [B, N, D]: patch tokens, through the norm of their mean."""
    return self.pooled_and_tokens(images)[1]

  def pooled(self, images: jax.Array) -> jax.Array:
    """float32 [B, H, W, 3] -> [B, D]: what the head is given."""
    return self.pooled_and_tokens(images)[0]

  def pooled_and_tokens(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`pooled` and `patch_tokens` of the same images, in one pass."""
    tokens = self.features(images)
    return self._pool(tokens), self.fc_norm(tokens[:, 1:]).astype(jnp.float32)

  def _pool(self, tokens):
    return self.fc_norm(tokens[:, 1:].mean(axis=1))
