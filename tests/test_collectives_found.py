"""What `collectives.find` reads from programs: of this machine's compiler, and as TPUs' compiler writes them."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from dtm_jax import collectives
from dtm_jax.collectives import Collective

ROWS, COLUMNS = 6, 16  # of each device's float32 part
PART = ROWS * COLUMNS * 4  # bytes
RING = [(i, (i + 1) % 8) for i in range(8)]


def repeated(x):
  return jax.lax.scan(lambda x, _: (jax.lax.psum(x, "b") / 8, None), x, length=5)[0]


def until_small(x):
  return jax.lax.while_loop(lambda x: x[0, 0] > 1, lambda x: jax.lax.psum(x, "b") / 16, x)


@pytest.mark.parametrize(
  ("function", "groups", "expected"),
  [
    (lambda x: jax.lax.psum(x, "b"), 1, ("all-reduce", PART, 8, 1)),
    (lambda x: jax.lax.psum(x, "b"), 4, ("all-reduce", PART, 2, 1)),
    (lambda x: jax.lax.psum(x, "a"), 2, ("all-reduce", PART, 2, 1)),
    (lambda x: jax.lax.all_gather(x, "b"), 2, ("all-gather", 4 * PART, 4, 1)),
    (lambda x: jax.lax.psum_scatter(x, "b", scatter_dimension=1, tiled=True), 1, ("reduce-scatter", PART, 8, 1)),
    (lambda x: jax.lax.ppermute(x, "b", RING), 1, ("collective-permute", PART, 8, 1)),
    (repeated, 1, ("all-reduce", PART, 8, 5)),
    (until_small, 1, ("all-reduce", PART, 8, None)),
  ],
  ids=["all", "neighbours", "strided", "gather", "scatter", "permute", "scan", "while"],
)
def test_bytes_groups_and_counts(function, groups, expected):
  mesh = jax.make_mesh((groups, 8 // groups), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
  split = PartitionSpec(("a", "b"))
  mapped = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=split, out_specs=split, check_vma=False))
  program = mapped.lower(np.zeros((8 * ROWS, COLUMNS), np.float32)).compile()
  assert collectives.find(program.as_text(), 8) == [Collective(*expected)]


# Shortened from a step for a v5e slice: a tuple of two kinds, tilings, iota groups, a scan of 12 layers, a ring
# whose loop is unrolled twice, and the fusion that scatters what it reduces.
TPU = """HloModule jit_train_step

%all-reduce-scatter.1 (input: f32[16,768]) -> f32[4,768] {
  %input = f32[16,768]{1,0:T(8,128)} parameter(0)
  %all-reduce.9 = f32[16,768]{1,0:T(8,128)} all-reduce(%input), replica_groups=[4,4]<=[16], to_apply=%add
  ROOT %dynamic-slice = f32[4,768]{1,0:T(8,128)} dynamic-slice(%all-reduce.9), dynamic_slice_sizes={4,768}
}

%body.2 (param.2: (s32[], f32[16,768])) -> (s32[], f32[16,768]) {
  %all-reduce.7 = (f32[12,197]{1,0:T(8,128)}, /*index=1*/bf16[768,3072]{1,0}) all-reduce(%a, %b), replica_groups={{0,4}}
  %counter.2 = s32[]{:T(128)} get-tuple-element(%param.2), index=0
  %constant.2 = s32[]{:T(128)} constant(1)
  %add.2 = s32[]{:T(128)} add(%counter.2, %constant.2)
  ROOT %tuple.2 = (s32[], f32[16,768]) tuple(%add.2, %x.2)
}

%ring.4 (param.4: (bf16[96,768], bf16[96,768], u32[])) -> (bf16[96,768], bf16[96,768], u32[]) {
  %left = bf16[96,768]{1,0} get-tuple-element(%param.4), index=0
  %right = bf16[96,768]{1,0} get-tuple-element(%param.4), index=1
  %collective-permute.1 = bf16[96,768]{1,0} collective-permute(%left), source_target_pairs={{0,1},{1,0}}
  %collective-permute.2 = bf16[96,768]{1,0} collective-permute(%right), source_target_pairs={{1,0},{0,1}}
  %counter.4 = u32[]{:T(128)} get-tuple-element(%param.4), index=2
  %constant.4 = u32[]{:T(128)} constant(1)
  %add.4 = u32[]{:T(128)} add(%counter.4, %constant.4)
  %constant.5 = u32[]{:T(128)} constant(2)
  %add.5 = u32[]{:T(128)} add(%counter.4, %constant.5)
  ROOT %tuple.4 = (bf16[96,768], /*index=1*/bf16[96,768], u32[]) tuple(%left.2, /*index=1*/%right.2, %add.5)
}

%condition.4 (param.5: (bf16[96,768], bf16[96,768], u32[])) -> pred[] {
  %constant.6 = u32[]{:T(128)} constant(4)
  %counter.5 = u32[]{:T(128)} get-tuple-element(%param.5), index=2
  ROOT %lt.4 = pred[]{:T(512)} compare(%counter.5, %constant.6), direction=LT
}

%condition.2 (param.1: (s32[], f32[16,768])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(12)
  %counter = s32[]{:T(128)} get-tuple-element(%param.1), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%counter, %constant.1), direction=LT
}

ENTRY %main.3 (param: f32[16,768]) -> f32[4,768] {
  %while.1 = (s32[], f32[16,768]) while(%tuple), condition=%condition.2, body=%body.2
  %while.4 = (bf16[96,768], bf16[96,768], u32[]) while(%tuple.4), condition=%condition.4, body=%ring.4
  %all-gather-start.1 = (bf16[2,768]{1,0}, bf16[32,768]{1,0}) all-gather-start(%x), replica_groups=[1,16]<=[16]
  %all-gather-start.2 = ((f32[1,4], f32[8]), (f32[16,4], f32[128])) all-gather-start(%v), replica_groups=[1,16]<=[16]
  %all-gather-done.1 = bf16[32,768]{1,0} all-gather-done(%all-gather-start.1)
  ROOT %fusion.1 = f32[4,768]{1,0:T(8,128)} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_what_a_tpus_compiler_writes():
  assert sorted(collectives.find(TPU, 16)) == [
    Collective("all-gather", 16 * 4 * 4 + 128 * 4, 16, 1),
    Collective("all-gather", 32 * 768 * 2, 16, 1),
    Collective("all-reduce", 12 * 197 * 4 + 768 * 3072 * 2, 2, 12),
    Collective("collective-permute", 96 * 768 * 2, 16, 2),
    Collective("collective-permute", 96 * 768 * 2, 16, 2),
    Collective("reduce-scatter", 16 * 768 * 4, 4, 1),
  ]


def test_bytes_sent():
  sent = {name: Collective(name, 800, 8, 1).sent for name in ("all-reduce", "all-gather", "reduce-scatter")}
  assert sent == {"all-reduce": 1400, "all-gather": 700, "reduce-scatter": 700}
  assert Collective("collective-permute", 800, 8, 1).sent == 800
