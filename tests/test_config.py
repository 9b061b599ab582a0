"""Every setting is checked by name, and every shipped config resolves."""

import pathlib
import re

import pytest

from dtm_jax import config as config_lib
from dtm_jax.errors import InputError
from dtm_jax.workdir import settings_that_differ

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def namespace(path: pathlib.Path) -> dict:
  """What a config file defines."""
  defined: dict = {}
  exec(compile(path.read_text(), path, "exec"), defined)
  return defined


def load(path: pathlib.Path, form: str = ""):
  return namespace(path)["get_config"](form)


def sets(path: pathlib.Path) -> list[str]:
  """The data sets that a form may name, [""] where there is no choice."""
  return list(namespace(path).get("SETS", [""]))


@pytest.mark.parametrize(("path", "name"), [(path, name) for path in CONFIGS for name in sets(path)])
def test_shipped_configs_resolve_and_have_a_smoke_form(path, name):
  config_lib.resolve(load(path, name))
  smoke = config_lib.resolve(load(path, f"{name},smoke" if name else "smoke"))
  assert smoke.run.steps == 2 and smoke.data.source == "synthetic" and smoke.model.variant == "tiny"


def test_vitb_is_the_papers_recipe():
  config = config_lib.resolve(load(ROOT / "configs" / "vitb.py"))
  assert config.num_tokens == config.morphing_budget == 196
  assert config.peak_lr == 1.5e-3
  images = 1_281_167
  assert config.total_steps(images) == 300 * 625 and config.warmup_steps(images) == 10 * 625
  assert (config.optim.betas, config.optim.clip_norm, config.optim.weight_decay) == ((0.9, 0.98), 3.0, 0.05)
  assert (config.morphing.draws, config.morphing.max_iterations, config.data.num_masked) == (2, 14, 75)


def test_finetune_vitb_is_the_papers_recipe():
  config = config_lib.resolve(load(ROOT / "configs" / "finetune_vitb.py"))
  images = 1_281_167
  assert config.total_steps(images) == 100 * 1251 and config.warmup_steps(images) == 20 * 1251
  assert (config.peak_lr, config.optim.layer_decay, config.optim.weight_decay) == (5e-4, 0.65, 0.05)
  assert (config.optim.betas, config.optim.clip_norm, config.optim.min_lr) == ((0.9, 0.999), None, 1e-6)
  assert (config.finetune.mixup, config.finetune.cutmix, config.finetune.label_smoothing) == (0.8, 1.0, 0.1)
  assert (config.finetune.erase_prob, config.model.drop_path) == (0.25, 0.1)
  assert (config.data.rand_augment, config.data.crop_scale) == ("m9-mstd0.5-inc1", (0.08, 1.0))


def test_finetune_vitb_at_384_pixels_as_its_page_says():
  path = ROOT / "configs" / "finetune_vitb.py"
  words = re.findall(r"--config\.(\S+)=(\S+)", path.read_text().partition("At 384 pixels")[2].partition('"""')[0])
  changes = {name: value if name == "finetune.init" else float(value) for name, value in words}
  config = config_lib.resolve(_with(load(path), changes | {"data.image_size": int(changes["data.image_size"])}))
  assert (config.grid, config.data.eval_crop, config.run.epochs) == ((24, 24), 1.0, 30)


def test_shipped_vitb_states_the_base_recipe():
  # The pages of S and L state only what differs from it.
  assert config_lib.resolve(load(ROOT / "configs" / "vitb.py")) == config_lib.resolve(
    _with(config_lib.base(), {"morphing.budget": 196})
  )


def _with(config, changes):
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  return config


def test_learning_rate_follows_the_square_root_of_the_batch():
  config = _with(config_lib.base(), {"data.batch_size": 512})
  assert config_lib.resolve(config).peak_lr == pytest.approx(0.75e-3)


BAD = [
  ({"data.image_size": 225}, "config.data.image_size=225 is not a multiple of config.model.patch_size=16; 224 or 240"),
  ({"data.num_masked": 197}, "config.data.num_masked=197 is over the 196 patches"),
  ({"data.batch_size": 0}, "config.data.batch_size=0 must be positive"),
  ({"data.batch_size": True}, "config.data.batch_size=True must be of type int, not bool"),
  ({"data.source": "web"}, "config.data.source='web' is not one of digits, tfds, folder, synthetic"),
  ({"data.source": "folder"}, "needs config.data.path"),
  ({"optim.name": "adam"}, "config.optim.name='adam' is not one of adamw, sgd"),
  ({"optim.momentum": 1.0}, "config.optim.momentum=1.0 must be in [0, 1)"),
  ({"data.crop_scale": (0.5,)}, "must have 2 elements"),
  ({"data.crop_scale": (0.9, 0.5)}, "0 < low <= high <= 1"),
  ({"data.colour": 1}, "config.data.colour does not exist; config.data has source"),
  ({"model.variant": "H"}, "config.model.variant='H' is not one of"),
  ({"model.attention": "cudnn", "model.dtype": "float32"}, "'cudnn' needs config.model.dtype"),
  ({"teacher.weights": ""}, "needs config.teacher.weights"),
  ({"morphing.budget": 197}, "config.morphing.budget=197 is over the 196 tokens"),
  ({"morphing.fixed_num_merged": 197}, "over the budget of 196"),
  ({"morphing.granularity": "group"}, "config.morphing.group_size goes with"),
  ({"morphing.granularity": "group", "morphing.group_size": 3}, "does not divide config.data.batch_size=2048"),
  ({"morphing.loss_on": "masked", "data.num_masked": 0}, "needs config.data.num_masked > 0"),
  ({"teacher.kind": "hog", "teacher.normalization": "clip"}, "is for kind 'clip'"),
  ({"optim.accumulate_steps": 3}, "not divisible by config.optim.accumulate_steps=3"),
  ({"run.epochs": None}, "give config.run.steps or config.run.epochs"),
  ({"run.seed": -1}, "config.run.seed=-1"),
  ({"mesh.fsdp": 0}, "config.mesh sizes (-1, 0, 1) must be positive, or -1"),
  ({"mesh.fsdp": -1}, "only one of config.mesh.data, fsdp and tensor may be -1"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_settings_are_named_in_one_line(changes, message):
  with pytest.raises(InputError) as error:
    config_lib.resolve(_with(config_lib.base(), changes))
  assert message in str(error.value) and "\n" not in str(error.value)


def test_missing_settings_are_named():
  config = config_lib.base()
  del config.data.flip
  with pytest.raises(InputError, match="config.data.flip is missing"):
    config_lib.resolve(config)


def test_json_and_back():
  config = config_lib.resolve(load(ROOT / "configs" / "quickstart.py"))
  assert config_lib.from_json(config_lib.to_json(config) | {"command": "x"}) == config


def test_what_a_resumed_run_may_change():
  old = config_lib.resolve(config_lib.base())
  free = _with(config_lib.base(), {"run.steps": 7, "data.num_workers": 0, "model.scan_layers": True, "eval.knn": False})
  less_memory = _with(free, {"optim.accumulate_steps": 2, "model.remat": True})  # as a run without memory is told to
  assert settings_that_differ(old, config_lib.resolve(less_memory)) == {}
  other = _with(config_lib.base(), {"run.seed": 7, "morphing.draws": 1})
  assert settings_that_differ(old, config_lib.resolve(other)) == {
    "config.run.seed": (0, 7),
    "config.morphing.draws": (2, 1),
  }


def test_every_setting_is_read_somewhere():
  """No dead options: each field's name occurs in the code beyond the schema."""
  code = "\n".join(path.read_text() for path in (ROOT / "dtm_jax").rglob("*.py") if path.name != "config.py")
  schema = (ROOT / "dtm_jax" / "config.py").read_text()
  resolved = schema[schema.index("class Config:") :]
  config = config_lib.base()
  unread = [
    f"{section}.{name}"
    for section in config
    if section != "task"
    for name in config[section]
    if f".{name}" not in code + resolved
  ]
  assert not unread
