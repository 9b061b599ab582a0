"""Several processes that work as one: how they find each other, agree, stop together and end together.

All of it works alike, and costs nothing, where there is only one process.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from absl import logging

# JAX has no public access to its key-value store; orbax takes it from the same place.
from jax._src.clusters import ClusterEnv, K8sCluster
from jax._src.distributed import global_state
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec

from dtm_jax import console, signals
from dtm_jax.config import flatten
from dtm_jax.errors import InputError, TransientError, some_of

START_SECONDS = 300  # from the first process to the last one
SHARED_FOLDER_SECONDS = 20  # until a file of another host is seen; network file systems remember what was not there
_MEETING_SECONDS = 1200  # from the first process to the last one, wherever they wait for each other
_LAST_WORDS_SECONDS = 2  # for the others, whom jax ends as soon as they miss process 0
_HEARTBEAT_SECONDS = 40  # without a sign of life a process counts as dead, and jax ends the others

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SAME_START = "give every process the same command, code, packages and files"
_REMEDY = f"set {', '.join(_VARIABLES)} for every process, or none of them"
# In the message of a collective operation or a meeting that another process has not come to.
_SIGNS_OF_LOSS = ("gloo", "nccl", "coordinationservice", "coordination_service", "barrier")

_PREEMPTION_NOTICE = "RECEIVED_PREEMPTION_NOTICE"  # jax's name for it in the key-value store

_meetings = itertools.count()
T = TypeVar("T")


class SharedInputError(InputError):
  """Raised on every process at the same place, so that none waits for another."""


# ------------------------------------------------------------ who is there


def initialize() -> None:
  """Joins the other processes where there are any; to be called before jax has devices.

  They are told by JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID, or found by
  jax itself: Slurm, TPU pods, Open MPI, indexed Kubernetes jobs.

  Raises:
    InputError: the environment is wrong.
  """
  if {*_VARIABLES} & os.environ.keys():
    given = _from_environment(os.environ)
    known, num_processes = given | {"cluster_detection_method": "deactivate"}, given["num_processes"]
  else:
    known, num_processes = {}, _count_detected()
  if num_processes == 1:
    return
  jax.config.update("jax_enable_preemption_service", True)  # `stop_requests` listens to it
  missing = f"not all of {num_processes} processes have come within {START_SECONDS} s; {_REMEDY}"
  with _interruptible(), _within(START_SECONDS, missing):
    try:
      jax.distributed.initialize(
        **known,
        initialization_timeout=2 * START_SECONDS,  # jax would end the process with a stack trace
        heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=_HEARTBEAT_SECONDS,
      )
    except ValueError as error:
      raise InputError(f"cannot join the other processes ({_first_line(error)}); {_REMEDY}") from error
    except RuntimeError as error:  # of the network: another try may help
      sys.exit(console.fail(f"cannot join the other processes ({_first_line(error)}); {_REMEDY}", console.EXIT_FAILED))
  console.speak_as(index())


def _from_environment(variables: Mapping[str, str]) -> dict[str, Any]:
  """Arguments of `jax.distributed.initialize`. Raises InputError where they do not make sense."""
  missing = [name for name in _VARIABLES if not variables.get(name)]
  if missing:
    raise InputError(f"{', '.join(missing)} not set; {_REMEDY}")
  address, count, own = (variables[name] for name in _VARIABLES)
  if not (count.isdecimal() and own.isdecimal() and int(own) < int(count)):
    raise InputError(f"JAX_PROCESS_ID={own} of JAX_NUM_PROCESSES={count}: processes are numbered from 0; {_REMEDY}")
  host, _, port = address.rpartition(":")
  if not (host and port.isdecimal() and 0 < int(port) < 2**16):
    raise InputError(f"JAX_COORDINATOR_ADDRESS={address} is not the HOST:PORT of process 0; {_REMEDY}")
  return {"coordinator_address": address, "num_processes": int(count), "process_id": int(own)}


def _count_detected() -> int:
  """How many processes jax finds: 1 on a laptop, and in what a cluster starts alone."""
  known = (env for env in ClusterEnv._cluster_types if not env.opt_in_only_method)
  if "JOB_COMPLETION_INDEX" not in os.environ:
    known = (env for env in known if env is not K8sCluster)  # a pod that is no part of an indexed job is alone
  env = next((env for env in known if env.is_env_present()), None)
  if env is None and {"JOB_COMPLETION_INDEX", "KUBERNETES_SERVICE_HOST"} <= os.environ.keys():
    raise InputError(f"jax does not see this indexed Kubernetes job; pip install 'jax[k8s]', or {_REMEDY}")
  return 1 if env is None else env.get_process_count()


def count() -> int:
  """How many processes there are. Starts no devices where there is one."""
  return jax.process_count() if jax.distributed.is_initialized() else 1


def index() -> int:
  """Which one this is."""
  return jax.process_index() if jax.distributed.is_initialized() else 0


def is_first() -> bool:
  """Whether this process writes files and tells how things go."""
  return index() == 0


def connect(mesh: Mesh, layout: str) -> None:
  """Connects the devices of several processes, and logs a line about these, their hosts and the mesh; all have to come.

  On CPUs who needs a connection first waits 30 s for the others to need it, and some may compile for longer.
  """
  if count() == 1:
    return
  shared = [axis for axis, size in mesh.shape.items() if size > 1]
  for axes in itertools.chain.from_iterable(itertools.combinations(shared, n + 1) for n in range(len(shared))):
    everywhere = {"mesh": mesh, "in_specs": PartitionSpec(), "out_specs": PartitionSpec()}
    add = jax.shard_map(functools.partial(jax.lax.psum, axis_name=axes), **everywhere)
    jax.block_until_ready(jax.jit(add)(np.float32(1)))
  hosts, sizes = zip(*gather([socket.gethostname(), jax.local_device_count()]), strict=True)
  each = "-".join(map(str, sorted({*sizes})))
  logging.info("%d processes on %d host(s) with %s device(s) each: %s", len(hosts), len({*hosts}), each, layout)


# ------------------------------------------------------------ agreeing


def gather(value: Any) -> list[Any]:
  """What JSON can hold, of every process, in order; all have to come here."""
  if count() == 1:
    return [value]
  client, meeting = global_state.client, next(_meetings)
  folder = _folder(meeting)
  client.key_value_set_bytes(f"{folder}{index():06d}", zlib.compress(json.dumps(value).encode()))
  client.wait_at_barrier(folder, 1000 * _MEETING_SECONDS)
  found = sorted(client.key_value_dir_get_bytes(folder))
  if is_first() and meeting:
    client.key_value_delete(_folder(meeting - 1))  # which all have read, having come here
  return [json.loads(zlib.decompress(content)) for _, content in found]


def _folder(meeting: int) -> str:
  return f"dtm_jax/{meeting}/"


def from_first(read: Callable[[], T]) -> T:
  """What process 0 reads, for every process: something that JSON can hold.

  Raises:
    SharedInputError: `read` raised InputError.
  """
  if count() == 1:
    return read()
  answer = None
  if is_first():
    try:
      answer = {"value": read()}
    except InputError as error:
      answer = {"problem": str(error)}
  answer = gather(answer)[0]
  if "problem" in answer:
    raise SharedInputError(answer["problem"])
  return answer["value"]


def together(action: Callable[[], T]) -> T:
  """What the action returns on this process.

  Raises:
    SharedInputError: it raised InputError on any process; names the first such.
  """
  if count() == 1:
    return action()
  result, problem = None, None
  try:
    result = action()
  except InputError as error:
    problem = str(error)
  problems = gather(problem and [socket.gethostname(), problem])
  failed = [i for i, problem in enumerate(problems) if problem]
  if failed:
    host, text = problems[failed[0]]
    is_of_all = len({json.dumps(problem and problem[1]) for problem in problems}) == 1
    raise SharedInputError(text if is_of_all else f"process {failed[0]} on {host}: {text}")
  return result


def check_same(values: Mapping[str, Any], remedy: str = _SAME_START) -> None:
  """Raises SharedInputError where a process has other values than process 0; it names the process and the values.

  Args:
    values: what JSON can hold.
    remedy: what the user is told to do.
  """
  if count() == 1:
    return
  own = flatten(json.loads(json.dumps(values)))
  first = from_first(lambda: own)

  def compare():
    names = sorted(name for name in own.keys() | first.keys() if own.get(name) != first.get(name))
    if names:
      name = names[0]
      raise InputError(
        f"{some_of(names)} not as on process 0 ({own.get(name)!r} here, {first.get(name)!r} there for {name}); {remedy}"
      )

  together(compare)


def check_shared(folder: pathlib.Path) -> None:
  """Raises SharedInputError where a process does not see what process 0 writes, or cannot write there itself."""
  if count() == 1:
    return
  token = folder / from_first(lambda: f".shared-{secrets.token_hex(8)}")

  def look():
    end = time.monotonic() + SHARED_FOLDER_SECONDS
    while not (folder.is_dir() and token in folder.iterdir()):  # which makes a network file system look again
      if time.monotonic() > end:
        raise InputError(f"{folder.resolve()} is not the folder of process 0; choose one that all hosts share")
      time.sleep(0.1)
    if not os.access(folder, os.W_OK):
      raise InputError(f"no permission to write to {folder.resolve()}; choose another folder, or mend its owner")

  try:
    from_first(lambda: token.write_text(""))
    together(look)
  finally:
    if is_first():
      token.unlink(missing_ok=True)


def code_sha256() -> str:
  """Of this package's modules, which must not differ between processes."""
  root, digest = pathlib.Path(__file__).parent, hashlib.sha256()
  for path in sorted(root.rglob("*.py")):
    digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
  return digest.hexdigest()


def to_host(array: Any) -> np.ndarray:
  """All of an array, wherever its parts lie; all processes have to ask."""
  if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
    return multihost_utils.process_allgather(array, tiled=True)
  return np.asarray(array)


# ------------------------------------------------------------ stopping and ending


@dataclasses.dataclass
class _Stop:
  """Asked by all processes equally often, says True to all from the same time on."""

  asked: int = 0
  is_agreed: bool = False

  def __call__(self) -> bool:
    self.asked += 1
    self.is_agreed = self.is_agreed or multihost_utils.reached_preemption_sync_point(self.asked)
    return self.is_agreed


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
  """Whether any of several processes got SIGTERM or SIGINT; asking costs less than a microsecond.

  JAX listens to SIGTERM from `initialize` on, tells all processes in the background, and finds the number of asking
  that none has come to yet. SIGINT becomes SIGTERM.
  """

  def note(number, frame):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends the process

  previous = signal.signal(signal.SIGINT, note)
  try:
    with signals.heard() as next_stop:
      threading.Thread(target=_pass_on, args=(next_stop,), daemon=True).start()
      yield _Stop()
  finally:
    signal.signal(signal.SIGINT, previous)


def _pass_on(next_stop: Callable[[], int | None]) -> None:
  """SIGINT as SIGTERM, also while the main thread compiles or waits for another process."""
  if next_stop() == signal.SIGINT:
    os.kill(os.getpid(), signal.SIGTERM)


def is_preempted() -> bool:
  """Whether any of several processes got SIGTERM, as jax tells all of them; may be asked by any thread."""
  with contextlib.suppress(RuntimeError):  # it is not there, or there is nobody to ask any more
    return bool(global_state.client.key_value_try_get_bytes(_PREEMPTION_NOTICE))
  return False


@contextlib.contextmanager
def ending_at_once(*shared: type[Exception]) -> Iterator[None]:
  """One of several processes that fails in here ends at once: it would wait for the others, and they for it.

  Args:
    *shared: exceptions that all processes raise at the same place, beside SharedInputError. They go on.
  """
  try:
    yield
  except (SharedInputError, *shared):
    raise
  except Exception as error:
    if count() == 1:
      raise
    leave(tell(error))


def tell(error: Exception) -> int:
  """Says why one of several processes ends; returns its exit code."""
  if is_loss(error):
    return console.fail(
      f"another process has ended or cannot be reached ({_first_line(error)}); see its messages, then start all of"
      " them again: they go on from the last checkpoint",
      console.EXIT_FAILED,
    )
  code = console.tell(error)
  if code is None:
    traceback.print_exception(error)
  return console.EXIT_FAILED if code is None else code


def is_loss(error: BaseException | None) -> bool:
  """Whether an error, or what has caused it, tells that another process has not come."""
  while error is not None and count() > 1:
    # Our own name files and folders, which may be called anything.
    is_own = isinstance(error, (InputError, TransientError))
    if not is_own and any(sign in str(error).lower() for sign in _SIGNS_OF_LOSS):
      return True
    error = error.__cause__
  return False


def leave(code: int) -> NoReturn:
  """Ends this process. JAX would first wait for the others, who may be waiting for it."""
  if is_first() and count() > 1:
    time.sleep(_LAST_WORDS_SECONDS)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
  """Ends the process on SIGINT where nothing is lost, and Python would not look at it for minutes."""

  def end() -> None:
    if next_stop() is not None:
      os._exit(console.fail(console.INTERRUPTED, console.EXIT_SIGNAL))

  with signals.heard() as next_stop:
    threading.Thread(target=end, daemon=True).start()
    yield


@contextlib.contextmanager
def _within(seconds: float, problem: str) -> Iterator[None]:
  """Ends the process where something that cannot be interrupted takes longer."""
  timer = threading.Timer(seconds, lambda: os._exit(console.fail(problem, console.EXIT_FAILED)))
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def _first_line(error: Exception) -> str:
  return str(error).partition("\n")[0][:200]
