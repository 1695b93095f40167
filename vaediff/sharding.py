"""Where arrays live: a mesh of devices, and ordered rules from parameter paths to NamedShardings.

Axes: `data` splits the batch, `fsdp` splits the batch and the state. Never pmap.
"""

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
RULES: Sequence[tuple[str, PartitionSpec | str]] = ((r'.*', FSDP),)
"""(regex, spec), first match wins, over slash-joined paths such as `networks/denoiser/params/...`."""


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Returns the mesh that `config.mesh` describes, over all devices unless some are given.

  Raises:
    UserError: when the axes do not multiply to the number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = {axis: config[axis] for axis in ('data', 'fsdp')}
  rest = [axis for axis, size in sizes.items() if size == -1]
  if len(rest) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
    raise UserError(f'config.mesh sizes must be >= 1, at most one of them -1 (the rest); got {sizes}')
  known = int(np.prod([size for size in sizes.values() if size != -1]))
  if rest:
    sizes[rest[0]] = len(devices) // known
  if int(np.prod(list(sizes.values()))) != len(devices):
    raise UserError(f'config.mesh {dict(config)} does not fit the {len(devices)} devices here')
  return jax.make_mesh(
    tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array whose first dimension is the batch."""
  return NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))


def shardings_of(tree: Any, mesh: Mesh, rules: Sequence[tuple[str, PartitionSpec | str]] = RULES) -> Any:
  """Returns the NamedSharding of each leaf of an abstract tree, by the first rule its path matches."""

  def one(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    for pattern, spec in rules:
      if re.search(pattern, name):
        return NamedSharding(mesh, _largest_divisible(leaf.shape, mesh) if spec == FSDP else spec)
    raise UserError(f'no sharding rule matches {name!r}; end the rules with (".*", PartitionSpec())')

  return jax.tree_util.tree_map_with_path(one, tree)


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
