"""`--mode=evaluate`: the figures of a trained stage as one table, in JSON, Markdown and plots."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from vaediff.data import sources
from vaediff.errors import UserError
from vaediff.evaluation import (
  codebooks,
  compositions,
  controls,
  decoders,
  embedded,
  likelihoods,
  measures,
  networks,
  plots,
  report,
  retrieval,
  shuffled_codes,
)
from vaediff.evaluation.measures import Figure
from vaediff.evaluation.networks import Networks
from vaediff.evaluation.reconstructions import reconstruction_rows
from vaediff.evaluation.sets import DATA, FOLDER, Real, name_of, real_images, sample_rows
from vaediff.run import log
from vaediff.run.trained import Trained
from vaediff.storage import files


def evaluate(trained: Trained, out: pathlib.Path | None = None) -> dict[str, float]:
  """Prints the table of the stage; writes `evaluation/<name>.json`, `.md` and plots.

  Args:
    trained: the stage.
    out: folder to write to; None = the run's.

  Returns:
    {}: all figures are in the table.

  Raises:
    UserError: for a setting that is not allowed. What cannot be computed is said in the table; where that is
      every figure of the networks that the config names, it is an error once the table is written.
  """
  config, settings = trained.config, trained.config.evaluate
  for split in sources.SPLITS:
    trained.images(split)  # are those of its training
  folder, name = (out or trained.workdir) / FOLDER, name_of(trained)
  opened = networks.open_networks(config, trained.mesh)
  real = real_images(config, opened)
  rows = sample_rows(trained, opened, real, folder)
  reconstructed = reconstruction_rows(trained, opened, real)
  decoded = decoders.decoder_rows(trained, opened, real)
  composed = [*compositions.composition_rows(trained, opened), *embedded.decoder_rows(trained)]
  followed = controls.control_rows(trained)
  model = {
    '': trained.stage,
    **likelihoods.figures(trained),
    **shuffled_codes.figures(trained),
    **codebooks.figures(trained),
    **retrieval.figures(trained),
    **embedded.figures(trained),
  }
  result = {
    **header(trained),
    'num_images': settings.num_images,
    'num_seeds': settings.num_seeds,
    'networks': network_rows(opened, real),
    'samples': rows,
    'reconstructions': reconstructed,
    'decoders': decoded,
    'compositions': composed,
    'controls': followed,
    'model': model,
    'missing': opened.missing,
    'settings': config[trained.stage].sample.to_dict(),
    'notes': notes(opened, real, settings),
    'made_of': trained.made_of,
  }
  text = as_text(result)
  for line in text.splitlines():
    log.say(line)
  if jax.process_index() == 0:
    report.write_json(folder / f'{name}.json', result)
    files.write_text(folder / f'{name}.md', as_text(result, markdown=True) + '\n')
    drawn = plots.bars(folder / f'{name}.png', rows, trained.made_of)
    log.say(f'\nwrote {folder / name}.json, .md{" and .png" if drawn else ""}')
  check_any(settings, [*rows, *reconstructed, *decoded, model], f'{folder / name}.md')
  return {}


def wanted(settings: ConfigDict) -> set[str]:
  """Returns the names of the figures of all networks that `config.evaluate` names."""
  names = set()
  for network in settings.extractors:
    names |= {*measures.names_of(network), *(f'r{name}' for name in measures.distance_names(network))}
  return names | ({settings.lpips, f'diversity_{settings.lpips}'} if settings.lpips else set())


def check_any(settings: ConfigDict, rows: Sequence[Mapping[str, Any]], table: str) -> None:
  """Raises UserError where no figure of the networks that are named could be made, whatever else could."""
  names = wanted(settings)
  figures = [
    value
    for row in rows
    if row.get('set') != DATA
    for name, value in row.items()
    if isinstance(value, Figure) and (name in names or not names)
  ]
  if figures and all(figure.value is None for figure in figures):
    reasons = '; '.join(dict.fromkeys(figure.missing for figure in figures))
    asked = [*settings.extractors, *([settings.lpips] if settings.lpips else [])]
    raise UserError(
      f'no figure of {", ".join(asked) or "the stage"} could be made: {reasons}. The table with the rest is '
      f'{table}; config.evaluate.extractors and lpips name the networks'
    )


def notes(opened: Networks, real: Real, settings: ConfigDict) -> list[str]:
  """Returns a warning for each figure computed on fewer images than configured."""
  found = []
  for name in opened.features:
    have = min(settings.num_images, settings.max_features, len(real.train[name].features))
    if have < settings.kernel_subset_size:
      found.append(
        f'{measures.distance_names(name)[1]}: subsets hold at most {have} images, not the '
        f'{settings.kernel_subset_size} of config.evaluate.kernel_subset_size: there are no more'
      )
  return found


def header(trained: Trained) -> dict[str, Any]:
  """Returns what was evaluated, where."""
  return {
    'config': trained.config.name,
    'stage': trained.stage,
    'checkpoint': trained.settings.checkpoint,
    'step': trained.step,
    'seed': trained.settings.seed,
    'device': f'{jax.devices()[0].device_kind} x {trained.mesh.size}',
    'jax': jax.__version__,
  }


def network_rows(opened: Networks, real: Real) -> list[dict[str, Any]]:
  """Returns one row per network: what makes its figures comparable with others of the same name."""
  rows = []
  for name, network in opened.features.items():
    rows.append(
      {
        'network': name,
        'features': network.extractor.num_features,
        'resize': network.extractor.resize,
        'weights sha256': network.extractor.fingerprint,
        'training images': real.train[name].moments.count,
        'own test accuracy': network.accuracy,
      }
    )
  if opened.lpips:
    lpips = opened.lpips.lpips
    rows.append({'network': lpips.name, 'resize': lpips.resize, 'weights sha256': lpips.fingerprint})
  return rows


def as_text(result: dict[str, Any], *, markdown: bool = False) -> str:
  """Returns the whole evaluation as text or Markdown."""

  def shown(rows):
    return report.table(rows, markdown=markdown)

  networks_shown = [row | {'weights sha256': row['weights sha256'][:12]} for row in result['networks']]
  title = (
    f'{result["config"]}, stage {result["stage"]}, {result["checkpoint"]} checkpoint, step {result["step"]}; '
    f'{result["device"]}'
  )
  parts = [f'# {title}' if markdown else f'\n{title}']
  if networks_shown:
    parts.append(shown(networks_shown))
  about = f'± is the standard deviation over {result["num_seeds"]} seeds.' if result['num_seeds'] > 1 else ''
  parts.append(shown(report.transpose(result['samples'], 'set')))
  parts.append(
    f'Samples are compared with the training split. {about} The floor is what real images get.'.replace(
      '  ', ' '
    )
  )
  if result['reconstructions']:
    parts.append(shown(report.transpose(result['reconstructions'], 'set')))
    parts.append('Reconstructions are of the evaluation split and are compared with it.')
  if result['decoders']:
    parts.append(shown(report.transpose(result['decoders'], 'decoder')))
    parts.append(
      'Decoders draw the same codes, of the first N images of the evaluation split. A sample of the '
      "posterior has twice the squared error of the posterior's mean: vaediff/evaluation/decoders.py."
    )
  if result['compositions']:
    parts.append(shown(report.transpose(result['compositions'], 'set')))
    parts.append(compositions.ABOUT)
  if result['controls']:
    parts.append(shown(report.transpose(result['controls'], 'set')))
    parts.append(controls.ABOUT)
  if len(result['model']) > 1:
    parts.append(shown(report.transpose([result['model']], '')))
    parts.append(
      'Bounds and losses are over the first N images of the evaluation split; ± is the standard error over '
      'images. elbo is in nats. Codes are counted in the first N images.'
    )
  tables = ('samples', 'reconstructions', 'decoders', 'compositions', 'controls')
  rows = [*(row for name in tables for row in result[name]), result['model']]
  parts += [f'note: {line}' for line in result['notes']]
  parts += [f'not computed: {line}' for line in report.reasons(rows)]
  return '\n\n'.join(parts)
