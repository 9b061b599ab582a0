#!/usr/bin/env bash
# ImageNet-1K, from the two official archives to the TFDS data set that the configs read; without TensorFlow.
#
#   launch/prepare_imagenet.sh TARS DATA
#
# TARS holds ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar. They are unpacked into DATA/imagenet2012_images, a
# folder per class, and from there packed into DATA/imagenet2012. The same command goes on where it was interrupted.
# PYTHON is the interpreter.
set -euo pipefail

python=${PYTHON:-python}

fail() {
  echo "error: $1" >&2
  exit 2
}

# Bytes in all of these files and folders, as far as they are there.
bytes_of() { { du -sbc "$@" 2> /dev/null || true; } | tail -n 1 | cut -f 1; }
gigabytes() { echo "$((($1 + 999999999) / 1000000000)) GB"; }

check_archives() {
  local archive
  for archive in "$train" "$validation"; do
    [ -f "$archive" ] || fail "$archive is missing; get it from https://image-net.org/download-images (with an account)"
  done
}

# The images once unpacked and once packed, less what an earlier run has left.
check_space() {
  local needed free
  needed=$((2 * $(bytes_of "$train" "$validation") - $(bytes_of "$images" "$data/imagenet2012")))
  free=$(df --output=avail -B 1 "$data" | tail -n 1)
  ((needed <= free)) ||
    fail "$data needs $(gigabytes $needed) and has $(gigabytes "$free"); make room or give another folder"
}

# Folders appear under their names when they are whole.
unpack_train() {
  local classes class
  classes=$(tar -tf "$train") || fail "$train is broken; fetch it again"
  echo "$(wc -l <<< "$classes") classes for training"
  for class in $classes; do
    [[ $class =~ ^n[0-9]{8}\.tar$ ]] || fail "$train holds $class and not one archive per class; fetch it again"
    class=${class%.tar}
    [ ! -d "$images/train/$class" ] || continue
    rm -rf "$images/train/.$class"
    mkdir -p "$images/train/.$class"
    tar -xOf "$train" --occurrence=1 "$class.tar" | tar -x --no-same-owner -C "$images/train/.$class" ||
      fail "$class.tar in $train is broken; fetch it again"
    mv "$images/train/.$class" "$images/train/$class"
  done
}

unpack_validation() {
  [ ! -d "$images/validation" ] || return 0
  rm -rf "$images/.validation"
  mkdir -p "$images/.validation"
  tar -xf "$validation" --no-same-owner -C "$images/.validation" || fail "$validation is broken; fetch it again"
  sort_by_class "$images/.validation"
  mv "$images/.validation" "$images/validation"
}

# The class of image number N is in line N of a list that comes with TFDS.
sort_by_class() {
  "$python" - "$1" << 'END'
import importlib.util, pathlib, sys

[tfds] = importlib.util.find_spec("tensorflow_datasets").submodule_search_locations
labels = pathlib.Path(tfds, "datasets/imagenet2012/validation_labels.txt").read_text().split()
for image in sorted(pathlib.Path(sys.argv[1]).glob("ILSVRC2012_val_*.JPEG")):
  folder = image.parent / labels[int(image.stem.rpartition("_")[2]) - 1]
  folder.mkdir(exist_ok=True)
  image.rename(folder / image.name)
END
}

[ $# -eq 2 ] || fail "usage: launch/prepare_imagenet.sh TARS DATA, the folder of the archives and the one for data sets"
train=$1/ILSVRC2012_img_train.tar validation=$1/ILSVRC2012_img_val.tar data=$2
images=$data/imagenet2012_images
ready="--config.data.path=$data has ImageNet"
if compgen -G "$data/imagenet2012/[0-9]*" > /dev/null; then
  echo "$ready"
  exit
fi

check_archives
"$python" -c 'import dtm_jax' 2> /dev/null || fail "$python has no dtm_jax; activate the environment, or set PYTHON"
mkdir -p "$data"
check_space
unpack_train
unpack_validation
"$python" -m dtm_jax.data.prepare "$images" --out="$data" --name=imagenet2012
echo "$ready; the unpacked images are no longer needed: rm -r $images"
