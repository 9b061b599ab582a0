"""What is written down while a run goes, and what is found in it again."""

import contextlib

import pytest

from dtm_jax import metrics
from dtm_jax.errors import InputError
from dtm_jax.metrics import MetricWriter


@pytest.fixture
def writer(tmp_path):
  with contextlib.closing(MetricWriter(tmp_path)) as writer:
    yield writer


def test_the_best_is_the_first_of_the_highest_up_to_a_step(writer):
  for step, raw, averaged in ((4, 0.5, 0.6), (2, 0.3, 0.6), (6, 0.7, 0.1), (8, 0.9, 0.2)):
    writer.write(step, {"top1": raw, "ema_top1": averaged, "loss": 9.0})
  names = ("top1", "ema_top1")
  assert writer.best(names, until=5) == (2, "ema_top1", 0.6)
  assert writer.best(names, until=6) == (6, "top1", 0.7)
  assert writer.best(("ema_top1",), until=8) == (2, "ema_top1", 0.6)


def test_a_damaged_line_is_named(tmp_path):
  (tmp_path / metrics.FILE).write_bytes(b'{"step": 1}\n\0\0\0\n{"step": 3}\n')
  with pytest.raises(InputError, match="line 2 of .*metrics.jsonl is damaged"):
    metrics.read_rows(tmp_path)
