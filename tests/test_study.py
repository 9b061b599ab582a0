"""The study's plan, its runner with real runs in real processes, and its table."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

import runs
from dtm_jax import config as config_lib
from dtm_jax import workdir as workdir_lib
from dtm_jax.errors import InputError
from dtm_jax.optim import warmup_cosine
from dtm_jax.study import pictures, results, runner
from dtm_jax.study.__main__ import main
from dtm_jax.study.plan import Cell, Study, read_study
from dtm_jax.workdir import settings_that_differ

ROOT = pathlib.Path(__file__).parents[1]
SHIPPED = "configs/study_fashion_mnist.py"
FASHION_MNIST_IMAGES = 60_000

pytestmark = pytest.mark.filterwarnings("ignore:.*load_module:DeprecationWarning")  # how ml_collections reads a page

# Two steps of a tiny student for each run. The arm "broken" has a teacher that is not there.
PAGE = """
from ml_collections import ConfigDict

from configs import quickstart


def get_config(form):
  scale, _, run = form.partition("/")
  study = ConfigDict({"baseline": "token-wise", "data_hint": "Mend the page.", "seeds": (0,), "teachers": ("hog",)})
  study.update(arms=("broken", "token-wise"), untrained="", labels=())
  pretrain, evaluate = quickstart.get_config("smoke"), quickstart.get_config("smoke")
  evaluate.task = "evaluate"
  evaluate.eval.update(linear=False, fewshot=(1,), knn_k=5)
  broken = pretrain.copy_and_resolve_references()
  broken.teacher.update(kind="checkpoint", weights="MISSING")
  study.runs = ConfigDict({"hog/token-wise": pretrain, "hog/broken": broken, "evaluate": evaluate})
  return study.runs[run] if run else study
"""


@functools.cache
def shipped(scale: str, folder: pathlib.Path = pathlib.Path("STUDY")) -> Study:
  return read_study(SHIPPED, scale, ["--config.data.path=DATA"], folder)


@pytest.mark.parametrize(
  ("scale", "number"),
  [
    ("ci", 14),
    ("cpu", 36),
    ("arms", 98),
    ("seeds", 50),
    ("long", 26),
    ("hog", 86),
    ("tokens", 26),
    ("noisy", 48),
    ("gpu", 268),
  ],
)
def test_cells_come_after_what_they_need(scale, number):
  study = shipped(scale)
  assert len(study.cells) == number
  names = [cell.name for cell in study.cells]
  assert len({*names}) == len(names)
  assert all(not cell.needs or cell.needs in names[:i] for i, cell in enumerate(study.cells))
  assert all(cell.config.data.path == "DATA" for cell in study.cells)


def test_the_cells_of_one_student():
  cells = {cell.name: cell for cell in shipped("arms").cells}
  train = cells["2000-labels/dtm/seed1/train"]
  assert train.needs == "2000-labels/teacher/train"
  assert (train.config.run.seed, train.config.teacher.weights) == (1, "STUDY/2000-labels/teacher/train")
  few = cells["2000-labels/dtm/seed1/600-labels"]
  assert few.config.finetune.init == "STUDY/2000-labels/dtm/seed1/train"
  assert (few.config.run.seed, few.config.data.train_split) == (1, "train[:600]")
  evaluate = cells["2000-labels/dtm/seed1/evaluate"]
  assert evaluate.config.eval.checkpoint == "STUDY/2000-labels/dtm/seed1/train"
  assert cells["2000-labels/teacher/train"].config.data.train_split == "train[:2000]"
  assert cells["none/seed1/600-labels"].config.finetune.init == "STUDY/none/seed1/train"


def test_arms_differ_in_what_their_name_says_alone():
  cells = {cell.name: cell.config for cell in shipped("gpu").cells}
  baseline = cells["raw-hog/token-wise/seed2/train"]
  expected = {
    "dtm": {},
    "half-budget": {"budget": 98},
    "fixed-n": {"fixed_num_merged": 98},
    "fixed-k": {"fixed_iterations": 7},
    "per-image": {"granularity": "image"},
    "random-split": {"split": "random"},
  }
  for arm, morphing in expected.items():
    config = cells[f"raw-hog/{arm}/seed2/train"]
    own = {"enabled": True, **morphing}
    assert [*settings_that_differ(baseline, config)] == [f"config.morphing.{name}" for name in own]
    assert {name: getattr(config.morphing, name) for name in own} == own


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_the_untrained_student_takes_no_step_of_any_length(scale):
  config = next(cell.config for cell in shipped(scale).cells if cell.name == "none/seed0/train")
  total = config.total_steps(FASHION_MNIST_IMAGES)
  warmup = min(config.warmup_steps(FASHION_MNIST_IMAGES), total)
  assert total == 1
  assert warmup_cosine(config.peak_lr, config.optim.min_lr, warmup, total)(0) == 0


def test_other_pages_and_scales_are_refused():
  with pytest.raises(InputError, match=r"cannot load --config=configs/study_fashion_mnist.py:huge \(KeyError: huge"):
    shipped("huge")
  with pytest.raises(InputError, match=r"configs/quickstart.py is the page of one run, not of a study"):
    read_study("configs/quickstart.py", "smoke", [], pathlib.Path("STUDY"))
  with pytest.raises(InputError, match=r"config.data.paht does not exist"):
    read_study(SHIPPED, "ci", ["--config.data.paht=DATA"], pathlib.Path("STUDY"))


@pytest.mark.parametrize(
  ("option", "message"),
  [
    ("--jobs=0", "argument --jobs: '0' is not a number of runs; --help shows the usage"),
    ("--scale=huge", "cannot load --config=configs/study_fashion_mnist.py:huge (KeyError: huge)"),
    ("--config.run.seed=3", "the seeds are the page's, (0, 1); leave --config.run.seed out or change them in configs/"),
    ("--paht=data", "Unknown command line flag 'paht'"),
    ("--config.data.path=MISSING", "python -m dtm_jax.data.prepare /usr/share/datasets/fashion-mnist"),
  ],
)
def test_wrong_usage_and_missing_data_are_told_in_one_line(tmp_path, capsys, option, message):
  assert main(["study", "--scale=ci", f"--workdir={tmp_path}/study", option]) == 2
  stderr = capsys.readouterr().err
  assert message in stderr and stderr.count("\n") == 1
  assert not (tmp_path / "study").exists()


def test_processes_share_the_gpus():
  def seen(gpus, jobs):
    return [slot.environment for slot in runner.gpu_slots(gpus, jobs)]

  assert seen(["0", "3"], None) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "3"}]
  assert seen(["0", "3"], 1) == [{"CUDA_VISIBLE_DEVICES": "0"}]
  assert [slot["CUDA_VISIBLE_DEVICES"] for slot in seen(["0", "3"], 3)] == ["0", "3", "0"]
  assert seen(["0"], 2)[1]["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"


def test_processes_share_the_cores():
  def cores(of, jobs):
    return [{*slot.cores} for slot in runner.cpu_slots(of, jobs)]

  assert cores([2, 5], None) == [{2}, {5}]
  assert cores([0, 1, 2], 1) == [{0, 1, 2}]
  assert cores([0, 1, 2], 2) == [{0, 2}, {1}]
  assert cores([4, 6], 3) == [{4}, {6}, {4}]
  assert len(cores(range(64), None)) == 8 and set().union(*cores(range(64), None)) == {*range(64)}


# The table, from summaries made by hand.

RECORDED = {
  ("token-wise", 0): {"knn_top1": 0.70, "linear_top1": 0.80, "fewshot_10_top1": 0.60, "few": 0.50},
  ("token-wise", 1): {"knn_top1": 0.74, "linear_top1": 0.81, "fewshot_10_top1": 0.61, "few": 0.54},
  ("dtm", 0): {"knn_top1": 0.72, "linear_top1": 0.80, "fewshot_10_top1": 0.63, "few": 0.51},
  ("dtm", 1): {"knn_top1": 0.80, "linear_top1": 0.83, "fewshot_10_top1": 0.62},
  ("dtm", 2): {"knn_top1": 0.88},
}
# By hand: standard deviations of (70, 74), (80, 81), ... are their difference over sqrt(2), of (72, 80, 88) it is 8;
# standard errors of two paired differences are half of their difference.
TABLE = """
| pre-training | k-NN | linear | 10-shot | few |
| --- | --- | --- | --- | --- |
| fixed-n | - | - | - | - |
| token-wise | 72.0 ± 2.8 | 80.5 ± 0.7 | 60.5 ± 0.7 | 52.0 ± 2.8 |
| dtm | 80.0 ± 8.0 (+4.0 ± 2.0) | 81.5 ± 2.1 (+1.0 ± 1.0) | 62.5 ± 0.7 (+2.0 ± 1.0) | 51.0 (+1.0) |
| *the teacher itself* | 66.0 | - | - | - |

The teacher's own classifier: 77.7 %.
"""


def mark_done(folder: pathlib.Path, cell: Cell, **scores: float) -> None:
  """As a run leaves it whose parameters have the cell's name for a hash."""
  record = {"init_sha256": cell.needs, "devices": "1 x cpu"}
  summary = {"params_sha256": cell.name, "seconds": 2.5, **scores}
  files = {runner.DONE_FILE: config_lib.to_json(cell.config), "config.json": record, "summary.json": summary}
  (folder / cell.name).mkdir(parents=True, exist_ok=True)
  for name, content in files.items():
    (folder / cell.name / name).write_text(json.dumps(content))


@pytest.fixture
def recorded(tmp_path):
  summaries = {"hog/teacher/train": {"top1": 0.777}, "hog/teacher/evaluate": {"knn_top1": 0.66}}
  for (arm, seed), scores in RECORDED.items():
    summaries[f"hog/{arm}/seed{seed}/train"] = {}
    summaries[f"hog/{arm}/seed{seed}/evaluate"] = scores
    if "few" in scores:
      summaries[f"hog/{arm}/seed{seed}/few"] = {"top1": scores["few"]}
  config, cells = config_lib.resolve(config_lib.base()), []
  for name, summary in summaries.items():
    trained = name.rpartition("/")[0] + "/train"
    cells.append(Cell(name, (), config, "" if name == trained else trained))
    mark_done(tmp_path, cells[-1], **summary)
  arms = ("fixed-n", "token-wise", "dtm")
  return Study("study:ci", tmp_path, (0, 1, 2), ("hog",), arms, "", "token-wise", ("few",), (10,), "", (*cells,))


def test_table_of_recorded_summaries(recorded, tmp_path):
  found = results.collect(recorded)
  path = results.write(tmp_path, found)
  assert path.read_text().endswith(TABLE)
  assert (found["devices"], found["cell_seconds"]) == (["1 x cpu"], round(2.5 * len(recorded.cells)))


def with_seed(study: Study, name: str, seed: int) -> Study:
  """With one cell's settings changed, as by an edited page."""

  def changed(cell):
    if cell.name != name:
      return cell
    return dataclasses.replace(
      cell, config=dataclasses.replace(cell.config, run=dataclasses.replace(cell.config.run, seed=seed))
    )

  return dataclasses.replace(study, cells=(*map(changed, study.cells),))


def test_a_run_that_is_not_complete_is_not_in_the_table(recorded):
  def third(study):
    found = results.collect(study)
    entries = found["teachers"]["hog"]["arms"]["dtm"]["k-NN"]
    return found["cells_done"], entries["values"], entries["std"]

  number, of_two = len(recorded.cells), ({"0": 0.72, "1": 0.80}, pytest.approx(0.08 / 2**0.5))
  assert third(recorded)[:2] == (number, {"0": 0.72, "1": 0.80, "2": 0.88})
  assert third(with_seed(recorded, "hog/dtm/seed2/evaluate", 7)) == (number - 1, *of_two)  # of other settings
  assert third(with_seed(recorded, "hog/dtm/seed2/train", 7)) == (number - 2, *of_two)  # nor what it began from
  trained = recorded.folder / "hog/dtm/seed2/train/summary.json"
  before = trained.read_text()
  trained.write_text(json.dumps({"params_sha256": "of another training"}))
  assert third(recorded) == (number - 1, *of_two)
  trained.write_text(before)
  (recorded.folder / "hog/dtm/seed2/evaluate/cell.json").unlink()
  assert third(recorded) == (number - 1, *of_two)  # under way


def test_differences_are_of_the_same_seeds():
  found = results.paired_differences({0: 0.5, 2: 0.9, 3: 0.1}, {2: 0.7, 0: 0.6, 1: 0.0})
  assert found == pytest.approx([-0.1, 0.2])


def test_pictures_of_whatever_steps_there_are(tmp_path, saved_figures):
  one, other = ((0, 5, 10), (0.3, 0.2, 0.1)), ((0, 5), (0.5, 0.2))
  panels = {"hog": {"token-wise": [one, other], "dtm": [one]}, "pixels": {"dtm": [((0,), (0.5,))]}}
  pictures.curves_figure(tmp_path / "loss.png", panels, "loss", window=1, scale=100)
  hog, pixels = saved_figures[0].axes
  assert (hog.get_title(), pixels.get_title()) == ("teacher: hog", "teacher: pixels")
  mean, single = hog.lines
  np.testing.assert_allclose(mean.get_xydata(), [(0, 40), (5, 20)])  # of the steps that both seeds have
  np.testing.assert_allclose(single.get_xydata(), [(0, 30), (5, 20), (10, 10)])
  band = hog.collections[0].get_paths()[0].vertices
  assert {tuple(point) for point in band.round(9)} == {(0, 30), (0, 50), (5, 20)}
  np.testing.assert_allclose(pixels.lines[0].get_xydata(), [(0, 50)])


def test_the_picture_of_differences(recorded, tmp_path, saved_figures):
  path = tmp_path / "differences.png"
  pictures.differences_figure(path, results.collect(recorded))
  knn, _, _, few = saved_figures[0].axes
  assert [panel.get_title() for panel in saved_figures[0].axes] == ["k-NN", "linear", "10-shot", "few"]
  assert [label.get_text() for label in knn.get_yticklabels()] == ["fixed-n", "dtm"]

  def drawn(panel):
    """Points of the seeds, the mean, and the ends of its error bar where it has one."""
    seeds, mean, *_ = panel.lines
    ends = [segment[:, 0].tolist() for bars in panel.collections for segment in bars.get_segments()]
    return sorted(seeds.get_xdata()), mean.get_xdata()[0], ends

  # By hand, as in TABLE.
  assert drawn(knn) == (pytest.approx([2, 6]), pytest.approx(4), [pytest.approx([2, 6])])
  assert drawn(few) == (pytest.approx([1]), pytest.approx(1), [])
  found = results.collect(recorded)
  found["teachers"]["a-classifier-of-2000-labels"] = found["teachers"].pop("hog")
  pictures.differences_figure(path, found, leave_out="fixed-n")
  assert [label.get_text() for label in saved_figures[1].axes[0].get_yticklabels()] == ["dtm"]
  label = saved_figures[1].axes[0].yaxis.label.get_window_extent()
  assert saved_figures[1].bbox.height > label.y1 > label.y0 > 0  # of one low row of panels, too
  path.unlink()
  pictures.differences_figure(path, results.collect(dataclasses.replace(recorded, arms=("token-wise",))))
  assert not path.exists()  # nothing to compare


# Real runs.


def start(page: pathlib.Path, workdir: pathlib.Path, cache: pathlib.Path, *arguments: str) -> subprocess.Popen:
  environment = os.environ | {
    "XLA_FLAGS": "",
    "JAX_COMPILATION_CACHE_DIR": str(cache),
    "PYTHONPATH": str(ROOT),
  }
  command = [sys.executable, "-m", "dtm_jax.study", f"--config={page}", "--scale=x", f"--workdir={workdir}"]
  return runs.popen([*command, *arguments], env=environment, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def page(tmp_path):
  path = tmp_path / "page.py"
  path.write_text(PAGE)
  return path


@pytest.mark.slow
def test_a_failing_cell_is_named_and_the_others_go_on(page, tmp_path, compile_cache):
  code, stderr = runs.finish(start(page, tmp_path / "study", compile_cache, "--jobs=2"))
  assert code == 1, stderr
  folder = tmp_path / "study" / "hog"
  assert "hog/broken/seed0/train: FAILED (exit code 2): error: weights file MISSING does not exist" in stderr
  assert "hog/broken/seed0/evaluate: left out, hog/broken/seed0/train failed" in stderr
  assert runs.summary(folder / "token-wise/seed0/train")["steps"] == 2
  evaluated = runs.summary(folder / "token-wise/seed0/evaluate")
  assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in stderr.splitlines())  # told once, and plainly
  table = (tmp_path / "study" / "results.md").read_text()
  assert f"| token-wise | {100 * evaluated['knn_top1']:.1f} | - | {100 * evaluated['fewshot_1_top1']:.1f} |" in table
  assert "| broken | - | - | - |" in table
  figures = {path.name for path in (tmp_path / "study/figures").iterdir()}
  assert figures == {"loss.png", "accuracy.png", "tokens_hog.png"}


def finish_well(process: subprocess.Popen) -> str:
  code, stderr = runs.finish(process)
  assert code == 0, stderr
  return stderr


@pytest.mark.slow
def test_stopped_or_killed_the_same_command_goes_on(page, tmp_path, compile_cache):
  page.write_text(PAGE.replace('arms=("broken", "token-wise")', 'arms=("token-wise",)'))
  folder = tmp_path / "study"
  workdir = folder / "hog/token-wise/seed0/train"
  settings = {"run.steps": 4000, "run.log_every_steps": 1, "eval.figure_images": 0}
  long = [f"--config.{name}={value}" for name, value in settings.items()]
  start_study = functools.partial(start, page, folder, compile_cache, *long)

  process = start_study()
  rows = workdir / "metrics.jsonl"
  runs.wait_until(lambda: rows.exists() and len(rows.read_text().splitlines()) > 2, process)  # steps, not k-NN alone
  with pytest.raises(InputError, match="another process is at work in"), workdir_lib.locked(folder):
    pass
  process.send_signal(signal.SIGTERM)
  code, stderr = runs.finish(process)
  assert code == 143 and "hog/token-wise/seed0/train: stopped" in stderr, stderr
  [step] = runs.checkpoints(workdir)
  assert 0 < step < 4000
  with workdir_lib.locked(folder):  # nobody is left in it
    pass

  process = start_study()
  runs.wait_until(lambda: f"resuming at step {step}" in (workdir / "log.txt").read_text(), process)
  [child] = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
  slots = runner.cpu_slots(sorted(os.sched_getaffinity(0)), None)
  assert os.sched_getaffinity(int(child)) in [slot.cores for slot in slots]
  environment = pathlib.Path(f"/proc/{child}/environ").read_text().split("\0")
  assert f"GLIBC_TUNABLES={os.environ.get('GLIBC_TUNABLES', 'glibc.malloc.hugetlb=1')}" in environment
  assert f"JAX_COMPILATION_CACHE_DIR={compile_cache}" in environment  # the user's goes before the study's own
  process.kill()
  runs.finish(process)
  with (
    pytest.raises(InputError, match="another process is at work in"),
    workdir_lib.locked(folder),
  ):  # its cell lives on
    pass
  os.kill(int(child), signal.SIGKILL)

  end = f"--config.run.steps={step + 2}"
  finish_well(start_study(end))
  assert runs.summary(workdir)["steps"] == step + 2
  logs = {path: path.read_text() for path in folder.rglob("log.txt")}
  assert len(logs) == 2
  assert "2 of 2 cells are complete already" in finish_well(start_study(end))
  assert {path: path.read_text() for path in logs} == logs


def test_what_begins_from_an_incomplete_cell_is_not_complete(tmp_path):
  teacher, _, student, *_ = cells = shipped("ci", tmp_path).cells
  stop = threading.Event()
  stop.set()  # before any cell is started
  found = []
  for cell in (student, teacher):
    mark_done(tmp_path, cell)
    run = runner.Runner(tmp_path, [runner.Slot()], 0, stop)
    run.run(cells, on_end=lambda: None)
    found.append(run.done)
  assert found == [set(), {teacher.name, student.name}]
