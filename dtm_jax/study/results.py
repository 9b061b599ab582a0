"""What a study has found so far: means, spreads, and differences seed by seed."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dtm_jax import workdir as workdirs
from dtm_jax.files import replacing
from dtm_jax.study.plan import EVALUATE, TEACHER, TRAIN, Study
from dtm_jax.study.runner import complete

MISSING = "-"

Values = Mapping[int, float]  # accuracy in [0, 1] by seed
Summary = Mapping[str, Any]  # of a run
Summaries = Mapping[str, Summary]  # of the cells that are complete, by name


@dataclasses.dataclass(frozen=True)
class Spread:
  """Of some seeds. `std` (of a sample) and `standard_error` (of the mean) are None for one seed."""

  mean: float
  std: float | None
  standard_error: float | None


def spread(values: Sequence[float]) -> Spread | None:
  """None for no values."""
  if not values:
    return None
  std = float(np.std(values, ddof=1)) if len(values) > 1 else None
  return Spread(float(np.mean(values)), std, None if std is None else std / math.sqrt(len(values)))


def paired_differences(values: Values, baseline: Values) -> list[float]:
  """Of the seeds that both have."""
  return [values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())]


def feature_columns(study: Study) -> dict[str, str]:
  """Columns of the table that come from task "evaluate", and the entries of its summary."""
  shots = {f"{number}-shot": f"fewshot_{number}_top1" for number in study.shots}
  return {"k-NN": "knn_top1", "linear": "linear_top1"} | shots


def collect(study: Study) -> dict[str, Any]:
  """All that is known, as `results.json` has it: for each teacher, arm and column, values and their statistics."""
  done = complete(study.folder, study.cells)
  summaries = {name: _read(study, name, workdirs.SUMMARY_FILE) for name in done}
  return {
    "study": study.title,
    "baseline": study.baseline,
    "seeds": [*study.seeds],
    "cells": len(study.cells),
    "cells_done": len(summaries),
    "cell_seconds": round(sum(summary.get("seconds", 0) for summary in summaries.values())),
    "devices": sorted({_read(study, name, workdirs.CONFIG_FILE).get("devices", "") for name in done}),
    "versions": workdirs.versions(),
    "teachers": {teacher: _of_teacher(study, summaries, teacher) for teacher in study.teachers},
  }


def _read(study: Study, cell: str, file: str) -> Summary:
  return workdirs.read_json(study.folder / cell / file) or {}


def _of_teacher(study: Study, summaries: Summaries, teacher: str) -> dict[str, Any]:
  """Its own scores, where it was trained, and each arm's."""
  values = {
    arm: {
      **{column: _values(study, summaries, folder, EVALUATE, key) for column, key in feature_columns(study).items()},
      **{labels: _values(study, summaries, folder, labels, "top1") for labels in study.labels},
    }
    for arm, folder in study.students(teacher)
  }
  itself = _teacher_scores(study, summaries, f"{teacher}/{TEACHER}")
  return {"itself": itself, "arms": {arm: _of_arm(study, arm, values) for arm in values}}


def _of_arm(study: Study, arm: str, values: Mapping[str, Mapping[str, Values]]) -> dict[str, Any]:
  entries = {}
  for name, own in values[arm].items():
    differences = paired_differences(own, values[study.baseline][name]) if arm != study.baseline else []
    found = {"": spread([*own.values()]), "difference_": spread(differences)}
    statistics = {prefix + key: value for prefix, one in found.items() if one for key, value in vars(one).items()}
    entries[name] = {"values": {str(seed): value for seed, value in own.items()}, **statistics}
  return entries


def _values(study: Study, summaries: Summaries, folder: str, readout: str, key: str) -> Values:
  of_seeds = {seed: summaries.get(f"{folder}/seed{seed}/{readout}", {}) for seed in study.seeds}
  return {seed: summary[key] for seed, summary in of_seeds.items() if key in summary}


def _teacher_scores(study: Study, summaries: Summaries, folder: str) -> dict[str, float]:
  """By column, and "top1" of a classifier."""
  features, trained = (summaries.get(f"{folder}/{cell}", {}) for cell in (EVALUATE, TRAIN))
  scores = {column: features[key] for column, key in feature_columns(study).items() if key in features}
  return scores | ({"top1": trained["top1"]} if "top1" in trained else {})


def markdown(results: Mapping[str, Any]) -> str:
  """A table for each teacher."""
  seeds, baseline = results["seeds"], results["baseline"]
  lines = [
    f"# {results['study']}",
    "",
    f"{results['cells_done']} of {results['cells']} cells are complete. Top-1 accuracy in %: mean ± standard deviation"
    f" over {len(seeds)} seed{'s' * (len(seeds) > 1)}; in brackets the difference to {baseline}, seed by seed:"
    " mean ± standard error.",
  ]
  for teacher, found in results["teachers"].items():
    names = [*next(iter(found["arms"].values()))]
    lines += ["", f"## Teacher: {teacher}", "", _row("pre-training", names), _row("---", ["---"] * len(names))]
    lines += [_row(arm, [_entry(entries[name]) for name in names]) for arm, entries in found["arms"].items()]
    own = found["itself"]
    if own:
      lines.append(_row("*the teacher itself*", [_percent(own[name]) if name in own else MISSING for name in names]))
    if "top1" in own:
      lines += ["", f"The teacher's own classifier: {_percent(own['top1'])} %."]
  return "\n".join(lines) + "\n"


def _row(head: str, entries: Sequence[str]) -> str:
  return f"| {' | '.join([head, *entries])} |"


def _entry(found: Mapping[str, Any]) -> str:
  if "mean" not in found:
    return MISSING
  text = _with_error(_percent(found["mean"]), found["std"])
  if "difference_mean" not in found:
    return text
  difference = f"{100 * found['difference_mean']:+.1f}"
  return f"{text} ({_with_error(difference, found['difference_standard_error'])})"


def _with_error(text: str, error: float | None) -> str:
  return text if error is None else f"{text} ± {_percent(error)}"


def _percent(value: float) -> str:
  return f"{100 * value:.1f}"


def write(folder: pathlib.Path, found: Mapping[str, Any]) -> pathlib.Path:
  """Writes what `collect` has found as `results.md`, which it returns, and `results.json`. Raises InputError if not."""
  workdirs.write_json(folder / "results.json", found)
  path = folder / "results.md"
  with replacing(path, workdirs.RUN_AGAIN) as unfinished:
    unfinished.write_text(markdown(found))
  return path
