"""scikit-learn's handwritten digits as a TFDS data set: real images that need no download."""

import contextlib
import fcntl
import io
import os
import pathlib

import numpy as np
import tensorflow_datasets as tfds

from dtm_jax.data import transforms
from dtm_jax.errors import InputError

_TEST_FRACTION = 0.2
_GREY_LEVELS = 16  # the largest value in scikit-learn's arrays


class DtmDigits(tfds.core.GeneratorBasedBuilder):
  """1797 grey images of 8 x 8 pixels in ten classes, split by class into 1437 and 360."""

  VERSION = tfds.core.Version("1.0.0")
  # Nothing is downloaded. TFDS 4.9.10 would look for checksums by way of `importlib_resources`,
  # which it does not declare.
  url_infos = None

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.__doc__,
      features=tfds.features.FeaturesDict(
        {"image": tfds.features.Image(shape=(8, 8, 1)), "label": tfds.features.ClassLabel(num_classes=10)}
      ),
      supervised_keys=("image", "label"),
      homepage="https://archive.ics.uci.edu/dataset/80",
      license="CC BY 4.0",
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager):
    from sklearn import datasets, model_selection

    digits = datasets.load_digits()
    train, test = model_selection.train_test_split(
      np.arange(len(digits.target)), test_size=_TEST_FRACTION, stratify=digits.target, random_state=0
    )
    return {
      "train": self._generate_examples(digits.images, digits.target, train),
      "test": self._generate_examples(digits.images, digits.target, test),
    }

  def _generate_examples(self, images: np.ndarray, labels: np.ndarray, members: np.ndarray):
    for i in members.tolist():
      pixels = (images[i] * (255 / _GREY_LEVELS)).round().astype(np.uint8)
      yield i, {"image": io.BytesIO(transforms.encode_png(pixels)), "label": int(labels[i])}


def prepared_builder(data_dir: str) -> DtmDigits:
  """The builder, after its data set was written if need be.

  Args:
    data_dir: where data sets live; "" is `dtm_jax` in the user's cache folder.

  Raises:
    InputError: the folder cannot be written.
  """
  folder = pathlib.Path(data_dir) if data_dir else _user_cache() / "dtm_jax"
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if not _open(folder).data_path.exists():
      with (folder / ".dtm_digits.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes one writes, and the others find it done
        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces downloads, of which there are none
          _open(folder).download_and_prepare()
  except (OSError, RuntimeError) as error:  # ArrayRecord makes a full disk a RuntimeError
    raise InputError(
      f"cannot write the digits to {folder} ({error}); set config.data.path to another folder"
    ) from error
  return _open(folder)


def _open(folder: pathlib.Path) -> DtmDigits:
  """A builder sees what is prepared when it is made, not later."""
  return DtmDigits(data_dir=folder, file_format="array_record")


def _user_cache() -> pathlib.Path:
  given = os.environ.get("XDG_CACHE_HOME")
  return pathlib.Path(given) if given else pathlib.Path.home() / ".cache"
