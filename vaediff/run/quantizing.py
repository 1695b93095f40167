"""What quantizes a trained denoiser, measured on its records: ranges, scales, roundings and the correction.

All is measured of the float network but for the correction, which is of the error of the quantized one, and
the inputs of a block, which are those of the network whose earlier blocks are rounded. Statistics are taken
of each record by itself, so that they do not depend on batches and devices.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from vaediff import checks, files, identity
from vaediff.diffusion import noise_correction
from vaediff.errors import UserError
from vaediff.experiments import recorded
from vaediff.experiments.denoiser import LEARNED, Denoiser
from vaediff.machine import distributed
from vaediff.models import adaround, ranges
from vaediff.models.functional import Model
from vaediff.models.observed import (
  Block,
  Layer,
  block_io,
  blocks_of,
  inputs_of,
  subtree,
  with_subtree,
)
from vaediff.models.quantized import Quantized
from vaediff.run import calibration, draw, log
from vaediff.run.calibration import Records
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
}
"""Of the section `quantize`, as far as it is about what is measured."""
SAMPLE = 512
"""Numbers that are kept of each record and part of a layer's input, at places that are drawn once."""
MOST = 2**15
"""Numbers that a range is chosen by."""

Batch = tuple[Any, Any, Any]
"""y, t and values of some records."""


def hand_over(trained: Trained, section: ConfigDict, quantized: Quantized) -> dict[str, Any]:
  """Returns the keyword arguments of `Quantized.quantize` for the denoiser of an opened stage.

  All but its correction, which is of what they make.

  Args:
    trained: the stage, with its float network.
    section: `config.quantize`.
    quantized: the network that is to be.

  Raises:
    UserError: for a setting out of bounds, or a stage without a sampler.
    Stale: when its records are of another checkpoint.
  """
  checks.check(section, BOUNDS, 'config.quantize.')
  records = calibration.load(trained, section.calibration)
  denoiser, size = trained.experiment.diffusion.denoiser, section.calibration.batch_size
  params = trained.read[denoiser.network]
  scales = kernel_scales(params, quantized.layers, quantized.bits, section.method)
  found = {'kernel_scales': scales}
  if quantized.quantized_inputs:
    edges = time_edges(records.t, quantized.buckets)
    bounds = input_ranges(denoiser, params, records, quantized, edges, section, size)
    found |= {'ranges': bounds, 'times': edges}
  if section.method == 'adaround':
    of = {'records': calibration.path_of(trained, section.calibration).name, **calibration.made_of(trained)}
    found['kernels'] = roundings(trained, records, quantized, scales, section, of)
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


# Records -----------------------------------------------------------------------------------------


def batches(records: Records, size: int) -> Iterator[tuple[Batch, int]]:
  """Yields records in batches of one size, the last padded by its last, and how many of each are real."""
  size = min(size, len(records))
  for rows in draw.batches(len(records), size):
    part = records.rows(rows)
    yield (part.y, part.t, part.values), min(size, len(records) - int(rows[0]))


def branches(denoiser: Denoiser) -> tuple[tuple[str, ...], ...]:
  """Returns the conditions that are dropped in each call of the network for one guided x0_hat."""
  weaker = (term.without for term in denoiser.guiding_terms() if term.guide is None)
  return tuple(dict.fromkeys(((), *weaker)))


def arguments(denoiser: Denoiser, batch: Batch, without: tuple[str, ...] = ()) -> tuple[Any, ...]:
  """Returns what the network is called with for some records."""
  y, t, values = batch
  return denoiser.inputs(y, t, values, denoiser.conditions.without(without, y.shape[0]))


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
  denoiser: Denoiser,
  params: Params,
  records: Records,
  quantized: Quantized,
  edges: Float[np.ndarray, ' edges'],
  section: ConfigDict,
  size: int,
) -> dict[str, Float[np.ndarray, 'buckets parts 2']]:
  """Returns the range of the input of each layer, in each bucket of time and part, by path."""
  found = _statistics(denoiser, params, records, quantized, size)
  bucket = np.searchsorted(edges, records.t, side='left')
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


def _statistics(
  denoiser: Denoiser, params: Params, records: Records, quantized: Quantized, size: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Returns, by path, smallest and largest [records, parts, 2] and a sample [records, parts, numbers]."""
  model, layers = quantized.in_floats, quantized.layers

  @jax.jit
  def run(params: Params, batch: Batch) -> dict[str, tuple[jax.Array, jax.Array]]:
    calls = [
      inputs_of(model, params, *arguments(denoiser, batch, without), layers=layers)[1]
      for without in branches(denoiser)
    ]
    return {layer.path: _of_layer(layer, number, calls) for number, layer in enumerate(layers)}

  parts = [
    jax.tree.map(lambda x: x[:fresh], jax.device_get(run(params, batch)))  # noqa: B023
    for batch, fresh in batches(records, size)
  ]
  distributed.beat(f'the ranges of {len(records)} records')
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


def roundings(
  trained: Trained,
  records: Records,
  quantized: Quantized,
  scales: dict[str, jax.Array],
  section: ConfigDict,
  of: identity.MadeOf,
) -> dict[str, np.ndarray]:
  """Returns the whole numbers of each kernel, int8 by path, learned block by block.

  After each block all that are learned are stored beside the stage: a run that is cut off goes on there.
  """
  settings = adaround.Settings(**section.adaround.to_dict())
  wanted = {**of, calibration.SETTINGS: identity.digest([section.adaround.to_dict(), quantized.bits])}
  path = trained.workdir / trained.stage / f'rounded-{identity.digest(wanted)}.npz'
  done = _stored_roundings(path, wanted)
  denoiser, size = trained.experiment.diffusion.denoiser, section.calibration.batch_size
  params = trained.read[denoiser.network]
  model = quantized.in_floats
  blocks = layers_by_block(model, quantized.layers)
  gather = _gatherer(denoiser, model, tuple(block for block, _ in blocks), records, size)
  rounded = params
  for number, (block, layers) in enumerate(blocks):
    if any(layer.path not in done for layer in layers):
      args, wanted_output = gather(rounded, block, False), gather(params, block, True)
      key = jax.random.fold_in(jax.random.key(section.calibration.seed), number)
      apply, kernels, spread = _function(block, layers, params, scales)
      found = adaround.learn(apply, kernels, spread, args, wanted_output, settings, key, quantized.bits)
      log.say(f'  {block.path}: error {found.error:.4g}, of rounding to nearest {found.nearest:.4g}')
      done |= {name: np.asarray(value) for name, value in found.kernels.items()}
      if jax.process_index() == 0:
        files.write_npz(path, {**done, calibration.MADE_OF: json.dumps(wanted)})
    for layer in layers:
      spread = ranges.spread(scales[layer.path], layer.shape, layer.slices)
      known = {**subtree(params, layer.path), 'kernel': spread * done[layer.path]}
      rounded = with_subtree(rounded, layer.path, known)
  return done


def _stored_roundings(path: Any, wanted: identity.MadeOf) -> dict[str, np.ndarray]:
  """Returns what an earlier run has learned of the same; its file has the digest of that in its name."""
  if not distributed.agree(path.exists()):
    return {}
  stored = files.read_npz(path)
  with files.reading(path):
    made = json.loads(str(stored.pop(calibration.MADE_OF)))
  identity.compare(str(path), made, wanted, files.REMOVE.capitalize())
  log.say(f'{path.name} holds the roundings of {len(stored)} layers: the others are learned')
  return stored


def _gatherer(
  denoiser: Denoiser, model: Model, blocks: tuple[Block, ...], records: Records, size: int
) -> Callable[[Params, Block, bool], Any]:
  """Returns (params, block, output) -> what a block is called with, or what it returns, of all records.

  One program is for all blocks.
  """

  @jax.jit
  def run(params: Params, batch: Batch) -> Any:
    return block_io(model, params, *arguments(denoiser, batch), blocks=blocks)

  def gather(params: Params, block: Block, output: bool) -> Any:
    parts = []
    for batch, fresh in batches(records, size):
      args, result = run(params, batch)[block.path]
      parts.append(jax.tree.map(lambda x: x[:fresh], result if output else args))  # noqa: B023
    return jax.tree.map(lambda *each: jnp.concatenate(each), *parts)

  return gather


def layers_by_block(model: Model, layers: tuple[Layer, ...]) -> tuple[tuple[Block, tuple[Layer, ...]], ...]:
  """Returns the blocks that have any of the layers, and those, in the order of a forward pass."""
  found = []
  for block in blocks_of(model):
    own = [layer for layer in layers if f'{layer.path}/'.startswith(f'{block.path}/')]
    found += [(block, tuple(own))] if own else []
  return tuple(found)


def _function(
  block: Block, layers: tuple[Layer, ...], params: Params, scales: dict[str, jax.Array]
) -> tuple[Callable[..., jax.Array], dict[str, jax.Array], dict[str, jax.Array]]:
  """Returns a block as a function of its kernels, these, and their scales, by path."""
  own = subtree(params, block.path)
  kernels = {layer.path: subtree(params, layer.path)['kernel'] for layer in layers}
  spread = {layer.path: ranges.spread(scales[layer.path], layer.shape, layer.slices) for layer in layers}

  def apply(kernels: dict[str, jax.Array], *args: Any) -> jax.Array:
    tree = own
    for path, kernel in kernels.items():
      below = path[len(block.path) :].strip('/')
      part = {**subtree(tree, below), 'kernel': kernel}
      tree = with_subtree(tree, below, part) if below else part
    return block.apply(tree, *args)

  return apply, kernels, spread


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
  for model, weights in ((quantized.in_floats, params), (quantized, tree)):
    run = _runner(denoiser, model)
    parts = [
      jax.device_get(run(weights, batch))[:fresh]
      for batch, fresh in batches(records, section.calibration.batch_size)
    ]
    outputs.append(np.concatenate(parts)[..., :channels])
  each = [records.step == step for step in range(steps)]
  rows = [noise_correction.fit(*(value[chosen] for value in outputs)) for chosen in each]
  times = np.asarray([records.t[chosen][0] for chosen in each])
  table = noise_correction.stacked(times, rows, others)
  shown = ', '.join(f'{np.mean(table[name]):.3g}' for name in ('gain', 'std'))
  log.say(f'correction of {steps} steps: mean gain and deviation of what is left: {shown}')
  return table if section.correction != 'mean' else {**table, 'std': np.zeros_like(table['std'])}


def _runner(denoiser: Denoiser, model: Model) -> Callable[[Params, Batch], jax.Array]:
  """Returns (params, batch) -> the output of a network at some records."""

  def run(params: Params, batch: Batch) -> jax.Array:
    return model.apply(params, *arguments(denoiser, batch))

  return jax.jit(run)
