"""A trained model as one StableHLO file, which `dtm_jax.load_exported` or `jax.export` runs on CPU, GPU and TPU.

  python -m dtm_jax.export IN OUT [--what=features|classify] [--best] [--averaged] [--overwrite]

IN is the work folder of a run, a weights file, or a Hugging Face model folder.

Exit codes: 0 done; 2 wrong usage, a model that cannot be read or exported; 130 interrupted.
"""

import argparse
import pathlib
import sys

from dtm_jax import console
from dtm_jax.errors import InputError


def main(argv: list[str]) -> int:
  """Runs the command line `argv`, whose first element is the program, and returns the exit code."""
  return console.exit_code(lambda: _export(argv[1:]))


def _parser() -> argparse.ArgumentParser:
  layout = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
  parser = console.ArgumentParser(prog="python -m dtm_jax.export", description=__doc__, **layout)
  parser.add_argument("input", metavar="IN", type=pathlib.Path)
  parser.add_argument("output", metavar="OUT", type=pathlib.Path)
  parser.add_argument("--what", choices=("features", "classify"), default="features", help="of the model (features)")
  parser.add_argument("--best", action="store_true", help="the best checkpoint of a fine-tuning run, not the last")
  parser.add_argument("--averaged", action="store_true", help="the moving average of a fine-tuning run's weights")
  parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
  return parser


def _export(arguments: list[str]) -> None:
  options = _parser().parse_args(arguments)
  if options.output.exists() and not options.overwrite:
    raise InputError(f"{options.output} is there already; --overwrite replaces it")
  from dtm_jax import inference  # starts a backend, which takes seconds

  model = inference.load(options.input, checkpoint="best" if options.best else "last", averaged=options.averaged)
  model.export(options.output, options.what)
  platforms, size = ", ".join(inference.PLATFORMS), model.image_size
  print(f"wrote {options.output}: {options.what} of uint8 [b, {size}, {size}, 3], any b, on {platforms}")


if __name__ == "__main__":
  sys.unraisablehook = console.report_unraisable
  sys.exit(main(sys.argv))
