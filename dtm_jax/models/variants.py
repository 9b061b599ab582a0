"""Sizes of the student: the one table of variants."""

from typing import NamedTuple


class Variant(NamedTuple):
  width: int
  depth: int
  heads: int
  layer_scale: float


# S, B and L are the paper's; tiny is for digits, tests and laptops.
VARIANTS = {
  "tiny": Variant(width=96, depth=4, heads=3, layer_scale=0.1),
  "S": Variant(width=384, depth=12, heads=6, layer_scale=0.1),
  "B": Variant(width=768, depth=12, heads=12, layer_scale=0.1),
  "L": Variant(width=1024, depth=24, heads=16, layer_scale=1e-5),
}
