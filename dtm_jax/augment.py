"""Image operations that run on the device, on float images in [0, 1]."""

import jax
import jax.numpy as jnp

_GREY = (0.299, 0.587, 0.114)  # ITU-R 601 luma, as Pillow's "L" and torchvision


def to_unit(images: jax.Array) -> jax.Array:
  """uint8 [..., 3] in 0..255 -> float32 in [0, 1]; float images are taken to be there already."""
  return images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images


def normalize(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
  """Subtracts the mean and divides by the standard deviation of each channel.

  Args:
    images: [..., 3]: uint8 in 0..255, or float32 in [0, 1].
    mean, std: Of images in [0, 1].

  Returns:
    float32 [..., 3].
  """
  return (to_unit(images) - jnp.asarray(mean)) / jnp.asarray(std)


def color_jitter(keys: jax.Array, images: jax.Array, strength: float) -> jax.Array:
  """Brightness, contrast and saturation, in a random order, by random factors; torchvision's ColorJitter.

  Args:
    keys: PRNG keys [B], one per image.
    images: float32 [B, H, W, 3], RGB in [0, 1].
    strength: Each factor is uniform in [1 - strength, 1 + strength].

  Returns:
    float32 [B, H, W, 3] in [0, 1].
  """
  return jax.vmap(_jitter_one, in_axes=(0, 0, None))(keys, images, strength)


def _jitter_one(key: jax.Array, image: jax.Array, strength: float) -> jax.Array:
  order_key, factor_key = jax.random.split(key)
  order = jax.random.permutation(order_key, 3)
  factors = jax.random.uniform(factor_key, (3,), minval=1 - strength, maxval=1 + strength)
  return adjust_colors(image, order, factors)


def adjust_colors(image: jax.Array, order: jax.Array, factors: jax.Array) -> jax.Array:
  """Applies the three adjustments to one image in a given order.

  Each blends the image with something plainer, factor 1 leaving it as it is,
  and clips to [0, 1].

  Args:
    image: float32 [H, W, 3] in [0, 1].
    order: int [3], a permutation of 0 brightness, 1 contrast, 2 saturation; may be traced.
    factors: float32 [3], of brightness, contrast and saturation.

  Returns:
    float32 [H, W, 3] in [0, 1].
  """
  for i in range(3):
    operation = order[i]
    grey = (image * jnp.asarray(_GREY)).sum(axis=-1, keepdims=True)
    # One expression for all three, since `switch` under `vmap` computes every branch anyway.
    plain = jnp.select(
      [operation == 0, operation == 1], [jnp.zeros_like(grey), jnp.broadcast_to(grey.mean(), grey.shape)], grey
    )
    image = jnp.clip(plain + factors[operation] * (image - plain), 0, 1)
  return image
