"""Task "evaluate": what the frozen features of a checkpoint are worth, or the classes that a classifier tells."""

import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from dtm_jax import distributed, metrics, sharding
from dtm_jax import workdir as workdirs
from dtm_jax.config import OF_CHECKPOINT, Config, DataConfig, to_json
from dtm_jax.data.pipeline import num_evaluated
from dtm_jax.data.sources import NO_LABEL, Source, open_source
from dtm_jax.data.transforms import RESAMPLER
from dtm_jax.errors import InputError, StoppedError
from dtm_jax.evaluate import linear_probe
from dtm_jax.evaluate.accuracy import accuracies, has_label, read_labels
from dtm_jax.evaluate.corruptions import mean_corruption_error
from dtm_jax.evaluate.features import FeatureExtractor, Features, check_labels
from dtm_jax.evaluate.knn import knn_accuracy
from dtm_jax.evaluate.steps import make_feature_fn, make_top_classes_fn
from dtm_jax.files import replacing
from dtm_jax.restore import Checkpoint, data_settings, open_checkpoint
from dtm_jax.workdir import CONFIG_FILE, RUN_AGAIN, SUMMARY_FILE, write_json

# Settings that say which images are evaluated.
_IMAGES = ("source", "name", "path", "label", "train_split", "eval_split", "eval_crop")


@dataclasses.dataclass(frozen=True)
class Parts:
  """All that an evaluation is made of."""

  config: Config
  mesh: Mesh
  checkpoint: Checkpoint
  train_source: Source | None  # of features; to classify takes none
  test_sources: Mapping[str, Source]  # by name; of features one
  num_classes: int | None


def build(config: Config) -> Parts:
  """Reads the checkpoint and opens its data.

  Raises:
    InputError: any of them is missing or does not fit the others.
  """
  if config.model.attention == "cudnn" and jax.default_backend() != "gpu":
    raise InputError("config.model.attention='cudnn' needs a GPU; choose 'xla' or 'matmul'")
  mesh = sharding.create_mesh(config.mesh)
  checkpoint = read_checkpoint(config)
  asked, config = config.data, with_data_of(checkpoint, config)
  _tell_what_is_taken(asked, config.data, checkpoint)
  train_source = open_source(config.data, "train") if config.eval.needs_features else None
  names = config.eval.sets or (config.data.name if config.data.source == "tfds" else "test",)
  test_sources = {name: open_source(dataclasses.replace(config.data, name=name), "eval") for name in names}
  num_classes = test_sources[names[0]].num_classes
  if num_classes is None and (config.eval.needs_labels or config.eval.classify):
    raise InputError(
      "the images have no classes; choose others, or only save features: config.eval.knn=False, linear=False,"
      " fewshot=() and save_features=True"
    )
  if config.eval.classify:
    _check_classifier(checkpoint, test_sources)
  return Parts(config, mesh, checkpoint, train_source, test_sources, num_classes)


def _tell_what_is_taken(asked: DataConfig, data: DataConfig, checkpoint: Checkpoint) -> None:
  """Which images are the run's choice: what the command sets to its default does not count as set."""
  taken = {name: getattr(data, name) for name in _IMAGES if getattr(data, name) != getattr(asked, name)}
  if taken:
    told = ", ".join(f"{name}={value}" for name, value in taken.items())
    logging.info("images as %s has them: %s", checkpoint.path, told)


def _check_classifier(checkpoint: Checkpoint, sources: Mapping[str, Source]) -> None:
  if checkpoint.kind != "classifier":
    raise InputError(
      f"{checkpoint.path} is no classifier but a {checkpoint.kind}; fine-tune it first, or evaluate its features:"
      " config.eval.classify=False"
    )
  known = checkpoint.model.num_classes
  for name, source in sources.items():
    if source.num_classes != known:
      raise InputError(
        f"{checkpoint.path} tells {known} classes, and the {name} images are of {source.num_classes}; name images of"
        " its classes (config.data), or fine-tune it on these"
      )
    if checkpoint.class_names and source.class_names and source.class_names != checkpoint.class_names:
      logging.warning("the classes of the %s images have other names than those of %s", name, checkpoint.path)


def read_checkpoint(config: Config) -> Checkpoint:
  """Reads `config.eval.checkpoint`.

  Raises:
    InputError: it is not given, not there, or no model.
  """
  if not config.eval.checkpoint:
    raise InputError("give config.eval.checkpoint: the work folder of a run, or a weights file")
  settings, model = config.eval, config.model
  choice = {"best": settings.best, "averaged": settings.averaged}
  return open_checkpoint(settings.checkpoint, **choice, dtype=model.dtype, attention=model.attention)


def with_data_of(checkpoint: Checkpoint, config: Config) -> Config:
  """The settings of the evaluation: the run's, where there is one, but for what the evaluation sets.

  Of the data, what `config.data` sets to something else than its default goes before the run's. Where it names another
  source, only normalisation and crop are the run's (or, of weights, `data_settings`'). The image size is always the
  model's.

  Raises:
    InputError: a weights file and no source, or a model for other than square images.
  """
  data, run = config.data, checkpoint.config
  if run is None and data.source == OF_CHECKPOINT:
    raise InputError(
      f"{checkpoint.path} does not say on what data it was trained; name some: config.data.source=tfds, folder, ..."
    )
  fields, own = dataclasses.fields(data), data_settings(checkpoint)
  inherited = {f.name for f in fields} if data.source == OF_CHECKPOINT else {"mean", "std", "eval_crop"}
  unset = {f.name for f in fields if getattr(data, f.name) == f.default} | {"source"}
  data = dataclasses.replace(data, **{name: getattr(own, name) for name in inherited & unset})
  data = dataclasses.replace(data, image_size=checkpoint.image_size)
  whole = run or config
  run_settings = dataclasses.replace(whole.run, seed=config.run.seed)
  changes = {"task": config.task, "run": run_settings, "data": data, "mesh": config.mesh, "eval": config.eval}
  return dataclasses.replace(whole, **changes)


def run(config: Config, workdir: pathlib.Path, command: str, stop_requested: Callable[[], bool]) -> bool:
  """Evaluates a checkpoint and writes the summary.

  Args:
    config: of the evaluation; has to agree with the work folder's, but for what does not change the outcome.
    workdir: made where it is missing.
    command: how the evaluation was started, for the record.
    stop_requested: asked between batches and between results; True stops, and the same command begins again.

  Returns:
    True where the evaluation is complete, False where it was stopped before its end.

  Raises:
    InputError: something is wrong that the user can mend.
  """
  start = time.perf_counter()
  parts = distributed.together(lambda: build(config))
  distributed.connect(parts.mesh, sharding.describe(parts.mesh))
  new_record = _new_record(parts, command)
  if _is_complete(workdir, parts.config, new_record):
    logging.info("%s is complete; its results are in %s", workdir, workdir / SUMMARY_FILE)
    return True
  workdirs.create(workdir)
  with contextlib.ExitStack() as stack:
    workdirs.keep(workdir, until=stack)
    write_json(workdir / CONFIG_FILE, new_record)
    try:
      with distributed.ending_at_once(StoppedError):
        summary = _evaluate(parts, workdir, stop_requested)
    except StoppedError:
      logging.info("stopped; the same command begins again")
      return False
    summary |= {"seconds": round(time.perf_counter() - start, 1)}
    write_json(workdir / SUMMARY_FILE, summary)
  _log_summary(workdir, summary)
  return True


def _is_complete(workdir: pathlib.Path, config: Config, new_record: dict[str, Any]) -> bool:
  """Raises InputError where the folder holds something else than this evaluation."""
  inputs = ("params_sha256", "train_images", "test_images", "images_sha256", "resampler")
  record = workdirs.read_record(workdir, config)
  workdirs.check_same_inputs(workdir, record, new_record, inputs)
  summary = distributed.from_first(lambda: workdirs.read_json(workdir / SUMMARY_FILE))
  return record is not None and summary is not None


def _new_record(parts: Parts, command: str) -> dict[str, Any]:
  checkpoint, config = parts.checkpoint, parts.config
  sources = dict(zip(config.eval.sets or (config.data.name,), parts.test_sources.values(), strict=True))
  if parts.train_source is not None:
    sources["train"] = parts.train_source
  return {
    **to_json(config),
    **workdirs.circumstances(command),
    "kind": checkpoint.kind,
    "step": checkpoint.step,
    "params_sha256": checkpoint.sha256,
    "train_images": None if parts.train_source is None else len(parts.train_source),
    "test_images": sum(map(len, parts.test_sources.values())),
    "images_sha256": {split: source.fingerprint() for split, source in sources.items()},
    "resampler": RESAMPLER,
  }


def _evaluate(parts: Parts, workdir: pathlib.Path, stop_requested: Callable[[], bool]) -> dict[str, Any]:
  """The summary, but for the time; results are logged as they come."""
  config, checkpoint = parts.config, parts.checkpoint
  logging.info(
    "evaluating the %s of %s on %s images of %d pixels, %s",
    *(checkpoint.kind, checkpoint.path, config.data.source, config.data.image_size, sharding.describe(parts.mesh)),
  )
  summary = {
    "kind": checkpoint.kind,
    "step": checkpoint.step,
    "params_sha256": checkpoint.sha256,
    "num_classes": parts.num_classes,
  }
  with contextlib.closing(metrics.MetricWriter(workdir)) as writer:
    for result in _results(parts, workdir, stop_requested):
      summary |= result
      values = {name: value for name, value in result.items() if isinstance(value, float)}
      if values:
        writer.write(checkpoint.step, values)
        logging.info(metrics.told(values))
        if stop_requested():
          raise StoppedError
  return summary


def _results(parts: Parts, workdir: pathlib.Path, stop_requested: Callable[[], bool]) -> Iterator[dict[str, Any]]:
  """Entries of the summary, as they come."""
  if parts.config.eval.needs_features:
    train, test = _extract(parts, workdir, stop_requested)
    yield {"train_images": len(train.labels), "test_images": len(test.labels), "width": train.features.shape[1]}
    yield from _results_of_features(parts.config, train, test, parts.num_classes, parts.mesh)
  if parts.config.eval.classify:
    yield from _results_of_classes(parts, stop_requested)


def _extract(parts: Parts, workdir: pathlib.Path, stop_requested: Callable[[], bool]) -> tuple[Features, Features]:
  """Features of the training and of the test images, saved where that is asked."""
  config, (test_source,) = parts.config, parts.test_sources.values()
  extract = FeatureExtractor(config, parts.mesh, make_feature_fn(config, parts.checkpoint.model))

  def of_split(title: str, source: Source, limit: int | None) -> Features:
    logging.info("features of %d %s images", num_evaluated(source, limit), title)
    return extract(parts.checkpoint.params, source, limit, stop_requested, f"{title} images")

  train = of_split("training", parts.train_source, config.eval.max_train_images)
  test = of_split("test", test_source, config.eval.max_test_images)
  if config.eval.save_features:
    save_features(workdir / "features_train.npz", train)
    save_features(workdir / "features_test.npz", test)
  return train, test


def _results_of_classes(parts: Parts, stop_requested: Callable[[], bool]) -> Iterator[dict[str, Any]]:
  """Accuracy of each of several sets as `NAME/top1` and `NAME/top5`; then the means, and the number of images."""
  config, params = parts.config, parts.checkpoint.params
  top_classes = make_top_classes_fn(config, parts.checkpoint.model)
  # The classes are an argument: one program serves all sets.
  classify = FeatureExtractor(config, parts.mesh, lambda given, images: top_classes(given[0], images, given[1]))
  found, num_images = {}, 0
  for name, source in parts.test_sources.items():
    classes = _candidates(name, source, config.eval.only_own_classes)
    top, labels = classify((params, classes), source, config.eval.max_test_images, stop_requested, name)
    _check_classes(name, labels, source.num_classes)
    found[name] = accuracies(top, labels)
    num_images += int(has_label(labels.reshape(len(labels), -1)).sum())
    if config.eval.sets:
      yield {f"{name}/{score}": value for score, value in found[name].items()}
  means = {score: float(np.mean([values[score] for values in found.values()])) for score in found[name]}
  errors = mean_corruption_error({name: values["top1"] for name, values in found.items()})
  yield {**means, **errors, "test_images": num_images}


def _candidates(name: str, source: Source, only_own: bool) -> np.ndarray:
  """Among which classes a set's images are told apart, bool [num_classes]."""
  classes = np.full(source.num_classes, not only_own)
  if only_own:
    labels = read_labels(source)
    _check_classes(name, labels, source.num_classes)
    classes[labels] = True
  return classes


def _check_classes(name: str, labels: np.ndarray, num_classes: int) -> None:
  """Of images with several classes, NO_LABEL only fills up. Raises InputError where a label is none of the classes."""
  given = labels if labels.ndim == 1 else labels[labels != NO_LABEL]
  if not len(given):
    raise InputError(f"no {name} image has a class; name others (config.data)")
  check_labels(name, given, num_classes)


def _results_of_features(
  config: Config, train: Features, test: Features, num_classes: int, mesh: Mesh
) -> Iterator[dict[str, Any]]:
  """What the features are worth, for each of the asked."""
  settings = config.eval
  if settings.needs_labels:
    check_labels("training", train.labels, num_classes)
    check_labels("test", test.labels, num_classes)
  if settings.knn:
    options = {"k": settings.knn_k, "temperature": settings.knn_temperature, "num_classes": num_classes, "mesh": mesh}
    yield {"knn_top1": knn_accuracy(*train, *test, **options)}
  if settings.linear:
    yield _linear(config, train, test, num_classes, mesh)
  if settings.fewshot:
    yield _few_shot(config, train, test, num_classes)


def _linear(config: Config, train: Features, test: Features, num_classes: int, mesh: Mesh) -> dict[str, Any]:
  solver, seed = config.eval.linear_solver, config.run.seed
  if solver == "lbfgs":
    patience = 2  # the weakest regularisation takes the longest
    tried, candidates = "C (inverse regularisation)", linear_probe.INVERSE_STRENGTHS
    fit = functools.partial(linear_probe.fit_lbfgs, num_classes=num_classes, mesh=mesh)
  else:
    patience = None  # all rates are there in one pass
    tried, candidates = "learning rate", linear_probe.LEARNING_RATES[solver]
    fit = functools.partial(
      linear_probe.fit_sgd,
      num_classes=num_classes,
      epochs=config.eval.linear_epochs,
      batch_size=config.eval.linear_batch_size,
      seed=seed,
      lars=solver == "lars",
    )
  probe = linear_probe.linear_probe(train, test, fit, candidates, seed=seed, patience=patience)
  if probe.chosen in (candidates[0], candidates[-1]):
    logging.warning(
      "linear probe: the best %s, %g, is the %s of those tried; a better one may lie beyond",
      *(tried, probe.chosen, "smallest" if probe.chosen == candidates[0] else "largest"),
    )
  return {"linear_top1": probe.top1, "linear": {"solver": solver, **probe._asdict()}}


def _few_shot(config: Config, train: Features, test: Features, num_classes: int) -> dict[str, Any]:
  """`fewshot_top1` is the mean at the largest number of images per class."""
  smallest = np.bincount(train.labels, minlength=num_classes).min()
  most = max(config.eval.fewshot)
  if smallest < most:
    logging.warning("few-shot: a class has %d training images; it gives all that it has", smallest)
  number = config.eval.fewshot_seeds
  seeds = range(config.run.seed * number, (config.run.seed + 1) * number)  # runs of other seeds share none
  options = {"num_classes": num_classes, "seeds": seeds}
  shots = {n: linear_probe.few_shot(train, test, per_class=n, **options) for n in config.eval.fewshot}
  return {
    "fewshot_top1": shots[most].mean,
    **{f"fewshot_{n}_top1": shot.mean for n, shot in shots.items()},
    "fewshot": {n: shot._asdict() for n, shot in shots.items()},
  }


def save_features(path: pathlib.Path, features: Features) -> None:
  """`features` float32 [n, D] and `labels` int32 [n] in an `.npz` file, whole or not at all.

  Raises:
    InputError: it cannot be written.
  """
  if not distributed.is_first():
    return
  with replacing(path, RUN_AGAIN) as unfinished, unfinished.open("wb") as file:
    np.savez(file, **features._asdict())


def _log_summary(workdir: pathlib.Path, summary: dict[str, Any]) -> None:
  told = {name: value for name, value in summary.items() if isinstance(value, float) and "/" not in name}
  counts = {name: summary[name] for name in ("train_images", "test_images", "num_classes") if name in summary}
  logging.info("done: %s", metrics.told(told | counts))
  logging.info("see %s", workdir / SUMMARY_FILE)
