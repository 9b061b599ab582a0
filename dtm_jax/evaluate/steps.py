"""Pure functions that evaluation jits: frozen features of a model, and the groups a teacher's tokens make."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dtm_jax.augment import normalize, to_unit
from dtm_jax.config import Config
from dtm_jax.models.clip import ClipVision
from dtm_jax.models.vit import Classifier, ViT
from dtm_jax.morphing import group_tokens, merges_per_iteration
from dtm_jax.teachers import Teacher

TOP = 5  # classes by which ImageNet is judged beside the first


def make_feature_fn(config: Config, model: ViT | Classifier | ClipVision) -> Callable[[Any, jax.Array], jax.Array]:
  """`(params, images uint8 [B, S, S, 3]) -> float32 [B, D]`: one vector per image.

  Of a student the mean of its patch tokens after the final norm, of a classifier what its head is given, of CLIP its
  image embedding.
  """

  def features(params, images):
    normal = normalize(images, config.data.mean, config.data.std)
    return model.apply({"params": params}, normal, method="pooled").astype(jnp.float32)

  return features


def make_top_classes_fn(config: Config, model: Classifier) -> Callable[[Any, jax.Array], jax.Array]:
  """`(params, images uint8 [B, S, S, 3]) -> int32 [B, k]`: the k = 5 likeliest classes, or all of fewer, best first.

  A third argument, bool [num_classes], says which classes are likely at all.
  """

  def top_classes(params, images, classes=None):
    logits = model.apply({"params": params}, normalize(images, config.data.mean, config.data.std))
    if classes is not None:
      logits = jnp.where(classes, logits, -jnp.inf)
    return jax.lax.top_k(logits, min(TOP, model.num_classes))[1]

  return top_classes


def make_label_fn(
  config: Config, teacher: Teacher, settings: list[tuple[int, int]]
) -> Callable[[Any, jax.Array], jax.Array]:
  """`(teacher_params, images uint8 [B, S, S, 3]) -> int32 [B, C, N]`: groups under each (n, k) of the C settings."""
  num_merged, iterations = jnp.asarray(settings).T
  merges = merges_per_iteration(num_merged, iterations, config.morphing_budget)
  is_random = config.morphing.split == "random"

  def group(tokens, merges, iterations):
    key = jax.random.key(config.run.seed) if is_random else None
    protect_first, split = config.morphing.protect_first, config.morphing.split
    return group_tokens(tokens, merges, iterations, protect_first=protect_first, split=split, key=key)

  def labels(teacher_params, images):
    tokens = teacher.apply(teacher_params, to_unit(images))
    return jax.vmap(lambda image_tokens: jax.vmap(group, (None, 0, 0))(image_tokens, merges, iterations))(tokens)

  return labels
