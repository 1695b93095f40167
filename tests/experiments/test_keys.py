"""Keys: each is drawn from once, or split, or folded, and never two of these.

`jax_debug_key_reuse` sees a key that is drawn from twice, but not one that is drawn from and then folded.
Here the uses of every key are read off the program of each stage's update.
"""

import collections
import functools
import importlib
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff import experiments
from vaediff.machine import sharding
from vaediff.run import draw, guard, students
from vaediff.run import frozen as frozen_networks

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent.parent))
USES = {'random_bits': 'drawn', 'random_split': 'split', 'random_fold_in': 'folded'}
CASES = {
  'vae': ('debug', 'vae', {'vae.train.flip': True}),
  'refiner': ('z,guided,debug', 'refiner', {'refiner.train.flip': True}),
  'refiner in latents': ('unconditional,latent_diffusion,debug', 'refiner', {'refiner.train.flip': True}),
  'autoencoder': ('vq,debug', 'autoencoder', {'autoencoder.train.microbatches': 2}),
  'light decoder': ('light,debug', 'decoder', {}),
  'ddgan': ('latent,debug', 'ddgan', {'ddgan.train.flip': True}),
  'adversarial refiner': ('adversarial_refiner,debug', 'ddgan', {}),
  'halving': ('distill,debug', 'distill_1', {'distill.data_free_fraction': 0.5}),
  'consistency': ('consistency,debug', 'consistency', {}),
  'adversarial': ('adversarial,debug', 'adversarial', {}),
  'matching': ('matching,debug', 'matching', {}),
  'noised x0_vae': ('formulation2,debug', 'refiner', {'refiner.conditions.vae.aug_level': 0.5}),
  'super-resolution': ('cascade,debug', 'sr_8', {}),
  'degraded super-resolution': ('cascade,debug', 'sr_8', {
    'sr_8.conditions.low_resolution.augmentation': 'bsr'
  }),
}
"""With one condition: of several the first has the key itself, and the others what is folded of it, so that
runs with one stay as they are (`conditions.base.key_of`)."""


def uses_of(jaxpr, names, found):
  """Adds to `found`, by key, what is done with it; `names` has the keys of the programs around."""

  def name_of(variable):
    return None if hasattr(variable, 'val') else names[variable]  # a literal is no key

  for variable in (*jaxpr.constvars, *jaxpr.invars):
    names.setdefault(variable, object())
  for equation in jaxpr.eqns:
    kind = equation.primitive.name
    if kind in USES:
      found[name_of(equation.invars[0])].append(USES[kind])
    inner = [
      part.jaxpr if hasattr(part, 'jaxpr') else part
      for value in equation.params.values()
      for part in (value if isinstance(value, tuple | list) else (value,))
      if hasattr(part, 'eqns') or hasattr(getattr(part, 'jaxpr', None), 'eqns')
    ]
    for program in inner:
      given = equation.invars[len(equation.invars) - len(program.invars) :]
      branches = collections.defaultdict(list) if kind == 'cond' else found
      own = {outer: name_of(known) for outer, known in zip(program.invars, given, strict=True)}
      uses_of(program, own, branches)
      if kind == 'cond':  # one of the branches is run
        for key, done in branches.items():
          found[key] = list({*found[key], *done})
    for variable in equation.outvars:
      names[variable] = object()  # of this call: programs that are called twice have one set of variables


def shared_keys(function, *args):
  """Returns what is done with every key of which more than one thing is done."""
  found = collections.defaultdict(list)
  uses_of(jax.make_jaxpr(function)(*args).jaxpr, {}, found)
  assert any('drawn' in done for done in found.values())
  return [done for done in found.values() if len(set(done)) > 1 or done.count('drawn') > 1]


def test_what_is_looked_for_is_found(key):
  def drawn_and_folded(key):
    return jax.random.normal(key) + jax.random.normal(jax.random.fold_in(key, 1))

  def inside(key):
    return jax.lax.cond(key is None, lambda: 0.0, lambda: drawn_and_folded(key))

  def good(key):
    one, two = jax.random.split(key)
    return jax.random.normal(one) + jax.random.normal(jax.random.fold_in(two, 1))

  assert shared_keys(drawn_and_folded, key) and shared_keys(jax.jit(drawn_and_folded), key)
  assert shared_keys(inside, key)
  assert not shared_keys(good, key)


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES)
def test_nothing_is_done_with_a_key_that_was_drawn_from(case):
  variant, stage, changes = CASES[case]
  config = importlib.import_module('configs.digits').get_config(variant)
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  experiment = experiments.build(students.resolve(config), stage)
  frozen = frozen_networks.abstract(experiment, sharding.make_mesh(config.mesh))
  state = jax.eval_shape(guard.with_counts(experiment.init), jax.random.key(0))
  rng = np.random.default_rng(0)
  image = jnp.asarray(rng.integers(0, 256, (8, 8, 8, 1), np.uint8))
  batch = {'image': image, 'label': jnp.arange(8), 'mask': jnp.ones(8)}
  key = jax.random.key(1)
  for kind in {experiment.kind_of(step) for step in range(60)}:
    update = functools.partial(experiment.train_step, kind=kind)
    assert not shared_keys(update, state, frozen, batch, key), kind
  read = {**frozen, **{name: network.params for name, network in state.networks.items()}}
  if case != 'autoencoder':  # its evaluation draws nothing
    assert not shared_keys(experiment.eval_step, read, batch, key)
  if case in ('vae', 'refiner', 'noised x0_vae', 'adversarial refiner', 'matching'):
    run = draw.sampler(experiment)
    assert not shared_keys(run, read, jnp.arange(8), {}, jnp.int32(0))
