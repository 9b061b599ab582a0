"""Every teacher through the factory, on the tokens that it should give. Measured errors stand beside the tolerances."""

import dataclasses
import hashlib
import logging
import pathlib
import sys

import huggingface_hub
import jax
import numpy as np
import pytest
import torch

from dtm_jax import config as config_lib
from dtm_jax.config import DataConfig
from dtm_jax.convert import load_torch
from dtm_jax.errors import InputError
from dtm_jax.models.vit import ViT
from dtm_jax.teachers import create_teacher

GOLDEN = pathlib.Path(__file__).parent / "golden"
CLIP, STUDENT = str(GOLDEN / "clip_vision_tiny.pth"), str(GOLDEN / "student_tiny.pth")
UNIT = np.random.default_rng(0).uniform(size=(2, 64, 64, 3)).astype(np.float32)


def make_config(kind: str, weights: str = "", **sections) -> config_lib.Config:
  """A float32 run on 64 px images with 8 px patches, as the recorded weights are for."""
  config = config_lib.base()
  config.data.update(image_size=64, num_masked=24)
  config.model.update(patch_size=8, dtype="float32")
  config.teacher.update(kind=kind, weights=weights, dtype="float32")
  for section, values in sections.items():
    config[section].update(values)
  return config_lib.resolve(config)


def no_work_folder(path: pathlib.Path):
  raise AssertionError(f"{path} is not a work folder")


def refusal(config: config_lib.Config) -> str:
  with pytest.raises(InputError) as caught:
    create_teacher(config, no_work_folder)
  assert "\n" not in str(caught.value)
  return str(caught.value)


def unit_images(nchw: np.ndarray, mean, std) -> np.ndarray:
  """Undoes the normalisation of recorded inputs; they need not lie in [0, 1]."""
  return (nchw.transpose(0, 2, 3, 1) * np.asarray(std) + np.asarray(mean)).astype(np.float32)


@pytest.mark.parametrize("normalization", ["student", "clip"])
def test_clip_gives_the_recorded_tokens_after_its_own_normalisation(normalization):
  # The numbers of OpenAI's README, written out: the other pair is ImageNet's.
  mean, std = {
    "student": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
  }[normalization]
  recorded = np.load(GOLDEN / "clip_vision_tiny_io.npz")
  teacher, params = create_teacher(make_config("clip", CLIP, teacher={"normalization": normalization}), no_work_folder)
  tokens = jax.jit(teacher.apply)(params, unit_images(recorded["image_nchw"], mean, std))
  assert teacher.out_dim == tokens.shape[-1] == 32
  np.testing.assert_allclose(tokens, recorded["tokens"], rtol=0, atol=1.5e-5)  # measured 1.9e-6


def test_sha256_of_the_weights_is_kept_and_logged(caplog):
  with caplog.at_level(logging.INFO, logger="absl"):
    teacher, _ = create_teacher(make_config("clip", CLIP), no_work_folder)
  expected = hashlib.sha256(pathlib.Path(CLIP).read_bytes()).hexdigest()
  assert teacher.weights_sha256 == expected
  assert expected in caplog.text


def test_release_checkpoint_gives_the_recorded_features():
  recorded = np.load(GOLDEN / "student_tiny_features.npz")
  config = make_config("checkpoint", STUDENT)
  teacher, params = create_teacher(config, no_work_folder)
  tokens = jax.jit(teacher.apply)(params, unit_images(recorded["image_nchw"], config.data.mean, config.data.std))
  assert teacher.out_dim == tokens.shape[-1] == 48
  assert teacher.weights_sha256 == hashlib.sha256(pathlib.Path(STUDENT).read_bytes()).hexdigest()
  np.testing.assert_allclose(tokens, recorded["features"][:, 1:], rtol=0, atol=1.5e-5)  # measured 1.9e-6


def test_work_folder_gives_what_its_file_gives(tmp_path):
  _, model, params = load_torch(STUDENT)

  def restore_tower(path: pathlib.Path):
    assert path == tmp_path
    return ViT(**model, layer_scale=0.1, drop_path=0.1, dtype="bfloat16"), params, DataConfig(mean=(0.1, 0.2, 0.3))

  restored, restored_params = create_teacher(make_config("checkpoint", str(tmp_path)), restore_tower)
  assert restored.mean == (0.1, 0.2, 0.3)  # of the run that trained it
  restored = dataclasses.replace(restored, mean=make_config("pixels").data.mean)
  loaded, loaded_params = create_teacher(make_config("checkpoint", STUDENT), no_work_folder)
  assert restored.weights_sha256 == ""
  np.testing.assert_array_equal(
    jax.jit(restored.apply)(restored_params, UNIT), jax.jit(loaded.apply)(loaded_params, UNIT)
  )


def test_pixels_are_the_targets_of_masked_autoencoders():
  """Computed in PyTorch as MAE's paper says: by unfold, with the unbiased variance."""
  teacher, params = create_teacher(make_config("pixels"), no_work_folder)
  assert params == {}
  images = UNIT[:, :, :48]
  unfolded = torch.nn.functional.unfold(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), 8, stride=8)
  patches = unfolded.reshape(2, 3, 64, -1).permute(0, 3, 2, 1).reshape(2, 48, 192)
  expected = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
  tokens = jax.jit(teacher.apply)(params, images)
  assert teacher.out_dim == 192
  np.testing.assert_allclose(tokens, expected, rtol=0, atol=5e-6)  # measured 6e-7


def test_hog_has_the_patch_size_of_the_student():
  teacher, params = create_teacher(make_config("hog"), no_work_folder)
  assert params == {}
  assert jax.eval_shape(teacher.apply, params, UNIT).shape == (2, 64, teacher.out_dim) == (2, 64, 108)


@pytest.mark.parametrize("kind", ["clip", "checkpoint"])
def test_bfloat16_teachers_give_float32_tokens_close_to_float32_ones(kind):
  weights = {"clip": CLIP, "checkpoint": STUDENT}[kind]
  exact, params = create_teacher(make_config(kind, weights), no_work_folder)
  fast, _ = create_teacher(make_config(kind, weights, teacher={"dtype": "bfloat16"}), no_work_folder)
  expected, actual = jax.jit(exact.apply)(params, UNIT), jax.jit(fast.apply)(params, UNIT)
  assert actual.dtype == expected.dtype == np.float32
  assert np.abs(actual - expected).max() > 1e-4
  np.testing.assert_allclose(actual, expected, rtol=0, atol=0.15)  # measured 0.018


def test_weights_of_the_other_kind_are_refused():
  assert "config.teacher.kind='checkpoint' takes it" in refusal(make_config("clip", STUDENT))
  assert "config.teacher.kind='clip' takes it" in refusal(make_config("checkpoint", CLIP))


def test_other_patches_are_refused():
  settings = {"model": {"patch_size": 16}, "data": {"num_masked": 4}}
  assert "patches have 8 pixels" in refusal(make_config("clip", CLIP, **settings))
  assert "sees 8 x 8 patches, the student 4 x 4" in refusal(make_config("checkpoint", STUDENT, **settings))


def test_larger_images_interpolate_the_positions_of_clip():
  teacher, params = create_teacher(make_config("clip", CLIP, data={"image_size": 96}), no_work_folder)
  images = np.random.default_rng(0).uniform(size=(1, 96, 96, 3)).astype(np.float32)
  assert jax.eval_shape(teacher.apply, params, images).shape == (1, 144, 32)


def test_missing_weights_are_refused(tmp_path):
  for kind in ("clip", "checkpoint"):
    assert "absent.pt does not exist" in refusal(make_config(kind, str(tmp_path / "absent.pt")))
  assert "no weights" in refusal(make_config("clip", str(tmp_path)))


class Hub:
  """huggingface_hub's two functions, over a dict of files instead of a network."""

  def __init__(self, monkeypatch, tmp_path, files: dict[str, bytes], cached: bool = False, online: bool = True):
    self.errors = huggingface_hub.errors
    self.files, self.folder, self.cached, self.online, self.asked = files, tmp_path, cached, online, []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", self.look)

  def place(self, file: str) -> str:
    (self.folder / file).write_bytes(self.files[file])
    return str(self.folder / file)

  def look(self, name: str, file: str) -> str | None:
    return self.place(file) if self.cached and file in self.files else None

  def download(self, name: str, file: str) -> str:
    self.asked.append((name, file))
    if not self.online:
      raise self.errors.LocalEntryNotFoundError("cannot find the files\nin the cache")
    if file not in self.files:
      raise self.errors.EntryNotFoundError(f"no {file}")
    return self.place(file)


def test_hub_name_takes_the_first_file_that_is_there(monkeypatch, tmp_path):
  hub = Hub(monkeypatch, tmp_path, {"pytorch_model.bin": pathlib.Path(CLIP).read_bytes(), "config.json": b"{}"})
  teacher, _ = create_teacher(make_config("clip", "openai/clip-vit-base-patch16"), no_work_folder)
  assert teacher.out_dim == 32
  assert ("openai/clip-vit-base-patch16", "config.json") in hub.asked
  assert (tmp_path / "config.json").exists()


def test_cached_hub_file_needs_no_network(monkeypatch, tmp_path):
  hub = Hub(monkeypatch, tmp_path, {"pytorch_model.bin": pathlib.Path(CLIP).read_bytes()}, cached=True, online=False)
  create_teacher(make_config("clip", "openai/clip-vit-base-patch16"), no_work_folder)
  assert hub.asked == []


def test_hub_failures_say_what_to_do(monkeypatch, tmp_path):
  config = make_config("clip", "openai/clip-vit-base-patch16")
  Hub(monkeypatch, tmp_path, {}, online=False)
  assert "cannot find the files); download it by hand" in refusal(config)
  Hub(monkeypatch, tmp_path, {})
  assert "has none of model.safetensors" in refusal(config)


def test_hub_library_that_is_not_installed_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  assert "pip install huggingface_hub" in refusal(make_config("clip", "openai/clip-vit-base-patch16"))
