"""Names that code on both sides of the host/device border has to agree on."""

import enum

# Mesh axes. Batches are split over `data` and `fsdp`.
DATA = "data"
FSDP = "fsdp"
TENSOR = "tensor"
MESH_AXES = (DATA, FSDP, TENSOR)
BATCH_AXES = (DATA, FSDP)

# Logical axes: what an axis of a parameter or activation is, whatever the mesh. `sharding.RULES` says who holds them.
BATCH = "batch"
EMBED = "embed"  # of a parameter, along the residual stream
HEADS = "heads"  # attention heads, or their features side by side
MLP = "mlp"
OUT = "out"  # what a head predicts


class Stream(enum.IntEnum):
  """What a random number is for.

  Every random number is a function of (seed, stream, step or global example
  position), so that no two uses share numbers and a resumed run draws what an
  uninterrupted one would. The values are part of every run's identity: never
  renumber them.
  """

  INIT = 0
  ORDER = 1
  AUGMENT = 2
  MASK = 3
  COLOR_JITTER = 4
  SCHEDULE = 5
  SPLIT = 6
  DROP_PATH = 7
  RAND_AUGMENT = 8
  ERASE = 9
  MIX = 10
