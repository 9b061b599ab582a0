"""The PyTorch step against everything recorded from the released code. Measured errors stand beside the tolerances."""

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers.models.beit import modeling_beit

import dtm_jax
from dtm_jax.errors import InputError
from dtm_jax.models.variants import VARIANTS, Variant
from dtm_jax.morphing import split_priorities
from dtm_jax.numerics import require_torch, torch_models, torch_reference

GOLDEN = pathlib.Path(__file__).parent / "golden"
RECORDED_SIZE = Variant(width=48, depth=3, heads=3, layer_scale=0.1)
RECORDED_DISTANCES = {"smoothl1": "smooth_l1", "l1": "l1", "l2": "l2", "negcosine": "negative_cosine"}

both_attentions = pytest.mark.parametrize("sdpa", [False, True])


def load_student(*, sdpa: bool) -> torch_models.Student:
  student = torch_models.Student(RECORDED_SIZE, grid=(8, 8), patch_size=8, out_dim=32, sdpa=sdpa)
  student.load_state_dict(torch.load(GOLDEN / "student_tiny.pth", weights_only=True)["model"])
  return student


def load_classifier(*, sdpa: bool) -> torch_models.Classifier:
  classifier = torch_models.Classifier(RECORDED_SIZE, grid=(8, 8), patch_size=8, num_classes=7, sdpa=sdpa)
  classifier.load_state_dict(torch.load(GOLDEN / "finetune_tiny.pth", weights_only=True)["model"])
  return classifier


def load_teacher(*, sdpa: bool) -> torch_models.ClipVision:
  return torch_models.load_clip(torch.load(GOLDEN / "clip_vision_tiny.pth", weights_only=True), sdpa=sdpa)


def tensor(array: np.ndarray) -> torch.Tensor:
  return torch.from_numpy(array)


def adam_settings(recorded) -> dict:
  return {
    "betas": tuple(recorded["betas"].tolist()),
    "eps": float(recorded["eps"]),
    "weight_decay": float(recorded["weight_decay"]),
  }


def relative_error(actual: torch.Tensor, expected: np.ndarray) -> float:
  return float(np.linalg.norm(actual.detach().numpy() - expected) / np.linalg.norm(expected))


def test_a_machine_without_pytorch_is_told_how_to_install_it(monkeypatch):
  require_torch()
  monkeypatch.setitem(sys.modules, "torch", None)  # which is how Python marks what cannot be imported
  with pytest.raises(InputError, match=r"needs PyTorch: pip install -e '.\[test\]'"):
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


def random_tokens(*shape: int) -> torch.Tensor:
  return tensor(np.random.default_rng(0).normal(1, 2, shape).astype(np.float32))


def test_first_token_merges_where_it_is_not_protected():
  tokens = random_tokens(2, 30, 8)
  tokens[:, 0] = 1.1 * tokens[:, 7]  # the closest pair of all
  for protect_first in (True, False):
    group, num_groups = torch_reference.group_tokens(tokens, 1, 1, protect_first=protect_first)
    assert num_groups == 29
    assert (group[:, 0] == group[:, 7]).tolist() == [not protect_first] * 2
    # At most half of them merge each time: 30, 15, 8, 4; or half of all but the first: 30, 16, 9, 5.
    _, fewest = torch_reference.group_tokens(tokens, 99, 3, protect_first=protect_first)
    assert fewest == (5 if protect_first else 4)


def test_token_wise_loss_counts_masked_positions_and_normalised_targets():
  online, target = random_tokens(2, 3, 9, 16)
  mask = torch.arange(9) < torch.tensor([[4], [7], [0]])
  loss = torch_reference.dtm_loss(online, target, [], [], distance="l1", mask=mask, normalize_targets=True)
  v = target.double().numpy()
  v = (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, ddof=1, keepdims=True) + 1e-6)
  distances = np.abs(online.numpy() - v).mean(-1)
  expected = np.concatenate([distances[0, :4], distances[1, :7], distances[2, :0]])
  assert loss.item() == pytest.approx(expected.mean(), rel=7e-7)  # measured 7.8e-8


def test_targets_are_normalised_after_morphing():
  online, target = random_tokens(2, 3, 16, 8)
  group, num_groups = torch_reference.group_tokens(target, 5, 2)
  online_means, target_means = (torch_reference.morph(x, group, num_groups) for x in (online, target))
  normal = torch_reference.normalize_tokens(target_means)
  loss = torch_reference.dtm_loss(online, target, [5], [2], distance="l2", normalize_targets=True)
  assert loss.item() == pytest.approx(float(((online_means - normal) ** 2).mean()), rel=1e-6)  # measured 1.4e-7


def test_schedules_per_image_equal_each_image_alone():
  online, target = random_tokens(2, 3, 16, 8)
  merges, iterations = [[2, 8], [0, 3], [5, 1]], [[3, 5], [1, 14], [2, 9]]
  together = torch_reference.dtm_loss(online, target, merges, iterations)
  alone = [torch_reference.dtm_loss(online[[i]], target[[i]], merges[i], iterations[i]) for i in range(3)]
  assert together.item() == pytest.approx(np.mean(alone), rel=7e-7)  # measured 7.1e-8


MANY_SCHEDULES = [(1, 110), (7, 9), (9, 12), (98, 5)]  # merges, iterations: the groups pass through all rooms


@pytest.mark.parametrize("protect_first", [True, False])
def test_random_splits_equal_those_of_xla(protect_first):
  tokens, keys = random_tokens(3, 128, 16), jax.random.split(jax.random.key(1), 3)
  draw = jax.vmap(split_priorities, (None, 0, None))
  priorities = tensor(np.array(jax.vmap(lambda key: draw(key, jnp.arange(110), 128))(keys)))
  group = jax.vmap(
    functools.partial(dtm_jax.group_tokens, protect_first=protect_first, split="random"), (0, None, None)
  )
  for merges, iterations in MANY_SCHEDULES:
    labels = group(tokens.numpy(), merges, iterations, key=keys)
    groups, num_groups = torch_reference.group_tokens(
      tokens, merges, iterations, protect_first=protect_first, priorities=priorities
    )
    np.testing.assert_array_equal(torch_reference.smallest_member(groups), labels)
    assert len(np.unique(labels[0])) == num_groups
  in_order, _ = torch_reference.group_tokens(tokens, 9, 12)
  shuffled, _ = torch_reference.group_tokens(tokens, 9, 12, priorities=priorities)
  assert not torch.equal(in_order, shuffled)


@pytest.mark.parametrize("per_image", [False, True])
def test_the_loss_of_random_splits_equals_that_of_xla(per_image):
  online, target = random_tokens(2, 3, 40, 8)
  keys = jax.random.split(jax.random.key(2), 3)
  draws = jax.vmap(lambda key: jnp.stack([jax.random.fold_in(key, draw) for draw in range(2)]))(keys)
  one = jax.vmap(split_priorities, (None, 0, None))
  priorities = tensor(np.array(jax.vmap(jax.vmap(lambda key: one(key, jnp.arange(9), 40)))(draws)))
  schedule = (
    np.array([[3, 9], [12, 2], [0, 1]] if per_image else [5, 9]),
    np.array([[2, 4]] * 3 if per_image else [7, 3]),
  )
  ours = torch_reference.dtm_loss(online, target, *(x.tolist() for x in schedule), priorities=priorities)
  expected = dtm_jax.dtm_loss(online.numpy(), target.numpy(), *schedule, split="random", image_keys=keys)
  assert ours.item() == pytest.approx(float(expected), rel=2e-6)  # measured 2.2e-7
  assert ours.item() != pytest.approx(torch_reference.dtm_loss(online, target, *(x.tolist() for x in schedule)).item())


def test_branch_scales_multiply_the_two_branches_of_each_block():
  student = load_student(sdpa=False)
  images, scales = torch.linspace(-2, 2, 2 * 3 * 64 * 64).reshape(2, 3, 64, 64), torch.ones(3, 2, 2)
  scales[1, 0, 1], scales[2, 1, 0] = 0, 2
  with torch.no_grad():
    together = student(images, None, scales)
    for image, (block, gamma, factor) in enumerate([(2, "gamma_2", 2), (1, "gamma_1", 0)]):
      changed = load_student(sdpa=False)
      getattr(changed.blocks[block], gamma).mul_(factor)
      torch.testing.assert_close(together[image], changed(images)[image], rtol=0, atol=1e-6)
      assert (together[image] - student(images)[image]).abs().max() > 1e-3


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
  optimizer = torch_reference.make_optimizer(student, **adam_settings(recorded))
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


@both_attentions
def test_six_fine_tuning_steps_follow_the_recorded_trajectory(sdpa):
  recorded = np.load(GOLDEN / "finetune_trajectory.npz")
  classifier = load_classifier(sdpa=sdpa)
  decay = round(float(recorded["layer_decay"]), 6)  # recorded in float32
  optimizer = torch_reference.make_optimizer(classifier, **adam_settings(recorded), layer_decay=decay)
  for step in range(6):
    loss, _, logits = torch_reference.finetune_step(
      classifier,
      optimizer,
      tensor(recorded["images_nchw"][step]),
      tensor(recorded["targets"][step]),
      lr=float(recorded["lr"][step]),
      max_grad_norm=float(recorded["max_grad_norm"]),
    )
    assert loss.item() == pytest.approx(recorded["losses"][step], rel=1e-6)  # measured 1.2e-7
    np.testing.assert_allclose(logits, recorded["logits"][step], rtol=0, atol=1e-6)  # measured 1.5e-7
  for name, parameter in classifier.named_parameters():
    expected = recorded[f"final/{name}"]
    np.testing.assert_allclose(parameter.detach(), expected, rtol=0, atol=5e-7, err_msg=name)  # measured 6e-8


def test_layer_decay_and_weight_decay_act_on_the_recorded_names():
  recorded = np.load(GOLDEN / "finetune_trajectory.npz")
  named = dict(load_classifier(sdpa=False).named_parameters())
  assert named.keys() == set(recorded["names"])
  for name, scale, decayed in zip(recorded["names"], recorded["lr_scale"], recorded["decayed"], strict=True):
    assert torch_reference.lr_scale(name, RECORDED_SIZE.depth, 0.65) == scale, name
    assert torch_reference.is_decayed(name, named[name]) == decayed, name
  assert torch_reference.lr_scale("mask_token", 3, 0.5) == torch_reference.lr_scale("pos_embed", 3, 0.5) == 0.5**4
  assert torch_reference.lr_scale("rel_pos_bias.relative_position_bias_table", 3, 0.5) == 1


def test_decay_acts_on_the_recorded_names():
  recorded = np.load(GOLDEN / "pretrain_trajectory.npz")
  named = dict(load_student(sdpa=False).named_parameters())
  decayed = {name for name, parameter in named.items() if torch_reference.is_decayed(name, parameter)}
  assert decayed == set(recorded["decay_names"])
  assert named.keys() - decayed == set(recorded["no_decay_names"])


def first_step(teacher, **options) -> tuple[float, float]:
  """Loss and gradient norm of the recorded run's first step."""
  recorded = np.load(GOLDEN / "pretrain_trajectory.npz")
  student = load_student(sdpa=False)
  images, mask = tensor(recorded["images_nchw"][0]), tensor(recorded["masks"][0])
  draws = recorded["per_iteration"][0].tolist(), recorded["iterations"][0].tolist()
  optimizer = torch_reference.make_optimizer(student, **adam_settings(recorded))
  results = torch_reference.train_step(student, teacher, optimizer, images, mask, *draws, lr=1e-3, **options)
  assert all(parameter.dtype == torch.float32 for parameter in student.parameters())
  return tuple(result.item() for result in results)


def test_targets_may_be_given_instead_of_a_teacher():
  teacher = load_teacher(sdpa=False)
  with torch.no_grad():
    target = teacher(tensor(np.load(GOLDEN / "pretrain_trajectory.npz")["images_nchw"][0]))
  assert first_step(target) == first_step(teacher)


def test_masked_positions_alone_may_count():
  target = random_tokens(len(np.load(GOLDEN / "pretrain_trajectory.npz")["masks"][0]), 64, 32)
  recorded = np.load(GOLDEN / "pretrain_trajectory.npz")
  mask, draws = (
    tensor(recorded["masks"][0]),
    (recorded["per_iteration"][0].tolist(), recorded["iterations"][0].tolist()),
  )
  online = load_student(sdpa=False)(tensor(recorded["images_nchw"][0]), mask)
  expected = torch_reference.dtm_loss(online, target, *draws, mask=mask)
  assert first_step(target, loss_on="masked")[0] == expected.item() != first_step(target)[0]


def test_bfloat16_step_is_near_the_float32_one():
  teacher = load_teacher(sdpa=False)
  (loss, grad_norm), (loss32, grad_norm32) = first_step(teacher, dtype=torch.bfloat16), first_step(teacher)
  assert 0 < abs(loss / loss32 - 1) < 5e-2  # measured 1.2e-2
  assert 0 < abs(grad_norm / grad_norm32 - 1) < 5e-2  # measured 8e-3


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
  expected = modeling_beit.BeitRelativePositionBias.generate_relative_position_index((3, 5))
  np.testing.assert_array_equal(torch_models.RelativePositionBias((3, 5), 1).relative_position_index, expected)


def with_random_parameters(model: torch.nn.Module) -> torch.nn.Module:
  """New biases are 0 and new scales 1: nothing would notice a swap."""
  torch.manual_seed(0)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
  return model


# Names of the hub's BEiT and CLIP checkpoints, by the prefix of ours.
BEIT_TOP = {
  "cls_token": "embeddings.cls_token",
  "mask_token": "embeddings.mask_token",
  "patch_embed.proj": "embeddings.patch_embeddings.projection",
  "rel_pos_bias": "encoder.relative_position_bias",
  "norm": "layernorm",
  "fc_norm": "pooler.layernorm",
}
BEIT_BLOCK = {
  "norm1": "layernorm_before",
  "attn.qkv": "attention.attention.{}",
  "attn.q_bias": "attention.attention.query.bias",
  "attn.v_bias": "attention.attention.value.bias",
  "attn.relative_position_bias_table": "attention.attention.relative_position_bias.relative_position_bias_table",
  "attn.proj": "attention.output.dense",
  "gamma_1": "lambda_1",
  "norm2": "layernorm_after",
  "mlp.fc1": "intermediate.dense",
  "mlp.fc2": "output.dense",
  "gamma_2": "lambda_2",
}
CLIP_TOP = {
  "class_embedding": "embeddings.class_embedding",
  "positional_embedding": "embeddings.position_embedding.weight",
  "conv1": "embeddings.patch_embedding",
  "ln_pre": "pre_layrnorm",  # sic
  "ln_post": "post_layernorm",
}
CLIP_BLOCK = {
  "ln_1": "layer_norm1",
  "attn.in_proj_weight": "self_attn.{}_proj.weight",
  "attn.in_proj_bias": "self_attn.{}_proj.bias",
  "attn.out_proj": "self_attn.out_proj",
  "ln_2": "layer_norm2",
  "mlp.c_fc": "mlp.fc1",
  "mlp.c_proj": "mlp.fc2",
}


def renamed(name: str, top: dict[str, str], block: dict[str, str], blocks: str, their_blocks: str) -> str:
  table, before = top, ""
  if name.startswith(f"{blocks}."):
    i, name = name.removeprefix(f"{blocks}.").split(".", maxsplit=1)
    table, before = block, f"{their_blocks}.{i}."
  prefix = next(prefix for prefix in table if name == prefix or name.startswith(f"{prefix}."))
  return before + table[prefix] + name.removeprefix(prefix)


def save_for_transformers(folder, config, state: dict[str, torch.Tensor], parts: tuple[str, str, str]) -> None:
  """Config and weights as the hub has them; stacked projections, whose name has a gap, in their three parts."""
  split = {}
  for name, value in state.items():
    named = zip([name.format(part) for part in parts], value.chunk(3), strict=True) if "{}" in name else [(name, value)]
    split |= {name: value.clone() for name, value in named}
  config.save_pretrained(folder)
  save_file(split, folder / "model.safetensors")


def test_both_beits_equal_transformers(tmp_path):
  images = random_tokens(2, 3, 32, 32)
  mask = torch.arange(16) % 3 == torch.tensor([[0], [1]])
  size = Variant(width=24, depth=2, heads=3, layer_scale=0.1)
  for kind in (torch_models.Student, torch_models.Classifier):
    is_student = kind is torch_models.Student
    model = with_random_parameters(kind(size, (4, 4), 8, 5))
    config = transformers.BeitConfig(
      **{"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96},
      **{"image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-6, "use_mask_token": is_student},
      **{"use_relative_position_bias": True, "use_shared_relative_position_bias": is_student},
      use_mean_pooling=not is_student,
    )
    state = {
      renamed(name, BEIT_TOP, BEIT_BLOCK, "blocks", "encoder.layer"): value
      for name, value in model.state_dict().items()
      if not name.startswith(("lm_head", "head")) and not name.endswith("relative_position_index")
    }
    save_for_transformers(tmp_path, config, state, ("query", "key", "value"))
    beit, loading = transformers.BeitModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    with torch.no_grad():
      if is_student:
        actual, expected = model.features(images, mask), beit(images, bool_masked_pos=mask).last_hidden_state
      else:
        expected = beit(images)
        np.testing.assert_allclose(model.features(images), expected.last_hidden_state, rtol=0, atol=4e-6)  # 4.8e-7
        actual, expected = model(images), model.head(expected.pooler_output)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=7e-6)  # measured 1e-6


def test_clip_tower_equals_transformers(tmp_path):
  tower = with_random_parameters(torch_models.ClipVision((4, 4), 8, 128, 2, 5))
  config = transformers.CLIPVisionConfig(
    **{"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"image_size": 32, "patch_size": 8, "projection_dim": 5},
  )
  state = {
    f"vision_model.{renamed(name, CLIP_TOP, CLIP_BLOCK, 'transformer.resblocks', 'encoder.layers')}": value
    for name, value in tower.state_dict().items()
    if name != "proj"
  }
  state["visual_projection.weight"] = tower.proj.detach().T.contiguous()
  save_for_transformers(tmp_path, config, state, "qkv")
  clip, loading = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path, output_loading_info=True)
  assert not loading["missing_keys"] and not loading["unexpected_keys"]
  images = random_tokens(2, 3, 32, 32)
  with torch.no_grad():
    features, expected = tower.features(images), clip(images)
    np.testing.assert_allclose(features[:, 0] @ tower.proj, expected.image_embeds, rtol=0, atol=1e-5)  # 1.9e-6
    last = clip.vision_model.post_layernorm(expected.last_hidden_state)
    np.testing.assert_allclose(features, last, rtol=0, atol=1e-5)  # 1.7e-6
    np.testing.assert_allclose(tower(images), clip.visual_projection(last[:, 1:]), rtol=0, atol=2e-5)  # 2.4e-6


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


def test_new_classifier_starts_as_the_method_says():
  torch.manual_seed(0)
  classifier = torch_models.Classifier(RECORDED_SIZE, grid=(8, 8), patch_size=8, num_classes=1000)
  fc1 = classifier.blocks[0].mlp.fc1.weight
  assert fc1.std().item() == pytest.approx(0.02, rel=0.02)  # not cut at 0.02
  assert classifier.head.weight.std().item() == pytest.approx(0.02 * 0.001, rel=0.02)
