"""CLIP's vision transformer, as OpenAI released it; only ever a frozen teacher here.

Source: Radford et al. 2021, https://github.com/openai/CLIP (architecture). Pre-LN
blocks, QuickGELU, LayerNorm eps 1e-5, a LayerNorm before the blocks, no bias on
the patch embedding, a linear projection after the last LayerNorm.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from dtm_jax.axes import BATCH, HEADS, MLP
from dtm_jax.models.attention import dot_product_attention
from dtm_jax.models.layers import Constrain, Dense, LayerNorm, PatchEmbed, unconstrained

# The vision tower of "ViT-B/16", the paper's teacher: fields of `ClipVision`.
CLIP_B16 = {"patch_size": 16, "width": 768, "depth": 12, "heads": 12, "grid": (14, 14), "out_dim": 512}

_EPSILON = 1e-5
_MLP_RATIO = 4


def quick_gelu(x: jax.Array) -> jax.Array:
  """x * sigmoid(1.702 x), the GELU approximation that CLIP was trained with."""
  return x * jax.nn.sigmoid(1.702 * x)


def resize_positions(positions: jax.Array, stored: tuple[int, int], wanted: tuple[int, int]) -> jax.Array:
  """Interpolates a grid of position embeddings, bicubic as in PyTorch.

  Args:
    positions: [h * w, D] for the `stored` grid (down, across), row-major.
    stored: The grid that they were trained on.
    wanted: The grid (down, across) of the images.

  Returns:
    [H * W, D] for the `wanted` grid.
  """
  if stored == wanted:
    return positions
  width = positions.shape[-1]
  # torch.nn.functional.interpolate(mode="bicubic", align_corners=False).
  resized = jax.image.resize(positions.reshape(*stored, width), (*wanted, width), "cubic-pytorch", antialias=False)
  return resized.reshape(-1, width)


class Attention(nn.Module):
  """Multi-head self-attention, biases on all four products. [B, T, D] -> [B, T, D]."""

  heads: int
  dtype: jnp.dtype
  implementation: str
  constrain: Constrain

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    width = x.shape[-1]
    dense = functools.partial(Dense, width, dtype=self.dtype, constrain=self.constrain)
    features = (dense(axes=(None, HEADS), name=name)(x).reshape(*x.shape[:-1], self.heads, -1) for name in "qkv")
    query, key, value = (self.constrain(of_heads, (BATCH, None, HEADS, None)) for of_heads in features)
    attended = dot_product_attention(query, key, value, None, self.implementation)
    return dense(axes=(HEADS, None), name="proj")(attended.reshape(x.shape))


class Mlp(nn.Module):
  """Two layers with QuickGELU between. [B, T, D] -> [B, T, D]."""

  dtype: jnp.dtype
  constrain: Constrain

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    width = x.shape[-1]
    dense = functools.partial(Dense, dtype=self.dtype, constrain=self.constrain)
    hidden = dense(_MLP_RATIO * width, axes=(None, MLP), name="fc1")(x)
    hidden = quick_gelu(self.constrain(hidden, (BATCH, None, MLP)))
    return dense(width, axes=(MLP, None), name="fc2")(hidden)


class Block(nn.Module):
  """Pre-LN transformer block; the residual stream stays float32."""

  heads: int
  dtype: jnp.dtype
  attention: str
  constrain: Constrain

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    attention = Attention(self.heads, self.dtype, self.attention, self.constrain, name="attn")
    mlp = Mlp(self.dtype, self.constrain, name="mlp")
    for norm, branch in (("norm1", attention), ("norm2", mlp)):
      x = x + branch(LayerNorm(_EPSILON, self.dtype, name=norm)(x))
      x = self.constrain(x, (BATCH, None, None))
    return x


class ClipVision(nn.Module):
  """The vision tower.

  `residual_stream` in the collection "intermediates" is what enters the first block and leaves each.

  Attributes:
    patch_size: Pixels.
    width: D.
    depth: Blocks.
    heads: H.
    grid: Patches (down, across) that position embeddings are stored for.
    out_dim: K, the width of the space shared with text.
    dtype: Of matrix products; softmax and LayerNorm statistics are float32.
    attention: Implementation, see `models.attention`.
    constrain: Tells who holds an activation; where there is a mesh, `sharding.constrain_to(mesh)`.
  """

  patch_size: int
  width: int
  depth: int
  heads: int
  grid: tuple[int, int]
  out_dim: int
  dtype: jnp.dtype = jnp.float32
  attention: str = "matmul"
  constrain: Constrain = unconstrained

  @nn.compact
  def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Embeds images of any size that is a multiple of the patch size.

    Args:
      images: float32 [B, height, width, 3], already normalised.

    Returns:
      tokens: float32 [B, N, K], one per patch, row-major: after the last
        LayerNorm, times the projection (CLIP itself projects the class token only).
      pooled: float32 [B, K], the projected class token: CLIP's image embedding.
    """
    x = LayerNorm(_EPSILON, name="ln_pre")(self._embed(images))
    self.sow("intermediates", "residual_stream", x)
    for i in range(self.depth):
      x = Block(self.heads, self.dtype, self.attention, self.constrain, name=f"block_{i}")(x)
      self.sow("intermediates", "residual_stream", x)
    x = LayerNorm(_EPSILON, self.dtype, name="ln_post")(x)
    projection = self.param("proj", nn.initializers.normal(self.width**-0.5), (self.width, self.out_dim))
    projected = self.constrain(x @ projection.astype(self.dtype), (BATCH, None, None)).astype(jnp.float32)
    return projected[:, 1:], projected[:, 0]

  def pooled(self, images: jax.Array) -> jax.Array:
    """float32 [B, height, width, 3] -> float32 [B, K]: CLIP's image embedding alone."""
    return self.pooled_and_tokens(images)[0]

  def pooled_and_tokens(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`pooled`, and the projected patch tokens float32 [B, N, K] of the same images."""
    tokens, pooled = self(images)
    return pooled, tokens

  def _embed(self, images: jax.Array) -> jax.Array:
    """Class token, then patches, with their positions: float32 [B, 1 + N, D]."""
    init = nn.initializers.normal(self.width**-0.5)
    patches = PatchEmbed(self.width, self.patch_size, use_bias=False, dtype=self.dtype, name="patch_embed")(images)
    class_embedding = self.param("class_embedding", init, (self.width,))
    positions = self.param("pos_embed", init, (1 + math.prod(self.grid), self.width))
    grid = (images.shape[1] // self.patch_size, images.shape[2] // self.patch_size)
    tokens = patches + resize_positions(positions[1:], self.grid, grid)
    first = jnp.broadcast_to(class_embedding + positions[0], (images.shape[0], 1, self.width))
    return self.constrain(jnp.concatenate([first, tokens], axis=1), (BATCH, None, None))
