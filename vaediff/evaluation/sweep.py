"""`--mode=evaluate --sweep`: distance against network evaluations and seconds, one row per sampler setting.

Students and denoising GANs have one setting, the one they were trained for. Beside the distances stand
precision and recall, which guidance trades for each other, and of samples that were asked to be of a class
how often they are.

The trade-off of DiffuseVAE (arXiv:2201.00308, figure 3a of its first version) and LDDGAN (figure 3) as one
table and one plot. Every row is written when it is done, and a row that is there is not computed again.
"""

import hashlib
import itertools
import json
import pathlib
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vaediff.data import cache, resize, sources
from vaediff.errors import UserError
from vaediff.evaluation import against_teacher, measures, networks, plots, report, timing
from vaediff.evaluation.asked_classes import class_accuracy
from vaediff.evaluation.evaluate import check_any
from vaediff.evaluation.measures import Figure
from vaediff.evaluation.networks import Networks
from vaediff.evaluation.sets import (
  FOLDER,
  Real,
  distance_figures,
  draw_sets,
  floors_at,
  function_evaluations,
  network_figures,
  real_images,
  with_floors,
)
from vaediff.machine import cost, distributed
from vaediff.run import chain as chains
from vaediff.run import config as configs
from vaediff.run import draw, log, same_run, scoring
from vaediff.run.trained import Trained
from vaediff.storage import files, identity, places

NAME = 'sweep'


def sweep(trained: Trained, out: pathlib.Path | None = None) -> dict[str, float]:
  """Prints the table; writes `evaluation/sweep.json`, `.md`, and a plot for each distance.

  Args:
    trained: the stage.
    out: folder to write to, and to look for rows in; None = the run's.

  Returns:
    {}: all figures are in the table.

  Raises:
    UserError: for a setting that is not allowed, a stage that draws in no steps, or a run of other data; and
      once the table is written where no distance could be computed.
  """
  config, folder = trained.config, (out or trained.workdir) / FOLDER
  settings = config.evaluate.sweep
  stages = chosen_students(against_teacher.chain(trained), settings)
  teacher = None
  if len(stages) > 1:
    teacher = against_teacher.Teacher(stages[0], settings.teacher_steps, settings.num_compared)
  runs = [*stages, *(open_run(path, trained) for path in settings.workdirs)]
  points = [(run, changes) for run in runs for changes in grid(run, settings)]
  opened = networks.open_networks(config, trained.mesh)
  real = real_images(config, opened)
  floors = floors_at(config.evaluate.num_images, real, config.evaluate)
  rows, made_of = [], []
  for number, (run, changes) in enumerate(points, start=1):
    chosen = run.with_settings(**changes)
    compared = teacher if run in stages else None
    facts = facts_of(chosen, opened, compared)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
    path = folder / NAME / f'{digest}.json'
    known = read_row(path)
    if known is None:
      known = measure_or_say(chosen, opened, real, compared)
      if jax.process_index() == 0:
        write_row(path, facts, known, chosen.made_of)
      distributed.wait_for_all(f'wrote {path}')
    made_of.append(chosen.made_of)
    row = {**label(chosen), **{k: v for k, v in known.items() if not isinstance(v, Figure)}}
    row |= with_floors({k: v for k, v in known.items() if isinstance(v, Figure)}, floors)
    rows.append(row)
    shown = '  '.join(f'{name} {report.cell(value)}' for name, value in row.items() if name != 'line')
    log.say(f'{number}/{len(points)}  {shown}')
  write(folder, rows, floors, opened, made_of)
  check_any(config.evaluate, rows, f'{folder / NAME}.md')
  return {}


def chosen_students(chain: list[Trained], settings: ConfigDict) -> list[Trained]:
  """Returns the first teacher and, of its students, those of `settings.student_steps`, or all.

  Raises:
    UserError: when one of the step counts is no student's.
  """
  root, *students = chain
  known = [student.settings.num_steps for student in students]
  for count in settings.student_steps:
    if count not in known:
      raise UserError(
        f'config.evaluate.sweep.student_steps names {count}; the students from {root.stage!r} to '
        f'{chain[-1].stage!r} have {", ".join(map(str, known)) or "no"} steps'
      )
  chosen = settings.student_steps or known
  return [root, *(student for student in students if student.settings.num_steps in chosen)]


def open_run(path: str, trained: Trained) -> Trained:
  """Returns the last stage of another run.

  Raises:
    UserError: when it was trained on other data.
  """
  workdir = places.anywhere(path, 'config.evaluate.sweep.workdirs')
  config = configs.read(workdir)
  for field in cache.FIELDS:
    if config.data[field] != trained.config.data[field]:
      raise UserError(
        f'config.evaluate.sweep.workdirs: {workdir} was trained with data.{field} = {config.data[field]!r}, '
        f'{trained.workdir} with {trained.config.data[field]!r}; figures of other images do not compare'
      )
  config = same_run.with_own_data_places(config, trained.config)
  with config.unlocked():
    config.evaluate = trained.config.evaluate
  return Trained(config, workdir, configs.stages_of(config)[-1], trained.mesh)


def grid(run: Trained, settings: ConfigDict) -> list[dict[str, Any]]:
  """Returns the settings of each row of one run: samplers x levels x guidance weights x step counts.

  A weight above 0 is left out for a network that was trained without condition dropout, and a level of
  augmentation above the largest that a network was trained with. A student and a denoising GAN are sampled as
  they were trained.
  """
  if not run.experiment.num_function_evaluations:
    raise UserError(f'--sweep needs a stage that samples in steps; {run.stage!r} of {run.workdir} does not')
  if 'sampler' not in run.settings:
    return [{}]
  for field in ('samplers', 'num_steps'):
    if not settings[field]:
      raise UserError(f'config.evaluate.sweep.{field} is empty; name at least one')
  can = run.experiment.can_be_guided
  weights = [w for w in settings.guidance_weights if w == 0 or can] or [run.settings.guidance_weight]
  most = run.experiment.max_level
  levels = [level for level in settings.aug_levels if level <= most] or [run.settings.aug_level]
  samplers, counts = settings.samplers, settings.num_steps
  if 'teacher' in run.config[run.stage]:
    samplers, counts = (run.settings.sampler,), (run.settings.num_steps,)
    weights = weights if run.config[run.stage].model.guidance_embedding else [0.0]
  return [
    {'sampler': sampler, 'num_steps': steps, 'guidance_weight': float(weight), 'aug_level': float(level)}
    for sampler, level, weight, steps in itertools.product(samplers, levels, weights, counts)
  ]


def facts_of(
  chosen: Trained, opened: Networks, teacher: against_teacher.Teacher | None = None
) -> dict[str, Any]:
  """Returns everything that a row depends on; the same facts are the same row.

  What not every row has is said where it has it, so that rows of earlier versions are found.
  """
  evaluate, settings = chosen.config.evaluate, chosen.config.evaluate.sweep
  more = {'of reconstructions': True} if repeats_images(chosen) else {}
  if teacher:
    more['teacher'] = [settings.teacher_steps, settings.num_compared]
    if 'teacher' in chosen.config[chosen.stage] or settings.aug_levels:  # else those of the row say it
      more['images of the teacher'] = teacher.facts(chosen)
  if any(scoring.candidates_of(one.settings) > 1 for one in chains.stages_of(chosen)):
    more['cost'] = 'of all candidates'  # that of earlier versions was of one
  names = (
    'num_images', 'num_seeds', 'max_features', 'kernel_subsets', 'kernel_subset_size', 'num_neighbours'
  )  # fmt: skip
  return {
    'stage': chosen.stage,
    'made_of': chosen.made_of,
    'images': {split: chosen.images(split).fingerprint for split in sources.SPLITS},
    'sample': chosen.settings.to_dict(),
    'evaluate': {name: evaluate[name] for name in names},
    'networks': {name: network.extractor.fingerprint for name, network in opened.features.items()},
    'resize': {name: network.extractor.resize for name, network in opened.features.items()},
    'device': jax.devices()[0].device_kind,
    **more,
  }


def repeats_images(chosen: Trained) -> bool:
  """Returns whether a row has the distances of reconstructions too."""
  return bool(chosen.config.evaluate.sweep.aug_levels) and chosen.experiment.reconstructs


def label(chosen: Trained) -> dict[str, Any]:
  """Returns the columns that say which row it is; `line` names its line in the plot."""
  columns = chosen.experiment.columns()
  weight = f' w={columns.guidance:g}' if columns.guidance else ''
  level = chosen.settings.aug_level if chosen.experiment.max_level else 0.0
  noise = f' s={level:g}' if level else ''
  return {
    'line': f'{columns.condition} {columns.method}{weight}{noise}',
    'run': chosen.workdir.name,
    'stage': chosen.stage,
    'condition': columns.condition,
    'sampler': columns.sampler,
    'steps': columns.steps,
    'guidance': float(columns.guidance),
    **({'aug level': float(level)} if chosen.config.evaluate.sweep.aug_levels else {}),
  }


def measure_or_say(
  chosen: Trained, opened: Networks, real: Real, teacher: against_teacher.Teacher | None
) -> dict[str, Any]:
  """Returns the figures of one row; where its images are not finite, that is why there are none.

  So one setting that does not suit a network does not keep the others from being measured.
  """
  try:
    return measure(chosen, opened, real) | (teacher.compare(chosen) if teacher else {})
  except draw.NotFinite as error:
    log.say(str(error))
    names = [name for network in opened.features for name in names_of(network)]
    return {
      'N': chosen.config.evaluate.num_images,
      'NFE': function_evaluations(chosen),
      **dict.fromkeys(names, Figure(missing=str(error))),
    }


def names_of(network: str) -> tuple[str, ...]:
  """Returns the names of a network's figures that a sweep has."""
  return (*measures.distance_names(network), f'precision_{network}', f'recall_{network}')


def giga_macs(chosen: Trained, *, ranked: bool = True) -> float:
  """Returns the multiply-accumulates of one sample that is kept, times 1e-9.

  Those of all passes, of the decoder of its space, and of the stages that feed it. Of the best of several
  those of all candidates, for each of which these stages draw anew, but not those of what ranks them.

  Args:
    chosen: the stage.
    ranked: False where its samples are parts of candidates, or handed over as ids: see `Trained.draw`.
  """
  row, seed = jax.ShapeDtypeStruct((1,), np.int32), jax.ShapeDtypeStruct((), np.int32)
  shape, inputs = resize.image_shape(chosen.config.data), chosen.experiment.inputs
  fed = {  # by stages before it: of several grids of ids all
    name: jax.ShapeDtypeStruct((1, *inputs[name].shape), inputs[name].dtype)
    for name in draw.observed_alone(chosen.experiment, chosen.read, shape)
  }
  each = cost.macs(draw.sampler(chosen.experiment), chosen.read, row, fed, seed) / 1e9
  count = scoring.candidates_of(chosen.settings) if ranked else 1
  for source in chosen.experiment.makers:
    of_its_own = ranked and count == 1 and not chosen.handed(source)
    each += giga_macs(chosen.maker(source), ranked=of_its_own)
  return count * each


def measure(chosen: Trained, opened: Networks, real: Real) -> dict[str, Any]:
  """Returns the figures of one row: distances over seeds, network evaluations, seconds per image."""
  settings = chosen.config.evaluate
  seen, seconds = [], []
  for k in range(settings.num_seeds):
    seed, compiled = chosen.settings.seed + k, k > 0
    drawn = draw.own_image(draw_sets(chosen, opened, seed, settings.num_images, keep=1, compiled=compiled))
    seconds.append(drawn.seconds_per_image)
    seen.append(drawn.seen)
  figures = {
    'N': settings.num_images,
    'NFE': function_evaluations(chosen),
    **({'GMACs per image': giga_macs(chosen)} if chosen.draws_alone else {}),
    'seconds per image': timing.median_seconds_per_image(seconds),
    **class_accuracy(chosen, opened, seen, settings.num_images),
  }
  for network in settings.extractors:
    if network in opened.missing:
      reason = Figure(missing=opened.missing[network])
      figures |= dict.fromkeys(names_of(network), reason)
    else:
      found = network_figures(network, [each[network] for each in seen], real.train[network], settings)
      figures |= {name: found[name] for name in names_of(network)}
  if repeats_images(chosen):
    figures |= of_reconstructions(chosen, opened, real)
  return figures


def of_reconstructions(chosen: Trained, opened: Networks, real: Real) -> dict[str, Figure]:
  """Returns the distances of as many images that are made of the evaluation images, in turn.

  What is between these and the distances of samples is due to what samples are made of: an earlier network's
  work of nothing instead of data. Augmentation is to narrow it.
  """
  settings = chosen.config.evaluate
  image, label = chosen.eval_images(settings.num_images)
  given = chosen.observe(image, label)
  streams = {name: features.stream() for name, features in opened.features.items()}
  size = min(chosen.settings.batch_size, settings.num_images)
  for indices, num_real in draw.padded_batches(settings.num_images, size):
    drawn = chosen.draw(indices, {name: value[indices % len(image)] for name, value in given.items()})
    for stream in streams.values():
      stream.add(draw.own_image(drawn)[:num_real])
  figures = {}
  for network in settings.extractors:
    if network in streams:
      seen = streams[network].finish()['features']
      found = distance_figures(network, [seen], real.train[network], settings)
      figures |= {f'{name} of reconstructions': figure for name, figure in found.items()}
  return figures


def write_row(
  path: pathlib.Path, facts: dict[str, Any], figures: dict[str, Any], made_of: dict[str, str]
) -> None:
  """Writes the figures of a row, all that they depend on, and the digest by which damage is seen."""
  content = report.to_json({'facts': facts, 'made_of': made_of, 'figures': figures})
  report.write_json(path, identity.sealed(content))


def read_row(path: pathlib.Path) -> dict[str, Any] | None:
  """Returns the figures of a row that was measured before, or None.

  Raises:
    UserError: when the file is damaged or cannot be read; names it, the reason, and what to do.
  """
  if not distributed.agree(path.exists()):
    return None
  with files.reading(path):
    figures = identity.unsealed(files.read_json(path))['figures']
    return {name: Figure(**value) if isinstance(value, dict) else value for name, value in figures.items()}


def write(
  folder: pathlib.Path,
  rows: list[dict[str, Any]],
  floors: dict[str, tuple[float, int]],
  opened: Networks,
  made_of: list[dict[str, str]],
) -> None:
  """Prints and writes the table, and one plot per distance."""
  shown = [{name: value for name, value in row.items() if name != 'line'} for row in rows]
  log.say('\n' + report.table(shown))
  missing = [f'not computed: {line}' for line in report.reasons(rows)]
  for line in missing:
    log.say(line)
  if jax.process_index() != 0:
    return
  report.write_json(folder / f'{NAME}.json', {'rows': shown, 'missing': opened.missing, 'made_of': made_of})
  text = '\n\n'.join([report.table(shown, markdown=True), *missing])
  files.write_text(folder / f'{NAME}.md', text + '\n')
  of_rows = {f'row {number}': json.dumps(row, sort_keys=True) for number, row in enumerate(made_of, start=1)}
  for network in networks.NAMES:
    name = measures.distance_names(network)[0]
    floor = floors[name][0] if name in floors else None
    plots.curves(folder / f'{NAME}-{name}.png', rows, name, floor, of_rows)
  log.say(f'wrote {folder / NAME}.json, .md and plots')
