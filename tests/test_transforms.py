import io
import itertools
import math

import numpy as np
import pytest
from PIL import Image, ImageChops
from scipy import stats
from sklearn import datasets

from dtm_jax.axes import Stream
from dtm_jax.config import Config, DataConfig
from dtm_jax.data import pipeline, transforms
from dtm_jax.data.sources import Example

RATIO = (3 / 4, 4 / 3)
RESIZED = transforms.train_crop(DataConfig(crop_scale=(0.2, 1.0), crop_ratio=RATIO))
CROP = {"crop": RESIZED, "flip": 0.0}


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
  return Image.fromarray(datasets.load_sample_image("china.jpg"))  # 640 x 427


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
  encoded = io.BytesIO()
  image.save(encoded, kind, **options)
  return encoded.getvalue()


def mean_difference(a: np.ndarray, b: np.ndarray) -> float:
  return np.abs(a.astype(float) - b.astype(float)).mean()


def test_crop_boxes_are_distributed_as_defined():
  """Area uniform, shape log-uniform, place uniform; at most half of a large square, so that the first try fits."""
  rng = np.random.default_rng(0)
  side = 10_000
  boxes = np.array([transforms.random_crop_box(rng, (side, side), (0.2, 0.5), RATIO) for _ in range(2000)])
  width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
  uniform = {
    "area": (width * height / side**2 - 0.2) / 0.3,
    "shape": (np.log(width / height) / math.log(4 / 3) + 1) / 2,
    "left": boxes[:, 0] / (side - width),
    "top": boxes[:, 1] / (side - height),
  }
  for name, values in uniform.items():
    assert stats.kstest(values, "uniform").pvalue > 0.01, name  # measured 0.20 to 0.76


def test_crop_boxes_are_whole_pixels_inside_the_image():
  rng = np.random.default_rng(1)
  for size in ((37, 500), (500, 375), (3, 3), (1, 1)):
    for _ in range(200):
      left, top, right, bottom = transforms.random_crop_box(rng, size, (0.2, 1.0), RATIO)
      assert all(isinstance(value, int) for value in (left, top, right, bottom))
      assert 0 <= left < right <= size[0]
      assert 0 <= top < bottom <= size[1]


def test_crops_reach_every_edge():
  """Crops of 2 x 2 in 4 x 4 pixels have nine places, all equally likely."""
  rng = np.random.default_rng(2)
  boxes = [transforms.random_crop_box(rng, (4, 4), (0.25, 0.25), (1.0, 1.0)) for _ in range(900)]
  _, counts = np.unique(boxes, axis=0, return_counts=True)
  assert len(counts) == 9
  assert stats.chisquare(counts).pvalue > 0.01  # measured 0.93


@pytest.mark.parametrize(
  ("size", "box"), [((1000, 10), (493, 0, 506, 10)), ((10, 1000), (0, 493, 10, 506)), ((12, 10), (0, 0, 12, 10))]
)
def test_crop_of_an_image_that_no_try_fits(size, box):
  """Torchvision's fallback, worked out by hand; a scale of 4 never fits."""
  assert transforms.random_crop_box(np.random.default_rng(0), size, (4.0, 4.0), RATIO) == box


def test_square_crops_are_anywhere():
  rng = np.random.default_rng(3)
  draw = transforms.train_crop(DataConfig(train_crop="square", eval_crop=0.875))
  left, top, right, bottom = np.array([draw(rng, (400, 200)) for _ in range(2000)]).T
  np.testing.assert_allclose(right - left, 175)
  np.testing.assert_allclose(bottom - top, 175)
  for values in (left / (400 - 175), top / (200 - 175)):
    assert stats.kstest(values, "uniform").pvalue > 0.01  # measured 0.16, 0.70


@pytest.mark.parametrize("train_crop", ["resized", "square"])
def test_the_pipeline_takes_its_crops(photograph, train_crop):
  example = Example(encode(photograph), 0)
  data = DataConfig(train_crop=train_crop, image_size=32, num_masked=0, flip=0.0, color_jitter=0.0)
  config = Config(task="finetune", data=data)
  row = pipeline._TrainRow(config, [example])(5, 0)
  rng = pipeline._row_rng(config, Stream.AUGMENT, 5)
  expected = transforms.train_image(example.image, rng, size=32, crop=transforms.train_crop(data), flip=0.0)
  np.testing.assert_array_equal(row["image"], expected)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_train_image_is_the_bicubic_resize_of_the_crop(photograph, kind):
  data = encode(photograph, kind)
  box = RESIZED(np.random.default_rng(5), photograph.size)
  pixels = transforms.train_image(data, np.random.default_rng(5), size=224, **CROP)
  assert pixels.dtype == np.uint8
  assert pixels.shape == (224, 224, 3)
  reference = np.asarray(Image.open(io.BytesIO(data)).crop(box).resize((224, 224), Image.Resampling.BICUBIC))
  assert mean_difference(pixels, reference) < 1.0  # grey levels; measured 0.16 (cykooz_resizer), 0.005 (Pillow)


def test_scaled_decoding_stays_close_to_full_decoding(photograph):
  """Crops of four times the output: decoded at half or a quarter of the size."""
  data = encode(photograph.resize((1280, 854)), "JPEG", quality=90)
  differences = []
  for seed in range(10):
    box = RESIZED(np.random.default_rng(seed), (1280, 854))
    reference = np.asarray(Image.open(io.BytesIO(data)).crop(box).resize((128, 128), Image.Resampling.BICUBIC))
    pixels = transforms.train_image(data, np.random.default_rng(seed), size=128, **CROP)
    differences.append(mean_difference(pixels, reference))
  assert max(differences) < 4.0  # grey levels; measured 2.0
  assert np.mean(differences) < 2.0  # measured 1.0


@pytest.mark.parametrize(
  ("side", "scale"), [(127, 1), (128, 1), (255, 1), (256, 2), (300, 2), (511, 2), (512, 4), (800, 4)]
)
def test_decoding_scale_leaves_the_crop_enough_pixels(photograph, side, scale):
  data = encode(photograph.resize((1024, 1024)), "JPEG")
  box = (100, 60, 100 + side, 60 + side)
  image, scaled_box = transforms._decode(Image.open(io.BytesIO(data)), box, 128)
  assert image.size == (1024 // scale, 1024 // scale)
  assert scaled_box == tuple(value / scale for value in box)


def test_scaled_box_of_an_odd_size_does_not_drift(photograph):
  """1027 px at a quarter are 257, not 256.75; near the right edge the difference would show."""
  data = encode(photograph.resize((1027, 685)), "JPEG", quality=95)
  box = (515, 173, 1027, 685)
  image, scaled_box = transforms._decode(Image.open(io.BytesIO(data)), box, 128)
  assert image.size == (257, 172)
  assert scaled_box == (128.75, 43.25, 256.75, 171.25)


def test_eval_image_is_resize_then_center_crop(photograph):
  data = encode(photograph)
  width, height = photograph.size
  resized = photograph.resize((round(width * 256 / height), 256), Image.Resampling.BICUBIC)
  left = (resized.width - 224) / 2
  reference = np.asarray(resized.crop((round(left), 16, round(left) + 224, 240)))
  assert mean_difference(transforms.eval_image(data, size=224), reference) < 2.0  # grey levels; measured 0.64


def test_flip_mirrors_the_same_crop(photograph):
  data = encode(photograph)
  plain, mirrored = (
    transforms.train_image(data, np.random.default_rng(0), size=32, **CROP | {"flip": flip}) for flip in (0.0, 1.0)
  )
  np.testing.assert_array_equal(plain, mirrored[:, ::-1])
  assert np.any(plain != mirrored)


def test_flips_half_of_the_images(photograph):
  data = encode(photograph.resize((64, 43)))
  flipped = 0
  for seed in range(300):
    rngs = [np.random.default_rng(seed) for _ in range(2)]
    plain = transforms.train_image(data, rngs[0], size=8, **CROP)
    maybe = transforms.train_image(data, rngs[1], size=8, **CROP | {"flip": 0.5})
    flipped += bool(np.any(plain != maybe))
  assert 110 < flipped < 190  # 150, standard deviation 9


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_distortion_comes_last_and_sees_rgb(photograph, mode):
  data = encode(photograph.convert(mode))
  options = {"size": 32, **CROP, "flip": 1.0}
  plain = transforms.train_image(data, np.random.default_rng(0), **options)

  def move_right(crop):
    assert (crop.mode, crop.size) == ("RGB", (32, 32))
    return ImageChops.offset(crop, 5, 0)

  distorted = transforms.train_image(data, np.random.default_rng(0), **options, distort=move_right)
  np.testing.assert_array_equal(distorted, np.roll(plain, 5, axis=1))


def jitter_reference(pixels, factors, order):
  """Brightness, contrast, saturation as torchvision documents them, on floats rounded after each step."""
  for i in order:
    grey = (pixels @ np.array([0.299, 0.587, 0.114])).round()
    anchor = (0.0, np.round(grey.mean()), grey[..., None])[i]
    pixels = np.clip(anchor + factors[i] * (pixels - anchor), 0, 255).round()
  return pixels


def test_color_jitter_is_three_blends_in_some_order(photograph):
  image = photograph.resize((64, 43))
  chosen = set()
  for seed in range(30):
    factors = np.random.default_rng(seed).uniform(0.6, 1.4, size=3)
    jittered = np.asarray(transforms.color_jitter(image, np.random.default_rng(seed), 0.4))
    pixels = np.asarray(image, dtype=float)
    errors = {
      order: np.abs(jitter_reference(pixels, factors, order) - jittered).max()
      for order in itertools.permutations(range(3))
    }
    best = min(errors, key=errors.get)
    assert errors[best] <= 5, seed  # grey levels, at the worst pixel; measured 4
    chosen.add(best)
  assert len(chosen) == 6


def test_host_jitter_comes_before_the_crop(photograph):
  """Contrast pulls towards the mean of the whole image, not towards the crop's."""
  data = encode(photograph)
  pixels = transforms.train_image(
    data, np.random.default_rng(7), size=64, jitter=0.4, jitter_rng=np.random.default_rng(8), **CROP
  )
  whole = transforms.color_jitter(photograph, np.random.default_rng(8), 0.4)
  expected = transforms.train_image(encode(whole), np.random.default_rng(7), size=64, **CROP)
  np.testing.assert_array_equal(pixels, expected)


COLOR = (200, 100, 50)
GREY = (120, 120, 120)


def sixteen_bits():
  return Image.fromarray(np.full((20, 30), 120 * 257, np.uint16))


def palette_with_transparency():
  image = Image.new("RGBA", (30, 20), (*COLOR, 128)).quantize()
  assert image.mode == "P"
  return image


@pytest.mark.parametrize(
  ("image", "kind", "expected"),
  [
    (Image.new("RGB", (30, 20), COLOR), "PNG", COLOR),
    (Image.new("RGBA", (30, 20), (*COLOR, 255)), "PNG", COLOR),
    (Image.new("L", (30, 20), 120), "PNG", GREY),
    (Image.new("L", (30, 20), 120), "JPEG", GREY),
    (Image.new("LA", (30, 20), (120, 7)), "PNG", GREY),
    (Image.new("1", (30, 20), 1), "PNG", (255, 255, 255)),
    (Image.new("CMYK", (30, 20), tuple(255 - c for c in COLOR) + (0,)), "JPEG", COLOR),
    (sixteen_bits(), "PNG", GREY),
    (palette_with_transparency(), "PNG", COLOR),
  ],
  ids=["RGB", "RGBA", "L", "L-jpeg", "LA", "1", "CMYK", "16-bit", "P"],
)
def test_all_kinds_of_pixels_become_rgb(image, kind, expected):
  data = encode(image, kind)
  crop = transforms.train_image(data, np.random.default_rng(0), size=16, **CROP)
  for pixels in (crop, transforms.eval_image(data, size=16)):
    np.testing.assert_allclose(pixels, np.broadcast_to(expected, (16, 16, 3)), atol=3)  # JPEG and palette round


def broken_files(image: Image.Image) -> dict[str, bytes]:
  jpeg, png = encode(image, "JPEG"), encode(image)
  return {
    "empty": b"",
    "text": b"This is not an image.",
    "truncated JPEG": jpeg[: len(jpeg) // 2],
    "truncated PNG": png[: len(png) // 2],
    "PNG of a broken size": png[:16] + b"\xff" * 8 + png[24:],
    "PNG with a wrong chunk length": png[:33] + (8).to_bytes(4, "big") + png[37:],
    "bitmap header only": encode(image, "BMP")[:60],
  }


@pytest.mark.parametrize("name", broken_files(Image.new("RGB", (2, 2))))
def test_broken_files_are_unreadable(photograph, name):
  data = broken_files(photograph)[name]
  with pytest.raises(transforms.UnreadableImageError):
    transforms.train_image(data, np.random.default_rng(0), size=16, **CROP)
  with pytest.raises(transforms.UnreadableImageError):
    transforms.eval_image(data, size=16)


def test_an_absurdly_large_image_is_unreadable(monkeypatch):
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
  with pytest.raises(transforms.UnreadableImageError):
    transforms.eval_image(encode(Image.new("L", (50, 50))), size=16)
