"""Digests of the arrays of a state: a checkpoint's id is made of them, and its arrays are compared with them.

They depend on values, shapes and types alone, not on the devices, nor on how arrays are split over them.
"""

import collections
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vaediff.machine import sharding
from vaediff.storage import identity

DEPTH = 3
"""A part of a state is what the first so many names of a path have in common: networks/<name>/params."""


def of_parts(tree: Any) -> dict[str, str]:
  """Returns the digest of each part of a tree of arrays, by its name.

  All processes must call it. A part of `networks` is one network's parameters, average or optimizer state.
  """
  leaves = [(sharding.path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
  sums = _over_processes(np.array([_own_sum(leaf) for _, leaf in leaves], np.uint64))
  parts = collections.defaultdict(list)
  for (path, leaf), value in zip(leaves, sums.tolist(), strict=True):
    parts['/'.join(path.split('/')[:DEPTH])].append([path, list(leaf.shape), str(leaf.dtype), value])
  return {part: identity.digest(sorted(facts)) for part, facts in parts.items()}


def _own_sum(leaf: Any) -> int:
  """Returns the sum of the places of an array that this process answers for."""
  if not isinstance(leaf, jax.Array):
    return identity.sum_of(np.asarray(leaf)) if jax.process_index() == 0 else 0
  total = 0
  for shard in leaf.addressable_shards:
    if shard.replica_id == 0:
      first = tuple(part.start or 0 for part in shard.index)
      total += identity.sum_of(np.asarray(shard.data), first)
  return total % 2**64


def _over_processes(sums: np.ndarray) -> np.ndarray:
  """Returns the sums of all processes, modulo 2^64."""
  if jax.process_count() == 1:
    return sums
  halves = multihost_utils.process_allgather(sums.view(np.uint32))  # JAX would cut 64 bits to 32
  return np.asarray(halves, np.uint32).view(np.uint64).sum(axis=0, dtype=np.uint64)
