"""Image operations that run on the device: colours on floats in [0, 1], erasing and mixing on normalised images.

What is drawn and what is then done to the pixels are functions apart. A box is
int32 [4]: first row, first column, and the row and the column after the last.
"""

import math

import jax
import jax.numpy as jnp
import optax

_GREY = (0.299, 0.587, 0.114)  # ITU-R 601 luma, as Pillow's "L" and torchvision

# Random Erasing (Zhong et al. 2020, arXiv 1708.04896) as the recipes of BEiT and DeiT run it: at most 1/3 of the image
# instead of 0.4, and the aspect uniform in its logarithm, so that upright boxes are as likely as lying ones.
ERASED_AREA = (0.02, 1 / 3)  # of the image's
ERASED_ASPECT = (0.3, 1 / 0.3)  # height over width
ERASING_TRIES = 10


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


def box_mask(box: jax.Array, height: int, width: int) -> jax.Array:
  """The pixels of a box (int32 [4], see above), bool [height, width]."""
  top, left, bottom, right = box
  rows, columns = jnp.arange(height)[:, None], jnp.arange(width)
  return (top <= rows) & (rows < bottom) & (left <= columns) & (columns < right)


def random_erase(keys: jax.Array, images: jax.Array, probability: float) -> jax.Array:
  """Random Erasing: a rectangle of some images becomes standard normal noise, for each pixel and channel anew.

  Args:
    keys: PRNG keys [B], one per image.
    images: float32 [B, H, W, 3], normalised, so that the noise is of their kind.
    probability: of an image to lose a rectangle, at `draw_erasure`'s place.

  Returns:
    float32 [B, H, W, 3].
  """
  return jax.vmap(_erase_one, in_axes=(0, 0, None))(keys, images, probability)


def _erase_one(key: jax.Array, image: jax.Array, probability: float) -> jax.Array:
  coin_key, box_key, noise_key = jax.random.split(key, 3)
  height, width, _ = image.shape
  box = draw_erasure(box_key, height, width) * jax.random.bernoulli(coin_key, probability)
  noise = jax.random.normal(noise_key, image.shape)
  return jnp.where(box_mask(box, height, width)[..., None], noise, image)


def draw_erasure(key: jax.Array, height: int, width: int) -> jax.Array:
  """A box of area uniform in ERASED_AREA and aspect log-uniform in ERASED_ASPECT, anywhere in the image.

  Of ERASING_TRIES draws it is the first that is smaller than the image both ways; where none is, the box is empty.

  Returns:
    int32 [4], see above.
  """
  area_key, aspect_key, place_key = jax.random.split(key, 3)
  low, high = (share * height * width for share in ERASED_AREA)
  areas = jax.random.uniform(area_key, (ERASING_TRIES,), minval=low, maxval=high)
  low, high = map(math.log, ERASED_ASPECT)
  aspects = jnp.exp(jax.random.uniform(aspect_key, (ERASING_TRIES,), minval=low, maxval=high))
  sizes = jnp.round(jnp.sqrt(jnp.stack([areas * aspects, areas / aspects], axis=1))).astype(jnp.int32)
  image_size = jnp.array([height, width])
  fits = (sizes < image_size).all(axis=1)
  size = sizes[fits.argmax()] * fits.any()
  start = jax.random.randint(place_key, (2,), 0, image_size - size + 1)
  return jnp.concatenate([start, start + size])


def smooth_labels(labels: jax.Array, num_classes: int, smoothing: float) -> jax.Array:
  """int32 [B] -> float32 [B, C]: 1 - smoothing + smoothing / C for an image's class, smoothing / C for each other."""
  return optax.smooth_labels(jax.nn.one_hot(labels, num_classes), smoothing)


def mix(
  key: jax.Array, images: jax.Array, targets: jax.Array, *, mixup: float, cutmix: float, cutmix_prob: float
) -> tuple[jax.Array, jax.Array]:
  """Mixup (Zhang et al. 2018, arXiv 1710.09412) or CutMix (Yun et al. 2019, arXiv 1905.04899) with the reversed batch.

  One draw serves the global batch, and row i's partner is row B - 1 - i, so
  that nothing depends on how devices share the rows.

  Args:
    key: PRNG key.
    images: float32 [B, H, W, 3].
    targets: float32 [B, C], rows that sum to 1.
    mixup, cutmix: alpha of each one's Beta(alpha, alpha), of which an image's own share is drawn; 0 turns it off.
    cutmix_prob: Where both are on, how likely it is CutMix.

  Returns:
    Images and targets of the same shapes, as `blend` mixes them.
  """
  if not mixup and not cutmix:
    return images, targets
  kind_key, share_key, centre_key = jax.random.split(key, 3)
  cuts = jax.random.bernoulli(kind_key, cutmix_prob if mixup and cutmix else float(cutmix > 0))
  alpha = jnp.where(cuts, cutmix, mixup)
  share = jax.random.beta(share_key, alpha, alpha)
  centre = jax.random.randint(centre_key, (2,), 0, jnp.array(images.shape[1:3]))
  return blend(images, targets, cuts, share, centre)


def blend(
  images: jax.Array, targets: jax.Array, cuts: jax.Array, share: jax.Array, centre: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Mixes a batch with itself reversed, with given draws.

  Args:
    images: float32 [B, H, W, 3].
    targets: float32 [B, C].
    cuts: bool [], whether to paste the partner's `cutmix_box` instead of blending all pixels.
    share: float32 [] in [0, 1], of the image itself; CutMix's targets have its share of the pixels in the end.
    centre: int32 [2], row and column of the box's centre.

  Returns:
    Images and targets of the same shapes.
  """
  height, width = images.shape[1:3]
  kept = ~box_mask(cutmix_box(share, centre, height, width), height, width)
  pixel_share = jnp.where(cuts, kept, share)[..., None]
  target_share = jnp.where(cuts, kept.mean(), share)
  mixed = pixel_share * images + (1 - pixel_share) * images[::-1]
  return mixed, target_share * targets + (1 - target_share) * targets[::-1]


def cutmix_box(share: jax.Array, centre: jax.Array, height: int, width: int) -> jax.Array:
  """CutMix's box: sqrt(1 - share) of each side, rounded down to whole half sides, and clipped to the image.

  Args:
    share: float32 [] in [0, 1], of the image that the box is pasted to.
    centre: int32 [2], row and column.
    height, width: of the image.

  Returns:
    int32 [4], see above.
  """
  image_size = jnp.array([height, width])
  half = (image_size * jnp.sqrt(1 - share)).astype(jnp.int32) // 2
  return jnp.concatenate([jnp.maximum(centre - half, 0), jnp.minimum(centre + half, image_size)])
