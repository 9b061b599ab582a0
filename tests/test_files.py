"""Files that are there whole or not at all."""

import os
import pathlib
import threading
import time

import pytest

from dtm_jax.errors import InputError
from dtm_jax.files import locked, replacing


def write(path: pathlib.Path, text: str) -> None:
  with replacing(path) as unfinished:
    assert str(os.getpid()) in unfinished.name  # two programs that write the same file do not meet
    unfinished.write_text(text)


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path, is_there):
  target, link = tmp_path / "far" / "target", tmp_path / "link"
  link.symlink_to(target)
  if is_there:
    write(target, "old")
  write(link, "new")
  assert link.is_symlink()
  assert target.read_text() == "new"
  assert sorted(path.name for path in tmp_path.rglob("*")) == ["far", "link", "target"]


def test_what_is_neither_file_nor_folder_is_left_alone(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  os.mkfifo("pipe")
  pathlib.Path("circle").symlink_to("circle")
  for path in ("pipe", "circle", "/", ".", ""):
    with pytest.raises(InputError, match="cannot write"):
      write(pathlib.Path(path), "new")
  assert pathlib.Path("pipe").is_fifo()
  assert sorted(path.name for path in tmp_path.iterdir()) == ["circle", "pipe"]


def test_nothing_is_left_of_what_was_interrupted(tmp_path):
  write(tmp_path / "file", "old")
  with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "file") as unfinished:
    unfinished.write_text("ne")
    raise KeyboardInterrupt
  assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


def test_a_lock_that_is_held_for_a_while_is_waited_for(tmp_path):
  """As a network's file system holds that of a host which is no more."""
  path, is_held, start = tmp_path / "lock", threading.Event(), time.monotonic()

  def hold():
    with locked(path, "held"):
      is_held.set()
      time.sleep(1)

  threading.Thread(target=hold).start()
  is_held.wait()
  with pytest.raises(InputError, match="held"), locked(path, "held", patience=0.1):
    pass
  with locked(path, "held", patience=60):
    assert time.monotonic() - start > 0.9
