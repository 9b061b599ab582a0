"""The PyTorch step against everything recorded from the released code. Measured errors stand beside the tolerances."""

import pathlib
import sys

import numpy as np
import pytest
import torch

from dtm_jax.errors import InputError
from dtm_jax.models.variants import VARIANTS, Variant
from dtm_jax.numerics import require_torch, torch_models, torch_reference

GOLDEN = pathlib.Path(__file__).parent / "golden"
RECORDED_SIZE = Variant(width=48, depth=3, heads=3, layer_scale=0.1)
RECORDED_DISTANCES = {"smoothl1": "smooth_l1", "l1": "l1", "l2": "l2", "negcosine": "negative_cosine"}

both_attentions = pytest.mark.parametrize("sdpa", [False, True])


def load_student(*, sdpa: bool) -> torch_models.Student:
  student = torch_models.Student(RECORDED_SIZE, grid=(8, 8), patch_size=8, out_dim=32, sdpa=sdpa)
  student.load_state_dict(torch.load(GOLDEN / "student_tiny.pth", weights_only=True)["model"])
  return student


def load_teacher(*, sdpa: bool) -> torch_models.ClipVision:
  return torch_models.load_clip(torch.load(GOLDEN / "clip_vision_tiny.pth", weights_only=True), sdpa=sdpa)


def tensor(array: np.ndarray) -> torch.Tensor:
  return torch.from_numpy(array)


def relative_error(actual: torch.Tensor, expected: np.ndarray) -> float:
  return float(np.linalg.norm(actual.detach().numpy() - expected) / np.linalg.norm(expected))


def test_a_machine_without_pytorch_is_told_how_to_install_it(monkeypatch):
  require_torch()
  monkeypatch.setitem(sys.modules, "torch", None)  # which is how Python marks what cannot be imported
  with pytest.raises(InputError, match=r"needs PyTorch: pip install 'dtm_jax\[test\]'"):
    require_torch()


def test_merges_per_iteration_is_the_whole_recorded_table():
  table = np.load(GOLDEN / "schedule.npz")["per_iteration"]
  actual = [[torch_reference.merges_per_iteration(n, k, 196) for k in range(1, 15)] for n in range(197)]
  np.testing.assert_array_equal(actual, table)


def test_grouping_equals_every_recorded_case():
  recorded = np.load(GOLDEN / "morphing.npz")
  assert recorded["num_cases"] == 28
  for i in range(28):
    case = {name: recorded[f"{i}/{name}"] for name in ("tokens", "per_iteration", "iterations", "labels", "num_groups")}
    tokens = tensor(case["tokens"])
    group, num_groups = torch_reference.group_tokens(tokens, int(case["per_iteration"]), int(case["iterations"]))
    assert num_groups == case["num_groups"], i
    np.testing.assert_array_equal(torch_reference.smallest_member(group), case["labels"], err_msg=f"case {i}")
    morphed = torch_reference.morph(tokens, group, num_groups)
    np.testing.assert_allclose(morphed, recorded[f"{i}/morphed"], rtol=0, atol=2e-6)  # measured 4.8e-7


@pytest.mark.parametrize("recorded_name", RECORDED_DISTANCES)
def test_loss_and_gradient_equal_every_recorded_case(recorded_name):
  recorded = np.load(GOLDEN / "loss.npz")
  for i in range(int(recorded["num_cases"])):
    online = tensor(recorded[f"{i}/online"]).requires_grad_()
    loss = torch_reference.dtm_loss(
      online,
      tensor(recorded[f"{i}/target"]),
      recorded[f"{i}/per_iteration"].tolist(),
      recorded[f"{i}/iterations"].tolist(),
      distance=RECORDED_DISTANCES[recorded_name],
    )
    loss.backward()
    expected = float(recorded[f"{i}/{recorded_name}/loss"])
    assert loss.item() == pytest.approx(expected, rel=2e-6)  # measured 2.4e-7
    gradient_error = relative_error(online.grad, recorded[f"{i}/{recorded_name}/grad_online"])
    assert gradient_error < 1e-6  # measured 0


def test_unknown_distance_is_refused():
  tokens = torch.zeros(1, 4, 2)
  with pytest.raises(InputError, match="distance='cosine' is not one of smooth_l1, l1, l2, negative_cosine"):
    torch_reference.dtm_loss(tokens, tokens, [0], [1], distance="cosine")


@both_attentions
def test_student_equals_the_recorded_tokens_and_gradients(sdpa):
  recorded = np.load(GOLDEN / "student_tiny_io.npz")
  student = load_student(sdpa=sdpa)
  tokens = student(tensor(recorded["image_nchw"]), tensor(recorded["mask"]))
  np.testing.assert_allclose(tokens.detach(), recorded["tokens"], rtol=0, atol=7e-7)  # measured 7.5e-8
  (tokens * tensor(recorded["cotangent"])).sum().backward()
  for name, parameter in student.named_parameters():
    assert relative_error(parameter.grad, recorded[f"grad/{name}"]) < 5e-6, name  # measured 5.8e-7


@both_attentions
def test_student_features_equal_the_recorded_ones(sdpa):
  recorded = np.load(GOLDEN / "student_tiny_features.npz")
  with torch.no_grad():
    features = load_student(sdpa=sdpa).features(tensor(recorded["image_nchw"]))
  np.testing.assert_allclose(features, recorded["features"], rtol=0, atol=7e-6)  # measured 7.2e-7


@both_attentions
def test_clip_tower_equals_the_recorded_tokens(sdpa):
  recorded = np.load(GOLDEN / "clip_vision_tiny_io.npz")
  teacher, images = load_teacher(sdpa=sdpa), tensor(recorded["image_nchw"])
  with torch.no_grad():
    features, tokens = teacher.features(images), teacher(images)
    pooled = features[:, 0] @ teacher.proj
  np.testing.assert_allclose(features[:, 1:], recorded["tokens_preproj"], rtol=0, atol=7e-6)  # measured 7.2e-7
  np.testing.assert_allclose(tokens, recorded["tokens"], rtol=0, atol=1e-5)  # measured 1.2e-6
  np.testing.assert_allclose(pooled, recorded["pooled"], rtol=0, atol=5e-6)  # measured 4.8e-7


def test_clip_names_load_without_the_prefix():
  state = torch.load(GOLDEN / "clip_vision_tiny.pth", weights_only=True)
  stripped = torch_models.load_clip({name.removeprefix("visual."): value for name, value in state.items()})
  images = torch.linspace(-2, 2, 3 * 64 * 64).reshape(1, 3, 64, 64)
  with torch.no_grad():
    torch.testing.assert_close(stripped(images), load_teacher(sdpa=False)(images), rtol=0, atol=0)


@both_attentions
def test_ten_steps_follow_the_recorded_trajectory(sdpa):
  recorded = np.load(GOLDEN / "pretrain_trajectory.npz")
  student, teacher = load_student(sdpa=sdpa), load_teacher(sdpa=sdpa)
  optimizer = torch_reference.make_optimizer(
    student,
    betas=tuple(recorded["betas"].tolist()),
    eps=float(recorded["eps"]),
    weight_decay=float(recorded["weight_decay"]),
  )
  frozen = {name: value.clone() for name, value in teacher.state_dict().items()}
  for step in range(10):
    loss, grad_norm = torch_reference.train_step(
      student,
      teacher,
      optimizer,
      tensor(recorded["images_nchw"][step]),
      tensor(recorded["masks"][step]),
      recorded["per_iteration"][step].tolist(),
      recorded["iterations"][step].tolist(),
      lr=float(recorded["lr"][step]),
      max_grad_norm=float(recorded["max_grad_norm"]),
      distance=str(recorded["distance"]),
    )
    assert loss.item() == pytest.approx(recorded["losses"][step], rel=2e-6)  # measured 2.2e-7
    assert grad_norm.item() == pytest.approx(recorded["grad_norms"][step], rel=8e-7)  # measured 8.4e-8
  for name, parameter in student.named_parameters():
    expected = recorded[f"final/{name}"]
    np.testing.assert_allclose(parameter.detach(), expected, rtol=0, atol=1e-6, err_msg=name)  # measured 1.2e-7
  for name, value in teacher.state_dict().items():
    assert torch.equal(value, frozen[name]), name


def test_decay_acts_on_the_recorded_names():
  recorded = np.load(GOLDEN / "pretrain_trajectory.npz")
  named = dict(load_student(sdpa=False).named_parameters())
  decayed = {name for name, parameter in named.items() if torch_reference.is_decayed(name, parameter)}
  assert decayed == set(recorded["decay_names"])
  assert named.keys() - decayed == set(recorded["no_decay_names"])


def test_learning_rate_equals_the_recorded_schedule():
  recorded = np.load(GOLDEN / "lr_schedule.npz")
  steps_per_epoch = int(recorded["steps_per_epoch"])
  actual = [
    torch_reference.learning_rate(
      step,
      peak=float(recorded["base"]),
      final=float(recorded["final"]),
      warmup_steps=int(recorded["warmup_epochs"]) * steps_per_epoch,
      total_steps=int(recorded["epochs"]) * steps_per_epoch,
    )
    for step in range(len(recorded["lr"]))
  ]
  np.testing.assert_allclose(actual, recorded["lr"], rtol=0, atol=4e-18)  # measured 4.3e-19


def test_bias_index_equals_transformers_on_a_rectangle():
  beit = pytest.importorskip("transformers.models.beit.modeling_beit")
  expected = beit.BeitRelativePositionBias.generate_relative_position_index((3, 5))
  np.testing.assert_array_equal(torch_models.relative_position_index((3, 5)), expected)


def test_base_student_has_the_published_number_of_parameters():
  with torch.device("meta"):
    student = torch_models.Student(VARIANTS["B"], grid=(14, 14), patch_size=16, out_dim=512)
  assert round(sum(p.numel() for p in student.parameters()) / 1e6, 2) == 86.17


def test_new_student_starts_as_the_method_says():
  torch.manual_seed(0)
  student = torch_models.Student(RECORDED_SIZE, grid=(8, 8), patch_size=8, out_dim=32)
  assert student.lm_head.weight.abs().max() <= 0.02
  # A normal of std s cut at +-s has standard deviation 0.54 s (scipy.stats.truncnorm(-1, 1).std() is 0.5396).
  assert student.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.5396 * 0.02, rel=0.02)
  for i, block in enumerate(student.blocks, start=1):
    for kernel in (block.attn.proj.weight, block.mlp.fc2.weight):
      assert kernel.std().item() == pytest.approx(0.5396 * 0.02 / (2 * i) ** 0.5, rel=0.03)
  assert not any(table.any() for name, table in student.named_parameters() if "table" in name)
