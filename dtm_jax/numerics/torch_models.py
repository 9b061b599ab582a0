"""Student, fine-tuning model and CLIP vision tower in plain PyTorch, for `torch_reference`.

Parameter names are those of the public checkpoints: BEiT's for the student and the fine-tuning model, OpenAI's for the
CLIP tower. Stochastic depth is given, not drawn, because a comparison needs steps that repeat.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtm_jax.convert.layouts import relative_position_index
from dtm_jax.models.variants import Variant

_BEIT_EPS = 1e-6
_CLIP_EPS = 1e-5
_CLIP_HEAD_WIDTH = 64  # every CLIP ViT: heads = width / 64
_MLP_RATIO = 4
_INIT_STD = 0.02
_FINETUNE_INIT_BOUND = 2.0
_HEAD_INIT_SCALE = 0.001


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, sdpa: bool) -> Tensor:
  """Multi-head attention of [B, H, N, d] tensors; `bias` [H, N, N] is added to the scaled logits."""
  if sdpa:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.unsqueeze(0))
  logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
  if bias is not None:
    logits = logits + bias
  return logits.softmax(dim=-1) @ v


def _attend(qkv: Tensor, heads: int, bias: Tensor | None, *, sdpa: bool) -> Tensor:
  """Stacked projections [B, N, 3 D] -> attended values [B, N, D]."""
  batch, tokens, _ = qkv.shape
  q, k, v = qkv.view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
  return attention(q, k, v, bias, sdpa=sdpa).transpose(1, 2).reshape(batch, tokens, -1)


# ------------------------------------------------------------ student and fine-tuning model


class RelativePositionBias(nn.Module):
  """One table of relative position biases."""

  def __init__(self, grid: tuple[int, int], heads: int):
    super().__init__()
    height, width = grid
    num_rows = (2 * height - 1) * (2 * width - 1) + 3
    self.relative_position_bias_table = nn.Parameter(torch.zeros(num_rows, heads))
    self.register_buffer("relative_position_index", torch.tensor(relative_position_index(grid)))

  def bias(self) -> Tensor:
    """[H, 1 + N, 1 + N]."""
    return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)


class BiasedAttention(RelativePositionBias):
  """Self-attention that owns a bias table (a base class, because the checkpoints keep both under one name)."""

  def __init__(self, grid: tuple[int, int], width: int, heads: int, *, sdpa: bool):
    super().__init__(grid, heads)
    self.heads, self.sdpa = heads, sdpa
    self.qkv = nn.Linear(width, 3 * width, bias=False)
    self.q_bias = nn.Parameter(torch.zeros(width))
    self.v_bias = nn.Parameter(torch.zeros(width))
    self.proj = nn.Linear(width, width)

  def forward(self, x: Tensor, shared_bias: Tensor | None) -> Tensor:
    qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
    qkv = F.linear(x, self.qkv.weight, qkv_bias)
    bias = self.bias() if shared_bias is None else self.bias() + shared_bias
    return self.proj(_attend(qkv, self.heads, bias, sdpa=self.sdpa))


class Mlp(nn.Module):
  def __init__(self, width: int):
    super().__init__()
    self.fc1 = nn.Linear(width, _MLP_RATIO * width)
    self.fc2 = nn.Linear(_MLP_RATIO * width, width)

  def forward(self, x: Tensor) -> Tensor:
    return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
  def __init__(self, grid: tuple[int, int], size: Variant, *, sdpa: bool):
    super().__init__()
    self.norm1 = nn.LayerNorm(size.width, eps=_BEIT_EPS)
    self.attn = BiasedAttention(grid, size.width, size.heads, sdpa=sdpa)
    self.gamma_1 = nn.Parameter(torch.full((size.width,), size.layer_scale))
    self.norm2 = nn.LayerNorm(size.width, eps=_BEIT_EPS)
    self.mlp = Mlp(size.width)
    self.gamma_2 = nn.Parameter(torch.full((size.width,), size.layer_scale))

  def forward(self, x: Tensor, shared_bias: Tensor | None, branch_scale: Tensor | None) -> Tensor:
    gammas = self.gamma_1, self.gamma_2
    if branch_scale is not None:
      gammas = [gamma * scale[:, None, None] for gamma, scale in zip(gammas, branch_scale, strict=True)]
    x = x + gammas[0] * self.attn(self.norm1(x), shared_bias)
    return x + gammas[1] * self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
  def __init__(self, patch_size: int, width: int):
    super().__init__()
    self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

  def forward(self, images: Tensor) -> Tensor:
    return self.proj(images).flatten(2).transpose(1, 2)


class Encoder(nn.Module):
  """What pre-training and fine-tuning share: class token, patches, and blocks that own a bias table each.

  Args:
    size: an entry of `dtm_jax.models.variants.VARIANTS`, or another.
    grid: patches (down, across).
    patch_size: pixels.
    sdpa: `F.scaled_dot_product_attention` instead of matmul, softmax, matmul.
  """

  def __init__(self, size: Variant, grid: tuple[int, int], patch_size: int, *, sdpa: bool):
    super().__init__()
    self.cls_token = nn.Parameter(torch.zeros(1, 1, size.width))
    self.patch_embed = PatchEmbed(patch_size, size.width)
    self.blocks = nn.ModuleList(Block(grid, size, sdpa=sdpa) for _ in range(size.depth))

  def encode(self, patches: Tensor, shared_bias: Tensor | None, branch_scales: Tensor | None) -> Tensor:
    """Embedded patches [B, N, D] -> class and patch tokens after the last block, [B, 1 + N, D].

    `branch_scales` [depth, 2, B] multiply the branches of each block: 0, or 1 / the probability of keeping it.
    """
    x = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)
    for i, block in enumerate(self.blocks):
      x = block(x, shared_bias, None if branch_scales is None else branch_scales[i])
    return x

  @torch.no_grad()
  def _initialize(self, bound: float) -> None:
    """Normal of std 0.02 cut at +-bound; output kernels of block i, from 1, over sqrt(2 i). To be called last."""

    def draw(parameter):
      nn.init.trunc_normal_(parameter, std=_INIT_STD, a=-bound, b=bound)

    for module in self.modules():
      if isinstance(module, (nn.Linear, nn.Conv2d)):
        draw(module.weight)
        if module.bias is not None:
          nn.init.zeros_(module.bias)
    for name, parameter in self.named_parameters():
      if name in ("cls_token", "mask_token"):
        draw(parameter)
    for i, block in enumerate(self.blocks, start=1):
      block.attn.proj.weight.div_(math.sqrt(2 * i))
      block.mlp.fc2.weight.div_(math.sqrt(2 * i))


class Student(Encoder):
  """BEiT-style ViT that predicts one vector per patch; see `Encoder`, and `out_dim` is the vectors' width K."""

  def __init__(self, size: Variant, grid: tuple[int, int], patch_size: int, out_dim: int, *, sdpa: bool = False):
    super().__init__(size, grid, patch_size, sdpa=sdpa)
    self.mask_token = nn.Parameter(torch.zeros(1, 1, size.width))
    self.rel_pos_bias = RelativePositionBias(grid, size.heads)
    self.norm = nn.LayerNorm(size.width, eps=_BEIT_EPS)
    self.lm_head = nn.Linear(size.width, out_dim)
    self._initialize(bound=_INIT_STD)

  def features(self, images: Tensor, mask: Tensor | None = None, branch_scales: Tensor | None = None) -> Tensor:
    """Class and patch tokens after the final norm, [B, 1 + N, D]; see `forward` for the arguments."""
    patches = self.patch_embed(images)
    if mask is not None:
      patches = torch.where(mask.unsqueeze(-1), self.mask_token, patches)
    return self.norm(self.encode(patches, self.rel_pos_bias.bias(), branch_scales))

  def forward(self, images: Tensor, mask: Tensor | None = None, branch_scales: Tensor | None = None) -> Tensor:
    """Normalised images [B, 3, height, width] and masks bool [B, N] (True = masked) -> tokens [B, N, K]."""
    return self.lm_head(self.features(images, mask, branch_scales)[:, 1:])


class Classifier(Encoder):
  """BEiT-style ViT for fine-tuning: a head on the normalised mean of the patch tokens; see `Encoder`."""

  def __init__(self, size: Variant, grid: tuple[int, int], patch_size: int, num_classes: int, *, sdpa: bool = False):
    super().__init__(size, grid, patch_size, sdpa=sdpa)
    self.fc_norm = nn.LayerNorm(size.width, eps=_BEIT_EPS)
    self.head = nn.Linear(size.width, num_classes)
    self._initialize(bound=_FINETUNE_INIT_BOUND)
    with torch.no_grad():
      self.head.weight.mul_(_HEAD_INIT_SCALE)

  def features(self, images: Tensor, branch_scales: Tensor | None = None) -> Tensor:
    """Class and patch tokens after the last block, without a norm, [B, 1 + N, D]."""
    return self.encode(self.patch_embed(images), None, branch_scales)

  def forward(self, images: Tensor, branch_scales: Tensor | None = None) -> Tensor:
    """Normalised images [B, 3, height, width] -> logits [B, num_classes]."""
    return self.head(self.fc_norm(self.features(images, branch_scales)[:, 1:].mean(dim=1)))


# ------------------------------------------------------------ CLIP vision tower


class ClipAttention(nn.Module):
  """Self-attention with the parameter names of `nn.MultiheadAttention`."""

  def __init__(self, width: int, *, sdpa: bool):
    super().__init__()
    self.heads, self.sdpa = width // _CLIP_HEAD_WIDTH, sdpa
    self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
    self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
    self.out_proj = nn.Linear(width, width)
    nn.init.xavier_uniform_(self.in_proj_weight)

  def forward(self, x: Tensor) -> Tensor:
    qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
    return self.out_proj(_attend(qkv, self.heads, None, sdpa=self.sdpa))


class ClipMlp(nn.Module):
  def __init__(self, width: int):
    super().__init__()
    self.c_fc = nn.Linear(width, _MLP_RATIO * width)
    self.c_proj = nn.Linear(_MLP_RATIO * width, width)

  def forward(self, x: Tensor) -> Tensor:
    x = self.c_fc(x)
    return self.c_proj(x * torch.sigmoid(1.702 * x))  # QuickGELU


class ClipBlock(nn.Module):
  def __init__(self, width: int, *, sdpa: bool):
    super().__init__()
    self.ln_1 = nn.LayerNorm(width, eps=_CLIP_EPS)
    self.attn = ClipAttention(width, sdpa=sdpa)
    self.ln_2 = nn.LayerNorm(width, eps=_CLIP_EPS)
    self.mlp = ClipMlp(width)

  def forward(self, x: Tensor) -> Tensor:
    x = x + self.attn(self.ln_1(x))
    return x + self.mlp(self.ln_2(x))


class ClipTransformer(nn.Module):
  def __init__(self, width: int, depth: int, *, sdpa: bool):
    super().__init__()
    self.resblocks = nn.ModuleList(ClipBlock(width, sdpa=sdpa) for _ in range(depth))

  def forward(self, x: Tensor) -> Tensor:
    for block in self.resblocks:
      x = block(x)
    return x


class ClipVision(nn.Module):
  """CLIP's ViT image encoder, OpenAI's names without `visual.`."""

  def __init__(
    self, grid: tuple[int, int], patch_size: int, width: int, depth: int, out_dim: int, *, sdpa: bool = False
  ):
    super().__init__()
    scale = width**-0.5
    self.class_embedding = nn.Parameter(scale * torch.randn(width))
    self.positional_embedding = nn.Parameter(scale * torch.randn(1 + math.prod(grid), width))
    self.proj = nn.Parameter(scale * torch.randn(width, out_dim))
    self.conv1 = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size, bias=False)
    self.ln_pre = nn.LayerNorm(width, eps=_CLIP_EPS)
    self.transformer = ClipTransformer(width, depth, sdpa=sdpa)
    self.ln_post = nn.LayerNorm(width, eps=_CLIP_EPS)

  def features(self, images: Tensor) -> Tensor:
    """Class and patch tokens after `ln_post`, [B, 1 + N, D]."""
    x = self.conv1(images).flatten(2).transpose(1, 2)
    x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)
    x = self.ln_pre(x + self.positional_embedding)
    return self.ln_post(self.transformer(x))

  def forward(self, images: Tensor) -> Tensor:
    """Images [B, 3, height, width] -> projected patch tokens [B, N, K], the class token dropped."""
    return self.features(images)[:, 1:] @ self.proj


def load_clip(state: Mapping[str, Tensor], *, sdpa: bool = False) -> ClipVision:
  """Square-grid tower from a state dict in OpenAI's names, with or without the `visual.` prefix."""
  prefix = "visual."
  if any(name.startswith(prefix) for name in state):  # the text tower, where there is one, is left out
    state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
  width, _, patch_size, _ = state["conv1.weight"].shape
  side = math.isqrt(len(state["positional_embedding"]) - 1)
  depth = sum(name.endswith("ln_1.weight") for name in state)
  tower = ClipVision((side, side), patch_size, width, depth, state["proj"].shape[1], sdpa=sdpa)
  tower.load_state_dict(state)
  return tower
