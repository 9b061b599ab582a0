"""Which leaf of our parameter trees has which name in which file: one table per model, for reading and for writing.

A row is a leaf of ours, its axes, and its name in each layout. Axes are letters:
D width, F of the MLP, H heads, R rows of a bias table, P patch size, K outputs,
T tokens with the class token. `{}` is the number of a block.

Sources of the names: files of the released code and of BEiT v1 and v2; of
OpenAI's and open_clip's CLIP; what `save_pretrained` and `state_dict()` of
transformers give.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from dtm_jax.errors import InputError

MLP_RATIO = 4
CLIP_HEAD_WIDTH = 64  # of every CLIP vision transformer that OpenAI released
_LINEAR, _CONV = (1, 0), (2, 3, 1, 0)  # their axes in our order: [out, in]; [out, in, height, width]


@functools.lru_cache(maxsize=4)
def relative_position_index(grid: tuple[int, int]) -> np.ndarray:
  """Row of a bias table for each pair of tokens.

  Args:
    grid: Patches (down, across).

  Returns:
    int64 [1 + N, 1 + N], query by key, class token first; read-only.
  """
  down, across = grid
  row, column = np.divmod(np.arange(down * across), across)
  offsets = (2 * down - 1) * (2 * across - 1)
  index = np.empty((1 + down * across,) * 2, np.int64)
  index[1:, 1:] = (row[:, None] - row + down - 1) * (2 * across - 1) + column[:, None] - column + across - 1
  index[0], index[:, 0], index[0, 0] = offsets, offsets + 1, offsets + 2
  index.flags.writeable = False
  return index


class _Source(NamedTuple):
  """Where a leaf lies in a foreign state dict."""

  name: str
  order: tuple[int, ...] | None = None  # their axes in our order
  third: int | None = None  # of the rows of a tensor that stacks query, key and value


class _Row(NamedTuple):
  ours: str  # path; "" for an index buffer, which is no parameter
  axes: tuple
  theirs: tuple[_Source, ...]  # one per layout of the model


def _plain(ours: str, axes: tuple, *names: str) -> list[_Row]:
  return [_Row(ours, axes, tuple(map(_Source, names)))]


def _kernel(ours: str, inputs: str, outputs: str, *names: str | tuple[str, int]) -> list[_Row]:
  """A Linear layer's weight; `(name, i)` is the i-th third of a stacked one."""
  sources = (name if isinstance(name, tuple) else (name, None) for name in names)
  return [_Row(f"{ours}/kernel", (inputs, outputs), tuple(_Source(name, _LINEAR, third) for name, third in sources))]


def _dense(ours: str, inputs: str, outputs: str, *names: str) -> list[_Row]:
  bias = _plain(f"{ours}/bias", (outputs,), *(f"{name}.bias" for name in names))
  return _kernel(ours, inputs, outputs, *(f"{name}.weight" for name in names)) + bias


def _norm(ours: str, *names: str) -> list[_Row]:
  scale = _plain(f"{ours}/scale", ("D",), *(f"{name}.weight" for name in names))
  return scale + _plain(f"{ours}/bias", ("D",), *(f"{name}.bias" for name in names))


def _patches(*names: str) -> list[_Row]:
  return [_Row("patch_embed/kernel", ("P", "P", 3, "D"), tuple(_Source(name, _CONV) for name in names))]


def _inside(rows: list[_Row], ours: str, *prefixes: str) -> list[_Row]:
  """The rows of a part under the names of the whole."""
  return [
    _Row(
      row.ours and ours + row.ours,
      row.axes,
      tuple(source._replace(name=prefix + source.name) for prefix, source in zip(prefixes, row.theirs, strict=True)),
    )
    for row in rows
  ]


# ------------------------------------------------------------ BEiT: released code, files and modules of transformers

_TABLE = [
  *_plain("rel_pos_bias", ("R", "H"), *["relative_position_bias_table"] * 3),
  *_plain("", ("T", "T"), *["relative_position_index"] * 3),
]
_BEIT_BLOCK = [
  *_plain("gamma_1", ("D",), "gamma_1", "lambda_1", "lambda_1"),
  *_plain("gamma_2", ("D",), "gamma_2", "lambda_2", "lambda_2"),
  *_norm("norm1", "norm1", "layernorm_before", "layernorm_before"),
  *_plain("attn/q/bias", ("D",), "attn.q_bias", "attention.attention.query.bias", "attention.q_proj.bias"),
  *_plain("attn/v/bias", ("D",), "attn.v_bias", "attention.attention.value.bias", "attention.v_proj.bias"),
  *_inside(_TABLE, "attn/", "attn.", "attention.attention.relative_position_bias.", "relative_position_bias."),
  *_kernel("attn/q", "D", "D", ("attn.qkv.weight", 0), "attention.attention.query.weight", "attention.q_proj.weight"),
  *_kernel("attn/k", "D", "D", ("attn.qkv.weight", 1), "attention.attention.key.weight", "attention.k_proj.weight"),
  *_kernel("attn/v", "D", "D", ("attn.qkv.weight", 2), "attention.attention.value.weight", "attention.v_proj.weight"),
  *_dense("attn/proj", "D", "D", "attn.proj", "attention.output.dense", "attention.o_proj"),
  *_norm("norm2", "norm2", "layernorm_after", "layernorm_after"),
  *_dense("mlp/fc1", "D", "F", "mlp.fc1", "intermediate.dense", "mlp.fc1"),
  *_dense("mlp/fc2", "F", "D", "mlp.fc2", "output.dense", "mlp.fc2"),
]
_CLS_TOKEN = _plain("cls_token", (1, 1, "D"), "cls_token", *["beit.embeddings.cls_token"] * 2)
_MASK_TOKEN = _plain("mask_token", (1, 1, "D"), "mask_token", *["beit.embeddings.mask_token"] * 2)
_PATCH_EMBED = [
  *_patches("patch_embed.proj.weight", *["beit.embeddings.patch_embeddings.projection.weight"] * 2),
  *_plain(
    "patch_embed/bias", ("D",), "patch_embed.proj.bias", *["beit.embeddings.patch_embeddings.projection.bias"] * 2
  ),
]
_SHARED_TABLE = _inside(
  _TABLE, "", "rel_pos_bias.", "beit.encoder.relative_position_bias.", "beit.shared_position_bias."
)
_BEIT_BLOCKS = _inside(_BEIT_BLOCK, "block_{}/", "blocks.{}.", "beit.encoder.layer.{}.", "beit.layers.{}.")
_STUDENT = [
  *_CLS_TOKEN,
  *_MASK_TOKEN,
  *_PATCH_EMBED,
  *_SHARED_TABLE,
  *_BEIT_BLOCKS,
  *_norm("norm", "norm", "layernorm", "layernorm"),
  *_dense("head", "D", "K", "lm_head", "lm_head", "lm_head"),
]
_CLASSIFIER = [
  *_CLS_TOKEN,
  *_PATCH_EMBED,
  *_BEIT_BLOCKS,
  *_norm("fc_norm", "fc_norm", "beit.pooler.layernorm", "beit.pooler.layernorm"),
  *_dense("head", "D", "K", "head", "classifier", "classifier"),
]

# ------------------------------------------------------------ CLIP: OpenAI and open_clip, Hugging Face

_CLIP_BLOCK = [
  *_norm("norm1", "ln_1", "layer_norm1"),
  *_kernel("attn/q", "D", "D", ("attn.in_proj_weight", 0), "self_attn.q_proj.weight"),
  *_kernel("attn/k", "D", "D", ("attn.in_proj_weight", 1), "self_attn.k_proj.weight"),
  *_kernel("attn/v", "D", "D", ("attn.in_proj_weight", 2), "self_attn.v_proj.weight"),
  *(
    _Row(f"attn/{x}/bias", ("D",), (_Source("attn.in_proj_bias", third=i), _Source(f"self_attn.{x}_proj.bias")))
    for i, x in enumerate("qkv")
  ),
  *_dense("attn/proj", "D", "D", "attn.out_proj", "self_attn.out_proj"),
  *_norm("norm2", "ln_2", "layer_norm2"),
  *_dense("mlp/fc1", "D", "F", "mlp.c_fc", "mlp.fc1"),
  *_dense("mlp/fc2", "F", "D", "mlp.c_proj", "mlp.fc2"),
]
_HF_EMBEDDINGS = "vision_model.embeddings."
_CLIP = [
  *_plain("class_embedding", ("D",), "visual.class_embedding", f"{_HF_EMBEDDINGS}class_embedding"),
  *_plain("pos_embed", ("T", "D"), "visual.positional_embedding", f"{_HF_EMBEDDINGS}position_embedding.weight"),
  _Row("proj", ("D", "K"), (_Source("visual.proj"), _Source("visual_projection.weight", _LINEAR))),
  *_patches("visual.conv1.weight", f"{_HF_EMBEDDINGS}patch_embedding.weight"),
  *_norm("ln_pre", "visual.ln_pre", "vision_model.pre_layrnorm"),  # sic
  *_inside(_CLIP_BLOCK, "block_{}/", "visual.transformer.resblocks.{}.", "vision_model.encoder.layers.{}."),
  *_norm("ln_post", "visual.ln_post", "vision_model.post_layernorm"),
]

# ------------------------------------------------------------ layouts

_TABLES = ("rel_pos_bias", "block_{}/attn/rel_pos_bias")


class Layout(NamedTuple):
  """A model's table, one of its columns, and what may differ from it.

  Attributes:
    kind: "student", "classifier" or "clip_vision".
    title: For people.
    rows, column: The names.
    markers: Names that tell this layout from those after it in `LAYOUTS`.
    prefix: That the names in this file lack, because a part was saved alone.
    left_out: Patterns of names that belong to other parts of the saved model.
    absent: Leaves that may be missing as a whole, and are zeros then.
    folded: The shared table's rows where the model has none: it is added to those of the blocks.
  """

  kind: str
  title: str
  rows: list[_Row]
  column: int
  markers: tuple[str, ...]
  prefix: str = ""
  left_out: tuple[str, ...] = ()
  absent: tuple[str, ...] = ()
  folded: tuple[_Row, ...] = ()


_RELEASE = "patch_embed.proj.weight"
_HF = "beit.embeddings.patch_embeddings.projection.weight"
_HF_5 = "beit.layers.0.lambda_1"
_POOLED = "beit.pooler.layernorm.weight"
# The text tower, and what belongs to neither tower.
_OPENAI_REST = (
  r"(transformer|token_embedding|ln_final|text|logit_scale|logit_bias)(\..*)?",
  r"positional_embedding|text_projection|attn_mask|input_resolution|context_length|vocab_size",
)
_HF_CLIP_REST = (r"text_model\..*|text_projection\.weight|logit_scale", r"vision_model\.embeddings\.position_ids")

_HF_STUDENT = Layout(
  kind="student",
  title="a BEiT-style student in Hugging Face's names",
  rows=_STUDENT,
  column=1,
  markers=(_HF,),
  absent=(*_TABLES, "mask_token", "head/kernel", "head/bias"),
)
_HF_CLASSIFIER = Layout(
  kind="classifier",
  title="a BEiT-style classifier in Hugging Face's names",
  rows=_CLASSIFIER,
  column=1,
  markers=(_HF, _POOLED),
  left_out=(r"(beit\.)?embeddings\.mask_token",),  # from pre-training
  absent=(*_TABLES, "head/kernel", "head/bias"),
  folded=tuple(_SHARED_TABLE),
)
_RELEASE_STUDENT = Layout(
  kind="student",
  title="a BEiT-style student in the release's names",
  rows=_STUDENT,
  column=0,
  markers=(_RELEASE,),
  left_out=(r"cls_pt_.*",),  # BEiT v2's second decoder
  absent=_TABLES,
)
_RELEASE_CLASSIFIER = Layout(
  kind="classifier",
  title="a BEiT-style classifier in the release's names",
  rows=_CLASSIFIER,
  column=0,
  markers=(_RELEASE, "fc_norm.weight"),
  absent=_TABLES,
  folded=tuple(_SHARED_TABLE),
)
_OPENAI_CLIP = Layout(
  kind="clip_vision",
  title="a CLIP vision tower in OpenAI's names",
  rows=_CLIP,
  column=0,
  markers=("visual.conv1.weight",),
  left_out=_OPENAI_REST,
)
_HF_CLIP = Layout(
  kind="clip_vision",
  title="a CLIP vision tower in Hugging Face's names",
  rows=_CLIP,
  column=1,
  markers=(f"{_HF_EMBEDDINGS}patch_embedding.weight",),
  left_out=_HF_CLIP_REST,
)
_HF_BEIT = (
  _HF_CLASSIFIER._replace(column=2, markers=(_HF, _HF_5, _POOLED)),
  _HF_STUDENT._replace(column=2, markers=(_HF, _HF_5)),
  _HF_CLASSIFIER,
  _HF_STUDENT,
)
# In the order in which they are tried.
LAYOUTS = (
  _RELEASE_CLASSIFIER,
  _RELEASE_STUDENT,
  *_HF_BEIT,
  *(layout._replace(prefix="beit.") for layout in _HF_BEIT),
  _OPENAI_CLIP,
  _OPENAI_CLIP._replace(prefix="visual.", left_out=()),  # all that is left out is beside the tower
  _HF_CLIP,
)
# To write.
RELEASE = {"student": _RELEASE_STUDENT, "classifier": _RELEASE_CLASSIFIER, "clip_vision": _OPENAI_CLIP}
HUGGING_FACE = {"student": _HF_STUDENT._replace(prefix="beit."), "classifier": _HF_CLASSIFIER}


def first_place(layout: Layout, template: str) -> tuple[str, tuple[int, ...] | None]:
  """Their name of a leaf, in the first block where it is in all, and their axes in our order."""
  row = next(row for row in (*layout.rows, *layout.folded) if row.ours == template)
  source = row.theirs[layout.column]
  return source.name.format(0).removeprefix(layout.prefix), source.order


def count_blocks(layout: Layout, names: Iterable[str]) -> int:
  """How many different numbers of blocks there are: with a gap, the names that are out of line are then told."""
  block = next(row for row in layout.rows if "{}" in row.ours).theirs[layout.column].name
  number = re.compile(re.escape(block.removeprefix(layout.prefix).partition("{}")[0]) + r"(\d+)\.")
  return len({match[1] for match in map(number.match, names) if match})


class Leaf(NamedTuple):
  """One parameter of ours and its place in a foreign state dict.

  Attributes:
    path: Ours; "" for an index buffer, which is no parameter.
    template: The path with `{}` for the number of the block.
    name: Theirs.
    shape, their_shape: Of the parameter, and of the whole tensor that holds it.
  """

  path: str
  template: str
  name: str
  shape: tuple[int, ...]
  their_shape: tuple[int, ...]
  order: tuple[int, ...] | None
  third: int | None

  def ours(self, tensor: np.ndarray) -> np.ndarray:
    """The parameter, a view of their tensor."""
    if self.third is not None:
      tensor = np.split(tensor, 3)[self.third]
    return tensor if self.order is None else tensor.transpose(self.order)

  def theirs(self, parameter: np.ndarray) -> np.ndarray:
    """The parameter with their axes; of a stacked tensor, its third."""
    return parameter if self.order is None else parameter.transpose(np.argsort(self.order))


def leaves(layout: Layout, rows: Iterable[_Row], model: dict) -> Iterator[Leaf]:
  """Every leaf of some rows of a model, in the order of the foreign file.

  Args:
    layout: Of the foreign names.
    rows: The layout's `rows` or `folded`.
    model: The sizes, as `model_sizes` gives them.
  """
  letters = _letters(layout.kind, model)
  for is_block, group in itertools.groupby(rows, lambda row: "{}" in row.theirs[0].name):
    part = list(group)
    for i in range(model["depth"] if is_block else 1):
      for row in part:
        source, shape = row.theirs[layout.column], tuple(letters.get(axis, axis) for axis in row.axes)
        theirs = shape if source.order is None else tuple(shape[source.order.index(k)] for k in range(len(shape)))
        if source.third is not None:
          theirs = (3 * theirs[0], *theirs[1:])
        name = source.name.format(i).removeprefix(layout.prefix)
        yield Leaf(row.ours.format(i), row.ours, name, shape, theirs, source.order, source.third)


def _letters(kind: str, model: dict) -> dict[str, int]:
  width, (down, across) = model["width"], model["grid"]
  return {
    "D": width,
    "F": MLP_RATIO * width,
    "H": model["heads"],
    "R": (2 * down - 1) * (2 * across - 1) + 3,
    "P": model["patch_size"],
    "K": model[output_field(kind)],
    "T": 1 + down * across,
  }


def output_field(kind: str) -> str:
  """What the module of this kind calls the width of its output."""
  return "num_classes" if kind == "classifier" else "out_dim"


def model_sizes(kind: str, depth: int, shape: Callable[[str, int], tuple[int, ...]]) -> dict:
  """Fields of the module, from the shapes of a few leaves.

  Args:
    kind: Of the model.
    depth: Blocks.
    shape: Template and rank of a leaf -> its shape, of the first block where it is in all; () where it may be absent
      and is.

  Returns:
    `patch_size`, `width`, `depth`, `heads`, `grid` (down, across), and `out_dim` or `num_classes`.

  Raises:
    InputError: they are not the shapes of such a model.
  """
  patch_size, _, _, width = shape("patch_embed/kernel", 4)
  if kind == "clip_vision":
    side, heads = _clip_side(*shape("pos_embed", 2))
    outputs = shape("proj", 2)[1]
  else:
    table = shape("block_{}/attn/rel_pos_bias", 2) or shape("rel_pos_bias", 2)
    if not table:
      raise InputError("it has no relative position bias tables, so its grid and number of heads are unknown")
    side, heads = _grid_side(table[0]), table[1]
    outputs = (shape("head/kernel", 2) or (width, 0))[1]
  if 0 in (patch_size, width, depth, heads) or width % heads:
    raise InputError(f"{depth} blocks of width {width} with {heads} heads on patches of {patch_size} pixels")
  sizes = {"patch_size": patch_size, "width": width, "depth": depth, "heads": heads, "grid": (side, side)}
  return sizes | {output_field(kind): outputs}


def _clip_side(positions: int, width: int) -> tuple[int, int]:
  """G and the number of heads, of a table of positions [1 + G * G, 64 * heads]."""
  side = math.isqrt(positions - 1)
  if not side or side * side != positions - 1 or width % CLIP_HEAD_WIDTH:
    raise InputError(f"positions of shape {[positions, width]} are not the [1 + G * G, 64 * heads] of a CLIP tower")
  return side, width // CLIP_HEAD_WIDTH


def _grid_side(rows: int) -> int:
  """G of a bias table with (2G - 1)^2 + 3 rows (three for the class token)."""
  side = math.isqrt(rows - 3) if rows > 3 else 0
  if side % 2 == 0 or side * side != rows - 3:
    raise InputError(f"a bias table of {rows} rows is not for a square grid of patches")
  return (side + 1) // 2


def nest(flat: dict[str, np.ndarray]) -> dict:
  """{"a/b": x} -> {"a": {"b": x}}."""
  tree = {}
  for path, value in flat.items():
    *branches, last = path.split("/")
    branch = tree
    for name in branches:
      branch = branch.setdefault(name, {})
    branch[last] = value
  return tree


def flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
  """{"a": {"b": x}} -> {"a/b": x}."""
  flat = {}
  for name, value in tree.items():
    flat |= flatten(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {prefix + name: value}
  return flat
