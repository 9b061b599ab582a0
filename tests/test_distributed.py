"""Several processes agree, stop together, and compute what one process does: real ones, on this machine."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from absl import logging
from PIL import Image

import runs
import two_processes
from dtm_jax import console, distributed
from dtm_jax.errors import InputError

LOCAL = runs.ROOT / "launch" / "local.sh"
NUM_STEPS = 10
TOGETHER = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:4321", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


# ------------------------------------------------------------ how they start


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2 of JAX_NUM_PROCESSES=2"),
    ({"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID=-1 of"),
    ({"JAX_NUM_PROCESSES": "two"}, "of JAX_NUM_PROCESSES=two"),
    ({"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID not set"),
    ({"JAX_NUM_PROCESSES": None, "JAX_PROCESS_ID": None}, "JAX_NUM_PROCESSES, JAX_PROCESS_ID not set"),
    ({"JAX_COORDINATOR_ADDRESS": "4321"}, "JAX_COORDINATOR_ADDRESS=4321 is not the HOST:PORT"),
    ({"JAX_COORDINATOR_ADDRESS": "here:65536"}, "JAX_COORDINATOR_ADDRESS=here:65536 is not"),
  ],
)
def test_a_wrong_environment_is_one_clear_line(monkeypatch, changes, message):
  for name, value in (TOGETHER | changes).items():
    if value is not None:
      monkeypatch.setenv(name, value)
  with pytest.raises(InputError, match=re.escape(message)):
    distributed.initialize()


SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
  ("environment", "count"),
  [
    ({}, 1),
    (SLURM | {"SLURM_NTASKS": "1"}, 1),
    (SLURM | {"SLURM_NTASKS": "8"}, 8),
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, 1),  # the batch script itself
    ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, 1),  # any pod
  ],
)
def test_processes_of_a_cluster_are_counted(monkeypatch, environment, count):
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  assert distributed._count_detected() == count


def test_one_process_told_so_needs_no_other(monkeypatch):
  for name, value in (TOGETHER | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}).items():
    monkeypatch.setenv(name, value)
  distributed.initialize()
  assert (distributed.count(), distributed.index()) == (1, 0)


def test_a_process_that_nobody_joins_gives_up():
  program = "from dtm_jax import distributed; distributed.START_SECONDS = 1; distributed.initialize()"
  nobody = TOGETHER | {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}"}
  ended = subprocess.run([sys.executable, "-c", program], env=environment(**nobody), capture_output=True, text=True)
  assert ended.returncode == 1
  assert "not all of 2 processes have come within 1 s" in ended.stderr.splitlines()[-1]
  assert "Traceback" not in ended.stderr


def free_port() -> int:
  program = "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])"
  return int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)


def environment(**variables: str) -> dict[str, str]:
  """Of a process with one device, unless `variables` say otherwise."""
  # jax would warn of a proxy, which some machines have.
  own = {
    "XLA_FLAGS": runs.QUICKLY_COMPILED,
    "PYTHONPATH": str(runs.ROOT),
    "PYTHON": sys.executable,
    "JAX_CHECK_PROXY_ENVS": "0",
  }
  return os.environ | own | variables


# ------------------------------------------------------------ how they agree


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  """A folder of two classes, 45 images to learn and 5 to be tested; four of all cannot be read."""
  folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
  for i in range(50):
    path = folder / f"class{i // 25}" / f"{i:02}.png"
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(rng.integers(256, size=(20, 20, 3), dtype=np.uint8)).save(path)
    if i in (0, 7, 12, 33):
      path.write_bytes(b"no image")
  return folder


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
  """Where the two processes below keep their programs."""
  return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def agreed(tmp_path_factory, images, programs):
  """What two processes say to each other, by process."""
  folder, address = tmp_path_factory.mktemp("agreed"), f"127.0.0.1:{free_port()}"

  def start(index: int):
    variables = TOGETHER | {"JAX_COORDINATOR_ADDRESS": address, "JAX_PROCESS_ID": str(index)}
    variables["JAX_COMPILATION_CACHE_DIR"] = str(programs)
    command = [sys.executable, two_processes.__file__, str(folder), str(images)]
    return runs.popen(command, env=environment(**variables), stdout=subprocess.PIPE, text=True)

  processes = [start(0), start(1)]
  outputs = [process.communicate()[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0]
  return [json.loads(output.splitlines()[-1]) for output in outputs]


@pytest.mark.parametrize(
  ("case", "result"),
  [
    ("gather", [{"own": 0}, {"own": 1}]),
    ("from first", [0, "ä"]),
    ("first fails", "no record"),
    ("all fail", "no data"),
    ("same", None),
    ("shared", None),
    ("left", []),
  ],
)
def test_all_processes_hear_the_same(agreed, case, result):
  assert [said[case] for said in agreed] == [result, result]


def test_what_each_found_is_its_own(agreed):
  assert [said["none fails"] for said in agreed] == [0, 1]


@pytest.mark.parametrize(
  ("case", "message"),
  [
    ("last fails", "process 1 on .+: no data"),
    ("other", r"process 1 on .+: config\.seed not as on process 0 \(1 here, 0 there.+"),
    ("not shared", "process 1 on .+/1 is not the folder of process 0; .+"),
  ],
)
def test_all_processes_hear_which_one_differs(agreed, case, message):
  texts = {said[case] for said in agreed}
  assert len(texts) == 1
  assert re.fullmatch(message, texts.pop())


def test_all_processes_stop_at_the_same_call(agreed):
  (asked, still), other = (said["stopped"] for said in agreed)
  assert [asked, still] == other
  assert asked > 5
  assert still


def test_two_processes_evaluate_what_one_does(agreed, images):
  """Each image once, though the last batches are not full, and some cannot be read."""
  alone = two_processes.evaluate(str(images))
  assert [len(labels) for labels in alone["labels"]] == [42, 4]
  for said in agreed:
    found = said["evaluated"]
    assert {name: found[name] for name in ("labels", "knn", "probe")} == {
      name: alone[name] for name in ("labels", "knn", "probe")
    }
    for own, other in zip(found["features"], alone["features"], strict=True):
      np.testing.assert_allclose(own, other, rtol=1e-6)
  assert agreed[0]["evaluated"]["split_rows"] == agreed[1]["evaluated"]["split_rows"]


def test_each_keeps_its_programs(agreed, programs):
  """A program for CPUs is of one process."""
  names = [path.name for path in programs.glob("jit_psum-*-cache")]
  assert len(names) == len(agreed), [*programs.iterdir()]


def test_the_others_are_silent(monkeypatch, capsys):
  for name, value in {"_speaker": "", "_is_silent": False}.items():
    monkeypatch.setattr(console, name, value)
  level, verbosity = console.LINES.level, logging.get_verbosity()
  console.speak_as(1)
  try:
    assert console.fail("no data", 2) == 2
    with console.progress_bar(total=1) as bar:
      assert bar.disable
  finally:
    console.LINES.setLevel(level)
    logging.set_verbosity(verbosity)
  assert capsys.readouterr().err == "error in process 1: no data\n"


@pytest.mark.parametrize(
  ("error", "count", "expected"),
  [
    (RuntimeError("Gloo all-reduce failed: Connection closed by peer"), 2, True),
    (TimeoutError("Timed out while waiting for async_write_complete barrier."), 2, True),
    (TimeoutError("Timed out while waiting for async_write_complete barrier."), 1, False),
    (OSError(28, "No space left on device"), 2, False),
    (InputError("cannot write /data/barrier/summary.json"), 2, False),
  ],
)
def test_a_process_that_is_lost_is_told_from_other_errors(monkeypatch, error, count, expected):
  monkeypatch.setattr(distributed, "count", lambda: count)
  wrapped = ValueError("orbax says so")
  wrapped.__cause__ = error
  assert [distributed.is_loss(error), distributed.is_loss(wrapped)] == [expected, expected]


# ------------------------------------------------------------ what they compute


def launch(count: int, devices: int, arguments: list[str], cache: pathlib.Path) -> subprocess.Popen:
  """`launch/local.sh` with so many processes of so many devices; outputs are piped, as text."""
  variables = {"DEVICES_PER_PROCESS": str(devices), "JAX_COMPILATION_CACHE_DIR": str(cache)}
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  return runs.popen([LOCAL, str(count), *arguments], env=environment(**variables), **pipes)


def train(count: int, devices: int, arguments: list[str], cache: pathlib.Path) -> str:
  """What a run that succeeds says."""
  process = launch(count, devices, arguments, cache)
  _, stderr = process.communicate()
  assert process.returncode == 0, stderr
  return stderr


def options(workdir: pathlib.Path, images: pathlib.Path, **settings) -> list[str]:
  """Of a run of few steps; batches of evaluation are not full."""
  data = {"data__source": "folder", "data__path": images, "data__max_bad_fraction": 0.5, "eval__batch_size": 8}
  steps = {"run__steps": NUM_STEPS, "run__checkpoint_every_steps": 4, "run__keep_checkpoints": 5}
  return runs.options(workdir, **(data | steps | settings))


# Whose parameters lie on the devices of both processes, and which a file has.
TEACHER = {
  **{"teacher__kind": "checkpoint", "teacher__weights": runs.ROOT / "tests/golden/student_tiny.pth"},
  **{"data__image_size": 64, "data__num_masked": 24, "data__mask_min_block": 4, "model__patch_size": 8},
}


def assert_same_rows(workdir: pathlib.Path, reference: pathlib.Path, rtol: float) -> None:
  """The same steps in the same order, and values that agree."""
  own, others = runs.rows(workdir), runs.rows(reference)
  assert [(row["step"], *row) for row in own] == [(row["step"], *row) for row in others]
  for row, other in zip(own, others, strict=True):
    for name, value in row.items():
      np.testing.assert_allclose(np.sort(value, None), np.sort(other[name], None), rtol, err_msg=f"{row}, {other}")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, images, compile_cache):
  """A run of one process with two devices."""
  workdir = tmp_path_factory.mktemp("alone")
  train(1, 2, options(workdir, images, **TEACHER), compile_cache)
  return workdir


@pytest.fixture(scope="module")
def paired(tmp_path_factory, images, compile_cache):
  """A run of two processes with a device each: its work folder, and what it said."""
  workdir = tmp_path_factory.mktemp("paired")
  return workdir, train(2, 1, options(workdir, images, **TEACHER), compile_cache)


@pytest.mark.slow
def test_two_processes_compute_what_one_does(paired, alone):
  """That both have the same parameters in the end they compare themselves, see below."""
  assert_same_rows(paired[0], alone, rtol=1e-6)
  assert len({row["loss"] for row in runs.rows(alone)}) == NUM_STEPS
  assert runs.rows(alone)[-1]["bad_images"] == 3


@pytest.mark.slow
def test_only_the_first_of_two_processes_speaks(paired):
  workdir, stderr = paired
  assert "[1] error" not in stderr and "[1] step" not in stderr
  assert stderr.count("2 processes on 1 host(s) with 1 device(s) each: 2 cpu devices, data 2 x fsdp 1 x tensor 1") == 1
  assert stderr.count(f"step {NUM_STEPS}/{NUM_STEPS}, ") == 1
  assert stderr.count("unreadable image skipped") == 3
  assert [row["step"] for row in runs.rows(workdir)] == [*range(1, NUM_STEPS + 1)]
  assert sorted(path.name for path in workdir.iterdir()) == [
    *("checkpoints", "config.json", "figures", "lock", "metrics.jsonl", "summary.json", "tensorboard")
  ]


def end_of_two(arguments: list[list[str]], cache: pathlib.Path, folders=(None, None)) -> list[str]:
  """The last lines of two processes of one run that are started with different words or elsewhere, and end with 2."""
  variables = TOGETHER | {
    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
    "JAX_COMPILATION_CACHE_DIR": str(cache),
  }
  processes = [
    runs.popen(
      [sys.executable, "-m", "dtm_jax.main", *words],
      cwd=folder,
      env=environment(**variables | {"JAX_PROCESS_ID": str(index)}),
      stderr=subprocess.PIPE,
      text=True,
    )
    for index, (words, folder) in enumerate(zip(arguments, folders, strict=True))
  ]
  said = [process.communicate()[1] for process in processes]
  assert [process.returncode for process in processes] == [2, 2], said
  return [stderr.splitlines()[-1] for stderr in said]


@pytest.mark.slow
def test_processes_that_differ_are_told_apart(tmp_path, images, compile_cache):
  """The second one learns from other images, of which the folder has another number."""
  shutil.copytree(images, tmp_path / "images")
  (tmp_path / "images" / "class0" / "06.png").unlink()
  folders = (images, tmp_path / "images")
  lines = end_of_two([options(tmp_path / "run", folder) for folder in folders], compile_cache)
  for index, line in enumerate(lines):
    pattern = rf"error in process {index}: process 1 on .+: config\.data\.path not as on process 0 \(.+"
    assert re.fullmatch(pattern, line)
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.long
def test_processes_with_other_evaluation_images_are_told_apart(tmp_path, images, compile_cache):
  """As hosts with a disk of their own: under the same path, the second has an image fewer to evaluate on."""
  hosts = [tmp_path / str(index) for index in range(2)]
  for host in hosts:
    for split in ("train", "test"):
      shutil.copytree(images, host / "images" / split)
  (hosts[1] / "images" / "test" / "class0" / "06.png").unlink()
  lines = end_of_two([options(tmp_path / "run", pathlib.Path("images"))] * 2, compile_cache, hosts)
  for index, line in enumerate(lines):
    pattern = (
      rf"error in process {index}: process 1 on .+: eval_images, eval_sha256 not as on process 0 \(49 here, 50 .+"
    )
    assert re.fullmatch(pattern, line), line
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.long
def test_processes_with_folders_of_their_own_are_told(tmp_path, images, compile_cache):
  lines = end_of_two([options(tmp_path / f"run{index}", images) for index in range(2)], compile_cache)
  for index, line in enumerate(lines):
    assert line.startswith(f"error in process {index}: process 1 on "), line
    assert f"{tmp_path}/run1 is not the folder of process 0; choose one that all hosts share" in line
  assert not [*tmp_path.glob("run*/metrics.jsonl")]


@pytest.fixture(scope="module")
def four(tmp_path_factory, images, compile_cache):
  """Runs on four devices by number of processes, with k-NN before and after."""
  workdirs = {count: tmp_path_factory.mktemp(f"by_{count}") for count in (1, 4)}
  for count, workdir in workdirs.items():
    train(count, 4 // count, options(workdir, images, eval__knn=True, eval__knn_k=3), compile_cache)
  return workdirs


@pytest.mark.slow
@pytest.mark.long
def test_four_processes_compute_what_one_does(four):
  assert_same_rows(four[4], four[1], rtol=1e-6)
  assert [row["step"] for row in runs.rows(four[1]) if "knn_top1" in row] == [0, NUM_STEPS]


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_evaluate_as_one(four, tmp_path, images, compile_cache):
  """Each image once, though the last batches are not full, and one cannot be read."""
  folders = {count: tmp_path / str(count) for count in (1, 2)}
  for count, workdir in folders.items():
    settings = {"eval__checkpoint": four[1], "eval__knn_k": 3, "eval__save_features": True, "eval__fewshot": "(1, 2)"}
    config = f"--config={runs.ROOT}/configs/evaluate.py"
    train(count, 2 // count, [config, *options(workdir, images, eval__knn=True, **settings)[1:]], compile_cache)
  own, other = (runs.summary(folder) for folder in folders.values())
  assert {**own, "seconds": 0} == {**other, "seconds": 0}
  assert own["test_images"] == 4
  for split, number in (("train", 42), ("test", 4)):
    one, two = (np.load(folder / f"features_{split}.npz") for folder in folders.values())
    assert len(one["labels"]) == number
    np.testing.assert_array_equal(two["labels"], one["labels"])
    np.testing.assert_allclose(two["features"], one["features"], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_two_processes_fine_tune_as_one(tmp_path, images, compile_cache):
  """With the best checkpoint, which is saved while the newest one is still being written."""
  folders = {count: tmp_path / str(count) for count in (1, 2)}
  config = f"--config={runs.ROOT}/configs/finetune_quickstart.py:smoke"
  often = {"finetune__init": "", "run__steps": 4, "run__checkpoint_every_steps": 1, "eval__every_epochs": 0.2}
  for count, workdir in folders.items():
    train(count, 2 // count, [config, *options(workdir, images, **often)[1:]], compile_cache)
    assert [row["step"] for row in runs.rows(workdir) if "top1" in row] == [1, 2, 3, 4]
    assert [path.name for path in (workdir / "best").iterdir()]
  assert_same_rows(folders[2], folders[1], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("count", "devices", "mesh"),
  [
    pytest.param(2, 4, {}, marks=pytest.mark.long),
    (2, 2, {"mesh__fsdp": 2, "mesh__tensor": 2}),
    (1, 1, {}),
  ],
  ids=["two_processes", "another_layout", "one_device"],
)
def test_a_run_of_eight_devices_goes_on_elsewhere(eight, tmp_path, images, compile_cache, count, devices, mesh):
  """From step 4 of 10, as after a kill."""
  workdir = tmp_path / "run"
  shutil.copytree(eight, workdir)
  (workdir / "summary.json").unlink()
  for step in (8, NUM_STEPS):
    shutil.rmtree(workdir / "checkpoints" / str(step))
  lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
  (workdir / "metrics.jsonl").write_text("".join(lines[:4]))
  stderr = train(count, devices, options(workdir, images, **mesh), compile_cache)
  assert f"resuming at step 4 of {NUM_STEPS}" in stderr
  assert_same_rows(workdir, eight, rtol=1e-5)


@pytest.fixture(scope="module")
def eight(tmp_path_factory, images, compile_cache):
  """A run of one process with eight devices."""
  workdir = tmp_path_factory.mktemp("eight")
  train(1, 8, options(workdir, images), compile_cache)
  return workdir


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path, images, compile_cache):
  launcher = launch(2, 1, options(tmp_path, images, run__steps=5000), compile_cache)
  rows = tmp_path / "metrics.jsonl"
  runs.wait_until(lambda: rows.exists() and len(rows.read_text().splitlines()) >= 3, launcher)
  os.kill(process_of(launcher, index=1), signal.SIGTERM)
  _, stderr = launcher.communicate()
  assert launcher.returncode == 143, stderr
  last = runs.rows(tmp_path)[-1]["step"]
  assert f"stopped and saved at step {last}; the same command goes on from there" in stderr
  assert runs.checkpoints(tmp_path)[-1] == last < 5000


def process_of(launcher: subprocess.Popen, index: int) -> int:
  """The number of one of the processes that `launch/local.sh` has started."""
  children = pathlib.Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
  wanted = f"JAX_PROCESS_ID={index}".encode()
  [found] = [
    child
    for child in children
    if wanted in pathlib.Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
    and b"dtm_jax.main" in pathlib.Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
  ]
  return int(found)


@pytest.mark.slow
def test_a_signal_to_the_launcher_reaches_all(tmp_path, images, compile_cache):
  launcher = launch(2, 1, options(tmp_path, images, run__steps=5000), compile_cache)
  rows = tmp_path / "metrics.jsonl"
  runs.wait_until(lambda: rows.exists() and len(rows.read_text().splitlines()) >= 3, launcher)
  launcher.terminate()
  _, stderr = launcher.communicate()
  assert launcher.returncode == 143, stderr
  assert "stopped and saved at step" in stderr
