"""The whole training step in plain PyTorch: what the JAX code is compared with.

Written from the method's description as a PyTorch user would write it (shrinking shapes, Python integers for the
schedule, float32), so that speed and numbers of the two can be told side by side. The models are in `torch_models`.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from dtm_jax.errors import InputError
from dtm_jax.numerics.torch_models import Student

# ------------------------------------------------------------ morphing and loss


def merges_per_iteration(num_merged: int, iterations: int, budget: int) -> int:
  """`ceil(n / k)`, or `floor(n / k)` where that would merge more than `budget` in all."""
  merges = math.ceil(num_merged / iterations)
  return num_merged // iterations if merges * iterations > budget else merges


@torch.no_grad()
def group_tokens(tokens: Tensor, merges: int, iterations: int) -> tuple[Tensor, int]:
  """Groups the tokens of each image by iterated bipartite matching; token 0 never merges.

  Args:
    tokens: float32 [B, N, D].
    merges: tokens to merge in each iteration.
    iterations: number of iterations.

  Returns:
    The group of each token, int64 [B, N] in 0..G-1, and the number of groups G (the same for all images).
  """
  sums = tokens
  group = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[:2])
  for _ in range(iterations):
    r = min(merges, (sums.shape[1] - 1) // 2)
    if r == 0:
      break
    sums, moved_to = _match(sums, r)
    group = moved_to.gather(1, group)
  return group, sums.shape[1]


def _match(sums: Tensor, r: int) -> tuple[Tensor, Tensor]:
  """One matching iteration.

  Returns the new group sums [B, t - r, D] and, for each old position, its new one, int64 [B, t].
  """
  a, b = sums[:, ::2], sums[:, 1::2]
  unit = F.normalize(sums, dim=-1)  # a group's mean has the direction of its sum
  scores = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
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


def _negative_cosine(online: Tensor, target: Tensor) -> Tensor:
  return (1 - F.cosine_similarity(online, target, dim=-1, eps=1e-6)).mean()


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
  "smooth_l1": lambda online, target: F.smooth_l1_loss(online, target, beta=2.0),
  "l1": F.l1_loss,
  "l2": F.mse_loss,
  "negative_cosine": _negative_cosine,
}


def dtm_loss(
  online: Tensor, target: Tensor, merges: Sequence[int], iterations: Sequence[int], *, distance: str = "smooth_l1"
) -> Tensor:
  """Mean over the draws of the distance between morphed online and morphed target tokens [B, N, D].

  Args:
    online: the student's tokens; the gradient flows here.
    target: the teacher's tokens, which decide the groups.
    merges: merges per iteration of each draw; 0 compares token by token.
    iterations: iterations of each draw.
    distance: a key of `DISTANCES`.
  """
  if distance not in DISTANCES:
    raise InputError(f"distance={distance!r} is not one of {', '.join(DISTANCES)}")
  losses = []
  for r, k in zip(merges, iterations, strict=True):
    group, num_groups = group_tokens(target, r, k)
    losses.append(DISTANCES[distance](morph(online, group, num_groups), morph(target, group, num_groups)))
  return torch.stack(losses).mean()


# ------------------------------------------------------------ optimiser and step


def is_decayed(name: str, parameter: Tensor) -> bool:
  """Whether weight decay acts on a parameter; the mask token and the bias tables are decayed."""
  return parameter.ndim > 1 and name not in ("cls_token", "pos_embed")


def make_optimizer(
  model: nn.Module, *, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.AdamW:
  """AdamW over all parameters of `model`; `train_step` sets the learning rate."""
  named = list(model.named_parameters())
  groups = [
    {"params": [p for name, p in named if is_decayed(name, p)], "weight_decay": weight_decay},
    {"params": [p for name, p in named if not is_decayed(name, p)], "weight_decay": 0.0},
  ]
  return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)


def learning_rate(step: int, *, peak: float, final: float, warmup_steps: int, total_steps: int) -> float:
  """Linear from 0, reaching `peak` at the last warm-up step, then a cosine towards `final`."""
  if step < warmup_steps:
    return peak * step / max(1, warmup_steps - 1)
  progress = (step - warmup_steps) / (total_steps - warmup_steps)
  return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2


def train_step(
  student: Student,
  teacher: nn.Module,
  optimizer: torch.optim.Optimizer,
  images: Tensor,
  mask: Tensor,
  merges: Sequence[int],
  iterations: Sequence[int],
  *,
  lr: float,
  max_grad_norm: float = 3.0,
  distance: str = "smooth_l1",
) -> tuple[Tensor, Tensor]:
  """One optimiser step, in place.

  Args:
    student: the model that learns.
    teacher: images -> target tokens [B, N, K].
    optimizer: from `make_optimizer`.
    images: normalised float32 [B, 3, height, width].
    mask: bool [B, N], True = masked.
    merges: merges per iteration of each draw.
    iterations: iterations of each draw.
    lr: learning rate of this step.
    max_grad_norm: the gradient's global norm is clipped to this.
    distance: a key of `DISTANCES`.

  Returns:
    Loss and gradient norm before clipping, both scalars.
  """
  with torch.no_grad():
    target = teacher(images)
  loss = dtm_loss(student(images, mask), target, merges, iterations, distance=distance)
  optimizer.zero_grad(set_to_none=True)
  loss.backward()
  grad_norm = nn.utils.clip_grad_norm_(student.parameters(), max_grad_norm)
  for group in optimizer.param_groups:
    group["lr"] = lr
  optimizer.step()
  return loss.detach(), grad_norm
