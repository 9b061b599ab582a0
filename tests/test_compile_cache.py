"""Compiled programs are kept, found again, and never in the way."""

import logging
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import runs
from dtm_jax import compile_cache


@pytest.fixture
def said(caplog):
  """What the package logs."""
  caplog.set_level(logging.INFO, logger="absl")  # whose own level other tests may have left high
  return lambda: [record.getMessage() for record in caplog.records if record.pathname.endswith("compile_cache.py")]


@pytest.fixture
def unset():
  """jax as it is where no environment names a folder."""
  before = jax.config.jax_compilation_cache_dir
  jax.config.update("jax_compilation_cache_dir", None)
  yield
  jax.config.update("jax_compilation_cache_dir", before)


def new_step():
  """Every time another function for jax, and the same program."""

  def a_step_of_this_test(x):
    return jnp.tanh(x) @ x

  return compile_cache.told(jax.jit(a_step_of_this_test))


def test_the_first_call_says_whether_its_program_was_kept(said):
  x = jnp.eye(3)
  first = new_step()
  results = [first(x), first(x), new_step()(x)]
  compiled, kept = said()
  assert compiled.startswith("step compiled in ") and kept.startswith("step from the compile cache in ")
  assert (results[0] == results[2]).all() and (results[1] == results[2]).all()


def test_nothing_is_kept_or_found_where_it_is_disabled(said):
  with compile_cache.disabled():
    for size in (4, 4):
      new_step()(jnp.eye(size))
  assert jax.config.jax_enable_compilation_cache
  new_step()(jnp.eye(4))
  assert [message.partition(" in ")[0] for message in said()] == ["step compiled"] * 3


def test_what_jax_was_told_stays(monkeypatch, tmp_path):
  before = jax.config.jax_compilation_cache_dir
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  compile_cache.enable()
  assert jax.config.jax_compilation_cache_dir == before
  assert not [*tmp_path.iterdir()]


def test_a_folder_that_cannot_be_is_a_warning(monkeypatch, tmp_path, unset, said):
  in_the_way = tmp_path / "file"
  in_the_way.touch()
  monkeypatch.setenv("XDG_CACHE_HOME", str(in_the_way))
  compile_cache.enable()
  assert jax.config.jax_compilation_cache_dir is None
  (warning,) = said()
  assert str(in_the_way) in warning and "JAX_COMPILATION_CACHE_DIR names another" in warning


PROGRAM = """
import logging, jax, jax.numpy as jnp
from dtm_jax import compile_cache, console
console.log_plainly()
compile_cache.enable()
compile_cache.told(jax.jit(lambda x: jnp.tanh(x) @ x))(jnp.eye(3))
"""


def test_another_process_finds_the_program_in_the_users_folder(tmp_path):
  """Also a small one, which jax itself would not keep."""
  environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(runs.ROOT)}
  for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
    del environment[name]
  told = []
  for _ in range(2):
    process = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, stderr=subprocess.PIPE, text=True)
    assert process.returncode == 0, process.stderr
    told.append(process.stderr.partition(" ")[2].partition(" in ")[0])
  assert told == ["step compiled", "step from the compile cache"]
  (folder,) = (tmp_path / "dtm_jax" / "compiled").iterdir()
  assert any(folder.iterdir())


@pytest.mark.slow
def test_a_second_run_finds_its_step_and_ends_with_the_same_parameters(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  told, ended = [], []
  for name in ("first", "second"):
    code, stderr = runs.finish(runs.start(runs.options(tmp_path / name, run__steps=1), None))
    assert code == 0, stderr
    told += [kind for kind in ("step compiled in ", "step from the compile cache in ") if kind in stderr]
    ended.append(runs.summary(tmp_path / name)["params_sha256"])
  assert told == ["step compiled in ", "step from the compile cache in "]
  assert ended[0] == ended[1]
