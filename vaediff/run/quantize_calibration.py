"""What quantizes a trained network, measured on its records: ranges, scales, roundings and the correction.

All is measured of the float network but for the correction, which is of the error of the quantized one, and
the inputs of a block, which are those of the network whose earlier blocks are rounded. Statistics are taken
of each record by itself, so that they do not depend on batches and devices.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from vaediff import checks
from vaediff.diffusion import noise_correction
from vaediff.errors import UserError
from vaediff.experiments import recorded
from vaediff.experiments.denoiser import LEARNED, Denoiser
from vaediff.machine import distributed
from vaediff.models import ranges
from vaediff.models.functional import Model
from vaediff.models.observed import Layer, inputs_of, subtree
from vaediff.models.quantized import Quantized
from vaediff.run import calibration, log, rounding, subjects
from vaediff.run.subjects import Subject, batches
from vaediff.run.trained import Trained
from vaediff.types import Params

METHODS = (*ranges.WEIGHTS, 'adaround')
BOUNDS = {
  'method': checks.one_of(METHODS),
  'ranges': checks.one_of(ranges.ACTIVATIONS),
  'percentile': checks.inside_or_at(50, 100),
  'correction': checks.one_of(noise_correction.CORRECTIONS),
  'correction_images': checks.count(2),
  'adaround.num_steps': checks.count(1),
  'adaround.batch_size': checks.count(1),
  'adaround.learning_rate': checks.inside(0, 1),
  'adaround.weight': checks.at_least(0),
  'adaround.warmup': checks.between(0, 1),
  'adaround.beta_start': checks.between(1, 100),
  'adaround.beta_end': checks.between(1, 100),
  'learned_ranges.num_steps': checks.count(0),
  'learned_ranges.batch_size': checks.count(1),
  'learned_ranges.learning_rate': checks.inside(0, 1),
}
"""Of the section `quantize`, as far as it is about what is measured."""
SAMPLE = 512
"""Numbers that are kept of each record and part of a layer's input, at places that are drawn once."""
MOST = 2**15
"""Numbers that a range is chosen by."""


def hand_over(trained: Trained, section: ConfigDict, quantized: Quantized, network: str) -> dict[str, Any]:
  """Returns the keyword arguments of `Quantized.quantize` for a network of an opened stage.

  All but its correction, which is of what they make.

  Args:
    trained: the stage, with its float network.
    section: `config.quantize`.
    quantized: the network that is to be.
    network: its name.

  Raises:
    UserError: for a setting out of bounds, or a stage of which no records are known.
    Stale: when its records are of another checkpoint.
  """
  checks.check(section, BOUNDS, 'config.quantize.')
  subject = subjects.of(trained, section.calibration, network)
  found = {'kernel_scales': kernel_scales(subject.params, quantized.layers, quantized.bits, section.method)}
  if quantized.quantized_inputs:
    edges = time_edges(subject.t, quantized.buckets)
    found |= {'ranges': input_ranges(subject, quantized, edges, section), 'times': edges}
  if section.method == 'adaround':
    found |= rounding.learned(subject, trained.workdir / trained.stage, quantized, found, section)
  return found


def rows_of(trained: Trained, section: ConfigDict) -> int:
  """Returns the rows of the correction: one for each step of the configured sampler; 0 without one.

  Raises:
    UserError: when there is to be a correction, and no sampler.
  """
  if section.correction == 'none':
    return 0
  diffusion = trained.experiment.diffusion
  if diffusion is None:
    raise UserError(
      f'config.quantize.correction is {section.correction!r}, which is of the steps of a sampler; stage '
      f"{trained.stage!r} has none: set it to 'none'"
    )
  return len(recorded.times_of(diffusion))


# Activations -------------------------------------------------------------------------------------


def time_edges(t: Float[np.ndarray, ' records'], buckets: int) -> Float[np.ndarray, ' edges']:
  """Returns the last time of each bucket but the last: buckets of as many different times of the records.

  An edge is half way between two times. With fewer times than buckets the last ones are empty, from t = 1 on.
  """
  times = np.unique(t)
  first = [part[0] for part in np.array_split(times, buckets) if len(part)][1:]
  edges = [(start + times[np.searchsorted(times, start) - 1]) / 2 for start in first]
  return np.asarray([*edges, *[1.0] * (buckets - 1 - len(edges))], np.float32)


def input_ranges(
  subject: Subject, quantized: Quantized, edges: Float[np.ndarray, ' edges'], section: ConfigDict
) -> dict[str, Float[np.ndarray, 'buckets parts 2']]:
  """Returns the range of the input of each layer, in each bucket of time and part, by path."""
  found = _statistics(subject, quantized)
  bucket = np.searchsorted(edges, subject.t, side='left')
  # of a bucket without a record, the last that has one
  present = [k if (bucket == k).any() else int(bucket.max()) for k in range(len(edges) + 1)]

  def one(ends: np.ndarray, sample: np.ndarray, k: int) -> tuple[float, float]:
    rows = bucket == k
    values = sample[rows].ravel()
    values = values[:: -(-len(values) // MOST)].astype(np.float64)
    low, high = float(ends[rows, 0].min()), float(ends[rows, 1].max())
    return ranges.activation_range(values, low, high, section.ranges, float(section.percentile))

  def of(layer: Layer) -> np.ndarray:
    ends, sample = found[layer.path]
    parts = range(layer.parts)
    table = {k: [one(ends[:, p], sample[:, p], k) for p in parts] for k in set(present)}
    return np.asarray([table[k] for k in present], np.float32)

  return {layer.path: of(layer) for layer in quantized.layers}


def _statistics(subject: Subject, quantized: Quantized) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Returns, by path, smallest and largest [records, parts, 2] and a sample [records, parts, numbers]."""
  model, layers = quantized.in_floats, quantized.layers

  @jax.jit
  def run(params: Params, batch: Any) -> dict[str, tuple[jax.Array, jax.Array]]:
    calls = [
      inputs_of(model, params, *args, layers=layers, **keywords)[1] for args, keywords in subject.calls(batch)
    ]
    if missing := [layer.path for layer in layers if layer.path not in calls[0]]:
      raise UserError(
        f'what is recorded does not reach the layer {missing[0]!r}: nothing is known of what it reads. Add '
        'it to config.quantize.keep_float'
      )
    return {layer.path: _of_layer(layer, number, calls) for number, layer in enumerate(layers)}

  parts = [
    jax.tree.map(lambda x: x[:fresh], jax.device_get(run(subject.params, batch)))  # noqa: B023
    for batch, fresh in subject.batches()
  ]
  distributed.beat(f'the ranges of {len(subject.t)} records')
  return jax.tree.map(lambda *each: np.concatenate(each), *parts)


def _of_layer(layer: Layer, number: int, calls: list[dict[str, jax.Array]]) -> tuple[jax.Array, jax.Array]:
  ends, samples = [], []
  for part in layer.slices:
    each = [call[layer.path][..., part] for call in calls]
    flat = jnp.concatenate([x.astype(jnp.float32).reshape(x.shape[0], -1) for x in each], axis=1)
    places = np.random.default_rng(number).integers(0, flat.shape[1], SAMPLE)
    ends.append(jnp.stack([flat.min(axis=1), flat.max(axis=1)], axis=1))
    samples.append(flat[:, places])
  return jnp.stack(ends, axis=1), jnp.stack(samples, axis=1)


# Weights -----------------------------------------------------------------------------------------


def kernel_scales(params: Params, layers: tuple[Layer, ...], bits: int, method: str) -> dict[str, jax.Array]:
  """Returns the scales of each layer's kernel [parts, outputs], by path; AdaRound has those of 'mse'."""
  rule = method if method in ranges.WEIGHTS else 'mse'
  return {
    layer.path: ranges.kernel_scale(subtree(params, layer.path)['kernel'], bits, rule, layer.slices)
    for layer in layers
  }


# Correction --------------------------------------------------------------------------------------


def correction(
  trained: Trained, quantized: Quantized, found: dict[str, Any], section: ConfigDict
) -> dict[str, np.ndarray]:
  """Returns the table of PTQD's correction at every step of the configured sampler.

  Its records are of `correction_images` samples at every step. `std` is 0 unless the noise is corrected too.
  """
  diffusion = trained.experiment.diffusion
  steps = len(recorded.times_of(diffusion))
  asked = ConfigDict(section.calibration.to_dict())
  asked.update({'kind': 'steps', 'steps': 0, 'num_samples': steps * section.correction_images})
  records = calibration.load(trained, asked)
  denoiser, params = diffusion.denoiser, trained.read[diffusion.denoiser.network]
  tree = quantized.quantize(params, **found)
  channels = diffusion.space.shape[-1]
  others, outputs = channels if denoiser.variance == LEARNED else 0, []
  size = section.calibration.batch_size
  for model, weights in ((quantized.in_floats, params), (quantized, tree)):
    run = _runner(denoiser, model)
    parts = [
      jax.device_get(run(weights, batch))[:fresh]
      for batch, fresh in batches((records.y, records.t, records.values), len(records), size)
    ]
    outputs.append(np.concatenate(parts)[..., :channels])
  each = [records.step == step for step in range(steps)]
  rows = [noise_correction.fit(*(value[chosen] for value in outputs)) for chosen in each]
  times = np.asarray([records.t[chosen][0] for chosen in each])
  table = noise_correction.stacked(times, rows, others)
  shown = ', '.join(f'{np.mean(table[name]):.3g}' for name in ('gain', 'std'))
  log.say(f'correction of {steps} steps: mean gain and deviation of what is left: {shown}')
  return table if section.correction != 'mean' else {**table, 'std': np.zeros_like(table['std'])}


def _runner(denoiser: Denoiser, model: Model) -> Callable[[Params, Any], jax.Array]:
  """Returns (params, batch) -> the output of a network at some records."""

  def run(params: Params, batch: Any) -> jax.Array:
    return model.apply(params, *subjects.arguments(denoiser, batch))

  return jax.jit(run)
