"""Weights from one layout to another.

  python -m dtm_jax.convert IN OUT [--to=release|huggingface] [--overwrite] [--lenient]
                            [--image_size=PIXELS] [--num_classes=N [--tables=both|shared|own] [--seed=S]]

IN is a weights file or model folder (released code, BEiT, Hugging Face, OpenAI's or open_clip's CLIP), or the work
folder of a run of this program. OUT is a `.pth`, or a folder for Hugging Face: weights, config and image processor. On
the way, --image_size fits bias tables to another number of patches, and --num_classes makes a fine-tuning model of a
student.

Exit codes: 0 done; 2 wrong usage, weights that cannot be read or written; 130 interrupted.
"""

import argparse
import pathlib
import sys
from typing import Any, NamedTuple

from dtm_jax import console
from dtm_jax.config import DataConfig
from dtm_jax.convert.configs import with_preprocessing
from dtm_jax.convert.reading import Report, read_weights
from dtm_jax.convert.state_dict import file_sha256, weights_file
from dtm_jax.convert.transfer import TABLES, resize_tables, to_classifier
from dtm_jax.convert.writing import HUGGING_FACE_FILES, save_hugging_face, save_torch, sizes_of
from dtm_jax.errors import InputError, some_of

_TORCH_SUFFIXES = (".pth", ".pt")
# As the report's fields are told, but for what is refused.
_TITLES = {
  "loaded": "loaded",
  "absent": "absent, taken as zeros",
  "left_out": "left out",
  "unexpected": "unknown, left out",
  "reshaped": "reshaped",
}


class _Input(NamedTuple):
  """Weights, where they are from, and their sizes."""

  path: pathlib.Path
  sha256: str
  kind: str
  model: dict[str, Any]
  params: dict
  report: Report | None  # none for a work folder, whose names are ours
  class_names: list[str] | None = None  # which only a fine-tuning run tells
  data: DataConfig | None = None  # how it is shown images


def main(argv: list[str]) -> int:
  """Runs the command line `argv`, whose first element is the program, and returns the exit code."""
  return console.exit_code(lambda: _convert(argv[1:]))


def _convert(arguments: list[str]) -> None:
  options = _parser().parse_args(arguments)
  target = _check_target(options)
  source = _read(options)
  kind, params = _transfer(source, options)
  if options.to == "release":
    save_torch(options.output, kind, params)
  else:
    save_hugging_face(options.output, kind, params, source.class_names, source.data)
  _describe("read", source.path, source.kind, source.model, source.sha256, source.report)
  _describe("wrote", target, kind, sizes_of(kind, params), file_sha256(target), None)


def _parser() -> argparse.ArgumentParser:
  layout = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
  parser = console.ArgumentParser(prog="python -m dtm_jax.convert", description=__doc__, **layout)
  parser.add_argument("input", metavar="IN", type=pathlib.Path)
  parser.add_argument("output", metavar="OUT", type=pathlib.Path)
  parser.add_argument(
    "--to",
    choices=("release", "huggingface"),
    help="release if OUT ends in .pth or .pt, huggingface if it is no file's name",
  )
  parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
  parser.add_argument("--lenient", action="store_true", help="leave out unknown names, ignore axes of length 1")
  parser.add_argument("--image_size", type=int, metavar="PIXELS", help="of square images that OUT is for")
  parser.add_argument("--num_classes", type=int, metavar="N", help="make a fine-tuning model with so many classes")
  parser.add_argument("--tables", choices=TABLES, help="a block's table from its own and the shared one (both)")
  parser.add_argument("--seed", type=int, help="of the new head (0)")
  return parser


def _check_target(options: argparse.Namespace) -> pathlib.Path:
  """The weights file to write, before anything is read."""
  is_torch = options.output.suffix in _TORCH_SUFFIXES
  # `vitb-v1.0` may be a folder; `vitb.onnx` is none unless it is asked for, or there.
  is_other_file = options.output.suffix[1:2].isalpha() and not is_torch and not options.output.is_dir()
  if options.to is None and is_other_file:
    raise InputError(
      f"{options.output} is no name for what is written: --to=release writes a file for PyTorch, name it .pth;"
      " --to=huggingface makes a folder"
    )
  options.to = options.to or ("release" if is_torch else "huggingface")
  if options.num_classes is None and (options.tables, options.seed) != (None, None):
    raise InputError("--tables and --seed are for a fine-tuning model; give --num_classes too")
  target = options.output if options.to == "release" else options.output / HUGGING_FACE_FILES[0]
  if options.to == "huggingface" and options.output.is_file():
    raise InputError(f"{options.output} is a file; Hugging Face's layout is a folder, --to=release writes a file")
  if options.to == "release" and options.output.is_dir():
    raise InputError(f"{options.output} is a folder; name a .pth file in it, or --to=huggingface")
  taken = [target] if options.to == "release" else [options.output / name for name in HUGGING_FACE_FILES]
  for file in taken:
    if file.exists() and not options.overwrite:
      raise InputError(f"{file} is there already; --overwrite replaces it")
  return target


def _read(options: argparse.Namespace) -> _Input:
  path = options.input
  if (path / "checkpoints").is_dir():
    return _restore(path)
  kind, model, params, report = read_weights(path, strict=not options.lenient)
  file = weights_file(path)
  data = with_preprocessing(DataConfig(), path)
  return _Input(file, file_sha256(file), kind, model, params, report, data=data)


def _restore(workdir: pathlib.Path) -> _Input:
  # Not for a weights file: these start a backend, which takes seconds.
  from dtm_jax.restore import restore_run

  run = restore_run(workdir)
  names = ("patch_size", "width", "depth", "heads", "grid", "out_dim" if run.kind == "student" else "num_classes")
  model = {name: getattr(run.model, name) for name in names}
  return _Input(workdir, run.sha256, run.kind, model, run.params, None, run.class_names, run.config.data)


def _transfer(source: _Input, options: argparse.Namespace) -> tuple[str, dict]:
  kind, params = source.kind, source.params
  if options.image_size is not None:
    if kind == "clip_vision" or options.image_size < 1 or options.image_size % source.model["patch_size"]:
      raise InputError(
        f"--image_size={options.image_size} needs a student or classifier, and a multiple of its patches"
        f" ({source.model['patch_size']} pixels); {source.path} is a {kind}"
      )
    params = resize_tables(params, source.model["grid"], (options.image_size // source.model["patch_size"],) * 2)
  if options.num_classes is not None:
    if kind != "student":
      raise InputError(f"--num_classes needs a pre-training student; {source.path} is a {kind}")
    kind = "classifier"
    params = to_classifier(params, options.num_classes, tables=options.tables or "both", seed=options.seed or 0)
  return kind, params


def _describe(verb: str, file: pathlib.Path, kind: str, model: dict, sha256: str, report: Report | None) -> None:
  down, across = model["grid"]
  sizes = ", ".join(f"{name} {value}" for name, value in (model | {"grid": f"{down} x {across}"}).items())
  print(f"{verb:<6}{file}")
  print(f"      {kind}: {sizes}")
  for field, title in _TITLES.items() if report else ():
    names = getattr(report, field)
    if names:
      print(f"      {title:<22} {len(names):>4}  {some_of(names) if field != 'loaded' else ''}".rstrip())
  print(f"      sha256 {sha256}")


if __name__ == "__main__":
  sys.unraisablehook = console.report_unraisable
  sys.exit(main(sys.argv))
