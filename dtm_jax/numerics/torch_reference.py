"""Whole training steps in plain PyTorch: what the JAX code is compared with.

Written from the method's description as a PyTorch user would write it (shrinking shapes, Python integers for the
schedule, float32), so that speed and numbers of the two can be told side by side. The models are in `torch_models`.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtm_jax.errors import InputError
from dtm_jax.numerics.torch_models import Classifier, Encoder, Student

# ------------------------------------------------------------ morphing and loss


def merges_per_iteration(num_merged: int, iterations: int, budget: int) -> int:
  """`ceil(n / k)`, or `floor(n / k)` where that would merge more than `budget` in all."""
  merges = math.ceil(num_merged / iterations)
  return num_merged // iterations if merges * iterations > budget else merges


@torch.no_grad()
def group_tokens(
  tokens: Tensor, merges: int, iterations: int, *, protect_first: bool = True, priorities: Tensor | None = None
) -> tuple[Tensor, int]:
  """Groups the tokens of each image by iterated bipartite matching.

  Args:
    tokens: float32 [B, N, D].
    merges: tokens to merge in each iteration.
    iterations: number of iterations.
    protect_first: token 0 never merges.
    priorities: float32 [B, K, N], K >= iterations: before each iteration the groups are sorted by the first of that
      iteration's, as many as there are groups; a protected token 0 stays first. None leaves them in order.

  Returns:
    The group of each token, int64 [B, N] in 0..G-1, and the number of groups G (the same for all images).
  """
  sums = tokens
  group = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[:2])
  for i in range(iterations):
    r = min(merges, (sums.shape[1] - protect_first) // 2)
    if r == 0:
      break
    if priorities is not None:
      order = random_order(priorities[:, i, : sums.shape[1]], protect_first)
      sums, group = sums.gather(1, _columns(order, sums)), order.argsort(dim=1).gather(1, group)
    sums, moved_to = _match(sums, r, protect_first)
    group = moved_to.gather(1, group)
  return group, sums.shape[1]


def random_order(priorities: Tensor, protect_first: bool) -> Tensor:
  """Which group comes to each position, int64 [B, G], of groups with priorities [B, G]."""
  first = priorities[:, :protect_first] - 1  # below all others, which are at least 0
  return torch.cat([first, priorities[:, protect_first:]], dim=1).argsort(dim=1, stable=True)


def _match(sums: Tensor, r: int, protect_first: bool) -> tuple[Tensor, Tensor]:
  """One matching iteration.

  Returns the new group sums [B, t - r, D] and, for each old position, its new one, int64 [B, t].
  """
  a, b = sums[:, ::2], sums[:, 1::2]
  unit = F.normalize(sums, dim=-1)  # a group's mean has the direction of its sum
  scores = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
  if protect_first:
    scores[:, 0] = -torch.inf
  edge, partner = scores.max(dim=-1)
  order = edge.argsort(dim=-1, descending=True, stable=True)
  source, kept = order[:, :r], order[:, r:].sort(dim=-1).values
  target = partner.gather(1, source)
  merged = b.scatter_add(1, _columns(target, sums), a.gather(1, _columns(source, sums)))
  new_sums = torch.cat([a.gather(1, _columns(kept, sums)), merged], dim=1)

  position = torch.arange(new_sums.shape[1], device=sums.device).expand(len(sums), -1)
  num_kept = kept.shape[1]
  moved_to = torch.empty(sums.shape[:2], dtype=torch.int64, device=sums.device)
  moved_to[:, ::2] = partner + num_kept
  moved_to.scatter_(1, 2 * kept, position[:, :num_kept])
  moved_to[:, 1::2] = position[:, num_kept:]
  return new_sums, moved_to


def _columns(index: Tensor, like: Tensor) -> Tensor:
  """[B, M] -> [B, M, D], to gather or scatter whole vectors."""
  return index.unsqueeze(-1).expand(-1, -1, like.shape[-1])


def smallest_member(group: Tensor) -> Tensor:
  """Renames each group [B, N] to its smallest token index, which is how labels are recorded."""
  index = torch.arange(group.shape[1], device=group.device).expand_as(group)
  return torch.full_like(group, group.shape[1]).scatter_reduce(1, group, index, "amin").gather(1, group)


def morph(tokens: Tensor, group: Tensor, num_groups: int) -> Tensor:
  """Mean of each group written back to its members, [B, N, D]."""
  sums = tokens.new_zeros(len(tokens), num_groups, tokens.shape[-1])
  sums = sums.scatter_add(1, _columns(group, tokens), tokens)
  counts = tokens.new_zeros(len(tokens), num_groups).scatter_add(1, group, tokens.new_ones(group.shape))
  means = sums / (counts.unsqueeze(-1) + 1e-6)
  return means.gather(1, _columns(group, tokens))


def normalize_tokens(tokens: Tensor) -> Tensor:
  """Each token minus its mean, over the root of its unbiased variance + 1e-6. [..., D] -> [..., D]."""
  variance, mean = torch.var_mean(tokens, dim=-1, keepdim=True)
  return (tokens - mean) / (variance + 1e-6).sqrt()


# Of two [B, N, D] to [B, N].
DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
  "smooth_l1": lambda online, target: F.smooth_l1_loss(online, target, beta=2.0, reduction="none").mean(dim=-1),
  "l1": lambda online, target: F.l1_loss(online, target, reduction="none").mean(dim=-1),
  "l2": lambda online, target: F.mse_loss(online, target, reduction="none").mean(dim=-1),
  "negative_cosine": lambda online, target: 1 - F.cosine_similarity(online, target, dim=-1, eps=1e-6),
}

# One schedule [L] for the whole batch, or one for each image, [B][L].
Draws = Sequence[int] | Sequence[Sequence[int]]


def dtm_loss(
  online: Tensor,
  target: Tensor,
  merges: Draws,
  iterations: Draws,
  *,
  distance: str = "smooth_l1",
  mask: Tensor | None = None,
  protect_first: bool = True,
  normalize_targets: bool = False,
  priorities: Tensor | None = None,
) -> Tensor:
  """Mean over the draws of the distance between morphed online and morphed target tokens [B, N, D].

  Args:
    online: the student's tokens; the gradient flows here.
    target: the teacher's tokens, which decide the groups.
    merges: merges per iteration of each draw. No draws at all compare token by token.
    iterations: iterations of each draw.
    distance: a key of `DISTANCES`.
    mask: bool [B, N], True where a position counts (default: all).
    protect_first: token 0 never merges.
    normalize_targets: see `normalize_tokens`; after morphing.
    priorities: float32 [B, L, K, N] for a random split, see `group_tokens`.

  Returns:
    A scalar.

  Raises:
    InputError: an unknown distance.
  """
  if distance not in DISTANCES:
    raise InputError(f"distance={distance!r} is not one of {', '.join(DISTANCES)}")

  def compare(online: Tensor, target: Tensor) -> Tensor:
    target = normalize_tokens(target) if normalize_targets else target
    distances = DISTANCES[distance](online, target)
    return (distances if mask is None else distances[mask]).mean()

  losses = []
  for draw, (r, k) in enumerate(zip(_by_draw(merges), _by_draw(iterations), strict=True)):
    of_draw = None if priorities is None else priorities[:, draw]
    group, num_groups = _group_images(target, r, k, protect_first, of_draw)
    losses.append(compare(morph(online, group, num_groups), morph(target, group, num_groups)))
  return torch.stack(losses).mean() if losses else compare(online, target)


def _by_draw(values: Draws) -> list[int] | list[tuple[int, ...]]:
  """One entry for each draw: an int, or one for each image."""
  return list(zip(*values, strict=True)) if values and isinstance(values[0], Sequence) else list(values)


def _group_images(target: Tensor, merges, iterations, protect_first: bool, priorities) -> tuple[Tensor, int]:
  """`group_tokens`, image by image where each has its own schedule; some of the N groups are empty then."""
  if isinstance(merges, int):
    return group_tokens(target, merges, iterations, protect_first=protect_first, priorities=priorities)
  splits = [None] * len(target) if priorities is None else priorities.split(1)
  groups = [
    group_tokens(image, r, k, protect_first=protect_first, priorities=split)[0]
    for image, r, k, split in zip(target.split(1), merges, iterations, splits, strict=True)
  ]
  return torch.cat(groups), target.shape[1]


# ------------------------------------------------------------ optimiser and step


def is_decayed(name: str, parameter: Tensor) -> bool:
  """Whether weight decay acts on a parameter; the mask token and the bias tables are decayed."""
  return parameter.ndim > 1 and name not in ("cls_token", "pos_embed")


def lr_scale(name: str, depth: int, layer_decay: float) -> float:
  """What multiplies a parameter's learning rate: `layer_decay` for each layer between it and the head."""
  if name in ("cls_token", "mask_token", "pos_embed") or name.startswith("patch_embed."):
    layer = 0
  elif name.startswith("blocks."):
    layer = int(name.split(".")[1]) + 1
  else:
    layer = depth + 1
  return layer_decay ** (depth + 1 - layer)


def make_optimizer(
  model: Encoder, *, betas: tuple[float, float], eps: float, weight_decay: float, layer_decay: float = 1.0
) -> torch.optim.AdamW:
  """AdamW over all parameters of `model`; a step sets each group's learning rate, times its `lr_scale`."""
  groups = {}
  for name, parameter in model.named_parameters():
    kind = is_decayed(name, parameter), lr_scale(name, len(model.blocks), layer_decay)
    groups.setdefault(kind, []).append(parameter)
  return torch.optim.AdamW(
    [
      {"params": parameters, "weight_decay": weight_decay if decayed else 0.0, "lr_scale": scale}
      for (decayed, scale), parameters in groups.items()
    ],
    lr=0.0,
    betas=betas,
    eps=eps,
    fused=True,
  )


def learning_rate(step: int, *, peak: float, final: float, warmup_steps: int, total_steps: int) -> float:
  """Linear from 0, reaching `peak` at the last warm-up step, then a cosine towards `final`."""
  if step < warmup_steps:
    return peak * step / max(1, warmup_steps - 1)
  progress = (step - warmup_steps) / (total_steps - warmup_steps)
  return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2


def train_step(
  student: Student,
  teacher: Callable[[Tensor], Tensor] | Tensor,
  optimizer: torch.optim.Optimizer,
  images: Tensor,
  mask: Tensor,
  merges: Draws,
  iterations: Draws,
  *,
  lr: float,
  max_grad_norm: float = 3.0,
  dtype: torch.dtype = torch.float32,
  loss_on: str = "all",
  branch_scales: Tensor | None = None,
  **loss_options: Any,
) -> tuple[Tensor, Tensor]:
  """One step of pre-training, in place.

  Args:
    student: the model that learns.
    teacher: images -> target tokens [B, N, K]; or these tokens.
    optimizer: from `make_optimizer`.
    images: normalised float32 [B, 3, height, width].
    mask: bool [B, N], True = masked.
    merges: merges per iteration of each draw.
    iterations: iterations of each draw.
    lr: learning rate of this step.
    max_grad_norm: the gradient's global norm is clipped to this; `math.inf` does not.
    dtype: bfloat16 runs both models under `torch.autocast`; the loss is always computed in float32.
    loss_on: "all" positions, or the "masked" ones.
    branch_scales: float32 [depth, 2, B] of stochastic depth, see `torch_models.Encoder`.
    **loss_options: of `dtm_loss`.

  Returns:
    Loss and gradient norm before clipping, both scalars.
  """
  optimizer.zero_grad(set_to_none=True)  # ahead of the activations: gradients take as much room as the weights
  with _autocast(images, dtype):
    with torch.no_grad():
      target = teacher if isinstance(teacher, Tensor) else teacher(images)
    online = student(images, mask, branch_scales)
  counted = mask if loss_on == "masked" else None
  loss = dtm_loss(online.float(), target.float(), merges, iterations, mask=counted, **loss_options)
  return loss.detach(), _update(student, optimizer, loss, lr, max_grad_norm)


def finetune_step(
  model: Classifier,
  optimizer: torch.optim.Optimizer,
  images: Tensor,
  target: Tensor,
  *,
  lr: float,
  max_grad_norm: float = math.inf,
  dtype: torch.dtype = torch.float32,
  branch_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
  """One step of fine-tuning with soft targets, in place.

  Args:
    model: the model that learns.
    optimizer: from `make_optimizer`.
    images: normalised float32 [B, 3, height, width].
    target: probabilities float32 [B, num_classes].
    lr: learning rate of the head; layers below have theirs from the optimiser's `layer_decay`.
    max_grad_norm: see `train_step`.
    dtype: see `train_step`.
    branch_scales: see `train_step`.

  Returns:
    Loss, gradient norm before clipping, and the logits [B, num_classes] before the step.
  """
  optimizer.zero_grad(set_to_none=True)
  with _autocast(images, dtype):
    logits = model(images, branch_scales)
  loss = F.cross_entropy(logits.float(), target)
  return loss.detach(), _update(model, optimizer, loss, lr, max_grad_norm), logits.detach().float()


def _autocast(images: Tensor, dtype: torch.dtype) -> contextlib.AbstractContextManager:
  return torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32)


def _update(
  model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, lr: float, max_grad_norm: float
) -> Tensor:
  """Gradients of `loss`, clipped, then one optimiser step; the norm before clipping."""
  loss.backward()
  grad_norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
  for group in optimizer.param_groups:
    group["lr"] = lr * group["lr_scale"]
  optimizer.step()
  return grad_norm
