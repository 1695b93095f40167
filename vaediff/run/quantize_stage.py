"""How a trained network becomes one of whole numbers: one function for each method, and the checkpoint.

A method returns what `models.quantized.Quantized.quantize` asks for beside the parameters: the ranges of the
layers' inputs by time, and where it has them rounded kernels and a correction of the output.
"""

import dataclasses
import json
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vaediff.errors import UserError
from vaediff.experiments import quantized as stages
from vaediff.experiments.base import Experiment
from vaediff.models.functional import Model
from vaediff.models.quantized import Quantized
from vaediff.run import checkpoint, draw, quantize_calibration, same_run
from vaediff.run import frozen as frozen_networks
from vaediff.run.trained import Trained
from vaediff.storage import buckets
from vaediff.types import Params

BYTES = 'bytes'
"""In the `meta` of a checkpoint: bytes on disk of the same networks in floats."""
Seen = tuple[np.ndarray, Mapping[str, np.ndarray]]
"""Of one call of a network: times [rows], and the range of each row in each layer [rows, parts, 2]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
  """What a method works on.

  Attributes:
    settings: `config.quantize`.
    trained: the stage of floats.
    network: the name of the one that is quantized.
    model: it.
    quantized: what it becomes.
    params: its parameters, float32.
  """

  settings: ConfigDict
  trained: Trained
  network: str
  model: Model
  quantized: Quantized
  params: Params


def minmax(context: Context) -> dict[str, Any]:
  """Returns the smallest and largest inputs that the stage's own samples give each layer, by time."""
  whole = context.quantized
  if not whole.quantized_inputs:
    return {}
  seen = observed(context)
  times, ranges = by_time([t for t, _ in seen], [found for _, found in seen], whole.buckets)
  missing = [layer.path for layer in whole.layers if layer.path not in ranges]
  if missing:
    raise UserError(
      f'samples of stage {context.trained.stage!r} do not use the layer {missing[0]!r}: nothing is known of '
      'what it reads. Add it to config.quantize.keep_float'
    )
  return {'times': times, 'ranges': ranges}


def on_records(context: Context) -> dict[str, Any]:
  """Returns what is measured on records of what the network is called with; see `run.quantize_calibration`.

  Raises:
    UserError: for a stage of which no records are known.
  """
  diffusion = context.trained.experiment.diffusion
  if diffusion is not None and context.network != diffusion.denoiser.network:
    return minmax(context)  # an encoder that is trained with it
  return quantize_calibration.hand_over(context.trained, context.settings, context.quantized, context.network)


METHODS: Mapping[str, Callable[[Context], dict[str, Any]]] = {
  'minmax': minmax,
  **dict.fromkeys(quantize_calibration.METHODS, on_records),
}
"""By name, as `config.quantize.method` has it."""


def observed(context: Context) -> list[Seen]:
  """Returns what the layers read while the stage draws `quantize.num_images` images: a part for each call."""
  seen, model, trained = [], context.model, context.trained

  def sink(t: Any, ranges: Any) -> None:
    found = {path: np.asarray(value) for path, value in ranges.items()}
    rows = len(next(iter(found.values())))
    seen.append((np.zeros(rows) if isinstance(t, tuple) else np.asarray(t), found))

  looking = stages.Observing(
    module=context.quantized.module,
    inputs=model.inputs,
    entry=model.entry,
    layers=context.quantized.layers,
    sink=sink,
  )
  watched = trained.with_experiment(stages.replaced(trained.experiment, model, looking))
  count = context.settings.num_images
  for indices in draw.batches(count, min(trained.settings.batch_size, count)):
    watched.draw(indices)
  jax.effects_barrier()
  return seen


def by_time(
  times: Sequence[np.ndarray], ranges: Sequence[Mapping[str, np.ndarray]], buckets: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Returns the last time of each bucket but the last [buckets - 1], and ranges [buckets, parts, 2] by path.

  The buckets are those of `quantize_calibration.time_edges`. One that no time falls in has the ranges of its
  neighbour.

  Args:
    times: of each part, one for each row.
    ranges: of each part, those of each row [rows, parts, 2] by path.
    buckets: how many.
  """
  edges, found = quantize_calibration.time_edges(np.concatenate(times), buckets), {}
  for path in ranges[0]:
    low = np.full((buckets, *ranges[0][path].shape[1:-1]), np.inf, np.float32)
    high = -low
    for t, part in zip(times, ranges, strict=True):
      bucket = np.searchsorted(edges, t.astype(np.float32), side='left')
      np.minimum.at(low, bucket, part[path][..., 0])
      np.maximum.at(high, bucket, part[path][..., 1])
    known = np.flatnonzero(np.isfinite(low[:, 0]))
    nearest = known[np.argmin(np.abs(np.arange(buckets)[:, None] - known[None]), axis=1)]
    found[path] = np.stack([low[nearest], high[nearest]], axis=-1)
  return edges, found


def quantize(trained: Trained, experiment: Experiment, settings: ConfigDict) -> dict[str, Params]:
  """Returns the parameters of a quantized stage, by network; what is not quantized is as it was.

  Args:
    trained: the stage of floats.
    experiment: what it becomes.
    settings: `config.quantize`.
  """
  made = {}
  for name, whole in experiment.networks.items():
    params = trained.params[name]
    if isinstance(whole, Quantized):
      context = Context(
        settings=settings,
        trained=trained,
        network=name,
        model=trained.experiment.networks[name],
        quantized=whole,
        params=params,
      )
      found = METHODS[settings.method](context)
      if whole.rows:
        found['correction'] = quantize_calibration.correction(trained, whole, found, settings)
      params = jax.jit(lambda params, found, whole=whole: whole.quantize(params, **found))(params, found)
    made[name] = params
  return made


def save(
  config: ConfigDict, trained: Trained, experiment: Experiment, stage: str, params: Mapping[str, Params]
) -> None:
  """Writes the checkpoint of a quantized stage.

  It has the step of the stage it is made of, and the ids of all that it reads. One that is there already is
  moved to `earlier`.
  """
  folder, started = trained.workdir / stage, time.monotonic()
  of, step = checkpoint.load_meta(trained.folder, trained.opened.step), trained.step
  floats = {name: trained.params[name] for name in params}
  with tempfile.TemporaryDirectory(dir=buckets.Beside(trained.workdir).here) as place:
    in_floats = write(pathlib.Path(place), floats, step, {})
  if checkpoint.latest_step(folder) is not None:
    checkpoint.move_aside(folder / checkpoint.FOLDER)
  meta = {
    'stage': stage,
    'data_position': step,
    'seconds': time.monotonic() - started,
    'config': json.loads(config.to_json()),
    'last': {},
    'frozen': frozen_networks.ids(experiment, trained.workdir),
    same_run.DATA: of.get(same_run.DATA, {}),
    BYTES: {'float32': in_floats},
  }
  check = config.checkpoints.check_arrays
  write(folder, params, step, meta, check)


def write(
  folder: pathlib.Path, params: Mapping[str, Params], step: int, meta: dict[str, Any], check: bool = False
) -> int:
  """Writes networks as the checkpoint of a stage; returns the bytes of its arrays on disk."""
  checkpointer = checkpoint.Checkpointer(folder, 1, check)
  try:
    checkpointer.save(step, stages.state_of(params, step), meta)
  finally:
    checkpointer.close()
  return on_disk(folder)


def on_disk(stage_folder: pathlib.Path) -> int:
  """Returns the bytes of the arrays of a stage's latest checkpoint."""
  folder = checkpoint.latest_folder(stage_folder) / 'state'
  return sum(path.stat().st_size for path in folder.rglob('*') if path.is_file())
