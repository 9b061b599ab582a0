"""What a pre-training step sends between chips, from programs compiled ahead of time. Nothing is measured on a chip.

  python benchmarks/scaling.py --topology v5e:4x4 --variant B L --layout data fsdp --json=FILE
  python benchmarks/scaling.py --json=FILE --chip=v5e --figure=docs/images/scaling.png  # of what FILE has

Each point is the step that training runs (configs/vitb.py, configs/vitl.py), compiled with its layers scanned: that
compiles several times faster and sends the same gradients; and, but for --morphing, without morphing, which sends
nothing. TPU slices need libtpu, cpu:N nothing; but a program for CPUs sums gradients of matrices in float32 where TPUs
do in bfloat16. Points that FILE has are not compiled again.

Then a table of 8 to 1,024 chips with data parallelism for one global batch. Bytes: an all-reduce of V bytes among n
sends 2 V (n-1)/n of them from each device. V is a formula (`reduced_bytes`); where a point of a TPU slice disagrees
with it, the script ends with an error. Seconds: computing is the model's FLOPs at --mfu of the peak; sending goes at
--links of what a chip's links carry at once.

Last, what a host has to feed: images/s of all its chips at --mfu, and the cores that benchmarks/host_pipeline.py's
result (JPEG of 500 x 375 pixels to 224 px crops, on one core) asks for.
"""

import argparse
import collections
import datetime
import itertools
import json
import pathlib
from typing import Any

import jax
from common import write_json

from configs import vitb, vitl
from dtm_jax import ahead_of_time, roofline
from dtm_jax import config as config_lib
from dtm_jax.collectives import Collective
from dtm_jax.models.clip import CLIP_B16, ClipVision
from dtm_jax.models.variants import VARIANTS
from dtm_jax.networks import create_classifier, create_student

CONFIGS = {"B": vitb, "L": vitl}
LAYOUTS = {"data": {}, "fsdp": {"data": 1, "fsdp": -1}, "data x fsdp 8": {"fsdp": 8}, "tensor": {"tensor": 4}}
LOSS_BYTES = 4  # of the sum that a step without morphing leaves out
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
HOST = {"v4": 4, "v5e": 4, "v5p": 4, "v6e": 4, "a100": 8, "h100": 8, "h200": 8}  # usual chips of a host
PIPELINE = pathlib.Path(__file__).parent / "results" / "host_pipeline_cpu.json"
IMAGE = "500 x 375"  # of its rows
PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "numpy")
MAIN_OPERATIONS = ("all-reduce", "all-gather", "reduce-scatter")

Point = dict[str, Any]


# ------------------------------------------------------------ points


def compile_point(variant: str, layout: str, topology: str, options: argparse.Namespace) -> Point:
  """The step of one layout on one slice, as its compiler tells it."""
  devices = ahead_of_time.open_devices(topology)
  settings = CONFIGS[variant].get_config()
  settings.data.batch_size = options.images * len(devices) // LAYOUTS[layout].get("tensor", 1)
  settings.model.scan_layers = True
  settings.morphing.enabled = options.morphing
  settings.mesh.update(LAYOUTS[layout])
  with jax.default_matmul_precision("float32"):  # as in training
    compiled = ahead_of_time.compile_step(config_lib.resolve(settings), devices)
  told = ("seconds", "arguments", "outputs", "aliased", "temporaries", "needed", "flops", "counted_flops", "moved")
  return {
    **{"variant": variant, "layout": layout, "topology": topology, "devices": len(devices)},
    **{"batch_size": settings.data.batch_size, "morphing": options.morphing},
    **{name: getattr(compiled, name) for name in told},
    "collectives": merged(compiled.collectives),
    "date": datetime.date.today().isoformat(),
  }


def merged(found: tuple[Collective, ...]) -> list[dict[str, Any]]:
  """Operations of one kind, group and count as one, the largest first."""
  totals = collections.Counter()
  for one in found:
    totals[one._replace(bytes=0)] += one.bytes
  return [kind._replace(bytes=size)._asdict() for kind, size in totals.most_common()]


def check_formula(points: list[Point]) -> None:
  """Ends the script where a TPU slice with data parallelism does not send what the formula says, and nothing else."""
  for point in points:
    if point["layout"] == "data" and not point["topology"].startswith("cpu"):
      volumes = collections.Counter()
      for one in point["collectives"]:
        volumes[one["operation"]] += one["bytes"] * (one["count"] or 0)
      expected = reduced_bytes(point["variant"])
      if {*volumes} != {"all-reduce"} or abs(volumes["all-reduce"] - expected) > LOSS_BYTES:
        raise SystemExit(f"ViT-{point['variant']} on {point['topology']}: {dict(volumes)}; the formula says {expected}")


# ------------------------------------------------------------ sizes


def reduced_bytes(variant: str) -> int:
  """V of data parallelism on TPUs, in which every gradient is summed once: as the points have it, to the byte.

  Gradients of matrices go in bfloat16, those of vectors in float32, as do each block's of its [heads, T, T] attention
  biases, which only then become one of the table; and two sums of the loss.
  """
  size, tokens, patch = VARIANTS[variant], 1 + 14 * 14, 3 * 16**2
  width, targets = size.width, CLIP_B16["out_dim"]
  block = 2 * 12 * width**2 + 4 * 14 * width + 4 * size.heads * tokens**2
  vectors = 5 * width + targets  # of the last norm, class and mask token, patch embedding, head
  return size.depth * block + 2 * width * (patch + targets) + 4 * (vectors + 2)


def scale(variant: str, options: argparse.Namespace) -> list[Point]:
  """A row for each number of chips, with data parallelism."""
  chip, flops, rows = roofline.CHIPS[options.chip], flops_of_an_image(variant)["pre-training"], []
  for devices in SIZES:
    sent = Collective("all-reduce", reduced_bytes(variant), devices, 1).sent
    computing = flops * options.batch / devices / (chip.teraflops * 1e12 * options.mfu)
    sending = sent / (chip.network * 1e9 * options.links)
    rows.append(
      {
        **{"variant": variant, "devices": devices, "images": options.batch // devices},
        **{"all-reduce": sent / 1e6, "computing": 1e3 * computing, "sending": 1e3 * sending},
        "hidden": computing / max(computing, sending),
        "exposed": computing / (computing + sending),
      }
    )
  return rows


COLUMNS = {
  "ViT": ("variant", ""),
  "chips": ("devices", ","),
  "images/chip": ("images", ""),
  "all-reduce MB": ("all-reduce", ".1f"),
  "computing ms": ("computing", ".2f"),
  "sending ms": ("sending", ".2f"),
  "efficiency, hidden": ("hidden", ".0%"),
  "efficiency, one by one": ("exposed", ".0%"),
}
HOST_COLUMNS = {
  "ViT": ("variant", ""),
  "chip": ("chip", ""),
  "chips of a host": ("chips", ""),
  "pre-training, images/s": ("pre-training", ",.0f"),
  "cores": ("pre-training cores", ".1f"),
  "fine-tuning, images/s": ("fine-tuning", ",.0f"),
  "its cores": ("fine-tuning cores", ".1f"),
}
POINT_COLUMNS = {
  "ViT": ("variant", ""),
  "layout": ("layout", ""),
  "slice": ("topology", ""),
  "images/chip": ("images", ".0f"),
  "all-reduce MB": ("all-reduce", ".1f"),
  "all-gather MB": ("all-gather", ".1f"),
  "reduce-scatter MB": ("reduce-scatter", ".1f"),
  "other MB": ("other", ".1f"),
  "state and batch GiB": ("state", ".2f"),
  "memory GiB": ("memory", ".2f"),
}


def point_row(point: Point) -> Point:
  sent = collections.Counter()
  for one in (Collective(**fields) for fields in point["collectives"]):
    name = one.operation if one.operation in MAIN_OPERATIONS else "other"
    sent[name] += one.sent * (one.count or 0) / 1e6
  return {
    **point,
    **{name: sent[name] for name in (*MAIN_OPERATIONS, "other")},
    "images": point["batch_size"] / point["devices"],
    "state": point["arguments"] / 2**30,
    "memory": point["needed"] / 2**30,
  }


def flops_of_an_image(variant: str) -> dict[str, float]:
  """By the recipe that the pipeline was timed for."""
  config = config_lib.resolve(CONFIGS[variant].get_config())
  teacher = ClipVision(**CLIP_B16)
  return {
    "pre-training": roofline.training_flops(1, create_student(config, teacher.out_dim), teacher),
    "fine-tuning": roofline.training_flops(1, create_classifier(config, 1000), None),
  }


def host_rows(variants: list[str], mfu: float) -> list[Point]:
  """What hosts have to feed."""
  timed = json.loads(PIPELINE.read_text())["results"]["rows"]
  per_core = {row["recipe"]: row["ours_images_per_s"] for row in timed if row["image"] == IMAGE}
  rows = []
  for variant in variants:
    flops = flops_of_an_image(variant)
    for name, chips in HOST.items():
      images = {recipe: chips * roofline.CHIPS[name].teraflops * 1e12 * mfu / flops[recipe] for recipe in per_core}
      cores = {f"{recipe} cores": images[recipe] / per_core[recipe] for recipe in per_core}
      rows.append({"variant": variant, "chip": name, "chips": chips, **images, **cores})
  return rows


def markdown(rows: list[Point], columns: dict[str, tuple[str, str]]) -> str:
  columns = {name: (key, spec) for name, (key, spec) in columns.items() if any(row[key] for row in rows)}
  lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
  lines += ["| " + " | ".join(format(row[key], spec) for key, spec in columns.values()) + " |" for row in rows]
  return "\n".join(lines)


def draw(path: pathlib.Path, rows: list[Point], options: argparse.Namespace) -> None:
  """Computing and sending over the number of chips."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  variants = sorted({row["variant"] for row in rows})
  figure, axes = plt.subplots(1, len(variants), figsize=(5 * len(variants), 3.8), sharey=True, squeeze=False)
  for axis, variant in zip(axes[0], variants, strict=True):
    own = [row for row in rows if row["variant"] == variant]
    chips = [row["devices"] for row in own]
    axis.plot(chips, [row["computing"] for row in own], "k-", label=f"computing at {options.mfu:.0%} of the peak")
    axis.plot(chips, [row["sending"] for row in own], "C0-", label=f"sending at {options.links:.0%} of the links' rate")
    axis.set(xscale="log", yscale="log", xlabel="chips", title=f"ViT-{variant}, {options.batch} images per step")
    axis.set_xticks(SIZES, [f"{size:,}" for size in SIZES], fontsize=8)
    axis.minorticks_off()
  axes[0][0].set_ylabel("ms per step")
  axes[0][0].legend(fontsize=8)
  figure.tight_layout()
  figure.savefig(path, dpi=120)


# ------------------------------------------------------------ the command


def parse_options() -> argparse.Namespace:
  linked = [name for name, chip in roofline.CHIPS.items() if chip.network]
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--json", type=pathlib.Path, required=True, metavar="FILE", help="points, read and added to")
  parser.add_argument("--topology", nargs="*", default=[], help="to compile for: v5e:4x4, cpu:16")
  parser.add_argument("--variant", nargs="+", choices=CONFIGS, default=[*CONFIGS])
  parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=["data", "fsdp"])
  parser.add_argument("--images", type=int, default=64, help="per device, of the points (%(default)s)")
  parser.add_argument("--morphing", action="store_true", help="of the points, too")
  parser.add_argument("--chip", choices=linked, default="v5e", help="of the table (%(default)s)")
  parser.add_argument("--batch", type=int, default=2048, help="global, of the table (%(default)s)")
  parser.add_argument("--mfu", type=float, default=0.4, help="assumed (%(default)s)")
  parser.add_argument("--links", type=float, default=0.5, help="assumed share of the links' rate (%(default)s)")
  parser.add_argument("--figure", type=pathlib.Path, metavar="FILE", help="draw computing and sending")
  return parser.parse_args()


def add_points(points: list[Point], options: argparse.Namespace) -> None:
  """Compiles what was asked for and is not there, and writes the record after each point."""
  for topology, variant, layout in itertools.product(options.topology, options.variant, options.layout):
    if not any(is_point(point, topology, variant, layout, options) for point in points):
      points.append(compile_point(variant, layout, topology, options))
      write_json(options.json, points, PACKAGES)


def is_point(point: Point, topology: str, variant: str, layout: str, options: argparse.Namespace) -> bool:
  where = (point["topology"], point["variant"], point["layout"], point["morphing"])
  return where == (topology, variant, layout, options.morphing) and point_row(point)["images"] == options.images


def main() -> None:
  options = parse_options()
  points = json.loads(options.json.read_text())["results"] if options.json.exists() else []
  add_points(points, options)
  check_formula(points)
  rows = [row for variant in options.variant for row in scale(variant, options)]
  points.sort(key=lambda point: (point["variant"], point["layout"], point["devices"], point["topology"]))
  print(markdown([point_row(point) for point in points], POINT_COLUMNS), end="\n\n")
  print(markdown(rows, COLUMNS), end="\n\n")
  print(markdown(host_rows(options.variant, options.mfu), HOST_COLUMNS))
  if options.figure:
    draw(options.figure, rows, options)


if __name__ == "__main__":
  main()
