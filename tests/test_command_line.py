"""Which config and work folder a command line means."""

import pathlib

import pytest

from dtm_jax import command_line
from dtm_jax.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:.*load_module:DeprecationWarning")


def parse(*words: str):
  """Config and work folder."""
  return command_line.parse(["main", *words])[:2]


def test_the_default_is_the_quickstart():
  config, workdir = parse()
  assert config.data.source == "digits"
  assert workdir == pathlib.Path("runs/quickstart")


def test_overrides_reach_every_kind_of_setting():
  config, workdir = parse(
    "--config.run.steps=3", "--config.morphing.budget=9", "--config.data.crop_scale=(0.5,1.0)", "--workdir=x"
  )
  assert (config.run.steps, config.morphing.budget, config.data.crop_scale) == (3, 9, (0.5, 1.0))
  assert workdir == pathlib.Path("x")


def test_shipped_configs_are_found_from_any_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  config, workdir = parse("--config=configs/vitl.py:smoke", "--config.run.seed=7")
  assert (config.run.steps, config.run.seed) == (2, 7)
  assert workdir == pathlib.Path("runs/vitl")


def test_a_page_of_another_folder_is_no_shipped_one(tmp_path, monkeypatch):
  """A run of days would be another one than was meant."""
  monkeypatch.chdir(tmp_path)
  assert parse("--config=vitl.py")[0].model.variant == "L"
  for path in (f"{tmp_path}/vitl.py", "experiments/vitl.py:smoke", "../configs/vitl.py"):
    with pytest.raises(InputError, match="vitl.py does not exist; name a file of your own"):
      parse(f"--config={path}")


def test_a_file_that_is_there_goes_before_a_shipped_one(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  body = "from dtm_jax import config\n\ndef get_config():\n  c = config.base()\n  c.run.seed = 5\n  return c\n"
  pathlib.Path("vitb.py").write_text(body)
  assert parse("--config=vitb.py")[0].run.seed == 5


def test_a_command_with_options_of_its_own_has_no_work_folder():
  assert command_line.parse_config(["record", "--config.run.steps=3"]).run.steps == 3
  with pytest.raises(InputError, match="Unknown command line flag 'workdir'"):
    command_line.parse_config(["record", "--workdir=x"])


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ("vitb.py:huge", "form 'huge' of the config is none; give"),
    ("transfer.py", "form '' of the config is no data set; give"),
  ],
)
def test_a_form_that_does_not_exist_is_one_line(config, message):
  with pytest.raises(InputError) as caught:
    parse(f"--config=configs/{config}")
  assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
