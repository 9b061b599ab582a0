"""How long a step takes at least: the FLOPs of its matrix products, and what chips are said to do in a second."""

import re
from typing import NamedTuple

from dtm_jax.errors import InputError
from dtm_jax.models.clip import ClipVision
from dtm_jax.models.vit import Classifier, ViT

Tower = ViT | Classifier | ClipVision

_GPU_SHARE = 0.75  # of a GPU's memory, jax takes: its default of XLA_PYTHON_CLIENT_MEM_FRACTION


class Chip(NamedTuple):
  """Published figures of an accelerator, dense and in bfloat16; nothing here is measured.

  Attributes:
    teraflops: of matrix products, 1e12 FLOP/s.
    bandwidth: of its memory, 1e9 byte/s.
    memory: that a program can have, GiB.
    network: what it sends to its neighbours at once (TPU: ICI, GPU: NVLink), 1e9 byte/s, or None where not known.
  """

  teraflops: float
  bandwidth: float
  memory: float
  network: float | None = None


# TPUs: the system architecture pages of https://docs.cloud.google.com/tpu/docs (v4, v5e, v5p, v6e), where the
# interconnect is told for both directions together; memory is what their compiler (libtpu 0.0.42) says is there for a
# program, a little less than theirs. GPUs: NVIDIA's data sheets of the SXM and, where told, other
# boards; half of the FLOP/s "with sparsity", and half of NVLink's rate, which is for both directions.
CHIPS = {
  "v4": Chip(275, 1228, 30.75, 300),
  "v5e": Chip(197, 819, 15.75, 200),
  "v5p": Chip(459, 2765, 95.74, 600),
  "v6e": Chip(918, 1638, 31.25, 400),
  "a100": Chip(312, 2039, 80 * _GPU_SHARE, 300),
  "a100-40gb": Chip(312, 1555, 40 * _GPU_SHARE, 300),
  "h100": Chip(989.5, 3350, 80 * _GPU_SHARE, 450),
  "h100-pcie": Chip(756, 2000, 80 * _GPU_SHARE),
  "h100-nvl": Chip(835, 3900, 94 * _GPU_SHARE, 300),
  "h200": Chip(989.5, 4800, 141 * _GPU_SHARE, 450),
  "h200-nvl": Chip(835, 4800, 141 * _GPU_SHARE, 450),
}
# What jax calls them, the longer name first.
_KINDS = {
  "TPU v4": "v4",
  "TPU v5 lite": "v5e",
  "TPU v5": "v5p",
  "TPU v6 lite": "v6e",
  "NVIDIA A100-SXM4-40GB": "a100-40gb",
  "NVIDIA A100-PCIE-40GB": "a100-40gb",
  "NVIDIA A100": "a100",
  "NVIDIA H100 PCIe": "h100-pcie",
  "NVIDIA H100 NVL": "h100-nvl",
  "NVIDIA H100": "h100",
  "NVIDIA H200 NVL": "h200-nvl",
  "NVIDIA H200": "h200",
}


def chip_of(device_kind: str) -> Chip | None:
  """By jax's name of a device; None where its figures are not known."""
  return next((CHIPS[name] for kind, name in _KINDS.items() if device_kind.startswith(kind)), None)


def parse_chip(text: str) -> Chip:
  """A name of `CHIPS`, or "TFLOPS,GB/S,GIB" such as "197,819,16".

  Raises:
    InputError: neither.
  """
  if text.lower() in CHIPS:
    return CHIPS[text.lower()]
  numbers = text.split(",")
  if len(numbers) == 3 and all(re.fullmatch(r"\d*\.?\d+", number) and float(number) > 0 for number in numbers):
    return Chip(*map(float, numbers))
  raise InputError(
    f"--chip={text!r} is none of {', '.join(CHIPS)}; or give its TFLOP/s, GB/s and GiB, such as --chip=197,819,16"
  )


def training_flops(batch_size: int, model: ViT | Classifier, teacher: Tower | None) -> float:
  """Of one step's matrix products, two for each multiply-add.

  Per image: the teacher forward, the model forward and, twice that, backward, less the patch embedding's gradient by
  the pixels, which nobody needs. Morphing, biases, softmax and the optimiser are not counted, nor what is computed
  again in the backward pass (`config.model.remat`): what MFU is reckoned by.

  Args:
    batch_size: images.
    model: what is trained.
    teacher: the tower that gives the targets, or None.
  """
  num_tokens = model.grid[0] * model.grid[1]
  patch_embedding = 2 * num_tokens * model.width * 3 * model.patch_size**2
  image = 3 * forward_flops(model, num_tokens) - patch_embedding
  if teacher is not None:
    image += forward_flops(teacher, num_tokens)
  return float(batch_size * image)


def forward_flops(tower: Tower, num_tokens: int) -> int:
  """Of one image of N patches: depth * (24 T D^2 + 4 T^2 D) + 6 N D p^2 + the head, with T = N + 1."""
  length, width = 1 + num_tokens, tower.width
  blocks = tower.depth * (24 * length * width**2 + 4 * length**2 * width)
  outputs = tower.num_classes if isinstance(tower, Classifier) else num_tokens * tower.out_dim
  return blocks + 6 * num_tokens * width * tower.patch_size**2 + 2 * width * outputs


class Seconds(NamedTuple):
  """The least that a step takes: whichever is more, as if the other ran beside it. Communication is not in it."""

  computing: float
  moving: float

  @property
  def step(self) -> float:
    return max(self)


def least_seconds(chip: Chip, flops: float, moved: float, mfu: float) -> Seconds:
  """The roofline.

  Args:
    chip: that does it.
    flops: of the step, on one chip.
    moved: bytes to and from the chip's memory in the step.
    mfu: share of the chip's FLOP/s that matrix products reach.
  """
  return Seconds(flops / (chip.teraflops * 1e12 * mfu), moved / (chip.bandwidth * 1e9))
