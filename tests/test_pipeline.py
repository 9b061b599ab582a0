import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from dtm_jax.config import Config, DataConfig, ModelConfig, RunConfig, parse_rand_augment
from dtm_jax.data import pipeline, sources
from dtm_jax.data.rand_augment import rand_augment
from dtm_jax.errors import InputError

BATCH_SIZE = 12


FINETUNE = {"task": "finetune", "num_masked": 0, "color_jitter": 0.0, "rand_augment": "m9-mstd0.5-inc1"}


def make_config(seed: int = 5, task: str = "pretrain", **data) -> Config:
  settings = {
    "source": "synthetic",
    "image_size": 16,
    "batch_size": BATCH_SIZE,
    "num_workers": 0,
    "num_masked": 6,
    "mask_min_block": 4,
    "color_jitter_on": "host",
  }
  model = ModelConfig(patch_size=4)
  return Config(task=task, run=RunConfig(steps=3, seed=seed), data=DataConfig(**settings | data), model=model)


class FakeSource:
  """Tiny synthetic images, of which some are broken."""

  num_classes = 8
  label_shape = ()

  def __init__(self, length: int, broken: tuple[int, ...] = ()):
    self._length, self._broken, self._images = length, broken, sources.SyntheticSource("train")

  def __len__(self):
    return self._length

  def __getitem__(self, index):
    example = self._images[index]
    return example._replace(image=example.image[:300]) if index in self._broken else example

  def name(self, index):
    return f"fake[{index}]"


def take(config: Config, source, steps: int, start_step: int = 0, **processes) -> list[dict]:
  with contextlib.closing(pipeline.train_batches(config, source, start_step=start_step, **processes)) as batches:
    return [next(batches) for _ in range(steps)]


def take_eval(config: Config, source, batch_size: int, **options) -> list[dict]:
  with contextlib.closing(pipeline.eval_batches(config, source, batch_size, **options)) as batches:
    return list(batches)


def assert_equal_batches(batches: list[dict], expected: list[dict]) -> None:
  assert len(batches) == len(expected)
  for batch, other in zip(batches, expected, strict=True):
    assert batch.keys() == other.keys()
    for name in batch:
      np.testing.assert_array_equal(batch[name], other[name], err_msg=name)
      assert type(batch[name]) is np.ndarray  # not Grain's shared memory


def test_batch_fields():
  source = FakeSource(40)
  batch = take(make_config(), source, steps=3)[2]
  assert {name: (value.dtype.name, value.shape) for name, value in batch.items()} == {
    "image": ("uint8", (12, 16, 16, 3)),
    "mask": ("bool", (12, 16)),
    "label": ("int32", (12,)),
    "position": ("int64", (12,)),
    "index": ("int64", (12,)),
    "bad": ("int64", (12,)),
  }
  np.testing.assert_array_equal(batch["position"], np.arange(24, 36))
  np.testing.assert_array_equal(batch["label"], batch["index"] % 8)
  np.testing.assert_array_equal(batch["mask"].sum(1), 6)
  np.testing.assert_array_equal(batch["bad"], -1)
  assert len({row.tobytes() for row in batch["image"]}) == 12
  assert len({row.tobytes() for row in batch["mask"]}) > 6


def test_fine_tuning_has_no_mask():
  finetune, pretrain = ({*take(make_config(**task), FakeSource(40), steps=1)[0]} for task in (FINETUNE, {}))
  assert pretrain - finetune == {"mask"}
  assert not finetune - pretrain


def test_rand_augment_is_drawn_from_a_stream_of_its_own():
  mean = {"mean": (0.2, 0.4, 0.9)}
  plain, distorted = (
    take(make_config(**FINETUNE | mean | words), FakeSource(40), steps=2)[1] for words in ({"rand_augment": ""}, {})
  )
  policy = parse_rand_augment(FINETUNE["rand_augment"])
  for i, position in enumerate(range(12, 24)):
    rng = np.random.Generator(np.random.Philox(key=np.array([5, 8], np.uint64), counter=[0, position, 0, 0]))
    expected = rand_augment(Image.fromarray(plain["image"][i]), rng, policy, fill=(51, 102, 230))
    np.testing.assert_array_equal(distorted["image"][i], expected)
  changed = np.any(plain["image"] != distorted["image"], axis=(1, 2, 3))
  assert 4 < changed.sum() < 12  # three quarters, but for operations that change nothing


@pytest.mark.parametrize(("num_workers", "task"), [(3, {}), (2, FINETUNE)])
def test_worker_processes_do_not_change_the_stream(num_workers, task):
  source = FakeSource(40, broken=(3,))
  expected = take(make_config(**task), source, steps=5)
  assert_equal_batches(take(make_config(**task, num_workers=num_workers), source, steps=5), expected)


@pytest.mark.parametrize(("process_count", "task"), [(2, {}), (4, FINETUNE)])
def test_processes_share_the_same_global_batches(process_count, task):
  source = FakeSource(40)
  expected = take(make_config(**task), source, steps=4)
  shares = [
    take(make_config(**task), source, steps=4, process_index=index, process_count=process_count)
    for index in range(process_count)
  ]
  joined = [
    {name: np.concatenate([share[step][name] for share in shares]) for name in expected[step]} for step in range(4)
  ]
  assert_equal_batches(joined, expected)


@pytest.mark.parametrize("task", [{}, FINETUNE])
def test_resuming_gives_what_an_uninterrupted_run_would_see(task):
  source = FakeSource(40, broken=(3,))
  expected = take(make_config(**task), source, steps=9)
  for start_step in (1, 4, 8):
    resumed = take(make_config(**task), source, steps=9 - start_step, start_step=start_step)
    assert_equal_batches(resumed, expected[start_step:])
  in_a_share = take(make_config(**task), source, steps=2, start_step=7, process_index=1, process_count=3)
  assert_equal_batches(in_a_share, [{name: value[4:8] for name, value in batch.items()} for batch in expected[7:]])


class CountingSource(FakeSource):
  reads = 0

  def __getitem__(self, index):
    self.reads += 1
    return super().__getitem__(index)


def test_a_late_start_reads_nothing_before_it():
  source = CountingSource(40)
  batch = take(make_config(), source, steps=1, start_step=10**12)[0]
  assert batch["position"][0] == 12 * 10**12
  assert source.reads <= 4 * BATCH_SIZE  # this batch and those read ahead


def test_each_epoch_is_another_order_of_all_images():
  source = FakeSource(36)
  indices = np.concatenate([batch["index"] for batch in take(make_config(), source, steps=9)]).reshape(3, 36)
  for epoch in indices:
    np.testing.assert_array_equal(np.sort(epoch), np.arange(36))
  assert np.all(np.mean(indices[:-1] != indices[1:], axis=1) > 0.5)


def test_everything_random_depends_on_the_seed():
  source = FakeSource(1)  # one image: what differs is not the order
  first, other = (take(make_config(seed=seed), source, steps=1)[0] for seed in (1, 2))
  assert np.any(first["image"] != other["image"])
  assert np.any(first["mask"] != other["mask"])
  orders = [take(make_config(seed=seed), FakeSource(40), steps=1)[0]["index"] for seed in (1, 2)]
  assert np.any(orders[0] != orders[1])


def test_the_batch_size_does_not_change_the_stream():
  small, large = (take(make_config(batch_size=size), FakeSource(40), steps=24 // size) for size in (6, 12))
  for name in ("image", "mask", "index"):
    np.testing.assert_array_equal(np.concatenate([b[name] for b in small]), np.concatenate([b[name] for b in large]))


def test_device_jitter_leaves_colors_to_the_device():
  source = FakeSource(40)
  host, device, off = (
    take(make_config(**fields), source, steps=1)[0]["image"]
    for fields in ({}, {"color_jitter_on": "device"}, {"color_jitter": 0.0})
  )
  np.testing.assert_array_equal(device, off)
  assert np.any(host != off)


def test_unreadable_images_are_replaced_and_reported():
  broken = (3, 17, 30)
  clean, damaged = (take(make_config(), FakeSource(36, bad), steps=6) for bad in ((), broken))
  replaced = 0
  for before, after in zip(clean, damaged, strict=True):
    bad = np.isin(before["index"], broken)
    np.testing.assert_array_equal(after["bad"], np.where(bad, before["index"], -1))
    assert not np.any(np.isin(after["index"], broken))
    np.testing.assert_array_equal(after["label"], after["index"] % 8)
    for name in ("image", "index", "label", "mask"):
      np.testing.assert_array_equal(after[name][~bad], before[name][~bad])
    replaced += bad.sum()
  assert replaced == 6  # three images, two epochs


def test_a_missing_file_counts_as_unreadable(tmp_path):
  gone = tmp_path / "gone.png"
  source = sources.FolderSource([str(gone)], np.array([0]), None)
  with pytest.raises(InputError, match=r"gone.png and 20 random other images are unreadable"):
    take(make_config(), source, steps=1)


def test_errors_in_a_worker_reach_the_parent():
  with pytest.raises(InputError, match=r"fake\[\d\] and 20 random other images are unreadable; check config.data"):
    take(make_config(num_workers=1), FakeSource(2, broken=(0, 1)), steps=1)


def test_batch_that_processes_cannot_share():
  with pytest.raises(InputError, match="batch of 12 is not divisible by 5 processes"):
    take(make_config(), FakeSource(40), steps=1, process_index=0, process_count=5)


def test_monitor_names_each_image_once_and_has_a_bound(caplog):
  monitor = pipeline.BadImageMonitor(FakeSource(1500), max_fraction=0.001)  # two are allowed
  monitor.observe(np.array([-1, 7, -1]))
  monitor.observe(np.array([7, 7, 9]))
  assert monitor.count == 2
  assert [record.getMessage() for record in caplog.records] == [
    "unreadable image skipped: fake[7]",
    "unreadable image skipped: fake[9]",
  ]
  with pytest.raises(
    InputError, match=r"fake\[4\] is unreadable image number 3, and 2 are allowed; .*max_bad_fraction"
  ):
    monitor.observe(np.array([4]))


def test_evaluation_sees_each_image_once_in_order():
  batches = take_eval(make_config(), FakeSource(20, broken=(7,)), batch_size=8)
  index, valid, label = (np.concatenate([batch[name] for batch in batches]) for name in ("index", "valid", "label"))
  np.testing.assert_array_equal(index, [*range(20), -1, -1, -1, -1])
  np.testing.assert_array_equal(valid, (index >= 0) & (index != 7))
  np.testing.assert_array_equal(label, np.where(valid, index % 8, -1))
  assert batches[0]["image"].shape == (8, 16, 16, 3)
  assert np.all(batches[0]["image"][7] == 0)
  assert np.all(np.ptp(batches[0]["image"][:7], axis=(1, 2, 3)) > 0)


def test_evaluation_with_workers_and_processes():
  source = FakeSource(21)
  expected = take_eval(make_config(), source, batch_size=8)
  assert_equal_batches(take_eval(make_config(num_workers=2), source, batch_size=8), expected)
  shares = [take_eval(make_config(), source, 8, process_index=index, process_count=4) for index in range(4)]
  joined = [{k: np.concatenate([share[i][k] for share in shares]) for k in expected[i]} for i in range(len(expected))]
  assert_equal_batches(joined, expected)


def test_limited_evaluation_spreads_over_the_source():
  """Also where the step is a multiple of the number of classes, of which even steps would only meet one."""
  batches = take_eval(make_config(), FakeSource(320), batch_size=10, limit=40)
  index, label = (np.concatenate([batch[name] for batch in batches]) for name in ("index", "label"))
  np.testing.assert_array_equal(index // 8, np.arange(40))
  assert set(label) == set(range(8))
  assert len(take_eval(make_config(), FakeSource(20), batch_size=10, limit=99)) == 2


RUN_WITH_WORKERS = """
import contextlib, multiprocessing, os, signal, sys
import jax
import test_pipeline
from dtm_jax.data import pipeline

if __name__ == "__main__":
  jax.numpy.zeros(3).block_until_ready()  # workers must start, and stay clean, beside a running backend
  config = test_pipeline.make_config(num_workers=2)
  with contextlib.closing(pipeline.train_batches(config, test_pipeline.BackendSource(40), start_step=0)) as batches:
    next(batches), next(batches)  # from both workers: they are up
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    if sys.argv[1] == "kill":
      os.kill(os.getpid(), signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM):
      signal.signal(number, signal.SIG_IGN)
      os.killpg(0, number)
    for _ in range(8):
      next(batches)
"""


class BackendSource(FakeSource):
  """Fails where a JAX backend runs in a process that reads images."""

  def __getitem__(self, index):
    bridge = sys.modules.get("jax._src.xla_bridge")
    assert bridge is None or not bridge.backends_are_initialized()
    return super().__getitem__(index)


def is_running(pid: int) -> bool:
  status = pathlib.Path(f"/proc/{pid}/stat")
  try:
    return status.read_text().rpartition(")")[2].split()[0] != "Z"
  except FileNotFoundError:
    return False


@pytest.mark.skipif(not pathlib.Path("/proc").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize(("how", "returncode"), [("signal the group", 0), ("kill", -signal.SIGKILL)])
def test_workers_end_with_the_parent_and_not_before(tmp_path, how, returncode):
  script, output = tmp_path / "run.py", tmp_path / "workers"
  script.write_text(RUN_WITH_WORKERS)
  paths = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parents[1])]
  environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"}
  with output.open("w") as stdout:  # a pipe would stay open as long as any worker lives
    run = subprocess.run(
      [sys.executable, script, how], env=environment, stdout=stdout, check=False, start_new_session=True
    )
  assert run.returncode == returncode
  workers = [int(pid) for pid in output.read_text().split()]
  assert len(workers) == 2
  patience = 600  # tenths of a second
  while any(map(is_running, workers)) and patience:
    patience -= 1
    time.sleep(0.1)
  survivors = [pid for pid in workers if is_running(pid)]
  for pid in survivors:
    os.kill(pid, signal.SIGKILL)
  assert not survivors
