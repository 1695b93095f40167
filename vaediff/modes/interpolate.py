"""Rows of images between two ends: z, x_T, images of the data, their vectors; along attributes, directions.

And what the two do: how much a change of z, and one of x_T, changes the image, at low and at high frequencies
(the figure behind Pandey et al. 2021, arXiv:2201.00308v1, section 3.3: z has the structure, x_T the detail).
"""

import dataclasses
import pathlib

import jax
import numpy as np

from vaediff.conditions import pca
from vaediff.conditions.clip_image import EMBEDDING
from vaediff.conditions.vae import CODE
from vaediff.diffusion.interpolation import lerp, on_sphere, slerp
from vaediff.errors import UserError
from vaediff.evaluation import report
from vaediff.evaluation.frequencies import LOW, rms_by_band
from vaediff.experiments.base import NOISE, Experiment
from vaediff.modes import pictures
from vaediff.run import clips, directions, draw, images, log
from vaediff.run.config import Run
from vaediff.run.draw import HostArrays
from vaediff.run.trained import Trained, open_last, say_figures
from vaediff.storage import files

NAMES = {CODE: 'code', NOISE: 'x_T'}
"""What is changed, in tables and pictures."""


def mode(run: Run) -> None:
  """Interpolates with the last stage, and measures what its codes and its noise change."""
  out = pictures.out_of(run)
  trained = open_last(run)
  say_figures(interpolate(trained, out))
  if run.config.interpolate.num_pairs:
    changes(trained, out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """One interpolation.

  Attributes:
    given: to the sampler, for each of its images.
    what: moves, and what stays.
    left: the first image.
    right: the last one.
  """

  given: HostArrays
  what: str
  left: str
  right: str


def interpolate(trained: Trained, out: pathlib.Path | None = None) -> dict[str, float]:
  """Writes `interpolation.png`; each row is one interpolation (VAE images above, refined below).

  The kinds, in order: between two z's of the prior with one x_T; between two x_T's (slerp) with one z;
  between two encoded images of the evaluation split; from an encoded image along an attribute direction;
  of a z of the prior along each principal direction of the codes; and between the vectors that a CLIP stage
  makes of two images of the evaluation split, for a stage that reads them. A row shares the noise of every
  sampler step. Without latents only the x_T rows exist. Beside each row stands what it shows.

  Args:
    trained: the stage.
    out: folder to write to; None = the run's.
  """
  settings = trained.config.interpolate
  check(trained)
  weights = np.linspace(0.0, 1.0, settings.num_points, dtype=np.float32)
  found = directions.leading(trained, settings.num_directions) if CODE in kinds_of(trained.experiment) else {}
  by_row = [rows_of(trained, row, weights, found) for row in range(settings.num_rows)]
  rows, left, right = [], [], []
  for kind in by_row[0]:
    for row, kinds in enumerate(by_row):
      shown = trained.draw(np.full(len(weights), row), kinds[kind].given)
      for name, value in shown.items():
        rows.append(value)
        title = trained.experiment.titles.get(name, 'image')
        left.append(f'{kinds[kind].what}\n{title}, from:\n{kinds[kind].left}')
        right.append(f'to:\n{kinds[kind].right}')
  picture = images.grid(np.concatenate(rows), settings.num_points)
  pictures.write_picture(trained, 'interpolation', images.beside_rows(picture, left, right), out)
  return {'num_rows': float(settings.num_rows * len(by_row[0]))}


def check(trained: Trained) -> None:
  """Raises UserError for a stage that has nothing to interpolate."""
  if not kinds_of(trained.experiment):
    raise UserError(
      f'--mode=interpolate needs samples that start from a code or a noise; those of stage {trained.stage!r} '
      'do not. Choose another stage with --stages'
    )


def kinds_of(experiment: Experiment) -> set[str]:
  """Returns which ends a stage's samples have: a code, a noise, or both."""
  return {CODE, NOISE} & experiment.inputs.keys()


def rows_of(trained: Trained, row: int, weights: np.ndarray, found: pca.Arrays) -> dict[str, Row]:
  """Returns the interpolations of each kind; every other condition is that of the first end.

  `found` holds the principal directions of the codes; {} = there are none to walk along.
  """
  settings, kinds = trained.config.interpolate, {}
  possible = kinds_of(trained.experiment)
  ends = np.array([2 * row, 2 * row + 1])
  drawn = trained.draw_inputs(ends, trained.settings.seed)
  first = {name: np.repeat(value[:1], len(weights), axis=0) for name, value in drawn.items()}
  others = {name: value for name, value in first.items() if name not in (CODE, NOISE)}
  stays = ', one x_T' if NOISE in possible else ''
  if CODE in possible:
    kinds[CODE] = Row(
      given={**others, CODE: lerp(*drawn[CODE], weights)},
      what=f'z moves (lerp){stays}',
      left=f'z drawn, no. {ends[0]}',
      right=f'z drawn, no. {ends[1]}',
    )
  if NOISE in possible:
    code = {CODE: first[CODE]} if CODE in possible else {}
    kinds['x_T'] = Row(
      given={**others, **code, NOISE: slerp(*drawn[NOISE], weights)},
      what='x_T moves (slerp)' + (', one z' if code else ''),
      left=f'x_T drawn, no. {ends[0]}',
      right=f'x_T drawn, no. {ends[1]}',
    )
  if CODE in possible:
    data, labels = trained.eval_images(settings.num_encoded)
    codes = trained.observe(data, labels)[CODE]
    chosen = ends % len(codes)
    kinds['encoded'] = Row(
      given={**others, CODE: lerp(*codes[chosen], weights)},
      what=f'z moves (lerp){stays}',
      left=f'z of eval image {chosen[0]}',
      right=f'z of eval image {chosen[1]}',
    )
    kinds |= attribute_row(trained, row, weights, others, codes, labels, stays)
    kinds |= direction_rows(found, drawn[CODE][0], settings.deviations, weights, others, f'{ends[0]}{stays}')
  return kinds | embedding_rows(trained, ends, weights, others, drawn)


def embedding_rows(
  trained: Trained, ends: np.ndarray, weights: np.ndarray, others: HostArrays, drawn: HostArrays
) -> dict[str, Row]:
  """Returns the rows between the vectors of two evaluation images, with one x_T and between two; {} without.

  Captions have no words in them, where training dropped some: they would be true of one end alone.
  """
  if not clips.sees_vectors(trained):
    return {}
  data, labels = trained.eval_images(int(ends.max()) + 1)
  seen = trained.observe(data, labels)[EMBEDDING]
  chosen = ends % len(seen)
  given = {**others, **clips.no_words(trained, len(weights)), EMBEDDING: on_sphere(*seen[chosen], weights)}
  left, right = (f'eval image {number}' for number in chosen)
  noises = {
    'vector': ('one x_T', np.repeat(drawn[NOISE][:1], len(weights), axis=0)),
    'vector and x_T': ('x_T moves too', slerp(*drawn[NOISE], weights)),
  }
  return {
    name: Row(given={**given, NOISE: x_T}, what=f'its vector moves (slerp),\n{what}', left=left, right=right)
    for name, (what, x_T) in noises.items()
  }


def direction_rows(
  found: pca.Arrays, z: np.ndarray, reach: float, weights: np.ndarray, others: HostArrays, about: str
) -> dict[str, Row]:
  """Returns the walks of a drawn z along each direction, from -`reach` to `reach` deviations of the mean."""
  return {
    f'direction {number}': Row(
      given={**others, CODE: pca.along(found, z, number, reach * (2 * weights - 1))},
      what=f'z drawn, no. {about}:\nprincipal direction {number + 1}',
      left=f'{-reach:g} deviations',
      right=f'{reach:+g} deviations',
    )
    for number in range(directions.number_of(found))
  }


def attribute_row(
  trained: Trained,
  row: int,
  weights: np.ndarray,
  others: HostArrays,
  codes: np.ndarray,
  labels: np.ndarray,
  stays: str,
) -> dict[str, Row]:
  """Returns the row from an encoded image of one class on towards another; {} where they are not there."""
  settings = trained.config.interpolate
  wanted = {settings.from_label, settings.to_label}
  if wanted <= set(labels.tolist()):
    direction, starts = attribute_direction(trained, codes, labels)
    start = starts[row % len(starts)]
    return {
      'attribute': Row(
        given={**others, CODE: codes[start] + weights[:, None] * direction},
        what=f'z + class direction{stays}',
        left=f'z of eval image {start}',
        right=f'+ class {settings.to_label}\n- class {settings.from_label}',
      )
    }
  if row == 0:
    present = ', '.join(map(str, np.unique(labels)))
    log.say(
      f'no attribute rows: config.interpolate.from_label and to_label are {sorted(wanted)}; the labels of '
      f'the {len(labels)} images looked at are {present}'
    )
  return {}


def attribute_direction(
  trained: Trained, codes: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the mean z of `to_label` minus that of `from_label`, and which images have `from_label`."""
  settings = trained.config.interpolate
  start, end = (np.flatnonzero(labels == label) for label in (settings.from_label, settings.to_label))
  return codes[end].mean(axis=0) - codes[start].mean(axis=0), start


# What a code and what a noise changes ------------------------------------------------------------------


def changes(trained: Trained, out: pathlib.Path | None = None) -> list[dict[str, float | str]]:
  """Measures how much a change of z changes the image and how much one of x_T does, over many pairs.

  Of pair p the image of draw 2p is compared with that which has the z of draw 2p + 1 instead, or its x_T, and
  all else its own: the whole way from one draw to another, and the first of `num_points` - 1 steps on it, as
  in a row of the picture. Prints the mean over pairs of the root mean square change (pixels in [0, 1]), whole
  and at low and high frequencies; writes `interpolation.json`.

  Args:
    trained: the stage.
    out: folder to write to; None = the run's.

  Returns:
    A row for each change.
  """
  settings = trained.config.interpolate
  check(trained)
  pairs = np.arange(settings.num_pairs)
  both = [trained.draw_inputs(2 * pairs + end, trained.settings.seed) for end in (0, 1)]
  base = draw.own_image(trained.draw_all(both[0]))
  part, rows = 1 / (settings.num_points - 1), []
  for name in sorted(kinds_of(trained.experiment) & both[0].keys(), key=(CODE, NOISE).index):
    between = lerp if name == CODE else slerp
    for step, weight in (('the whole way', 1.0), (f'one step of {settings.num_points - 1}', part)):
      weights = np.array([weight], np.float32)
      ends = zip(both[0][name], both[1][name], strict=True)
      moved = np.stack([between(a, b, weights)[0] for a, b in ends])
      image = draw.own_image(trained.draw_all({**both[0], name: moved}))
      of_pairs = rms_by_band(base, image, settings.cutoff)
      figures = {f'rms {band}': float(value.mean()) for band, value in of_pairs.items()}
      share = float(np.mean(of_pairs[LOW] ** 2) / max(np.mean(of_pairs['all'] ** 2), 1e-12))
      rows.append({'change of': NAMES[name], 'by': step, **figures, 'low share': share})
  log.say(
    f'mean change of the image over {len(pairs)} pairs, pixels in [0, 1]; low: radial frequency up to '
    f'{settings.cutoff:g} of the highest along an axis, {settings.cutoff / 2:g} cycles per pixel; high: above'
  )
  log.say(report.table(rows))
  if jax.process_index() == 0:
    path = pictures.path_of(trained, 'interpolation', 'json', out)
    stored = {
      'num_pairs': len(pairs),
      'cutoff_cycles_per_pixel': settings.cutoff / 2,
      'rows': rows,
      'made_of': trained.made_of,
    }
    files.write_json(path, stored)
    log.say(f'wrote {path}')
  return rows
