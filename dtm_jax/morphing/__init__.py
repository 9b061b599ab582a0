"""Dynamic token morphing as pure functions of arrays (spec: DTM, arXiv 2401.00254, section 3).

One image at a time, fixed shapes, traced schedules: `jit` once and `vmap` over
images and draws.
"""

from dtm_jax.morphing.matching import group_tokens, split_priorities
from dtm_jax.morphing.morph import morph
from dtm_jax.morphing.schedule import merges_per_iteration, sample_schedule

__all__ = ["group_tokens", "merges_per_iteration", "morph", "sample_schedule", "split_priorities"]
