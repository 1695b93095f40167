"""Parameters of a network as if it had been trained: none of them zero."""

import functools

import jax


@functools.cache
def made(model, seed):
  """Random parameters, none of them zero: at initialisation the U-Net's output is."""
  params = jax.jit(model.init)(jax.random.key(seed))
  leaves, treedef = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(seed + 100), len(leaves))
  return treedef.unflatten(
    [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
  )
