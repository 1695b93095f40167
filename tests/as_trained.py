"""Parameters of a network as if it had been trained: none is zero, and kernels keep the size of their inputs.

In numpy: to compile the initialisation of a network takes longer than most tests of it.
"""

import math

import jax
import numpy as np


def params_of(init, seed=0, deviation=0.1):
  """Returns a tree of the shapes of `init(key)`; each number deviates so much from where it begins."""
  rng = np.random.default_rng(seed)

  def one(path, leaf):
    name = str(path[-1].key)
    fan_in = math.prod(leaf.shape[:-1]) if name == 'kernel' else math.inf
    spread = math.hypot(deviation, 1 / math.sqrt(3 * fan_in))
    numbers = (name == 'scale') + spread * rng.standard_normal(leaf.shape)
    return jax.device_put(np.asarray(numbers, leaf.dtype))  # `jnp.asarray` compiles for each shape

  return jax.tree_util.tree_map_with_path(one, jax.eval_shape(init, jax.random.key(0)))
