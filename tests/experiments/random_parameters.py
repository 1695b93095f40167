"""Parameters of networks as if they had been trained, none of them zero, and what an experiment reads."""

import functools

import as_trained
import jax
import jax.numpy as jnp

from vaediff import reads
from vaediff.models.functional import Model

SEEDS = {'teacher': 1, 'vae': 2, 'start': 7, 'autoencoder': 8, 'tokenizer': 9, 'first_tokenizer': 10}


def made(model, seed):
  """Random parameters, none of them zero: at initialisation the U-Net's output is."""
  structs, treedef = jax.tree.flatten(model.inputs)
  return _made(model.module, tuple(structs), treedef, seed)


@functools.cache
def _made(module, structs, treedef, seed):
  return as_trained.params_of(Model(module=module, inputs=treedef.unflatten(structs)).init, seed)


def frozen_of(experiment):
  """What it reads of others as the loop would load it: random networks, no measurement, published arrays."""

  def one(name, source):
    match source:
      case reads.FromStage():
        return made(source.model, SEEDS[name])
      case reads.Measured() | reads.Captions():
        return source.neutral()
      case reads.Published():
        return jax.tree.map(jnp.asarray, source.load())

  return {name: one(name, source) for name, source in experiment.frozen.items()}


def values_of(diffusion, read, count, seed=4):
  """The values of random codes, of which the rest is drawn or follows; {} where there is no VAE."""
  conditions = diffusion.conditions

  @jax.jit
  def values(read):
    given = conditions.draw(read, jax.random.split(jax.random.key(seed + 1), count), jnp.arange(count))
    if 'z' in given:
      given['z'] = jax.random.normal(jax.random.key(seed), given['z'].shape)
    return conditions.values(read, conditions.complete(read, given))

  return values(read)
