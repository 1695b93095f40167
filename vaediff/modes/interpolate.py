"""Rows of images between two ends: in z, in x_T, between data images, and along an attribute."""

import pathlib

import numpy as np

from vaediff.conditions.vae import CODE
from vaediff.errors import UserError
from vaediff.experiments.base import NOISE, Experiment
from vaediff.modes import pictures
from vaediff.run import log
from vaediff.run.config import Run
from vaediff.run.trained import Trained, open_last, say_figures


def mode(run: Run) -> None:
  """Interpolates with the last stage."""
  out = pictures.out_of(run)
  say_figures(interpolate(open_last(run), out))


def interpolate(trained: Trained, out: pathlib.Path | None = None) -> dict[str, float]:
  """Writes `interpolation.png`; each row is one interpolation (VAE images above, refined below).

  The kinds, in order: between two z's of the prior with one x_T; between two x_T's (slerp) with one z;
  between two encoded images of the evaluation split; and from an encoded image along an attribute
  direction. A row shares the noise of every sampler step. Without latents only the x_T rows exist.

  Args:
    trained: the stage.
    out: folder to write to; None = the run's.
  """
  settings = trained.config.interpolate
  if not kinds_of(trained.experiment):
    raise UserError(
      f'--mode=interpolate needs samples that start from a code or a noise; those of stage {trained.stage!r} '
      'do not. Choose another stage with --stages'
    )
  weights = np.linspace(0.0, 1.0, settings.num_points, dtype=np.float32)
  by_row = [rows_of(trained, row, weights) for row in range(settings.num_rows)]
  rows = []
  for kind in by_row[0]:
    for row, kinds in enumerate(by_row):
      rows += trained.draw(np.full(len(weights), row), kinds[kind]).values()
  pictures.write_grid(trained, 'interpolation', np.concatenate(rows), settings.num_points, out)
  return {'num_rows': float(settings.num_rows * len(by_row[0]))}


def kinds_of(experiment: Experiment) -> set[str]:
  """Returns which ends a stage's samples have: a code, a noise, or both."""
  return {CODE, NOISE} & experiment.inputs.keys()


def rows_of(trained: Trained, row: int, weights: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
  """Returns, for each kind of interpolation, what is given to the sampler at each weight.

  Every other condition is that of the first end.
  """
  settings, kinds = trained.config.interpolate, {}
  possible = kinds_of(trained.experiment)
  ends = np.array([2 * row, 2 * row + 1])
  drawn = trained.drawn(ends, trained.settings.seed)
  first = {name: np.repeat(value[:1], len(weights), axis=0) for name, value in drawn.items()}
  others = {name: value for name, value in first.items() if name not in (CODE, NOISE)}
  if CODE in possible:
    kinds[CODE] = {**others, CODE: lerp(*drawn[CODE], weights)}
  if NOISE in possible:
    code = {CODE: first[CODE]} if CODE in possible else {}
    kinds['x_T'] = {**others, **code, NOISE: slerp(*drawn[NOISE], weights)}
  if CODE in possible:
    data, labels = trained.eval_images(settings.num_encoded)
    codes = trained.observe(data, labels)[CODE]
    kinds['encoded'] = {**others, CODE: lerp(*codes[ends % len(codes)], weights)}
    wanted = {settings.from_label, settings.to_label}
    if wanted <= set(labels.tolist()):
      direction, starts = attribute_direction(trained, codes, labels)
      kinds['attribute'] = {**others, CODE: codes[starts[row % len(starts)]] + weights[:, None] * direction}
    elif row == 0:
      present = ', '.join(map(str, np.unique(labels)))
      log.say(
        f'no attribute rows: config.interpolate.from_label and to_label are {sorted(wanted)}; the labels of '
        f'the {len(labels)} images looked at are {present}'
      )
  return kinds


def attribute_direction(
  trained: Trained, codes: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the mean z of `to_label` minus that of `from_label`, and which images have `from_label`."""
  settings = trained.config.interpolate
  start, end = (np.flatnonzero(labels == label) for label in (settings.from_label, settings.to_label))
  return codes[end].mean(axis=0) - codes[start].mean(axis=0), start


def lerp(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """Returns (1 - w) a + w b for each weight w."""
  w = weights.reshape(-1, *[1] * a.ndim)
  return (1 - w) * a + w * b


def slerp(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """Returns the points on the great circle from a to b, so that unit-variance noise keeps its variance."""
  cosine = np.sum(a * b) / (np.linalg.norm(a) * np.linalg.norm(b))
  angle = np.arccos(np.clip(cosine, -1.0, 1.0))
  if np.sin(angle) < 1e-4:  # the same or opposite directions: no unique great circle
    return lerp(a, b, weights)
  w = weights.reshape(-1, *[1] * a.ndim)
  return ((np.sin((1 - w) * angle) * a + np.sin(w * angle) * b) / np.sin(angle)).astype(a.dtype)
