"""What a config would train, without data and without allocating a weight."""

import contextlib
import functools
import io
import pathlib

import jax
from clu import parameter_overview
from ml_collections import ConfigDict

from vaediff import experiments
from vaediff.data import sources
from vaediff.experiments import quantized
from vaediff.machine import cost
from vaediff.models import quantized as quantized_models
from vaediff.models.functional import Model
from vaediff.run import checkpoint, log, quantize_stage
from vaediff.run.config import Run
from vaediff.types import Params

COLUMNS = (
  'stage',
  'network',
  'parameters',
  'GMACs/image',
  'parameter MB',
  'optimizer MB',
  'EMA MB',
)


def mode(run: Run) -> None:
  """Prints what the stages of a run are."""
  describe(run.config, run.stages)
  for stage in run.stages:
    if run.config[stage].experiment == quantized.SECTION:
      describe_quantized(run.config, run.workdir, stage)


def describe_quantized(config: ConfigDict, workdir: pathlib.Path, stage: str) -> dict[str, int]:
  """Prints the bytes of a stage of whole numbers beside those of the same in floats; returns them.

  Keys: `memory` and `memory_float32` of the networks that are sampled, as XLA lays them out once the stage is
  opened: of floats where those are computed with. Where there is a checkpoint also `disk` and `disk_float32`,
  of its arrays and of the same networks stored as floats.
  """
  experiment = experiments.build(config, stage)
  bytes_of = {}
  for name, chosen in (('memory', experiment), ('memory_float32', quantized.in_floats(experiment))):
    models = chosen.networks.items()
    shapes = {network: jax.eval_shape(functools.partial(opened, model)) for network, model in models}
    bytes_of[name] = cost.device_bytes(shapes)
  lines = [('device memory', bytes_of['memory'], bytes_of['memory_float32'])]
  if checkpoint.latest_step(workdir / stage) is not None:
    bytes_of['disk'] = quantize_stage.on_disk(workdir / stage)
    bytes_of['disk_float32'] = checkpoint.load_meta(workdir / stage)[quantize_stage.BYTES]['float32']
    lines.append(('the checkpoint', bytes_of['disk'], bytes_of['disk_float32']))
  for what, own, floats in lines:
    log.say(
      f'{stage}: {own / 1e6:.3f} MB in {what}, {own / floats:.3f} of the {floats / 1e6:.3f} MB of float32'
    )
  return bytes_of


def opened(model: Model) -> Params:
  """Returns fresh parameters as an opened stage holds them."""
  return quantized_models.ready(model, model.init(jax.random.key(0)))


def describe(config: ConfigDict, stages: tuple[str, ...]) -> list[dict[str, float | str]]:
  """Prints the layers of every network, then a table of the stages; returns the table's rows.

  A GMAC is 1e9 multiply-accumulates of convolutions and matrix products in one forward pass of one image;
  a MB is 1e6 bytes.
  """
  rows, notes = [], []
  for stage in stages:
    experiment = experiments.build(config, stage)
    state = jax.eval_shape(experiment.init, jax.random.key(0))
    notes += [f'{stage}: {note}' for note in experiment.notes]
    for name, model in experiment.networks.items():
      network = state.networks[name]
      log.say(f'\n{stage}/{name}\n{layers(network.params)}')
      forward = cost.macs(
        lambda params, args, model=model: model.apply(params, *args), network.params, model.inputs
      )
      if tower := sum(cost.num_parameters(network.params[part]) for part in towers(network.params)):
        whole = cost.num_parameters(network.params)
        notes.append(f'{stage}/{name}: {tower:,} parameters are of the text tower, {whole - tower:,} others')
      rows.append(
        {
          'stage': stage,
          'network': name,
          'parameters': cost.num_parameters(network.params),
          'GMACs/image': forward / 1e9,
          'parameter MB': cost.num_bytes(network.params) / 1e6,
          'optimizer MB': cost.num_bytes(network.opt_state) / 1e6,
          'EMA MB': cost.num_bytes(network.ema_params) / 1e6,
        }
      )
  cells = [COLUMNS] + [
    tuple(
      f'{row[c]:,.3f}' if isinstance(row[c], float) else f'{row[c]:,}' if isinstance(row[c], int) else row[c]
      for c in COLUMNS
    )
    for row in rows
  ]
  widths = [max(len(line[k]) for line in cells) for k in range(len(COLUMNS))]
  log.say('')
  for line in cells:
    log.say('  '.join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
  if notes:
    log.say('\n' + '\n'.join(notes))
  steps = {stage: config[stage].train.num_steps for stage in stages}
  shown = ', '.join(
    f'{stage} {count:,} steps of {config[stage].train.batch_size} images' for stage, count in steps.items()
  )
  log.say(f'\ntraining: {shown}; {sum(steps.values()):,} steps in all')
  log.say(f'data: {sources.describe(config.data)}')
  return rows


def towers(params) -> list[str]:
  """Returns the names of the parts of a network that are towers of words: often another one's, elsewhere."""
  return [part for part in params if part.endswith('_tower')]


def layers(params) -> str:
  """Returns clu's table of every parameter array, its shape and size."""
  with contextlib.redirect_stdout(io.StringIO()):
    return parameter_overview.get_parameter_overview(params, include_stats=False)
