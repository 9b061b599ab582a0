"""`python -m dtm_jax.main --config=configs/NAME.py --workdir=DIR [--config.path.to.key=value]`.

The config is `configs/quickstart.py` where none is given, and the work folder runs/NAME. `--config=FILE:smoke` is two
steps of a miniature of it on made-up images. Any key of the config can be set; `dtm_jax/config.py` describes them all,
and a work folder's `config.json` has their values. The same command goes on where a run was stopped.

With `--compile_only` nothing is trained: the step is compiled for the devices of this machine, for `--topology=cpu:N`
or for TPU slices (`--topology=v5e:4x4`, two of them v5e:4x4:2; libtpu has to be installed). Images and weights need not
be there; what is assumed of them then is said. What the step needs is printed: memory of each device, FLOPs, bytes, and
how long it takes at least on `--chip=NAME` (or TFLOPS,GB/S,GIB) with matrix products at `--mfu=0.4` of the peak. The
exit code is 2 where it does not fit.

Several processes train as one where the environment says so: Slurm, a TPU pod, Open MPI, an indexed Kubernetes job, or
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, as `launch/local.sh N ARGS...` sets them.

Exit codes: 0 done; 1 another process has failed, a file server does not answer, or an error of the program itself, with
its traceback; 2 wrong usage, config or data, or devices without enough memory; 3 loss not finite; 143 stopped by a
signal, what there was to save saved.
"""

import pathlib
import shlex
import sys
from typing import Any

from ml_collections import ConfigDict

from dtm_jax import command_line, console
from dtm_jax.errors import InputError

EXIT_INPUT, EXIT_NONFINITE, EXIT_SIGNAL = console.EXIT_INPUT, 3, console.EXIT_SIGNAL


def main(argv: list[str]) -> int:
  """Runs the command line `argv`, whose first element is the program, and returns the exit code."""
  if {"--help", "-h"} & {*argv}:
    print(__doc__)
    return 0
  try:
    config, workdir, plan = command_line.parse(argv)
    console.log_plainly()
    if plan is not None:
      return _compile(config, plan)
    return _run(config, workdir, shlex.join([sys.executable, "-m", "dtm_jax.main", *argv[1:]]))
  except (InputError, OSError, RuntimeError) as error:
    code = console.tell(error)
    if code is None:
      raise
    return code
  except KeyboardInterrupt:  # while nobody listens yet
    return console.fail(console.INTERRUPTED, EXIT_SIGNAL)


def _compile(settings: ConfigDict, plan: command_line.Plan) -> int:
  import jax

  from dtm_jax import ahead_of_time, config

  with jax.default_matmul_precision("float32"):  # as in training
    ahead_of_time.run(config.resolve(settings), plan)
  return 0


def _run(settings: ConfigDict, workdir: pathlib.Path, command: str) -> int:
  # Not before the options are right: the backend takes seconds to start.
  import jax

  from dtm_jax import compile_cache, config, distributed, evaluation, finetuning, loop, pretraining, stopping
  from dtm_jax.checkpoint import saved_steps

  def newest_step() -> int:
    return max(saved_steps(workdir), default=0)

  tasks = {"pretrain": pretraining.run, "finetune": finetuning.run, "evaluate": evaluation.run}

  distributed.initialize()
  compile_cache.enable()
  with stopping.requests(newest_step) as stop_requested, distributed.ending_at_once(loop.NonFiniteError):
    try:
      # float32 means float32, on TPUs and GPUs too; products of bfloat16 are not concerned.
      with jax.default_matmul_precision("float32"):
        resolved = distributed.together(lambda: config.resolve(settings))
        distributed.check_same(_circumstances(resolved))
        is_done = tasks[resolved.task](resolved, workdir, command, stop_requested)
        distributed.gather(None)  # the last one may still draw or write
    except loop.NonFiniteError as error:
      return console.fail(error, EXIT_NONFINITE)
  return 0 if is_done else EXIT_SIGNAL


def _circumstances(resolved) -> dict[str, Any]:
  """What all processes have to share."""
  from dtm_jax import config, distributed, workdir

  return {"config": config.to_json(resolved), "code": distributed.code_sha256(), **workdir.versions()}


if __name__ == "__main__":
  sys.unraisablehook = console.report_unraisable
  sys.exit(main(sys.argv))
