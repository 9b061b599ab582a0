"""Building blocks that every tower shares, written so that XLA's backward pass is fast."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

# (activation or kernel in use, logical axis or None of each of its axes) -> the same, told who holds it.
Constrain = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]


def unconstrained(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
  """A `Constrain` that leaves it to the compiler."""
  del axes
  return x


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
  """[B, H, W, C] -> [B, N, p * p * C], patches in row-major order; H and W are multiples of p."""
  batch, height, width, channels = images.shape
  down, across = height // patch_size, width // patch_size
  patches = images.reshape(batch, down, patch_size, across, patch_size, channels).swapaxes(2, 3)
  return patches.reshape(batch, down * across, patch_size * patch_size * channels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
  """LayerNorm over the last axis with two-pass variance, in float32. [..., D] -> float32 [..., D].

  The gradient is in closed form: XLA would fuse the one that autodiff gives
  with the residual chain and recompute it in each consumer (a tenth of the
  time of a whole ViT-B step on CPU).
  """
  return _layer_norm_forward(x, scale, bias, epsilon)[0]


def _layer_norm_forward(x, scale, bias, epsilon):
  x = x.astype(jnp.float32)
  mean = x.mean(axis=-1, keepdims=True)
  rstd = jax.lax.rsqrt(jnp.square(x - mean).mean(axis=-1, keepdims=True) + epsilon)
  return (x - mean) * rstd * scale + bias, (x, mean, rstd, scale)


def _layer_norm_backward(epsilon, residuals, grad):
  del epsilon
  x, mean, rstd, scale = residuals
  normal = (x - mean) * rstd
  rows = tuple(range(grad.ndim - 1))
  grad_normal = grad * scale
  projection = (grad_normal * normal).mean(axis=-1, keepdims=True)
  grad_x = rstd * (grad_normal - grad_normal.mean(axis=-1, keepdims=True) - normal * projection)
  return grad_x, (grad * normal).sum(axis=rows), grad.sum(axis=rows)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


class LayerNorm(nn.Module):
  """`nn.LayerNorm`'s parameters with `layer_norm`'s numbers. [..., D] -> `dtype` [..., D]."""

  epsilon: float
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    width = x.shape[-1]
    scale = self.param("scale", nn.initializers.ones, (width,))
    bias = self.param("bias", nn.initializers.zeros, (width,))
    return layer_norm(x, scale, bias, self.epsilon).astype(self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _in_use(kernel: jax.Array, constrain: Constrain, axes: tuple[str | None, ...]) -> jax.Array:
  """The kernel constrained to `axes`, and its gradient not: one whole on each device would be summed by all of them."""
  return constrain(kernel, axes)


def _in_use_forward(kernel, constrain, axes):
  return constrain(kernel, axes), None


def _in_use_backward(constrain, axes, residuals, grad):
  del constrain, axes, residuals
  return (grad,)


_in_use.defvjp(_in_use_forward, _in_use_backward)


class Dense(nn.Module):
  """`nn.Dense`'s parameters on [..., D] flattened to rows: one plain matrix product forward and two backward.

  Attributes:
    axes: the logical axes along which the kernel stays split in the product. Along others its shards are gathered
      first: left to itself, XLA for TPUs sends them around anew in each product, backward ones included.
  """

  features: int
  use_bias: bool = True
  dtype: jnp.dtype = jnp.float32
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
  constrain: Constrain = unconstrained
  axes: tuple[str | None, str | None] = (None, None)

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    width = x.shape[-1]
    kernel = self.param("kernel", self.kernel_init, (width, self.features))
    rows = x.reshape(-1, width).astype(self.dtype) @ _in_use(kernel.astype(self.dtype), self.constrain, self.axes)
    if self.use_bias:
      # Added in float32, so that its gradient, a sum over all rows, is in float32, too.
      rows = (rows + self.param("bias", nn.initializers.zeros, (self.features,))).astype(self.dtype)
    return rows.reshape(*x.shape[:-1], self.features)


class PatchEmbed(nn.Module):
  """A convolution of kernel and stride p, as one matrix product. [B, H, W, 3] -> float32 [B, N, D]."""

  width: int
  patch_size: int
  use_bias: bool = True
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    p = self.patch_size
    kernel = self.param("kernel", self.kernel_init, (p, p, images.shape[-1], self.width))
    tokens = patchify(images, p).astype(self.dtype) @ kernel.reshape(-1, self.width).astype(self.dtype)
    tokens = tokens.astype(jnp.float32)
    if self.use_bias:
      tokens += self.param("bias", nn.initializers.zeros, (self.width,))
    return tokens


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
  """Exact GELU, x * Phi(x), with its gradient in closed form from x alone."""
  return jax.nn.gelu(x, approximate=False)


def _gelu_forward(x):
  return gelu(x), x


def _gelu_backward(x, grad):
  x32 = x.astype(jnp.float32)
  cdf = 0.5 * (1 + jax.lax.erf(x32 * 0.5**0.5))
  pdf = jnp.exp(-0.5 * jnp.square(x32)) * (0.5 / jnp.pi) ** 0.5
  return ((cdf + x32 * pdf).astype(x.dtype) * grad,)


gelu.defvjp(_gelu_forward, _gelu_backward)
