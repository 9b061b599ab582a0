"""What starts runs elsewhere: Slurm for real, on a cluster of one node; what is for clouds, by its text."""

import io
import math
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tarfile

import pytest

import miniatures
import one_node_slurm
import runs
from configs import vitb
from dtm_jax import config as config_lib
from dtm_jax import main
from dtm_jax.data import sources

LAUNCH = runs.ROOT / "launch"


def test_the_local_launcher_tells_how_it_is_used():
  told = subprocess.run([LAUNCH / "local.sh", "--help"], check=True, capture_output=True, text=True).stdout
  assert told.startswith("Several processes of one run on this machine:\n") and told.endswith("the first other one.\n")


@pytest.fixture
def run_local(tmp_path):
  """`launch/local.sh` with a line of shell in place of each process: exit code and standard error."""
  python = tmp_path / "python"
  python.write_text(
    f'#!/bin/sh\n[ "$1" = -m ] || exec {sys.executable} "$@"\neval "$(printenv LINE_$JAX_PROCESS_ID)"\n'
  )
  python.chmod(0o755)

  def run(*lines: str, **variables: str) -> tuple[int, str]:
    of_processes = {f"LINE_{i}": line for i, line in enumerate(lines)}
    environment = os.environ | {"PYTHON": str(python), **of_processes} | variables
    ended = subprocess.run([LAUNCH / "local.sh", str(len(lines))], env=environment, capture_output=True, text=True)
    return ended.returncode, ended.stderr

  return run


@pytest.mark.parametrize(
  ("lines", "code", "told"),
  [
    (("exit 0", "exit 0"), 0, ""),
    (("exit 0", "sleep 0.5; exit 7"), 7, "error: process 1 has ended with exit code 7\n"),
    (("exit 2", "exit 2"), 2, ""),  # which have said why
    (("exit 143", "exit 143"), 143, ""),
    (("sleep 1; exit 3", "exit 1"), 3, "error: process 1 has ended with exit code 1\n"),  # which may have lost it
    (("echo first >&2", "echo one >&2; printf two >&2"), 0, "first\n[1] one\n[1] two\n"),
  ],
)
def test_the_local_launcher_ends_as_its_processes_do(run_local, lines, code, told):
  found, stderr = run_local(*lines)
  assert (found, sorted(stderr.splitlines())) == (code, sorted(told.splitlines()))


def test_the_local_launcher_ends_who_stays_behind(run_local):
  code, stderr = run_local("trap '' TERM; exec sleep 100", "exit 2", GRACE_SECONDS="1")
  assert code == 2
  told = stderr.splitlines()[0]  # and then bash what it has killed
  assert told == "error: 1 of 2 processes still ran 1 s after another had failed, and are ended"


def test_the_local_launcher_gives_each_process_a_gpu(run_local, tmp_path):
  smi = tmp_path / "nvidia-smi"
  smi.write_text("#!/bin/sh\nprintf 'GPU 0: A\\nGPU 1: B\\n'\n")
  smi.chmod(0o755)
  path, own = f"{tmp_path}:{os.environ['PATH']}", "echo gpu $JAX_LOCAL_DEVICE_IDS >&2"
  code, stderr = run_local(own, own, PATH=path, JAX_PLATFORMS="")
  assert (code, sorted(stderr.splitlines())) == (0, ["[1] gpu 1", "gpu 0"])
  assert run_local(own, own, own, PATH=path, JAX_PLATFORMS="") == (
    2,
    "error: 3 processes, and 2 GPUs: one each; or JAX_PLATFORMS=cpu\n",
  )


# ------------------------------------------------------------ Slurm

NUM_STEPS = 200  # enough for a fast machine, too, not to be done before Slurm has looked


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
  if reason := one_node_slurm.missing():
    pytest.skip(reason)
  with one_node_slurm.started(tmp_path_factory.mktemp("slurm")) as cluster:
    yield cluster


def submit(slurm, *arguments: str, script_options: tuple[str, ...] = ()) -> str:
  """A job of launch/slurm.sbatch, with the Python that runs the tests."""
  settings = {"PYTHON": sys.executable, "PYTHONPATH": str(runs.ROOT), "XLA_FLAGS": ""}  # one device for each process
  return slurm.submit(*script_options, str(LAUNCH / "slurm.sbatch"), *arguments, **settings)


def submit_two(slurm, workdir: pathlib.Path, *script_options: str, steps: int = NUM_STEPS) -> str:
  """A job of two processes that saves nothing before its end, unless it is stopped."""
  settings = {"run__steps": steps, "run__checkpoint_every_steps": 10 * steps}
  return submit(slurm, *runs.options(workdir, **settings), script_options=("--ntasks=2", *script_options))


def wait_until(slurm, job: str, condition) -> None:
  slurm.wait(condition, lambda: (slurm.job(job), log(slurm, job)))


def log(slurm, job: str) -> str:
  path = slurm.folder / f"dtm_jax-{job}.log"
  return path.read_text() if path.exists() else ""


# Others pass, such as SIGNALING.
ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")


def has_ended(slurm, job: str) -> bool:
  return slurm.job(job)["JobState"] in ENDED


@pytest.mark.slow
def test_a_preempted_job_saves_is_requeued_and_ends_as_if_nothing_had_been(slurm, tmp_path):
  """Slurm itself takes the node from a job of two processes for one that is more urgent."""
  workdir, undisturbed = tmp_path / "preempted", tmp_path / "undisturbed"
  job = submit_two(slurm, workdir)
  wait_until(slurm, job, lambda: (workdir / "metrics.jsonl").exists() and len(runs.rows(workdir)) >= 3)
  urgent = submit_two(slurm, undisturbed, "--partition=urgent", "--exclusive")
  # Slurm counts a restart before the job has saved.
  wait_until(slurm, job, lambda: "stopped and saved at step" in log(slurm, job))
  [saved] = runs.checkpoints(workdir)
  assert 3 <= saved < NUM_STEPS
  for name in (urgent, job):
    wait_until(slurm, name, lambda name=name: has_ended(slurm, name))
    assert slurm.job(name)["JobState"] == "COMPLETED", log(slurm, name)
  assert slurm.job(job)["Restarts"] == "1"
  assert f"resuming at step {saved} of" in log(slurm, job)
  assert [row["step"] for row in runs.rows(workdir)] == [*range(1, NUM_STEPS + 1)]
  assert runs.rows(workdir) == runs.rows(undisturbed)
  assert runs.summary(workdir)["params_sha256"] == runs.summary(undisturbed)["params_sha256"]


@pytest.mark.slow
@pytest.mark.long
def test_a_job_longer_than_its_time_limit_goes_on_in_several_attempts(slurm, tmp_path):
  """Slurm counts in minutes, and gives notice two of them before the end: of four, two are left to work in, or less."""
  job = submit_two(slurm, tmp_path, "--time=4", steps=10**6)
  wait_until(slurm, job, lambda: slurm.job(job)["Restarts"] == "2" or has_ended(slurm, job))
  slurm.run("scancel", job)
  begun, stopped = (
    [int(step) for step in re.findall(rf"{words} at step (\d+)", log(slurm, job))]
    for words in ("resuming", "stopped and saved")
  )
  assert len(stopped) == 2 and 0 < stopped[0] < stopped[1], log(slurm, job)
  assert begun == stopped[:1]
  assert [row["step"] for row in runs.rows(tmp_path)] == [*range(1, stopped[-1] + 1)]


@pytest.mark.slow
def test_a_cancelled_job_stays_cancelled(slurm, tmp_path):
  job = submit(slurm, *runs.options(tmp_path))
  wait_until(slurm, job, lambda: f"{job}.0" in slurm.run("squeue", "--steps", "--noheader"))
  slurm.run("scancel", job)
  wait_until(slurm, job, lambda: has_ended(slurm, job))
  assert {name: slurm.job(job)[name] for name in ("JobState", "Restarts")} == {"JobState": "CANCELLED", "Restarts": "0"}


@pytest.mark.slow
@pytest.mark.parametrize(
  ("options", "arguments", "message"),
  [
    (("--gpus-per-node=2", "--ntasks-per-node=2", "--cpus-per-task=2"), ["--config=nonesuch.py"], "nonesuch.py"),
    (("--gpus-per-node=2", "--ntasks=1"), [runs.SMOKE], "1 tasks for 2 GPUs; submit with --ntasks-per-node=2"),
  ],
)
def test_what_the_user_has_to_mend_is_not_tried_again(slurm, options, arguments, message):
  job = submit(slurm, *arguments, script_options=options)
  wait_until(slurm, job, lambda: has_ended(slurm, job))
  assert slurm.job(job)["ExitCode"] == "2:0"
  assert slurm.job(job)["Restarts"] == "0"
  assert message in log(slurm, job)


# ------------------------------------------------------------ shell


@pytest.mark.parametrize("path", sorted(path.name for path in LAUNCH.glob("*.s*")))
def test_shellcheck_finds_nothing(path):
  program = shutil.which("shellcheck") or shutil.which("shellcheck", path=pathlib.Path(sys.executable).parent)
  if program is None:
    pytest.skip("no shellcheck here (pip install '.[test]')")
  result = subprocess.run([program, LAUNCH / path], capture_output=True, text=True, check=False)
  assert not result.stdout + result.stderr


def run_script(name: str, *arguments: object, **settings: str) -> subprocess.CompletedProcess:
  """A script of `launch/`, with the Python that runs the tests."""
  environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(runs.ROOT)} | settings
  command = [LAUNCH / name, *map(str, arguments)]
  return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


# ------------------------------------------------------------ TPU pods


def dry_run(command: str, *options: str) -> list[str]:
  """Lines that `tpu_pod.sh` prints."""
  options = ("--name=pod", "--zone=us-west4-a", "--dry_run", *options)
  result = run_script("tpu_pod.sh", command, *options, TMPDIR="/tmp")
  assert (result.returncode, result.stderr) == (0, "")
  return result.stdout.splitlines()


TPU = "gcloud compute tpus"
CODE = f"-C {runs.ROOT} dtm_jax configs setup.py pyproject.toml README.md LICENSE"
INSTALL = (
  "set -e; mkdir -p dtm_jax; tar -xzf dtm_jax.tar.gz -C dtm_jax; python3 -m pip install -q --user uv;"
  " [ -d .venv ] || ~/.local/bin/uv venv -q --python=3.12 .venv;"
  r" ~/.local/bin/uv pip install -q --python=.venv/bin/python -e '\''./dtm_jax[tpu]'\''"
)
MOUNT = (
  "set -e; sudo apt-get install -qq -y nfs-common; mkdir -p shared;"
  " mountpoint -q shared || sudo mount -t nfs 10.0.0.2:/dir shared"
)


@pytest.mark.parametrize(
  ("command", "options", "lines"),
  [
    (
      "create",
      ["--type=v5litepod-64"],
      [f"{TPU} tpu-vm create pod --zone=us-west4-a --accelerator-type=v5litepod-64 --version=v2-alpha-tpuv5-lite"],
    ),
    (
      "create",
      ["--type=v9-8", "--runtime=new", "--spot", "--project=ours"],
      [f"{TPU} tpu-vm create pod --zone=us-west4-a --project=ours --accelerator-type=v9-8 --spot --version=new"],
    ),
    (
      "create",
      ["--type=v6e-64", "--queued", "--spot"],
      [
        f"{TPU} queued-resources create pod --zone=us-west4-a --accelerator-type=v6e-64 --spot --node-id=pod"
        " --runtime-version=v2-alpha-tpuv6e",
        f"{TPU} queued-resources describe pod --zone=us-west4-a '--format=value(state.state)'",
      ],
    ),
    (
      "setup",
      ["--nfs=10.0.0.2:/dir"],
      [
        f"tar -czf /tmp/pod.tar.gz --exclude=__pycache__ {CODE}",
        f"{TPU} tpu-vm scp /tmp/pod.tar.gz pod:dtm_jax.tar.gz --zone=us-west4-a --worker=all",
        f"{TPU} tpu-vm ssh pod --zone=us-west4-a --worker=all '--command={INSTALL}'",
        f"{TPU} tpu-vm ssh pod --zone=us-west4-a --worker=all '--command={MOUNT}'",
      ],
    ),
    (
      "logs",
      ["--worker=3"],
      [
        f"{TPU} tpu-vm ssh pod --zone=us-west4-a --worker=3"
        " '--command=tail -n +1 -F --pid=$(cat dtm_jax.pid) dtm_jax.log'"
      ],
    ),
    ("stop", [], [f"{TPU} tpu-vm ssh pod --zone=us-west4-a --worker=all '--command=kill -TERM $(cat dtm_jax.pid)'"]),
    ("delete", [], [f"{TPU} tpu-vm delete pod --zone=us-west4-a --quiet"]),
    ("delete", ["--queued"], [f"{TPU} queued-resources delete pod --zone=us-west4-a --force --quiet"]),
  ],
)
def test_commands_for_tpu_pods(command, options, lines):
  assert dry_run(command, *options) == lines


def on_a_host(home: pathlib.Path, command: str, *options: str) -> tuple[int, str, str]:
  """What gcloud would have a host's shell do, done here: exit code and what it prints."""
  [line] = dry_run(command, *options)
  [remote] = [word.removeprefix("--command=") for word in shlex.split(line) if word.startswith("--command=")]
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  shell = subprocess.run(["bash", "-c", remote], cwd=home, env=environment, capture_output=True, text=True, check=False)
  return shell.returncode, shell.stdout, shell.stderr


def test_a_run_on_a_host_of_a_tpu_pod(tmp_path):
  """In the background, with arguments as they were given; a second run waits for the end of the first."""
  (tmp_path / "dtm_jax").mkdir()
  for name in ("dtm_jax", "configs"):
    (tmp_path / "dtm_jax" / name).symlink_to(runs.ROOT / name)
  (tmp_path / ".venv" / "bin").mkdir(parents=True)
  python, gate = tmp_path / ".venv" / "bin" / "python", tmp_path / "gate"
  wait = f'for i in $(seq 3000); do [ ! -e {gate} ] || exec {sys.executable} "$@"; sleep 0.01; done'
  python.write_text(f"#!/bin/sh\n{wait}\n")
  python.chmod(0o755)
  run = ("run", "--", "--config=no such 'config' $HOME;.py", "--workdir=runs/never")
  assert on_a_host(tmp_path, *run) == (0, "", "")
  assert on_a_host(tmp_path, *run) == (1, "", "a run is there; stop it first\n")
  gate.touch()
  code, line, _ = on_a_host(tmp_path, "logs")
  assert (code, line.count("\n")) == (0, 1)
  assert "no such 'config' $HOME;.py" in line
  gate.unlink()
  assert on_a_host(tmp_path, *run) == (0, "", "")
  assert on_a_host(tmp_path, "stop") == (0, "", "")
  assert on_a_host(tmp_path, "logs") == (0, line, "")


HERE = ("--name=pod", "--zone=z")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "usage: launch/tpu_pod.sh COMMAND"),
    (["destroy"], "error: there is no command destroy"),
    (["delete", "--zone=z"], "error: --name is missing"),
    (["delete", "--name=pod"], "error: --zone is missing"),
    (["create", *HERE], "error: --type is missing"),
    (["create", *HERE, "--type=v9-8"], "error: what runs on --type=v9-8 is not known here; give --runtime"),
    (["run", *HERE, "--config=c"], "error: --config=c is no option; what is for dtm_jax.main goes behind --"),
    (["stop", *HERE, "--", "now"], "error: stop takes nothing behind --"),
  ],
)
def test_wrong_commands_for_tpu_pods(arguments, message):
  result = run_script("tpu_pod.sh", *arguments)
  assert (result.returncode, result.stdout) == (2, "")
  assert result.stderr.startswith(message)


# ------------------------------------------------------------ Kubernetes


def jobset(name: str) -> dict:
  yaml = pytest.importorskip("yaml")
  return yaml.safe_load((LAUNCH / name).read_text())


@pytest.fixture(params=["gke_jobset.yaml", "gke_jobset_gpu.yaml"])
def manifest(request):
  return jobset(request.param)


def test_a_jobset_starts_again_whatever_can_go_on(manifest):
  assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  [rule] = manifest["spec"]["failurePolicy"]["rules"]
  assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
  [replicated] = manifest["spec"]["replicatedJobs"]
  job = replicated["template"]["spec"]
  [end] = job["podFailurePolicy"]["rules"]
  assert end["onExitCodes"]["values"] == [main.EXIT_INPUT, main.EXIT_NONFINITE]
  assert job["backoffLimit"] == 0  # one process that fails is enough to start all of them again
  assert job["completionMode"] == "Indexed"
  assert job["parallelism"] == job["completions"]
  pod = job["template"]["spec"]
  assert pod["restartPolicy"] == "Never"
  assert pod["terminationGracePeriodSeconds"] > 60


def test_a_pod_runs_main_with_a_shared_folder_and_nothing_of_its_own(manifest):
  [replicated] = manifest["spec"]["replicatedJobs"]
  pod = replicated["template"]["spec"]["template"]["spec"]
  [container] = pod["containers"]
  assert (
    container["name"] == replicated["template"]["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"]
  )
  assert container["command"] == ["python", "-m", "dtm_jax.main"]
  config, workdir, data = (argument.split("=") for argument in container["args"])
  assert (config[0], workdir[0], data[0]) == ("--config", "--workdir", "--config.data.path")
  assert (runs.ROOT / config[1]).is_file()
  mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
  assert {*mounts.values()} == {volume["name"] for volume in pod["volumes"]}
  assert workdir[1].startswith("/shared/") and data[1].startswith("/shared/")
  assert {*mounts} == {"/shared", "/dev/shm"}
  assert container["resources"]["requests"] == container["resources"]["limits"]


KEPT_PROGRAMS = {"name": "JAX_COMPILATION_CACHE_DIR", "value": "/shared/compiled"}  # or each restart compiles


def test_a_slice_has_a_process_for_each_of_its_hosts():
  [replicated] = jobset("gke_jobset.yaml")["spec"]["replicatedJobs"]
  job = replicated["template"]["spec"]
  pod = job["template"]["spec"]
  sides = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
  [container] = pod["containers"]
  assert job["completions"] * container["resources"]["limits"]["google.com/tpu"] == math.prod(map(int, sides))
  assert container["env"] == [KEPT_PROGRAMS]  # jax finds what GKE sets


def test_gpu_nodes_find_each_other():
  manifest = jobset("gke_jobset_gpu.yaml")
  name, [replicated] = manifest["metadata"]["name"], manifest["spec"]["replicatedJobs"]
  job = replicated["template"]["spec"]
  [container] = job["template"]["spec"]["containers"]
  env = {variable["name"]: variable.get("value", variable.get("valueFrom")) for variable in container["env"]}
  port = container["ports"][0]["containerPort"]
  assert env == {
    KEPT_PROGRAMS["name"]: KEPT_PROGRAMS["value"],
    "JAX_COORDINATOR_ADDRESS": f"{name}-{replicated['name']}-0-0.{name}:{port}",
    "JAX_NUM_PROCESSES": str(job["completions"]),
    "JAX_PROCESS_ID": {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}},
  }


# ------------------------------------------------------------ ImageNet

CLASSES = ("n01751748", "n02105855", "n09193705")  # in the order of labels
VALIDATION = {1: 0, 2: 2, 3: 1, 324: 0}  # numbers of images and their labels
NUM_TRAIN = 4  # of each class


def tar(files: dict[str, bytes]) -> bytes:
  stream = io.BytesIO()
  with tarfile.open(fileobj=stream, mode="w") as archive:
    for name, content in files.items():
      member = tarfile.TarInfo(name)
      member.size = len(content)
      archive.addfile(member, io.BytesIO(content))
  return stream.getvalue()


def image(number: int) -> bytes:
  return miniatures.picture(number, (24, 20), encoding="JPEG")


def write_archives(folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
  """The two of ILSVRC 2012, in small."""
  images = ({f"{name}_{i}.JPEG": image(10 * label + i) for i in range(NUM_TRAIN)} for label, name in enumerate(CLASSES))
  train, validation = (folder / f"ILSVRC2012_img_{split}.tar" for split in ("train", "val"))
  train.write_bytes(tar({f"{name}.tar": tar(files) for name, files in zip(CLASSES, images, strict=True)}))
  validation.write_bytes(tar({f"ILSVRC2012_val_{number:08d}.JPEG": image(100 + number) for number in VALIDATION}))
  return train, validation


def test_imagenet_from_its_archives_in_two_goes(tmp_path):
  train, _ = write_archives(tmp_path)
  whole, data = train.read_bytes(), tmp_path / "data sets"
  train.write_bytes(whole.replace(b"n09193705_2.JPEG", b"n09193705_2.JPEX"))  # the header's checksum is wrong
  broken = run_script("prepare_imagenet.sh", tmp_path, data)
  assert broken.returncode == 2
  assert broken.stderr.splitlines()[-1] == f"error: n09193705.tar in {train} is broken; fetch it again"
  unpacked = {path: path.stat().st_ino for path in (data / "imagenet2012_images" / "train").glob("n*/*")}
  assert len(unpacked) == 2 * NUM_TRAIN

  train.write_bytes(whole)
  done = run_script("prepare_imagenet.sh", tmp_path, data)
  assert done.returncode == 0, done.stderr
  assert {path: path.stat().st_ino for path in unpacked} == unpacked
  settings = vitb.get_config()
  settings.data.path = str(data)
  config = config_lib.resolve(settings).data
  sets = {split: sources.open_source(config, split) for split in ("train", "eval")}
  found = {split: [source[i] for i in range(len(source))] for split, source in sets.items()}
  assert found["train"] == [(image(10 * label + i), label) for label in range(3) for i in range(NUM_TRAIN)]
  by_class = sorted(VALIDATION, key=lambda number: (VALIDATION[number], number))
  assert found["eval"] == [(image(100 + number), VALIDATION[number]) for number in by_class]

  train.unlink()
  shutil.rmtree(data / "imagenet2012_images")
  again = run_script("prepare_imagenet.sh", tmp_path, data)
  assert (again.returncode, again.stdout) == (0, f"--config.data.path={data} has ImageNet\n")


def spoil(train: pathlib.Path, validation: pathlib.Path, how: str) -> None:
  match how:
    case "missing":
      validation.unlink()
    case "cut":
      train.write_bytes(train.read_bytes()[:20_000])
    case "validation cut":
      validation.write_bytes(validation.read_bytes()[:1_000])
    case "flat":
      train.write_bytes(validation.read_bytes())
    case "huge":
      os.truncate(train, 10**13)


def test_python_is_looked_at_before_hours_of_unpacking(tmp_path):
  write_archives(tmp_path)
  result = run_script("prepare_imagenet.sh", tmp_path, tmp_path / "data", PYTHON="nonesuch")
  assert result.returncode == 2
  assert result.stderr == "error: nonesuch has no dtm_jax; activate the environment, or set PYTHON\n"


@pytest.mark.parametrize(
  ("how", "message"),
  [
    ("missing", "ILSVRC2012_img_val.tar is missing; get it from https://image-net.org"),
    ("cut", "ILSVRC2012_img_train.tar is broken; fetch it again"),
    ("validation cut", "ILSVRC2012_img_val.tar is broken; fetch it again"),
    ("flat", "holds ILSVRC2012_val_00000001.JPEG and not one archive per class"),
    ("huge", "data needs 20001 GB and has "),
  ],
)
def test_archives_that_cannot_be_used(tmp_path, how, message):
  spoil(*write_archives(tmp_path), how)
  result = run_script("prepare_imagenet.sh", tmp_path, tmp_path / "data")
  assert result.returncode == 2
  assert message in result.stderr.splitlines()[-1]
  assert not (tmp_path / "data" / "imagenet2012").exists()
  assert not (tmp_path / "data" / "imagenet2012_images" / "validation").exists()
