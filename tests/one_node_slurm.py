"""A Slurm cluster of one node: its own daemons, folder and ports, without systemd and cgroups, as root."""

import contextlib
import os
import pathlib
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator

DAEMONS = ("munged", "slurmctld", "slurmd")
# What JAX makes of a job's id: a port among these (jax._src.clusters.slurm_cluster).
_FIRST_PORT, _NUM_PORTS = 65535 - 2**12 + 1, 2**12
_GRACE_SECONDS = 120  # of a preempted job, as docs/launch.md asks for
_NODE = "localhost"  # resolves everywhere: the processes meet at the node's name
_CONFIG = """
ClusterName=test
SlurmctldHost={node}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
MpiDefault=none
ReturnToService=2
MinJobAge=86400
FirstJobId={first_job}
GresTypes=gpu
NodeName={node} CPUs=4 Gres=gpu:2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes={node} Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace_seconds}
PartitionName=urgent Nodes={node} MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF
"""


def missing() -> str:
  """Why no cluster can be started here; "" where one can."""
  absent = [name for name in DAEMONS if find(name) is None]
  if absent:
    return f"no {', '.join(absent)} here (apt-get install slurm-wlm munge)"
  return "" if os.geteuid() == 0 else "Slurm's daemons need root"


def find(program: str) -> str | None:
  """Its path, where users' PATH ends before the administrator's programs too."""
  return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


class Cluster:
  """Runs Slurm's commands against one cluster."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

  def run(self, *command: str, **settings: str) -> str:
    """Standard output of a command that must not fail; `settings` go to its environment."""
    environment = self.environment | settings
    result = subprocess.run(command, env=environment, cwd=self.folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, (command, result.stderr)
    return result.stdout

  def submit(self, *arguments: str, **settings: str) -> str:
    """The id of a new job."""
    return self.run("sbatch", "--parsable", *arguments, **settings).strip()

  def job(self, job: str) -> dict[str, str]:
    """What `scontrol show job` tells."""
    words = self.run("scontrol", "show", "job", job).split()
    return dict(word.split("=", 1) for word in words if "=" in word)

  def wait(self, condition: Callable[[], object], why: Callable[[], object], seconds: float = 1200) -> None:
    """Returns as soon as the condition holds; fails with `why` where it takes so long that it never will."""
    end = time.monotonic() + seconds
    while not condition():
      assert time.monotonic() < end, why()
      time.sleep(0.1)


@contextlib.contextmanager
def started(folder: pathlib.Path) -> Iterator[Cluster]:
  """A running cluster with room for four CPU-only tasks and, as far as Slurm knows, two GPUs; stopped at the end.

  Jobs of partition `urgent` preempt those of the other one.
  """
  ports = [_free_port() for _ in range(2)]
  for name in ("state", "spool"):
    (folder / name).mkdir()
  (folder / "munge.key").write_bytes(os.urandom(128))
  (folder / "munge.key").chmod(0o600)
  (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
  values = {"folder": folder, "node": _NODE, "controller_port": ports[0], "node_port": ports[1]}
  values |= {"first_job": _job_with_free_port(), "grace_seconds": _GRACE_SECONDS}
  (folder / "slurm.conf").write_text(_CONFIG.format(**values))
  files = [f"--{kind}-file={folder}/munge.{kind}" for kind in ("key", "pid", "log", "seed")]
  cluster = Cluster(folder)
  with contextlib.ExitStack() as daemons:
    daemons.enter_context(
      _daemon(cluster, "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files)
    )
    cluster.wait((folder / "munge.socket").exists, (folder / "munged.log").read_text)
    daemons.enter_context(_daemon(cluster, "slurmctld", "-D"))
    daemons.enter_context(_daemon(cluster, "slurmd", "-D", "-N", _NODE))
    cluster.wait(lambda: _is_idle(cluster), lambda: [(folder / f"{name}.log").read_text() for name in DAEMONS])
    try:
      yield cluster
    finally:
      cluster.run("scancel", "--user=root")
      cluster.wait(lambda: not cluster.run("squeue", "--noheader"), lambda: cluster.run("squeue"))


@contextlib.contextmanager
def _daemon(cluster: Cluster, name: str, *arguments: str) -> Iterator[None]:
  with (cluster.folder / f"{name}.log").open("w") as log:
    # Also where the tests are killed.
    command = ["setpriv", "--pdeathsig=TERM", find(name), *arguments]
    # Ctrl-C is for pytest, which then stops the jobs while there still is a cluster.
    process = subprocess.Popen(command, env=cluster.environment, stdout=log, stderr=log, start_new_session=True)
  try:
    yield
  finally:
    process.terminate()
    process.wait()


def _is_idle(cluster: Cluster) -> bool:
  command = ("sinfo", "--noheader", "--format=%T")
  result = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, check=False)
  return result.stdout.strip() == "idle"


def _free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def _job_with_free_port() -> int:
  """Another cluster's jobs on this machine have the same ids, and so JAX gives them the same ports."""
  candidates = random.sample(range(_NUM_PORTS, 2 * _NUM_PORTS), 100)
  return next(job for job in candidates if _is_free(_FIRST_PORT + job % _NUM_PORTS))


def _is_free(port: int) -> bool:
  with socket.socket() as probe, contextlib.suppress(OSError):
    probe.bind(("127.0.0.1", port))
    return True
  return False
