"""`--mode=restore`: degraded images of the evaluation split, restored; PSNR, SSIM and LPIPS of both.

`restore.method` 'consistent' samples with a denoiser that keeps in every step what the degraded image says
(`vaediff.diffusion.restoration`), and observes the stage's conditions of the degraded image. 'condition' is
the out-of-the-box restoration of VAEDM (Pandey et al. 2021, arXiv:2201.00308v1, section 3.4): the refiner was
trained to repair blurry images, so it is given a degraded one in place of the VAE's. A stage that was trained
with degraded images restores those of its own task. A stage that reads captions is given those of the images.
"""

import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from vaediff.conditions.degraded import DEGRADED, KNOWN, learned_by
from vaediff.conditions.vae import IMAGE
from vaediff.data import pixels, sources, words
from vaediff.diffusion.restoration import TASKS, Degradation
from vaediff.errors import UserError
from vaediff.evaluation import networks, reconstructions, report
from vaediff.experiments import restored as restoring
from vaediff.modes import pictures
from vaediff.run import clips, images, log
from vaediff.run.config import Run
from vaediff.run.draw import HostArrays
from vaediff.run.trained import Trained, open_last
from vaediff.storage import files

ALL = 'all'
CONSISTENT = 'consistent'
MAX_PSNR = 58.92
"""dB, of images that differ by nothing but rounding to bytes; equal ones count as such."""
AFTER = 'restored'
"""Title of the first sample."""
DEGRADING = 2**32 - 1
"""In place of the index of an image: of the keys by which images are degraded."""
Observed = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Degraded images, A+ y and the mask of known pixels; of as many images, in [-1, 1]."""


def mode(run: Run) -> None:
  """Restores with the last stage and prints a table."""
  out = pictures.out_of(run)
  restore(open_last(run), out)


def restore(trained: Trained, out: pathlib.Path | None = None) -> dict[str, float]:
  """Degrades images of the evaluation split and restores them, task by task; says how well.

  Writes `restored-<task>.png`: data, degraded, restored and, of several samples, their mean; and
  `restored.json` with the figures.

  Args:
    trained: the stage.
    out: folder to write to; None = the run's.

  Returns:
    The figures: mean over the images of '<measure>/<task>/<what is measured>'.
  """
  settings, source = trained.config.restore, trained.eval_source
  batch = source.read(np.arange(min(settings.num_images, len(source))))
  data, labels = batch[sources.IMAGE], batch[sources.LABEL]
  told = {name: batch[name] for name in (words.TOKENS,) if name in batch}
  opened, rows, figures = lpips_of(trained), [], {}
  for degradation in tasks_of(trained):
    x0 = pixels.to_unit_range(jnp.asarray(data))
    observed = observe(degradation, x0, trained.settings.seed)
    shown = {DEGRADED: as_bytes(observed[0])}
    shown |= restored(trained, degradation, observed, labels, told)
    for name, value in shown.items():
      found = figures_of(opened, data, value)
      rows.append({'task': degradation.task, 'images': name, **found})
      figures |= {f'{measure}/{degradation.task}/{name}': figure for measure, figure in found.items()}
    picture = images.side_by_side(data[: pictures.MAX_RECONSTRUCTIONS], *first_of(shown))
    pictures.write_grid(trained, f'restored-{degradation.task}', picture, (1 + len(shown)) * 4, out)
  say(trained, rows, len(data))
  missing = reconstructions.missing_pair_figures(trained.config.evaluate, opened, trained.eval_source)
  for measure, figure in missing.items():
    log.say(f'{measure}: not measured, {figure.missing}')
  if jax.process_index() == 0:
    path = pictures.path_of(trained, 'restored', 'json', out)
    stored = {'num_images': len(data), 'figures': figures, 'made_of': trained.made_of}
    files.write_json(path, stored)
  return figures


def first_of(shown: HostArrays) -> Iterator[np.ndarray]:
  """Yields of each kind those that a picture has."""
  yield from (value[: pictures.MAX_RECONSTRUCTIONS] for value in shown.values())


def say(trained: Trained, rows: list[report.Row], count: int) -> None:
  """Prints the table of a restoration, with what it was done to."""
  settings = trained.config.restore
  log.say(
    f'{count} images of the evaluation split, stage {trained.stage!r}, restore.method = {settings.method!r}; '
    'psnr in dB, means over the images'
  )
  log.say(report.table(rows))


def lpips_of(trained: Trained) -> networks.Networks:
  """Returns the perceptual distance of `config.evaluate`, if its weights are there, and no other network."""
  config = trained.config.copy_and_resolve_references()
  config.evaluate.extractors = ()
  return networks.open_networks(config, trained.mesh)


def figures_of(opened: networks.Networks, data: np.ndarray, value: np.ndarray) -> dict[str, float]:
  """Returns the means over pairs of images, PSNR first."""
  found = reconstructions.pair_figures(opened, data, value)
  found['psnr'] = np.minimum(found['psnr'], MAX_PSNR)
  del found['mse']
  return {measure: float(np.mean(of_each)) for measure, of_each in found.items()}


def as_bytes(value: np.ndarray) -> np.ndarray:
  """Returns images in [-1, 1] as bytes."""
  return np.asarray(pixels.to_bytes(jnp.asarray(value)))


# What is restored ------------------------------------------------------------------------------------


def tasks_of(trained: Trained) -> list[Degradation]:
  """Returns the degradations that the config asks for, or the one that the stage has learned to undo.

  Raises:
    UserError: for one that these images, or this stage, cannot have.
  """
  settings, data = trained.config.restore, trained.config.data
  own = own_task(trained)
  if own:
    if settings.task not in (ALL, own.task):
      raise UserError(
        f'stage {trained.stage!r} has learned the task {own.task!r}; config.restore.task is '
        f'{settings.task!r}: set it to {ALL!r}, or train a stage whose conditions.degraded.task it is'
      )
    return [own]
  found = []
  for task in TASKS if settings.task == ALL else (settings.task,):
    degradation = Degradation(
      task=task,
      factor=settings.factor,
      noise_std=settings.noise_std,
      hole_fraction=settings.hole_fraction,
    )
    reason = left_out(trained, degradation)
    if reason and settings.task == ALL:
      log.say(f'{task} is left out: {reason}')
      continue
    if reason:
      raise UserError(f'config.restore.task is {task!r}: {reason}')
    degradation.check(data.image_size, data.channels, 'config.restore.')
    found.append(degradation)
  return found


def own_task(trained: Trained) -> Degradation | None:
  """Returns what the stage has learned to undo, if it was trained so."""
  diffusion = trained.experiment.diffusion
  return learned_by(diffusion.conditions) if diffusion else None


def left_out(trained: Trained, degradation: Degradation) -> str:
  """Returns why a task has no meaning for these images or this stage; '' where it has one."""
  if degradation.task == 'colourise' and trained.config.data.channels < 2:
    return 'the images of this data set are grey'
  is_student = trained.experiment.diffusion not in (None, trained.experiment)
  if degradation.task == 'denoise' and is_student and trained.config.restore.method == CONSISTENT:
    return (
      f'stage {trained.stage!r} is a student, which knows the times of its own steps and not that of the '
      'noise; choose its teacher with --stages'
    )
  return ''


def observe(degradation: Degradation, x0: jax.Array, seed: int) -> Observed:
  """Returns what is left of images, and what is known; image i of a seed is always degraded alike."""
  key = jax.random.fold_in(jax.random.key(seed), DEGRADING)
  keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(x0)))
  return tuple(np.asarray(value) for value in jax.jit(degradation.degrade)(x0, keys))


# How -------------------------------------------------------------------------------------------------


def restored(
  trained: Trained,
  degradation: Degradation,
  observed: Observed,
  labels: np.ndarray,
  told: HostArrays | None = None,
) -> HostArrays:
  """Returns the first sample of each image as 'restored' and, of several that differ, their mean; bytes."""
  count, samples = trained.config.restore.num_samples, []
  drawn, given = by_method(trained, degradation, observed, labels, told)
  for number in range(count):
    value = drawn.draw_all(given, first=number * len(labels))['x0']
    if degradation.task == 'inpaint':  # to the byte: the sample holds it but for rounding
      value = np.where(observed[2] > 0, as_bytes(observed[1]), value)
    if number == 1 and np.array_equal(value, samples[0]):
      break  # nothing is drawn: a deterministic sampler that starts from the noisy image
    samples.append(value)
  shown = {AFTER: samples[0]}
  if len(samples) > 1:
    mean = np.mean(samples, axis=0, dtype=np.float32)
    shown[f'mean of {count}'] = np.round(mean).astype(np.uint8)
  return shown


def by_method(
  trained: Trained,
  degradation: Degradation,
  observed: Observed,
  labels: np.ndarray,
  told: HostArrays | None = None,
) -> tuple[Trained, HostArrays]:
  """Returns what draws by `restore.method`, and what it is given.

  Args:
    trained: the stage.
    degradation: of the images.
    observed: what is left of them.
    labels: of them.
    told: {'tokens': their captions}, for a stage that reads captions; without them those of no words.

  Raises:
    UserError: for a stage that cannot restore so.
  """
  settings, experiment = trained.config.restore, trained.experiment
  degraded, measured, known = observed
  has_learned = own_task(trained) is not None
  if settings.method != CONSISTENT and not has_learned:
    if IMAGE not in experiment.inputs:
      raise UserError(
        "restore.method = 'condition' gives the degraded image in place of a VAE's, and stage "
        f"{trained.stage!r} reads none: set restore.method = 'consistent', train a stage with "
        'diffusion.condition = formulation1 or formulation2, or choose one with --stages'
      )
    given = {**trained.observe(degraded, labels), IMAGE: degraded}
    return trained, {**given, **captions_of(trained, len(degraded), told)}
  if experiment.diffusion is None:
    raise UserError(
      "restore.method = 'consistent' works within the steps of a denoiser, and the samples of stage "
      f'{trained.stage!r} are not made so; choose a diffusion with --stages, or set restore.method = '
      "'condition' where the stage reads a VAE's image"
    )
  drawn = restoring.restored(
    experiment.diffusion,
    degradation,
    fill_rounds=settings.fill_rounds,
    is_held=settings.method == CONSISTENT,
    start_at_level=not has_learned,
  )
  given = {DEGRADED: degraded, restoring.MEASURED: measured, KNOWN: known, sources.LABEL: labels}
  return trained.with_experiment(drawn), {**given, **captions_of(trained, len(degraded), told)}


def captions_of(trained: Trained, count: int, told: HostArrays | None) -> HostArrays:
  """Returns what a stage that reads captions is told of so many images; {} for another.

  Raises:
    UserError: for images without captions and a stage that always had them.
  """
  if words.TOKENS not in trained.experiment.inputs:
    return {}
  found = told or clips.no_words(trained, count)
  if not found:
    raise UserError(
      f'stage {trained.stage!r} reads captions, these images come without, and none was left out in its '
      'training (dropout = 0): give each image its caption, or choose a stage that reads none with --stages'
    )
  return found
