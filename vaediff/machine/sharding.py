"""Where arrays live: a mesh of devices, and ordered rules from parameter paths to NamedShardings.

Axes: `data` splits the batch, `fsdp` splits the batch and the state. Never pmap.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from vaediff.errors import UserError

FSDP = 'fsdp'
"""In place of a PartitionSpec: split the largest dimension that the `fsdp` axis divides."""
Rules = Sequence[tuple[str, PartitionSpec | str]]
"""(regex, spec), first match wins, over slash-joined paths such as `networks/denoiser/params/...`."""
RULES: Rules = ((r'.*', FSDP),)
"""The last resort, behind the rules of the config."""
AXES = ('data', 'fsdp')


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Returns the mesh that `config.mesh` describes, over all devices unless some are given.

  Raises:
    UserError: when the axes do not multiply to the number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = {axis: config[axis] for axis in AXES}
  rest = [axis for axis, size in sizes.items() if size == -1]
  if len(rest) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
    raise UserError(f'config.mesh sizes must be >= 1, at most one of them -1 (the rest); got {sizes}')
  known = math.prod(size for size in sizes.values() if size != -1)
  if rest:
    sizes[rest[0]] = len(devices) // known
  if math.prod(sizes.values()) != len(devices):
    asked = ', '.join(f'{axis}={config[axis]}' for axis in AXES)
    raise UserError(
      f'config.mesh ({asked}) does not divide the {len(devices)} devices here: the sizes must multiply to '
      'their number; one may be -1 (the rest)'
    )
  return jax.make_mesh(
    tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def replicate(tree: Any, mesh: Mesh) -> Any:
  """Returns the arrays held whole by every device; every process must give the same values.

  They may share memory with those that are given: donate neither, and change no NumPy array afterwards.
  """
  if jax.process_count() == 1:
    return jax.device_put(tree, replicated(mesh))  # nothing to compile
  return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))(tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array whose first dimension is the batch."""
  return NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))


def abstract_replicated(tree: Any, mesh: Mesh) -> Any:
  """Returns shapes and types of a tree of arrays, with a copy on every device."""
  where = replicated(mesh)
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree)


def rules_of(config: ConfigDict) -> Rules:
  """Returns the rules of `config.mesh.rules`, and behind them the last resort.

  A rule is a regex and a spec in words: 'replicated', 'fsdp' (the largest dimension that divides), or the
  axis of each dimension, as '-,-,-,fsdp' for the output channels of a convolution.

  Raises:
    UserError: for a regex that cannot be read, or a spec with an unknown axis.
  """
  rules = []
  for rule in config.rules:
    pair = rule if isinstance(rule, tuple | list) else ()
    if len(pair) != 2 or not all(isinstance(part, str) for part in pair):
      raise UserError(
        f"config.mesh.rules holds {rule!r}; a rule is a pair of texts (regex, spec), as ('kernel', 'fsdp')"
      )
    pattern, text = pair
    try:
      re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
      raise UserError(f'config.mesh.rules holds {pattern!r}, which is no regex: {error}') from error
    if text in ('replicated', FSDP):
      rules.append((pattern, FSDP if text == FSDP else PartitionSpec()))
      continue
    axes = [None if part.strip() == '-' else part.strip() for part in text.split(',')]
    for axis in axes:
      if axis is not None and axis not in AXES:
        raise UserError(
          f'config.mesh.rules gives {pattern!r} the spec {text!r}; valid: replicated, fsdp, or one of '
          f'{", ".join(AXES)} or - for each dimension'
        )
    named = [axis for axis in axes if axis is not None]
    if len(set(named)) < len(named):
      raise UserError(
        f'config.mesh.rules gives {pattern!r} the spec {text!r}, with an axis twice; it splits one dimension'
      )
    rules.append((pattern, PartitionSpec(*axes)))
  return (*rules, *RULES)


def check_rules(trees: Sequence[Any], rules: Rules) -> None:
  """Raises UserError for a rule that is the first match of no path of any tree: it would do nothing."""
  names = [path_name(path) for tree in trees for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
  unused = dict.fromkeys(pattern for pattern, _ in rules[: len(rules) - len(RULES)])
  for name in names:
    first = next((pattern for pattern, _ in rules if re.search(pattern, name)), None)
    unused.pop(first, None)
  for pattern in unused:
    raise UserError(
      f'config.mesh.rules: {pattern!r} is the first match of no array of any stage; a path looks like '
      f'{names[0]!r}'
    )


def shardings_of(tree: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
  """Returns the NamedSharding of each leaf of an abstract tree, by the first rule its path matches.

  Raises:
    UserError: when no rule matches, or a spec has more dimensions than the array or does not divide it.
  """

  def one(path, leaf):
    name = path_name(path)
    for pattern, spec in rules:
      if re.search(pattern, name):
        if spec == FSDP:
          return NamedSharding(mesh, _largest_divisible(leaf.shape, mesh))
        _check_divides(name, leaf.shape, spec, mesh)
        return NamedSharding(mesh, spec)
    raise UserError(f'no sharding rule matches {name!r}; end the rules with (".*", PartitionSpec())')

  return jax.tree_util.tree_map_with_path(one, tree)


def path_name(path: Any) -> str:
  """Returns the slash-joined path of a leaf."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def _check_divides(name: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> None:
  sizes = [1 if axis is None else mesh.shape[axis] for axis in spec]
  fits = len(spec) <= len(shape) and all(
    length % size == 0 for length, size in zip(shape, sizes, strict=False)
  )
  if not fits:
    raise UserError(
      f'config.mesh.rules splits {name!r}, of shape {shape}, by {tuple(spec)}, which does not divide it over '
      f'{dict(mesh.shape)}'
    )


def _largest_divisible(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
  size = mesh.shape['fsdp']
  fitting = [(length, -axis) for axis, length in enumerate(shape) if length % size == 0 and length >= size]
  if size == 1 or not fitting:
    return PartitionSpec()
  axis = -max(fitting)[1]
  return PartitionSpec(*[None] * axis, 'fsdp')


def put_batch(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
  """Returns the global batch on the devices, from the slice that this process read."""
  return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


def round_up(batch_size: int, mesh: Mesh) -> int:
  """Returns the smallest multiple of the number of devices that is >= `batch_size`."""
  return -(-batch_size // mesh.size) * mesh.size
