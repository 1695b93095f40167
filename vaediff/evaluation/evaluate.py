"""`--mode=evaluate`: the figures of a trained stage as one table, in JSON, Markdown and plots."""

from typing import Any

import jax

from vaediff import files
from vaediff.data import sources
from vaediff.evaluation import likelihoods, networks, plots, report
from vaediff.evaluation.networks import Networks
from vaediff.evaluation.reconstructions import reconstruction_rows
from vaediff.evaluation.sets import FOLDER, Real, name_of, real_images, sample_rows
from vaediff.run import checkpoint, log
from vaediff.run.trained import Trained


def evaluate(trained: Trained) -> dict[str, float]:
  """Prints the table of the stage; writes `evaluation/<name>.json`, `.md` and plots.

  Returns:
    {}: all figures are in the table.

  Raises:
    UserError: for a setting that is not allowed. What cannot be computed is said in the table.
  """
  config, settings = trained.config, trained.config.evaluate
  for split in sources.SPLITS:
    trained.images(split)  # are those of its training
  opened = networks.open_networks(config, trained.mesh)
  real = real_images(config, opened)
  rows = sample_rows(trained, opened, real)
  reconstructed = reconstruction_rows(trained, opened, real)
  model = {'': trained.stage, **likelihoods.figures(trained)}
  result = {
    **header(trained),
    'num_images': settings.num_images,
    'num_seeds': settings.num_seeds,
    'networks': network_rows(opened, real),
    'samples': rows,
    'reconstructions': reconstructed,
    'model': model,
    'missing': opened.missing,
    'settings': config[trained.stage].sample.to_dict(),
  }
  folder, name = trained.workdir / FOLDER, name_of(trained)
  text = as_text(result)
  for line in text.splitlines():
    log.say(line)
  if jax.process_index() == 0:
    report.write_json(folder / f'{name}.json', result)
    files.write_text(folder / f'{name}.md', as_text(result, markdown=True) + '\n')
    plots.bars(folder / f'{name}.png', rows)
  log.say(f'\nwrote {folder / name}.json, .md and .png')
  return {}


def header(trained: Trained) -> dict[str, Any]:
  """Returns what was evaluated, where."""
  return {
    'config': trained.config.name,
    'stage': trained.stage,
    'checkpoint': trained.settings.checkpoint,
    'step': checkpoint.latest_step(trained.folder),
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
  parts.append(shown(report.turned(result['samples'], 'set')))
  parts.append(
    f'Samples are compared with the training split. {about} The floor is what real images get.'.replace(
      '  ', ' '
    )
  )
  if result['reconstructions']:
    parts.append(shown(report.turned(result['reconstructions'], 'set')))
    parts.append('Reconstructions are of the evaluation split and are compared with it.')
  if len(result['model']) > 1:
    parts.append(shown(report.turned([result['model']], '')))
    parts.append(
      'Bounds are over the evaluation split; ± is the standard error over images. elbo is in nats.'
    )
  rows = [*result['samples'], *result['reconstructions'], result['model']]
  parts += [f'not computed: {line}' for line in report.reasons(rows)]
  return '\n\n'.join(parts)
