"""Roundings of kernels, and ranges of their inputs, that are learned block by block.

Blocks are taken in the order of a forward pass: inputs of a block are those of the network whose earlier
blocks are rounded, outputs those of the float one. After each block all that is learned is stored beside the
stage.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vaediff.machine import distributed
from vaediff.models import adaround, integers, learned_ranges, ranges
from vaediff.models.functional import Model
from vaediff.models.observed import Block, Layer, block_io, blocks_of, subtree, with_subtree
from vaediff.models.quantized import Quantized
from vaediff.run import calibration, log
from vaediff.run.subjects import Subject
from vaediff.storage import files, identity
from vaediff.types import Params

RANGES = 'ranges/'
"""What is before the path of a layer in the file, where its array is the range of its input."""


def learned(
  subject: Subject, folder: pathlib.Path, quantized: Quantized, found: dict[str, Any], section: ConfigDict
) -> dict[str, dict[str, np.ndarray]]:
  """Returns `kernels`, the whole numbers of each kernel by path, and `ranges`, where those are learned too.

  A run that is cut off goes on with the next block.

  Args:
    subject: the float network and its records.
    folder: of the stage.
    quantized: what the network becomes.
    found: `kernel_scales`, and with quantized inputs `ranges` and `times`, as `Quantized.quantize` has them.
    section: `config.quantize`.
  """
  of_ranges = learned_ranges.Settings(**section.learned_ranges.to_dict())
  both = quantized.quantized_inputs and of_ranges.num_steps > 0
  asked = [section.adaround.to_dict(), quantized.bits]
  if both:
    asked += [section.learned_ranges.to_dict(), section.ranges, section.percentile, quantized.buckets]
  wanted = {**subject.made_of, calibration.SETTINGS: identity.digest(asked)}
  path = folder / f'rounded-{identity.digest(wanted)}.npz'
  done, rounded = stored(path, wanted), subject.params
  blocks = layers_by_block(quantized.in_floats, quantized.layers)
  gather = gatherer(subject, quantized.in_floats, tuple(block for block, _ in blocks))
  for number, (block, layers) in enumerate(blocks):
    if any(layer.path not in done for layer in layers):
      root = jax.random.key(section.calibration.seed)
      keys = [jax.random.fold_in(root, place) for place in (number, len(blocks) + number)]
      task = Task(
        block=block, layers=layers, params=subject.params, found=found, bits=quantized.bits,
        seen=gather(rounded, block), wanted=gather(subject.params, block).output,
      )  # fmt: skip
      done |= task.kernels(adaround.Settings(**section.adaround.to_dict()), keys[0])
      done |= task.ranges(of_ranges, keys[1], subject.t, done) if both else {}
      if jax.process_index() == 0:
        files.write_npz(path, {**done, calibration.MADE_OF: json.dumps(wanted)})
    for layer in layers:
      rounded = with_kernel(rounded, layer, scales_of(found, layer) * done[layer.path])
  kernels = {name: value for name, value in done.items() if not name.startswith(RANGES)}
  bounds = {name[len(RANGES) :]: value for name, value in done.items() if name not in kernels}
  return {'kernels': kernels, **({'ranges': bounds} if both else {})}


def stored(path: pathlib.Path, wanted: identity.MadeOf) -> dict[str, np.ndarray]:
  """Returns what an earlier run has learned of the same; its file has the digest of that in its name."""
  if not distributed.agree(path.exists()):
    return {}
  arrays = files.read_npz(path)
  with files.reading(path):
    made = json.loads(str(arrays.pop(calibration.MADE_OF)))
  identity.compare(str(path), made, wanted, files.REMOVE.capitalize())
  count = sum(not name.startswith(RANGES) for name in arrays)
  log.say(f'{path.name} holds the roundings of {count} layers: the others are learned')
  return arrays


def layers_by_block(model: Model, layers: tuple[Layer, ...]) -> tuple[tuple[Block, tuple[Layer, ...]], ...]:
  """Returns the blocks that have any of the layers, and those, in the order of a forward pass.

  A layer that is called before its block is, as that of an encoder's keys, is in none but itself.
  """
  found, known = [], set()
  for block in blocks_of(model):
    own = [layer for layer in layers if f'{layer.path}/'.startswith(f'{block.path}/')]
    own = [layer for layer in own if layer.path not in known]
    known |= {layer.path for layer in own}
    found += [(block, tuple(own))] if own else []
  return tuple(found)


def scales_of(found: dict[str, Any], layer: Layer) -> jax.Array:
  """Returns the scale of each weight of a layer, to be broadcast against its kernel."""
  return ranges.spread(found['kernel_scales'][layer.path], layer.shape, layer.slices)


def with_kernel(params: Params, layer: Layer, kernel: jax.Array) -> Params:
  """Returns the parameters with another kernel of a layer."""
  return with_subtree(params, layer.path, {**subtree(params, layer.path), 'kernel': kernel})


# What a block reads --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
  """What a block reads and gives, of all records.

  Attributes:
    rows: of its arguments, the arrays with a row for each record.
    arguments: (such rows) -> the arguments, with what is the same for every record among them.
    output: the first of what it returns.
  """

  rows: list[jax.Array]
  arguments: Callable[[Any], tuple[Any, ...]]
  output: jax.Array


def first(result: Any) -> jax.Array:
  """Returns what a block returns, or the first of several."""
  return result[0] if isinstance(result, tuple) else result


def gatherer(subject: Subject, model: Model, blocks: tuple[Block, ...]) -> Callable[[Params, Block], Seen]:
  """Returns (params, block) -> what it reads and gives of all records; one program is for all blocks."""

  def run(params: Params, batch: Any) -> dict[str, tuple[Any, jax.Array]]:
    args, keywords = subject.calls(batch)[0]
    seen = block_io(model, params, *args, blocks=blocks, **keywords)
    return {path: (inputs, first(result)) for path, (inputs, result) in seen.items()}

  compiled, shapes = jax.jit(run), []
  for count in (2, 3):  # what has a row for each record has another shape
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype), subject.records)  # noqa: B023
    shapes.append(jax.eval_shape(run, subject.params, batch))

  def gather(params: Params, block: Block) -> Seen:
    pair = (jax.tree.leaves(each[block.path][0]) for each in shapes)
    changing = [a.shape != b.shape for a, b in zip(*pair, strict=True)]
    parts = []
    for batch, fresh in subject.batches():
      args, output = compiled(params, batch)[block.path]
      leaves, tree = jax.tree.flatten(args)
      own = [x for x, chosen in zip(leaves, changing, strict=True) if chosen]
      parts.append(jax.tree.map(lambda x: x[:fresh], (own, output)))  # noqa: B023
    rows, output = jax.tree.map(lambda *each: jnp.concatenate(each), *parts)
    fixed = [
      None if chosen else x if x.ndim else x.item() for x, chosen in zip(leaves, changing, strict=True)
    ]

    def arguments(rows: Any) -> tuple[Any, ...]:
      given = iter(rows)
      return tree.unflatten([next(given) if x is None else x for x in fixed])

    return Seen(rows=rows, arguments=arguments, output=output)

  return gather


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """What is learned of one block.

  Attributes:
    block: it.
    layers: its layers.
    params: of the whole float network.
    found: `kernel_scales`, `ranges` and `times`.
    bits: of the kernels.
    seen: what it reads where the earlier blocks are rounded.
    wanted: its output in the float network.
  """

  block: Block
  layers: tuple[Layer, ...]
  params: Params
  found: dict[str, Any]
  bits: int
  seen: Seen
  wanted: jax.Array

  def below(self, layer: Layer) -> str:
    """Returns the path of a layer in the block."""
    return layer.path[len(self.block.path) :].strip('/')

  def output(self, kernels: dict[str, jax.Array], rows: Any) -> jax.Array:
    """Returns what the block gives with other kernels, by the paths of their layers."""
    tree = subtree(self.params, self.block.path)
    for layer in self.layers:
      below, kernel = self.below(layer), kernels[layer.path]
      part = {**subtree(tree, below), 'kernel': kernel}
      tree = with_subtree(tree, below, part) if below else part
    return first(self.block.apply(tree, *self.seen.arguments(rows)))

  def kernels(self, settings: adaround.Settings, key: jax.Array) -> dict[str, np.ndarray]:
    """Returns the whole numbers of the kernels, by path."""
    kernels = {layer.path: subtree(self.params, layer.path)['kernel'] for layer in self.layers}
    scales = {layer.path: scales_of(self.found, layer) for layer in self.layers}
    found = adaround.learn(
      lambda kernels, *rows: self.output(kernels, rows),
      kernels, scales, tuple(self.seen.rows), self.wanted, settings, key, self.bits,
    )  # fmt: skip
    log.say(f'  {self.block.path}: error {found.error:.4g}, of rounding to nearest {found.nearest:.4g}')
    return {path: np.asarray(value) for path, value in found.kernels.items()}

  def ranges(
    self, settings: learned_ranges.Settings, key: jax.Array, t: np.ndarray, done: dict[str, np.ndarray]
  ) -> dict[str, np.ndarray]:
    """Returns the ranges of the layers' inputs with rounded kernels, by `RANGES` and path.

    Args:
      settings: how they are learned.
      key: of which records an update sees.
      t: the time of each record.
      done: the rounded kernels.
    """
    bounds = {layer.path: jnp.asarray(self.found['ranges'][layer.path]) for layer in self.layers}
    affine = {path: integers.affine(x[..., 0], x[..., 1]) for path, x in bounds.items()}
    scales, zeros = ({path: pair[i] for path, pair in affine.items()} for i in range(2))
    kernels = {layer.path: scales_of(self.found, layer) * done[layer.path] for layer in self.layers}
    layers = {self.below(layer): layer for layer in self.layers}
    bucket = jnp.asarray(np.searchsorted(self.found['times'], t, side='left'), jnp.int32)

    def block(scales: learned_ranges.Steps, bucket: jax.Array, *rows: jax.Array) -> jax.Array:
      call = lambda: self.output(kernels, rows)
      return learned_ranges.with_rounded_inputs(call, layers, scales, zeros, bucket)

    rows = (bucket, *self.seen.rows)
    found = learned_ranges.learn(block, scales, rows, self.wanted, settings, key)
    log.say(f'  {self.block.path}: error {found.error:.4g}, of the measured ranges {found.measured:.4g}')
    return {RANGES + path: np.asarray(bounds[path] * found.factors[path][..., None]) for path in bounds}
