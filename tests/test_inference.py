"""Trained models in use: beside PyTorch, beside evaluation, and from an exported file in a process of its own."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import special
from sklearn import datasets

import dtm_jax
from configs import finetune_quickstart
from dtm_jax import config as config_lib
from dtm_jax import export, inference, sharding
from dtm_jax.checkpoint import BEST_FOLDER, FOLDER, CheckpointStore
from dtm_jax.convert import __main__ as convert_command
from dtm_jax.data.pipeline import eval_batches
from dtm_jax.data.sources import open_source
from dtm_jax.errors import InputError
from dtm_jax.evaluate.steps import make_feature_fn
from dtm_jax.models.variants import Variant
from dtm_jax.networks import create_classifier, init_params
from dtm_jax.numerics import torch_models
from dtm_jax.optim import create_optimizer
from dtm_jax.train_state import create_train_state
from dtm_jax.workdir import CONFIG_FILE, write_json

GOLDEN = pathlib.Path(__file__).parent / "golden"
WEIGHTS = {
  "student": GOLDEN / "student_tiny.pth",
  "classifier": GOLDEN / "finetune_tiny.pth",
  "clip_vision": GOLDEN / "clip_vision_tiny.pth",
}
SIZE, NUM_CLASSES = 64, 7
BATCH = 8  # one image for each of the eight devices
MEAN, STD = (0.3, 0.4, 0.5), (0.2, 0.25, 0.3)

kinds = pytest.mark.parametrize("kind", WEIGHTS)


@functools.cache
def load(kind: str) -> inference.Model:
  return dtm_jax.load(WEIGHTS[kind], batch_size=BATCH)


@functools.cache
def some_images() -> np.ndarray:
  """As many as need two batches."""
  return np.random.default_rng(0).integers(0, 256, (11, SIZE, SIZE, 3), np.uint8)


# ------------------------------------------------------------ what is computed


def in_torch(kind: str, images: np.ndarray, mean=None, std=None) -> dict[str, np.ndarray]:
  """The PyTorch reference's outputs of images that numpy has normalised, by default as the model does."""
  mean, std = mean or load(kind).mean, std or load(kind).std
  normal = (images / 255 - np.array(mean)) / np.array(std)
  state = torch.load(WEIGHTS[kind], weights_only=True)
  tensor = torch.from_numpy(normal.astype(np.float32)).permute(0, 3, 1, 2)
  size = Variant(width=48, depth=3, heads=3, layer_scale=0.1)
  with torch.no_grad():
    if kind == "clip_vision":
      tower = torch_models.load_clip(state)
      projected = tower.features(tensor) @ tower.proj
      return {"pooled": projected[:, 0].numpy(), "tokens": projected[:, 1:].numpy()}
    if kind == "student":
      student = torch_models.Student(size, grid=(8, 8), patch_size=8, out_dim=32)
      student.load_state_dict(state["model"])
      tokens = student.features(tensor)[:, 1:]
      return {"pooled": tokens.mean(dim=1).numpy(), "tokens": tokens.numpy()}
    classifier = torch_models.Classifier(size, grid=(8, 8), patch_size=8, num_classes=NUM_CLASSES)
    classifier.load_state_dict(state["model"])
    tokens = classifier.features(tensor)[:, 1:]
    return {
      "pooled": classifier.fc_norm(tokens.mean(dim=1)).numpy(),
      "tokens": classifier.fc_norm(tokens).numpy(),
      "classes": classifier(tensor).softmax(dim=1).numpy(),
    }


# Measured, at most of the three kinds: 1.1e-6, 2.4e-6 and 6e-8.
TOLERANCES = {"pooled": 5e-6, "tokens": 2e-5, "classes": 5e-7}


@kinds
def test_outputs_equal_pytorchs(kind):
  expected, model = in_torch(kind, some_images()), load(kind)
  actual = model.features(some_images())._asdict()
  if kind == "classifier":
    actual["classes"] = model.classify(some_images())
    assert model.num_classes == NUM_CLASSES
  assert actual.keys() == expected.keys()
  for name, values in expected.items():
    assert actual[name].dtype == np.float32
    assert actual[name].shape == values.shape
    assert np.abs(values).max() > 0.1
    np.testing.assert_allclose(actual[name], values, rtol=0, atol=TOLERANCES[name], err_msg=name)


@pytest.mark.parametrize("count", [0, 1, 8])
def test_any_number_of_images_by_one_program(count):
  model = load("classifier")
  pooled, tokens = model.features(some_images())
  few = model.features(jax.numpy.asarray(some_images()[3 : 3 + count]))
  assert few.pooled.shape == (count, 48)
  assert few.tokens.shape == (count, 64, 48)
  np.testing.assert_array_equal(few.pooled, pooled[3 : 3 + count])
  np.testing.assert_array_equal(few.tokens, tokens[3 : 3 + count])
  assert model.classify(some_images()[:count]).shape == (count, NUM_CLASSES)
  assert [compiled._cache_size() for compiled in model._jitted.values()] == [1, 1]


def test_every_device_has_its_share():
  model = dtm_jax.load(WEIGHTS["student"], batch_size=1)
  assert model.batch_size == jax.device_count() == 8
  split = sharding.batch_sharding(model.mesh)
  outputs = model._compiled("features")(sharding.to_global(some_images()[:8], split))
  assert [shard.data.shape for shard in outputs["pooled"].addressable_shards] == [(1, 48)] * 8


def test_normalisation_is_of_the_kind_or_as_given():
  assert load("student").mean == load("classifier").mean == config_lib.IMAGENET_MEAN
  assert load("clip_vision").std == (0.26862954, 0.26130258, 0.27577711)  # CLIP's README
  colors = {"mean": (0.5, 0.4, 0.3), "std": (0.25, 0.5, 1.0)}
  other = dtm_jax.load(WEIGHTS["student"], batch_size=BATCH, **colors)
  expected = in_torch("student", some_images()[:2], **colors)["pooled"]
  np.testing.assert_allclose(other.features(some_images()[:2]).pooled, expected, rtol=0, atol=2e-6)  # measured 3e-7


def test_half_precision_and_attention_are_as_asked():
  half = dtm_jax.load(WEIGHTS["classifier"], batch_size=BATCH, dtype="bfloat16", attention="xla")
  assert (half.checkpoint.model.dtype, half.checkpoint.model.attention) == (np.dtype("bfloat16"), "xla")
  difference = np.abs(half.features(some_images()).tokens - load("classifier").features(some_images()).tokens).max()
  assert 1e-3 < difference < 0.1  # measured 0.019


# ------------------------------------------------------------ runs


RUN_SIZE, RUN_CLASSES = 16, 10
NAMES = [f"digit {i}" for i in range(RUN_CLASSES)]
ALL_WEIGHTS = [("last", False), ("last", True), ("best", False), ("best", True)]


@functools.cache
def random_weights(averaged: bool, step: int) -> Any:
  config = run_config()
  shapes = jax.eval_shape(lambda: init_params(config, create_classifier(config, RUN_CLASSES)))
  rng = np.random.default_rng(2 * step + averaged)
  return jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), shapes)


def run_config() -> config_lib.Config:
  """Of a run with an average, its own normalisation and its own crop."""
  config = finetune_quickstart.get_config("smoke")
  config.data.update(mean=MEAN, std=STD, eval_crop=0.7)
  return config_lib.resolve(config)


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory):
  """The work folder of a run whose best step is 1 and whose last is 2."""
  workdir, config = tmp_path_factory.mktemp("finetuned"), run_config()
  write_json(workdir / CONFIG_FILE, config_lib.to_json(config) | {"num_classes": RUN_CLASSES, "class_names": NAMES})
  optimizer = create_optimizer(config.optim, lambda step: 0.0)
  for folder, step in ((FOLDER, 2), (BEST_FOLDER, 1)):
    params, average = (random_weights(averaged, step) for averaged in (False, True))
    # An average begins as the weights.
    state = create_train_state(params, optimizer).replace(opt_state=optimizer.init(average), step=np.int32(step))
    with contextlib.closing(CheckpointStore(workdir, keep=1, folder=folder)) as store:
      store.save(state)
      store.wait()
  return workdir


@pytest.fixture(scope="module")
def models(finetuned) -> dict[tuple[str, bool], inference.Model]:
  options = {"batch_size": BATCH}
  return {(name, avg): dtm_jax.load(finetuned, checkpoint=name, averaged=avg, **options) for name, avg in ALL_WEIGHTS}


@pytest.mark.parametrize(("name", "averaged"), ALL_WEIGHTS)
def test_last_best_and_averaged_are_weights_of_their_own(models, name, averaged):
  model, step = models[name, averaged], 2 if name == "last" else 1
  assert model.checkpoint.step == step
  assert jax.tree.all(jax.tree.map(np.array_equal, model.checkpoint.params, random_weights(averaged, step)))


def test_a_run_brings_its_settings(models):
  model = models["last", True]
  assert (model.mean, model.std, model.crop, model.image_size) == (MEAN, STD, 0.7, RUN_SIZE)
  assert len(repr(model)) < 200 and str(model.checkpoint.path) in repr(model)
  assert (model.num_classes, model.class_names) == (RUN_CLASSES, NAMES)
  pixels = some_images()[:4, :RUN_SIZE, :RUN_SIZE]
  logits = jax.jit(create_classifier(run_config(), RUN_CLASSES).apply)
  logits = logits({"params": random_weights(True, 2)}, np.float32((pixels / 255 - np.array(MEAN)) / np.array(STD)))
  expected = special.softmax(np.asarray(logits, np.float64), axis=1)
  assert np.ptp(expected) > 0.03
  np.testing.assert_allclose(model.classify(pixels), expected, rtol=0, atol=1.5e-7)  # measured 1.7e-8


def test_pooled_features_are_those_that_evaluation_uses(models):
  model = models["last", False]
  config, pixels = run_config(), some_images()[:, :RUN_SIZE, :RUN_SIZE]
  expected = jax.jit(make_feature_fn(config, model.checkpoint.model))(model.checkpoint.params, pixels)
  np.testing.assert_allclose(model.features(pixels).pooled, expected, rtol=0, atol=8e-7)  # measured 9e-8


# ------------------------------------------------------------ preprocessing


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[pathlib.Path]:
  """Real images of odd sizes and kinds, in the order in which a folder's are read."""
  folder = tmp_path_factory.mktemp("images")
  photograph = Image.fromarray(datasets.load_sample_image("china.jpg"))  # 640 x 427
  rng = np.random.default_rng(0)
  photograph.save(folder / "a large.jpg", quality=90)
  photograph.resize((101, 333)).save(folder / "b odd.jpeg")
  photograph.convert("L").resize((75, 50)).save(folder / "c grey.jpg")
  photograph.convert("P").save(folder / "d palette.png", transparency=3)
  photograph.resize((40, 90)).convert("RGBA").save(folder / "e alpha.png")
  Image.fromarray(rng.integers(0, 2**16, (50, 61), np.uint16)).save(folder / "f 16 bit.png")
  photograph.resize((9, 12)).save(folder / "g small.png")
  return sorted(folder.iterdir())


@pytest.mark.parametrize("crop", [224 / 256, 1.0])
def test_images_are_those_of_evaluation(files, crop):
  model = dataclasses.replace(load("student"), crop=crop)
  folder = {"source": "folder", "path": str(files[0].parent), "num_workers": 0}
  config = config_lib.Config(task="evaluate", data=config_lib.DataConfig(**folder, image_size=SIZE, eval_crop=crop))
  expected = {}
  for split in ("train", "eval"):
    source = open_source(config.data, split)
    with contextlib.closing(eval_batches(config, source, 4)) as batches:
      for batch in batches:
        rows = zip(batch["index"], batch["image"], batch["valid"], strict=True)
        expected |= {pathlib.Path(source.name(index)).name: image for index, image, valid in rows if valid}
  assert len(expected) == len(files) == 7
  paths = model.preprocess(files)
  assert (paths.shape, paths.dtype) == ((7, SIZE, SIZE, 3), np.uint8)
  np.testing.assert_array_equal(paths, [expected[file.name] for file in files])
  np.testing.assert_array_equal(model.preprocess(map(str, files)), paths)
  np.testing.assert_array_equal(model.preprocess([file.read_bytes() for file in files]), paths)


def test_pixels_are_as_good_as_their_lossless_file(files):
  model = load("student")
  lossless = [file for file in files if file.suffix == ".png"]
  expected = model.preprocess(lossless)
  np.testing.assert_array_equal(model.preprocess([Image.open(file) for file in lossless]), expected)
  pixels = np.asarray(Image.open(files[-1]))
  np.testing.assert_array_equal(model.preprocess([pixels, jax.numpy.asarray(pixels)]), expected[[-1, -1]])
  np.testing.assert_array_equal(model.preprocess(pixels[None]), expected[-1:])
  grey = np.asarray(Image.open(files[2]))
  np.testing.assert_array_equal(model.preprocess([grey]), model.preprocess([np.stack([grey] * 3, axis=2)]))


def test_an_opened_jpeg_stays_as_it_is_and_is_almost_its_bytes(files):
  opened = Image.open(files[0])
  pixels = load("student").preprocess([opened])
  assert (opened.size, opened.mode) == ((640, 427), "RGB")
  difference = np.abs(pixels.astype(int) - load("student").preprocess(files[:1])).mean()
  assert 0 < difference < 4  # grey levels; measured 1.6


def test_no_image_makes_none():
  assert load("student").preprocess([]).shape == (0, SIZE, SIZE, 3)


# ------------------------------------------------------------ exported programs


@functools.cache
def lowered(kind: str, what: str) -> jax.export.Exported:
  return load(kind).lower(what)


# Measured, at most: 1e-6 and 3e-8. XLA orders sums by the size of the batch.
PROGRAM_TOLERANCES = {"features": 1e-5, "classify": 3e-7}
CASES = [
  *(("student", "features"), ("classifier", "features")),
  *(("classifier", "classify"), ("clip_vision", "features")),
]


def direct(kind: str, what: str) -> dict[str, np.ndarray]:
  """What the model itself gives for `some_images()`."""
  outputs = getattr(load(kind), what)(some_images())
  return outputs._asdict() if isinstance(outputs, tuple) else {"": outputs}


@pytest.mark.parametrize(("kind", "what"), CASES)
def test_a_lowered_program_equals_the_model_for_any_batch(kind, what):
  program, expected = lowered(kind, what), direct(kind, what)
  assert program.platforms == ("cpu", "cuda", "tpu")
  assert str(program.in_avals[0]) == f"uint8[b,{SIZE},{SIZE},3]"
  for count in (1, 3, 11):
    actual = program.call(some_images()[:count])
    for name, values in expected.items():
      part = actual[name] if name else actual
      assert part.dtype == np.float32
      np.testing.assert_allclose(part, values[:count], rtol=0, atol=PROGRAM_TOLERANCES[what])


def test_a_lowered_program_multiplies_in_float32():
  """The default of TPUs is less."""
  products = [
    line for line in lowered("student", "features").mlir_module().splitlines() if "stablehlo.dot_general" in line
  ]
  assert len(products) > 3 * 6
  assert [line for line in products if "HIGHEST, HIGHEST" not in line] == []


@pytest.mark.parametrize(
  ("kind", "what"), [pytest.param(*case, marks=[pytest.mark.slow] * (case[1] == "features")) for case in CASES]
)
def test_a_file_equals_the_model_in_a_fresh_process(kind, what, tmp_path):
  load(kind).export(tmp_path / "new" / "model.stablehlo", what)
  np.save(tmp_path / "images.npy", some_images())
  program = """
import sys
import numpy as np
import dtm_jax
folder = sys.argv[1]
model = dtm_jax.load_exported(folder + "/new/model.stablehlo")
assert len(repr(model)) < 200, repr(model)[:200]
images = np.load(folder + "/images.npy")
outputs = {}
for count in (0, 1, 3, 11):
  values = model(images[:count])
  values = values._asdict() if isinstance(values, tuple) else {"": values}
  outputs |= {f"{name}{count}": value for name, value in values.items()}
np.savez(folder + "/outputs.npz", **outputs, size=model.image_size, crop=model.crop)
"""
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  subprocess.run([sys.executable, "-c", program, tmp_path], check=True, env=environment, cwd=GOLDEN.parents[1])
  with np.load(tmp_path / "outputs.npz") as outputs:
    actual = dict(outputs)
  assert (actual["size"], actual["crop"]) == (SIZE, load(kind).crop)
  for name, values in direct(kind, what).items():
    for count in (0, 1, 3, 11):
      assert actual[f"{name}{count}"].shape == (count, *values.shape[1:])
      np.testing.assert_allclose(actual[f"{name}{count}"], values[:count], rtol=0, atol=PROGRAM_TOLERANCES[what])


def test_jax_alone_reads_the_file_and_a_damaged_one_is_told(tmp_path):
  file = tmp_path / "model.stablehlo"
  load("classifier").export(file, "classify")
  content = file.read_bytes()
  assert b"vit.py" in content and str(pathlib.Path(dtm_jax.__file__).parent).encode() not in content
  values = jax.export.deserialize(bytearray(content)).call(some_images()[:2])
  np.testing.assert_allclose(values, direct("classifier", "classify")[""][:2], rtol=0, atol=3e-7)
  middle = len(content) // 2
  damaged = bytearray(content)
  damaged[middle] ^= 1
  for bad in (content[:-1], content[:middle], bytes(damaged), content + b"\0"):
    file.write_bytes(bad)
    with pytest.raises(InputError, match=f"{file} is damaged, or no file that Model.export has written"):
      dtm_jax.load_exported(file)


@pytest.mark.parametrize("content", [b"", b"text", GOLDEN.joinpath("schedule.npz").read_bytes()])
def test_a_foreign_file_is_told(tmp_path, content):
  file = tmp_path / "model.stablehlo"
  file.write_bytes(content)
  with pytest.raises(InputError, match=f"{file} is damaged, or no file that Model.export has written; export") as told:
    dtm_jax.load_exported(file)
  assert "\n" not in str(told.value)


def test_a_file_that_is_not_there(tmp_path):
  with pytest.raises(InputError, match="cannot read /no/such .No such file or directory.; name a file that"):
    dtm_jax.load_exported("/no/such")
  with pytest.raises(InputError, match="cannot read .*Is a directory"):
    dtm_jax.load_exported(tmp_path)


def test_cudnn_cannot_be_exported():
  model = load("student")
  checkpoint = dataclasses.replace(model.checkpoint, model=model.checkpoint.model.clone(attention="cudnn"))
  with pytest.raises(
    InputError, match="attention='cudnn' runs on GPUs alone and cannot be exported; load the model wi"
  ):
    dataclasses.replace(model, checkpoint=checkpoint).lower("features")


# ------------------------------------------------------------ the command


def test_a_runs_class_names_go_with_it_to_hugging_face(finetuned, tmp_path, capsys):
  assert convert_command.main(["convert", str(finetuned), str(tmp_path / "hf")]) == 0
  settings = json.loads((tmp_path / "hf" / "config.json").read_text())
  assert [*settings["id2label"].values()] == NAMES


def test_the_command_writes_what_the_method_writes(models, finetuned, tmp_path, capsys):
  file = tmp_path / "model.stablehlo"
  arguments = ["export", str(finetuned), str(file), "--what=classify", "--best", "--averaged"]
  assert export.main(arguments) == 0
  wrote = capsys.readouterr().out
  assert wrote == f"wrote {file}: classify of uint8 [b, 16, 16, 3], any b, on cpu, cuda, tpu\n"
  exported, pixels = dtm_jax.load_exported(file), some_images()[:3, :16, :16]
  np.testing.assert_allclose(exported(pixels), models["best", True].classify(pixels), rtol=0, atol=3e-7)
  assert exported.crop == 0.7
  assert export.main(arguments) == 2
  assert capsys.readouterr().err == f"error: {file} is there already; --overwrite replaces it\n"
  assert export.main([*arguments, "--overwrite"]) == 0


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "the following arguments are required: IN, OUT; --help shows the usage"),
    ([WEIGHTS["student"], "OUT", "--what=logits"], "invalid choice: 'logits'"),
    ([WEIGHTS["student"], "OUT", "--what=classify"], "student_tiny.pth is a student without classes; fine-tune it"),
    ([WEIGHTS["student"], "OUT", "--best"], "student_tiny.pth keeps no best checkpoint, as fine-tuning runs do"),
    ([WEIGHTS["student"], "OUT", "--averaged"], "student_tiny.pth keeps no average of its weights"),
    (["/no/such", "OUT"], "/no/such does not exist; name the work folder of a run, or a weights file"),
    ([WEIGHTS["student"], WEIGHTS["student"]], "student_tiny.pth is there already; --overwrite replaces it"),
  ],
  ids=lambda value: str(value)[-30:],
)
def test_a_command_that_cannot_be_done_is_one_line_and_writes_nothing(
  arguments, message, tmp_path, capsys, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  assert export.main(["export", *map(str, arguments)]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: ") and message in line
  assert not list(tmp_path.iterdir())


# ------------------------------------------------------------ bad input


@pytest.mark.parametrize(
  ("images", "given"),
  [
    (np.zeros((2, SIZE, SIZE, 3), np.float32), "float32 [2, 64, 64, 3]"),
    (np.zeros((2, SIZE, 32, 3), np.uint8), "uint8 [2, 64, 32, 3]"),
    (np.zeros((SIZE, SIZE, 3), np.uint8), "uint8 [64, 64, 3]"),
    (np.zeros((2, 3, SIZE, SIZE), np.uint8), "uint8 [2, 3, 64, 64]"),
    (np.uint8(3), "uint8 []"),
    ([np.zeros((SIZE, SIZE, 3), np.uint8)], "list"),
    ("cat.jpg", "str"),
  ],
  ids=lambda value: str(value)[:20],
)
def test_other_images_are_told_with_the_remedy(images, given):
  wanted = f"takes uint8 [n, {SIZE}, {SIZE}, 3], not {given}; its preprocess(images) makes that of any images"
  exported = inference.ExportedModel(lowered("classifier", "classify"), 0.875)
  for function in (load("classifier").features, load("classifier").classify, exported):
    with pytest.raises(InputError, match=re.escape(wanted)):
      function(images)


@pytest.mark.parametrize("image", ["cat.jpg", pathlib.Path("cat.jpg"), b"\xff\xd8", Image.new("RGB", (4, 4))])
def test_a_single_image_is_told(image):
  with pytest.raises(InputError, match="preprocess takes several images; put a single one into a list"):
    load("student").preprocess(image)


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 3)])
def test_a_single_array_is_told(shape):
  with pytest.raises(InputError, match="preprocess takes several images; put a single one into a list"):
    load("student").preprocess(np.zeros(shape, np.uint8))


def truncated_jpeg() -> bytes:
  encoded = io.BytesIO()
  Image.new("RGB", (64, 64)).save(encoded, "JPEG")
  return encoded.getvalue()[:300]


@pytest.mark.parametrize(
  ("image", "message"),
  [
    ("/no/such.jpg", r"/no/such.jpg cannot be read as an image \(.*No such file"),
    (b"text", r"image 1 cannot be read as an image \(cannot identify"),
    (truncated_jpeg(), "image 1 cannot be read as an image .*; leave it out, or mend it"),
    (
      np.zeros((4, 4, 3), np.float32),
      r"image 1 is float32 \[4, 4, 3\] instead of uint8 \[H, W, 3\] or \[H, W\]; convert",
    ),
    (np.zeros((4, 4, 4), np.uint8), r"image 1 is uint8 \[4, 4, 4\] instead"),
    (np.zeros((0, 4, 3), np.uint8), r"image 1 is uint8 \[0, 4, 3\] instead"),
    (7, r"image 1 is int64 \[\] instead"),
  ],
  ids=lambda value: str(value)[:20],
)
def test_an_image_that_cannot_be_read_is_named(image, message):
  with pytest.raises(InputError, match=message):
    load("student").preprocess([Image.new("RGB", (4, 4)), image])


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"checkpoint": "first"}, "checkpoint='first' is not one of last, best"),
    ({"checkpoint": "best"}, "student_tiny.pth keeps no best checkpoint, as fine-tuning runs do; take its last one"),
    ({"averaged": True}, "student_tiny.pth keeps no average of its weights .config.optim.ema_decay.; take the weights"),
    ({"dtype": "float16"}, "dtype='float16' is not one of None, float32, bfloat16"),
    ({"attention": "flash"}, "attention='flash' is not one of matmul, xla, cudnn"),
    ({"attention": "cudnn"}, "attention='cudnn' needs a GPU; choose 'xla' or 'matmul'"),
    ({"batch_size": 0}, "batch_size=0 must be positive"),
    ({"mean": (0.5, 0.5)}, r"mean=\(0.5, 0.5\) must be three numbers: red, green, blue"),
    ({"std": (0.5, 0.5, 0)}, r"std=\(0.5, 0.5, 0.0\) must be three positive numbers: red, green, blue"),
  ],
  ids=lambda value: str(value)[:30],
)
def test_wrong_options_are_told(options, message):
  with pytest.raises(InputError, match=message):
    dtm_jax.load(WEIGHTS["student"], **options)


def test_models_without_classes_tell_none():
  for kind in ("student", "clip_vision"):
    assert load(kind).num_classes is None
    with pytest.raises(InputError, match=f"_tiny.pth is a {kind} without classes; fine-tune it, or take its features"):
      load(kind).classify(some_images())
  with pytest.raises(InputError, match="what='logits' is not one of features, classify"):
    load("classifier").export("/no/such/folder", "logits")


# ------------------------------------------------------------ docs/inference.md


def code_after(marker: str) -> str:
  text = (GOLDEN.parents[1] / "docs" / "inference.md").read_text()
  return re.search(rf"<!-- test: {marker} -->\n```python\n(.*?)```", text, re.DOTALL)[1]


@pytest.fixture
def in_a_users_folder(finetuned, files, tmp_path, monkeypatch):
  (tmp_path / "runs").mkdir()
  for name in ("quickstart", "finetune_quickstart"):
    (tmp_path / "runs" / name).symlink_to(finetuned)
  (tmp_path / "cat.jpg").symlink_to(files[0])
  (tmp_path / "dog.png").symlink_to(files[3])
  monkeypatch.chdir(tmp_path)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # which a page may leave to the end of the program
@pytest.mark.usefixtures("in_a_users_folder")
def test_the_pages_code_runs():
  names = {}
  for marker in ("features", "classify"):
    exec(code_after(marker), names)
  assert names["pooled"].shape == (2, 96)
  assert names["tokens"].shape == (2, 16, 96)
  assert names["probabilities"].shape == (1, names["classifier"].num_classes)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.usefixtures("in_a_users_folder")
def test_the_pages_code_of_files_runs():
  names = {}
  for marker in ("features", "classify", "export", "without"):
    exec(code_after(marker), names)
  assert names["probabilities"].shape == (3, names["classifier"].num_classes)
