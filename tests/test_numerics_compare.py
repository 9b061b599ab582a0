"""Both frameworks on one step: how near they are, and that a planted error is seen where it is."""

import dataclasses
import functools
import json
import pathlib
import re

import jax
import numpy as np
import pytest
import torch
from PIL import Image

from dtm_jax import command_line
from dtm_jax.numerics import compare, compare_report, depth_figure, partings, report, torch_models
from dtm_jax.numerics.__main__ import main
from dtm_jax.numerics.case import open_case, torch_model

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
TEACHER = GOLDEN / "clip_vision_tiny.pth"
# Four by four patches of noise, half the grid of the teacher's position embeddings; one draw compiles faster than two.
OPTIONS = [
  f"--config={ROOT}/configs/quickstart.py:smoke",
  *("--config.data.image_size=32", "--config.model.patch_size=8", "--config.morphing.draws=1"),
  *("--config.model.drop_path=0.5", "--config.morphing.split=random"),
]
STAGES = ["embed", "block_0", "block_1", "tokens"]

pytestmark = pytest.mark.filterwarnings("ignore:.*load_module:DeprecationWarning")


@pytest.fixture(scope="module")
def student_file(tmp_path_factory) -> pathlib.Path:
  """Weights of a small student."""
  torch.manual_seed(0)
  student = torch_models.Student(torch_models.Variant(48, 2, 3, 0.1), grid=(4, 4), patch_size=8, out_dim=32)
  path = tmp_path_factory.mktemp("weights") / "student.pth"
  torch.save({"model": student.state_dict()}, path)
  return path


@pytest.fixture(scope="module")
def live(student_file):
  """A case, its first inputs, and the outcomes of PyTorch and XLA."""
  with pytest.warns(DeprecationWarning, match="load_module"):
    settings = command_line.parse_config(["compare", *OPTIONS])
  with jax.default_matmul_precision("float32"):
    case = open_case(settings, student_file, TEACHER, "float32")
    with case.inputs() as stream:
      inputs = next(stream)
    return case, inputs, *(compare.run(case, inputs, setting) for setting in compare.pairs("float32")[0])


def by_name(comparison) -> dict:
  return {row["name"]: row for row in comparison["tensors"]}


def test_float32_agrees_at_every_stage(live):
  case, inputs, torch_outcome, xla_outcome = live
  comparison = compare.compare(torch_outcome, xla_outcome, case, inputs)
  rows = by_name(comparison)
  assert [*depth_figure.activations(comparison["tensors"], "student")] == STAGES
  assert [*depth_figure.activations(comparison["tensors"], "teacher")] == STAGES
  assert [*depth_figure.gradients(comparison["tensors"])] == STAGES
  named = {name for name, _ in torch_model(case).named_parameters()}
  for prefix in ("gradient/", "updated/"):
    assert {name.removeprefix(prefix) for name in rows if name.startswith(prefix)} == named
  worst = {prefix: max(r["relative"] for n, r in rows.items() if n.startswith(prefix)) for prefix in "stgu"}
  assert max(worst[prefix] for prefix in "stg") < 6e-6, worst  # measured 6.5e-7
  assert worst["u"] < 5e-4  # measured 5e-5: Adam's first step divides small gradients by themselves
  assert min(row["cosine"] for row in rows.values()) > 1 - 1e-10  # measured 1 - 2e-11; optimised 1 - 2e-12
  assert [draw["tokens_equal"] for draw in comparison["morphing"]] == [1]
  before, after = (rows[f"{prefix}/norm.weight"]["reference_max_abs"] for prefix in ("gradient", "updated"))
  assert 0 < before != after


def test_a_planted_error_shows_at_its_block(live):
  case, inputs, _, xla_outcome = live
  block = dict(case.params["block_1"])
  block["gamma_2"] = block["gamma_2"] * np.where(np.arange(48) == 5, 2, 1).astype(np.float32)
  planted = dataclasses.replace(case, params=case.params | {"block_1": block})
  torch_outcome = compare.run_torch(planted, inputs, compare.pairs("float32")[0][0])
  comparison = compare.compare(torch_outcome, xla_outcome, case, inputs)
  errors = depth_figure.activations(comparison["tensors"], "student")
  assert errors["block_0"] < 1e-5
  assert errors["block_1"] > 1e-4
  text = compare_report.describe({"XLA beside PyTorch": comparison})
  assert re.search(r"^student, .* grows most at block_1, by a factor of", text, re.MULTILINE)
  assert "in short, largest relative errors of XLA beside PyTorch: teacher, forward " in text
  assert f"; student, forward {max(errors.values()):.1e}; " in text
  rows = by_name(comparison)
  assert rows["updated/blocks.1.gamma_2"]["relative"] == max(
    row["relative"] for name, row in rows.items() if name.startswith("updated/") and "gamma" in name
  )
  assert rows["teacher/tokens"]["relative"] < 1e-5


def test_bfloat16_by_the_command(capsys, tmp_path, student_file):
  words = [*OPTIONS, f"--student={student_file}", f"--teacher={TEACHER}", f"--out={tmp_path}", "--dtype=bfloat16"]
  assert main(["numerics", "compare", *words]) == 0
  out = capsys.readouterr().out
  assert "XLA bfloat16 beside PyTorch bfloat16" in out
  assert "matrix products in bfloat16 (config.model.dtype='float32')" in out
  record = json.loads((tmp_path / "compare.json").read_text())
  assert record["dtype"] == "bfloat16"
  assert {"jax", "torch", "dtm_jax"} <= record["versions"].keys()
  here, yardstick = record["comparisons"].values()
  for name, row in by_name(here).items():
    assert np.isfinite([row["max_abs"], row["relative"], row["cosine"]]).all(), name
  ours, theirs = (max(depth_figure.activations(rows["tensors"], "student").values()) for rows in (here, yardstick))
  assert 1e-3 < ours < 3 * theirs  # measured 3.5e-3 and 5.1e-3
  with Image.open(tmp_path / "compare.png") as picture:
    assert picture.size == (1500, 630)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["compare.json", "compare.png"]


def test_difference_of_known_tensors():
  row = compare.difference("x", np.array([3.0, 4.0]), np.array([3.0, 4.5]))
  assert row["max_abs"] == 0.5
  assert row["relative"] == 0.125
  assert row["cosine"] == pytest.approx(27 / (5 * np.hypot(3, 4.5)))
  assert compare.difference("x", np.zeros(2), np.zeros(2))["relative"] == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("both", [False, True])
def test_what_is_not_finite_stands_first(tmp_path, value, both):
  broken = np.array([1, value])
  names = [f"{tower}/{stage}" for tower in ("student", "teacher") for stage in ("embed", "block_0")]
  rows = [compare.difference(name, np.ones(2), np.full(2, 1.5)) for name in [*names, "gradient/norm.bias"]]
  bad = ["student/tokens", "gradient/cls_token"]
  rows += [compare.difference(name, broken if both else np.ones(2), broken) for name in bad]
  comparisons = {"XLA beside PyTorch": {"tensors": rows, "morphing": []}}
  assert compare.not_finite(comparisons) == bad
  text = compare_report.describe(comparisons)
  assert re.search(r"^gradient, worst first.*\ncls_token +inf +inf +nan", text, re.MULTILINE)
  assert text.endswith("NOT FINITE: student/tokens, gradient/cls_token")
  depth_figure.draw(tmp_path / "compare.png", {title: rows["tensors"] for title, rows in comparisons.items()})
  report.write_json(tmp_path / "compare.json", comparisons)
  read = json.loads((tmp_path / "compare.json").read_text(), parse_constant=pytest.fail)
  assert by_name(read["XLA beside PyTorch"])["gradient/cls_token"]["relative"] == "inf"


@pytest.mark.slow  # compiles a step of its own
def test_a_student_that_is_not_finite_ends_with_1(capsys, tmp_path, student_file):
  content = torch.load(student_file, weights_only=True)
  content["model"]["lm_head.weight"][3] = 3e38  # finite, but no sum of its products is
  torch.save(content, tmp_path / "huge.pth")
  words = [*OPTIONS, f"--student={tmp_path}/huge.pth", f"--teacher={TEACHER}", f"--out={tmp_path}"]
  assert main(["numerics", "compare", *words]) == 1
  assert "NOT FINITE: student/tokens" in capsys.readouterr().out


def test_a_file_in_the_way_of_the_folder_is_told_before_the_work(capsys, tmp_path, student_file):
  words = [*OPTIONS, "--student=none.pth", f"--out={student_file}"]
  assert main(["numerics", "compare", *words]) == 2
  assert "student.pth is not a folder" in capsys.readouterr().err


# ------------------------------------------------------------ where groupings part

# Positions 0, 2, 4 merge into 1, 3, 5; directions in degrees. Token 0 never merges.
PARTNERS = ([200, 10, 0, -10.01, 90, 140], [200, 10, 0, -9.99, 90, 140])
EDGES = ([200, 10, 0, 100, 90.01, 140], [200, 9.98, 0, 100, 90.01, 140])


def directions(degrees) -> np.ndarray:
  radians = np.deg2rad(degrees)
  return np.stack([np.cos(radians), np.sin(radians)], axis=-1)[None].astype(np.float32)


def cosine(degrees: float) -> float:
  return float(np.cos(np.deg2rad(degrees)))


@pytest.mark.parametrize(
  ("angles", "margin"),
  [(PARTNERS, cosine(10) - cosine(10.01)), (EDGES, cosine(9.99) - cosine(10))],
  ids=["between two partners", "between the last edge that merges and the next"],
)
def test_the_margin_of_a_parting_is_told(angles, margin):
  reference, other = map(directions, angles)
  (draw,) = partings.compare_groups(
    (reference, partings.group_in_torch), (other, partings.group_in_xla), np.array([1]), np.array([1]), True
  )
  (parting,) = draw["partings"]
  assert draw["images_equal"] == 0
  assert draw["tokens_equal"] < 1
  assert (parting["image"], parting["iteration"]) == (0, 1)
  assert parting["margin"] == pytest.approx(margin, rel=0.05)
  assert parting["score_difference"] > abs(margin) / 2


def test_a_margin_is_told_of_groups_in_random_order():
  order = np.array([0, 3, 5, 1, 4, 2])  # of tokens, by position
  priorities = np.empty((1, 1, 1, 6), np.float32)
  priorities[..., order] = np.linspace(0.9, 1, 6)
  priorities[..., 0] = 0.99  # a protected first token stays first
  reference, other = (np.empty((1, 6, 2), np.float32) for _ in range(2))
  reference[:, order], other[:, order] = map(directions, PARTNERS)
  group = functools.partial(partings.group_in_torch, priorities=priorities)
  (draw,) = partings.compare_groups((reference, group), (other, group), np.array([1]), np.array([1]), True, priorities)
  assert draw["partings"][0]["margin"] == pytest.approx(cosine(10) - cosine(10.01), rel=0.05)


def test_equal_tokens_do_not_part():
  tokens = np.random.default_rng(0).normal(size=(3, 12, 8)).astype(np.float32)
  merges, iterations = np.array([[2, 0], [1, 3], [4, 1]]), np.array([[2, 1], [4, 2], [1, 3]])
  sides = [(tokens, group) for group in (partings.group_in_torch, partings.group_in_xla)]
  draws = partings.compare_groups(*sides, merges, iterations, False)
  assert [draw["partings"] for draw in draws] == [[], []]
  assert draws[0]["merges"] == [1, 2, 4]


def test_a_later_parting_is_found_at_its_iteration():
  rng = np.random.default_rng(1)
  tokens = rng.normal(size=(1, 24, 4)).astype(np.float32)
  labels = [partings.group_in_torch(tokens, np.array([[2]]), np.array([[i]]), True) for i in (1, 2, 3, 4)]
  for seed in range(50):  # the smallest disturbance that parts late enough
    other = tokens + np.random.default_rng(seed).normal(size=tokens.shape).astype(np.float32) * 0.02
    again = [partings.group_in_xla(other, np.array([[2]]), np.array([[i]]), True) for i in (1, 2, 3, 4)]
    equal = [np.array_equal(a, b) for a, b in zip(labels, again, strict=True)]
    if equal[:2] == [True, True] and not equal[-1]:
      break
  (draw,) = partings.compare_groups(
    (tokens, partings.group_in_torch), (other, partings.group_in_xla), np.array([2]), np.array([4]), True
  )
  (parting,) = draw["partings"]
  assert parting["iteration"] == 1 + equal.index(False) > 2
  assert 0 < parting["margin"] < 2 * parting["score_difference"]
