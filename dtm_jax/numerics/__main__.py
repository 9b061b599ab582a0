"""XLA beside PyTorch.

  python -m dtm_jax.numerics replay --trace T.npz --student S.pth --teacher C.pth   a recorded PyTorch run again in XLA
  python -m dtm_jax.numerics record --config=FILE --out T.npz                       records one with the reference
  python -m dtm_jax.numerics compare --config=FILE                                  both live on the same images

Exit codes: 0 done; 1 a replay is beyond its tolerance, or compare found values that are not finite; 2 wrong usage,
files or config; 130 interrupted.
"""

import argparse
import pathlib
import signal
import sys

from dtm_jax import command_line, console
from dtm_jax.errors import InputError
from dtm_jax.numerics import require_torch

EXIT_BEYOND, EXIT_INPUT, EXIT_INTERRUPTED = 1, 2, 130
_CONFIG_OPTIONS = "The run: --config=FILE and --config.path.to.key=value, as for dtm_jax.main; without, the quickstart."


def main(argv: list[str]) -> int:
  """Runs the command line `argv`, whose first element is the program, and returns the exit code."""
  try:
    options, rest = _parser().parse_known_args(argv[1:])
    return options.run(options, [argv[0], *rest])
  except (InputError, OSError) as error:
    return console.fail(error, EXIT_INPUT)
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    return EXIT_INTERRUPTED


def _replay(options: argparse.Namespace, rest: list[str]) -> int:
  if rest[1:]:
    raise InputError(f"{rest[1]!r} is not an option of replay; --help shows them")
  if options.json:
    _check_targets(options.json, overwrite=True)
  # Not before the options are right: the backend takes seconds to start.
  import jax

  from dtm_jax.numerics import report
  from dtm_jax.numerics.replay import Tolerances, describe, replay, summarize
  from dtm_jax.numerics.trace import read_trace

  trace = read_trace(options.trace)
  with jax.default_matmul_precision("float32"):
    replayed = replay(trace, _model_file(options, trace.kind), options.teacher)
  tolerances = Tolerances(options.loss_rtol, options.param_atol, options.grad_norm_rtol)
  summary = summarize(trace, replayed, tolerances)
  if options.json:
    report.write_json(options.json, summary)
  print(describe(summary, all_tensors=options.all))
  return 0 if summary["within_tolerance"] else EXIT_BEYOND


def _model_file(options: argparse.Namespace, kind: str) -> pathlib.Path:
  wanted, other = ("student", "model") if kind == "pretrain" else ("model", "student")
  if getattr(options, wanted) is None:
    raise InputError(f"{options.trace} is a {kind} trace: give the weights that it began with as --{wanted}")
  for name in (other,) if kind == "pretrain" else (other, "teacher"):
    if getattr(options, name) is not None:
      raise InputError(f"{options.trace} is a {kind} trace, which has no --{name}")
  return getattr(options, wanted)


def _record(options: argparse.Namespace, rest: list[str]) -> int:
  require_torch()
  settings = command_line.parse_config(rest)
  if options.steps < 1:
    raise InputError(f"--steps={options.steps} must be at least 1")
  if options.out.suffix != ".npz":
    raise InputError(f"--out={options.out} must end in .npz")
  import jax

  from dtm_jax.numerics.case import open_case
  from dtm_jax.numerics.record import describe, new_weights_file, record

  made = [options.out] if options.student else [options.out, new_weights_file(options.out, settings.task)]
  _check_targets(*made, overwrite=options.overwrite)
  with jax.default_matmul_precision("float32"):
    case = open_case(settings, options.student, options.teacher, "float32")
    weights_file = record(case, options.steps, options.out, options.student)
  print(describe(case, options.steps, options.out, weights_file))
  return 0


def _compare(options: argparse.Namespace, rest: list[str]) -> int:
  require_torch()
  settings = command_line.parse_config(rest)
  if settings.task == "finetune":
    raise InputError("compare takes the config of a pre-training run; for fine-tuning there are record and replay")
  _check_targets(*(options.out / name for name in ("compare.json", "compare.png")), overwrite=True)
  import jax

  from dtm_jax.numerics import compare, compare_report
  from dtm_jax.numerics.case import open_case

  with jax.default_matmul_precision("float32"):
    case = open_case(settings, options.student, options.teacher, options.dtype)
    comparisons = compare.compare_all(case, options.dtype)
  compare_report.write(options.out, case, comparisons, options.dtype)
  return EXIT_BEYOND if compare.not_finite(comparisons) else 0


def _check_targets(*files: pathlib.Path, overwrite: bool) -> None:
  """Before work of minutes: each can be written."""
  for file in files:
    if file.is_dir():
      raise InputError(f"{file} is a folder; name a file, or move it away")
    if file.exists() and not overwrite:
      raise InputError(f"{file} is there already; --overwrite replaces it")
    nearest = next(folder for folder in file.absolute().parents if folder.exists())
    if not nearest.is_dir():
      raise InputError(f"{file} cannot be made, as {nearest} is not a folder; choose another place")


def _parser() -> argparse.ArgumentParser:
  layout = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
  parser = console.ArgumentParser(prog="python -m dtm_jax.numerics", description=__doc__, **layout)
  commands = parser.add_subparsers(metavar="COMMAND", required=True)

  def add(name: str, run, text: str, epilog: str = "") -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text, epilog=epilog, **layout)
    command.set_defaults(run=run)
    return command

  _add_replay(add("replay", _replay, "re-run a recorded PyTorch run in XLA, from the same weights"))
  _add_record(add("record", _record, "record a run of the PyTorch reference", _CONFIG_OPTIONS))
  _add_compare(add("compare", _compare, "one step in both frameworks, stage by stage", _CONFIG_OPTIONS))
  return parser


_FILE = {"type": pathlib.Path, "metavar": "FILE"}


def _add_replay(command: argparse.ArgumentParser) -> None:
  command.add_argument("--trace", required=True, **_FILE, help="the recorded run, .npz (docs/recording.md)")
  command.add_argument("--student", **_FILE, help="weights that a pre-training run began with")
  command.add_argument("--teacher", **_FILE, help="its CLIP teacher's weights, unless the trace holds target tokens")
  command.add_argument("--model", **_FILE, help="weights that a fine-tuning run began with")
  command.add_argument("--json", **_FILE, help="write all figures to this file")
  command.add_argument("--all", action="store_true", help="list all final parameters, not the ten worst")
  command.add_argument("--loss_rtol", type=float, default=1e-5, help="of each step's loss (%(default)s)")
  command.add_argument("--param_atol", type=float, default=2e-5, help="of each final parameter (%(default)s)")
  command.add_argument("--grad_norm_rtol", type=float, default=1e-4, help="of each gradient norm (%(default)s)")


def _add_record(command: argparse.ArgumentParser) -> None:
  command.add_argument("--out", required=True, **_FILE, help="the trace to write, .npz")
  command.add_argument("--steps", type=int, default=10, metavar="S", help="optimiser steps (%(default)s)")
  command.add_argument("--overwrite", action="store_true", help="replace the trace, and its weights, if they are there")
  _add_weights(command)


def _add_compare(command: argparse.ArgumentParser) -> None:
  _add_weights(command)
  command.add_argument(
    "--dtype", choices=("float32", "bfloat16"), default="float32", help="of matrix products (%(default)s)"
  )
  command.add_argument(
    "--out",
    type=pathlib.Path,
    metavar="FOLDER",
    default=pathlib.Path("runs/compare"),
    help="for JSON and PNG (%(default)s)",
  )


def _add_weights(command: argparse.ArgumentParser) -> None:
  command.add_argument(
    "--student", **_FILE, help="weights that pre-training begins with; new ones from the config's seed if not given"
  )
  command.add_argument("--teacher", **_FILE, help="weights of a CLIP teacher in place of the config's teacher")


if __name__ == "__main__":
  sys.unraisablehook = console.report_unraisable
  signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # tables are piped to `head`
  sys.exit(main(sys.argv))
