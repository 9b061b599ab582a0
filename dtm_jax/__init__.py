"""Dynamic Token Morphing (DTM, arXiv 2401.00254) pre-training of Vision Transformers in JAX.

The public functions come from their modules on first use: data workers import
this package too, and must not import jax.
"""

import importlib

__version__ = "0.1.0"

_HOME_OF = {
  "merges_per_iteration": "dtm_jax.morphing",
  "sample_schedule": "dtm_jax.morphing",
  "group_tokens": "dtm_jax.morphing",
  "morph": "dtm_jax.morphing",
  "dtm_loss": "dtm_jax.losses",
  "load_torch": "dtm_jax.convert",
  "save_torch": "dtm_jax.convert",
  "load": "dtm_jax.inference",
  "load_exported": "dtm_jax.inference",
}

__all__ = list(_HOME_OF)


def __getattr__(name: str):
  if name not in _HOME_OF:
    raise AttributeError(f"module 'dtm_jax' has no attribute {name!r}")
  return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__():
  return [*globals(), *__all__]
