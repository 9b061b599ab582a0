"""From the words of a command line to a config and a work folder."""

import pathlib
from typing import NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from dtm_jax.errors import InputError

_PACKAGE = pathlib.Path(__file__).parent
# The configs lie beside the package in a checkout and inside it when installed.
_CONFIG_FOLDER = next(folder for folder in (_PACKAGE.parent / "configs", _PACKAGE / "configs") if folder.is_dir())


class Plan(NamedTuple):
  """How a step is compiled without being run: see `ahead_of_time`.

  Attributes:
    topology: the devices, "cpu:8" or "v5e:4x4"; "" for those of this machine.
    chip: what they can do, see `roofline.parse_chip`; "" for what is known of them.
    mfu: share of their FLOP/s that matrix products are assumed to reach.
  """

  topology: str
  chip: str
  mfu: float


class Command(NamedTuple):
  """What a command line asks for.

  Attributes:
    config: of the run, unresolved.
    workdir: of the run.
    plan: where the step is only to be compiled, else None.
  """

  config: ConfigDict
  workdir: pathlib.Path
  plan: Plan | None


def parse(argv: list[str]) -> Command:
  """Reads `--config`, its overrides and `--workdir`; the default is the quickstart in `runs/NAME_OF_CONFIG`.

  Args:
    argv: the program, then its arguments.

  Raises:
    InputError: see `parse_config`; options of `--compile_only` without it; a work folder that is an address.
  """
  values = flags.FlagValues()
  workdir = flags.DEFINE_string("workdir", None, "", flag_values=values)
  compile_only = flags.DEFINE_bool("compile_only", False, "", flag_values=values)
  # Of `Plan`.
  topology = flags.DEFINE_string("topology", "", "", flag_values=values)
  chip = flags.DEFINE_string("chip", "", "", flag_values=values)
  mfu = flags.DEFINE_float("mfu", 0.4, "", lower_bound=0.01, upper_bound=1.0, flag_values=values)
  config, name = _parse(argv, values)
  given = [flag.name for flag in (topology, chip, mfu) if flag.present]
  if given and not compile_only.value:
    raise InputError(f"--{given[0]} is for --compile_only, which trains nothing; give both, or neither")
  plan = Plan(topology.value, chip.value, mfu.value) if compile_only.value else None
  place = workdir.value or f"runs/{name}"
  if "://" in place:
    raise InputError(f"--workdir={place} is no folder; give one on a disk or a network's file system")
  return Command(config, pathlib.Path(place), plan)


def parse_config(argv: list[str]) -> ConfigDict:
  """Reads `--config` and its overrides, for commands that have taken out their own options.

  Args:
    argv: the program, then its arguments.

  Raises:
    InputError: an option that does not exist or cannot be read, or a config file that cannot be loaded. Keys that the
      config does not have pass, to be named with their neighbours by `config.resolve`.
  """
  return _parse(argv, flags.FlagValues())[0]


def _parse(argv: list[str], values: flags.FlagValues) -> tuple[ConfigDict, str]:
  """The config and its file's name; fills `values`, in which further options may be defined."""
  flags.FLAGS(argv[:1])  # absl's own settings, which its log and Grain read
  try:
    return _load(argv, values)
  except InputError:
    raise
  except flags.Error as error:
    # Of a config file's own error ml_collections makes the last line of a traceback.
    told = str(error).strip().splitlines()[-1].removeprefix(f"{InputError.__module__}.{InputError.__qualname__}: ")
    raise InputError(f"{told}; mend that option, --help shows the usage") from error
  except Exception as error:  # a config file is Python: anything can go wrong in it
    given = " ".join(word for word in argv if word.startswith("--config")) or "the default config"
    raise InputError(f"cannot load {given} ({_reason(error)}); mend the file or option") from error


def _load(argv: list[str], values: flags.FlagValues) -> tuple[ConfigDict, str]:
  options = {"flag_values": values, "sys_argv": argv, "lock_config": False, "accept_new_attributes": True}
  config = config_flags.DEFINE_config_file("config", str(_CONFIG_FOLDER / "quickstart.py"), **options)
  unknown = values([_find_shipped(word) for word in argv])[1:]
  if unknown:
    raise InputError(f"{unknown[0]!r} is not an option; a config file is given as --config=FILE")
  name = pathlib.Path(config_flags.get_config_filename(values["config"]).partition(":")[0]).stem
  return config.value.copy_and_resolve_references(), name


def _find_shipped(word: str) -> str:
  """`--config=configs/vitb.py`, or vitb.py, from any folder: where it is not there, the shipped page."""
  path, colon, form = word.removeprefix("--config=").partition(":")
  if not word.startswith("--config=") or pathlib.Path(path).exists():
    return word
  shipped = _CONFIG_FOLDER / pathlib.Path(path).name
  # Of another folder, a page of the same name is another page.
  if pathlib.Path(path).parent.as_posix() not in (".", _CONFIG_FOLDER.name) or not shipped.is_file():
    known = ", ".join(sorted(file.name for file in _CONFIG_FOLDER.glob("*.py")))
    raise InputError(f"{path} does not exist; name a file of your own, or one of configs: {known}")
  return f"--config={shipped}{colon}{form}"


def _reason(error: Exception) -> str:
  """The last line of what ml_collections wraps, often twice and with a traceback in the text."""
  while error.args and isinstance(error.args[0], Exception):
    error = error.args[0]
  text = str(error.args[0]) if isinstance(error, KeyError) else str(error)
  *_, last = ("", *(line for line in text.splitlines() if line.strip()))
  return f"{type(error).__name__}: {last.strip()}"
