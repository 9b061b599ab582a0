"""What each of two processes does for tests/test_distributed.py: `python two_processes.py FOLDER IMAGES`."""

import functools
import hashlib
import json
import os
import pathlib
import signal
import sys
import threading
import time

import jax.numpy as jnp
import numpy as np

from configs import quickstart
from dtm_jax import compile_cache, distributed, sharding
from dtm_jax import config as config_lib
from dtm_jax.data.sources import open_source
from dtm_jax.errors import InputError
from dtm_jax.evaluate.features import FeatureExtractor
from dtm_jax.evaluate.knn import knn_accuracy
from dtm_jax.evaluate.linear_probe import fit_lbfgs, linear_probe
from dtm_jax.train_state import params_sha256


def fail(text: str):
  raise InputError(text)


def told(action):
  """What it returns, or what all processes are told."""
  try:
    return action()
  except distributed.SharedInputError as error:
    return str(error)


def interrupt_in_a_computation() -> bool:
  """Whether SIGINT is passed on while the main thread is where Python does not look at signals."""
  is_over, heard = threading.Event(), []

  def interrupt():
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGINT)
    while not is_over.is_set():
      if distributed.is_preempted():
        heard.append(True)
        return
      time.sleep(0.01)

  thread = threading.Thread(target=interrupt)
  thread.start()
  hashlib.pbkdf2_hmac("sha256", b"", b"", 20_000_000)  # some seconds
  is_over.set()
  thread.join()
  return heard == [True]


def ask_until_told(is_last: bool) -> tuple[int, bool]:
  """At which question a process is told to stop, and whether also at the next; the last one gets SIGINT."""
  asked = 1
  with distributed.stop_requests() as stop_requested:
    while not stop_requested():
      if is_last and asked == 5:
        assert interrupt_in_a_computation()
      time.sleep(0.05 if is_last else 0.01)  # each process at its own pace
      asked += 1
    return asked, stop_requested()


def evaluate(images: str) -> dict:
  """k-NN and a linear probe of the mean colours of images, a share of which each process reads."""
  settings = quickstart.get_config("smoke")
  settings.data.update(source="folder", path=images, max_bad_fraction=0.5)
  settings.eval.batch_size = 8
  config = config_lib.resolve(settings)
  mesh = sharding.create_mesh(config.mesh)
  distributed.connect(mesh, sharding.describe(mesh))
  params = {"scale": np.array([0.1, 0.2, 0.3], np.float32)}
  extract = FeatureExtractor(config, mesh, lambda params, images: params["scale"] * jnp.mean(images, axis=(1, 2)))
  sources = [open_source(config.data, split) for split in ("train", "eval")]
  train, test = (extract(params, source, None, lambda: False) for source in sources)
  classes = {"num_classes": 2, "mesh": mesh}
  probe = linear_probe(train, test, functools.partial(fit_lbfgs, **classes), (0.01, 1.0), seed=0)
  return {
    "features": [split.features.tolist() for split in (train, test)],
    "labels": [split.labels.tolist() for split in (train, test)],
    "knn": knn_accuracy(*train, *test, k=3, temperature=0.1, **classes),
    "probe": [probe.top1, probe.chosen, *probe.held_out_top1.values()],
    "split_rows": params_sha256(sharding.split_rows(train.features, mesh)),
  }


def main(folder: pathlib.Path, images: str) -> dict:
  distributed.initialize()
  compile_cache.enable()
  own = distributed.index()
  is_last = own == 1
  results = {
    "gather": distributed.gather({"own": own}),
    "from first": distributed.from_first(lambda: [own, "ä"]),
    "first fails": told(lambda: distributed.from_first(lambda: fail("no record"))),
    "last fails": told(lambda: distributed.together(lambda: fail("no data") if is_last else own)),
    "all fail": told(lambda: distributed.together(lambda: fail("no data"))),
    "none fails": told(lambda: distributed.together(lambda: own)),
    "same": told(lambda: distributed.check_same({"config": {"seed": 1}})),
    "other": told(lambda: distributed.check_same({"config": {"seed": own, "steps": 3}})),
    "shared": told(lambda: distributed.check_shared(folder)),
    "left": distributed.gather(None) and sorted(path.name for path in folder.iterdir()),
    "evaluated": evaluate(images),
    "stopped": ask_until_told(is_last),
  }
  distributed.SHARED_FOLDER_SECONDS = 0.2
  (folder / str(own)).mkdir()
  results["not shared"] = told(lambda: distributed.check_shared(folder / str(own)))
  distributed.gather(None)
  return results


if __name__ == "__main__":
  print(json.dumps(main(pathlib.Path(sys.argv[1]), sys.argv[2])))
