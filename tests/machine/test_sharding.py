"""Meshes and rules: what each device holds, and what cannot be."""

import importlib
import math
import pathlib
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from vaediff import experiments
from vaediff.errors import UserError
from vaediff.machine import compiling, cost, sharding
from vaediff.run import guard, loop

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))


def mesh_config(data=-1, fsdp=1, rules=()):
  return ConfigDict({'data': data, 'fsdp': fsdp, 'rules': rules})


@pytest.mark.parametrize(
  ('data', 'fsdp', 'shape'), [(-1, 1, (8, 1)), (-1, 4, (2, 4)), (2, -1, (2, 4)), (1, 8, (1, 8))]
)
def test_meshes(data, fsdp, shape):
  mesh = sharding.make_mesh(mesh_config(data, fsdp))
  assert mesh.devices.shape == shape and mesh.axis_names == ('data', 'fsdp')


@pytest.mark.parametrize('count', [1, 8])
def test_what_is_replicated_lies_whole_on_every_device_and_nothing_is_compiled_for_it(count):
  mesh = sharding.make_mesh(mesh_config(), jax.devices()[:count])
  numbers = np.arange(16, dtype=np.float32)
  given = {
    'numpy': numbers,
    'split': jax.device_put(numbers, sharding.batch_sharding(mesh)),
    'key': jax.random.key(3),
  }
  with compiling.Clock() as clock:
    whole = sharding.replicate(given, mesh)
    assert clock.seconds == 0
  for leaf in jax.tree.leaves(whole):
    assert leaf.committed and leaf.sharding.is_equivalent_to(sharding.replicated(mesh), leaf.ndim)
  np.testing.assert_array_equal(whole['numpy'], numbers)
  np.testing.assert_array_equal(whole['split'], numbers)
  np.testing.assert_array_equal(jax.random.key_data(whole['key']), jax.random.key_data(jax.random.key(3)))


@pytest.mark.parametrize(
  ('data', 'fsdp', 'message'),
  [
    (-1, 3, r'config.mesh \(data=-1, fsdp=3\) does not divide the 8 devices'),
    (4, 4, 'does not divide the 8 devices'),
    (-1, -1, 'at most one of them -1'),
    (0, 1, 'must be >= 1'),
  ],
)
def test_meshes_that_do_not_divide(data, fsdp, message):
  with pytest.raises(UserError, match=message):
    sharding.make_mesh(mesh_config(data, fsdp))


def one_device_bytes(tree, device):
  shards = [s for leaf in jax.tree.leaves(tree) for s in leaf.addressable_shards if s.device == device]
  return sum(np.asarray(shard.data).nbytes for shard in shards)


@pytest.mark.parametrize('stage', ['vae', 'refiner'])
def test_fsdp_asks_each_device_for_an_eighth_of_the_state(stage):
  config = importlib.import_module('configs.digits').get_config()
  experiment = experiments.build(config, stage)
  leaves = jax.tree.leaves(loop.abstract_state(experiment, sharding.make_mesh(mesh_config(data=1, fsdp=8))))
  whole = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
  network = experiment.networks[list(experiment.networks)[0]]
  assert whole > 4 * 4 * cost.num_parameters(jax.eval_shape(network.init, jax.random.key(1)))
  shard = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
  assert sum(map(shard, leaves)) <= whole / 7


@pytest.mark.slow
@pytest.mark.parametrize('stage', ['vae', 'refiner'])
def test_fsdp_leaves_each_device_an_eighth_of_the_state(stage):
  config = importlib.import_module('configs.digits').get_config()
  experiment = experiments.build(config, stage)
  mesh = sharding.make_mesh(mesh_config(data=1, fsdp=8))
  where = jax.tree.map(lambda leaf: leaf.sharding, loop.abstract_state(experiment, mesh))
  state = jax.jit(guard.with_counts(experiment.init), out_shardings=where)(jax.random.key(0))
  whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
  assert whole > 4 * cost.num_parameters(
    experiment.networks[list(experiment.networks)[0]].init(jax.random.key(1))
  )
  for device in jax.devices():
    assert one_device_bytes(state, device) <= whole / 7


def test_rules_come_before_the_last_resort():
  rules = sharding.rules_of(mesh_config(rules=(('bias$', 'replicated'), ('conv/kernel$', '-,-,-,fsdp'))))
  mesh = sharding.make_mesh(mesh_config(data=2, fsdp=4))
  shape = jax.ShapeDtypeStruct
  tree = {
    'networks': {
      'vae': {'params': {'conv': {'kernel': shape((3, 3, 16, 8), 'f4'), 'bias': shape((8,), 'f4')}}}
    },
    'other': shape((6, 12), 'f4'),
    'step': shape((), 'i4'),
  }
  specs = jax.tree.map(lambda where: where.spec, sharding.shardings_of(tree, mesh, rules))
  conv = specs['networks']['vae']['params']['conv']
  assert conv['kernel'] == PartitionSpec(None, None, None, 'fsdp') and conv['bias'] == PartitionSpec()
  assert specs['other'] == PartitionSpec(None, 'fsdp') and specs['step'] == PartitionSpec()
  sharding.check_rules([tree], rules)


def test_moments_and_averages_lie_with_their_parameters():
  config = importlib.import_module('configs.digits').get_config('debug')
  experiment = experiments.build(config, 'refiner')
  rules = sharding.rules_of(mesh_config(rules=(('denoiser/.*kernel$', 'fsdp'), ('.*', 'replicated'))))
  mesh = sharding.make_mesh(mesh_config(data=4, fsdp=2))
  state = loop.abstract_state(experiment, mesh, rules)
  network = state.networks['denoiser']
  specs = [leaf.sharding.spec for leaf in jax.tree.leaves(network.params)]
  assert any(spec == PartitionSpec() for spec in specs) and any('fsdp' in tuple(spec) for spec in specs)
  moments = next(part for part in network.opt_state if hasattr(part, 'mu'))
  for tree in (moments.mu, moments.nu, network.ema_params):
    assert [leaf.sharding.spec for leaf in jax.tree.leaves(tree)] == specs


@pytest.mark.parametrize(
  ('rules', 'message'),
  [
    ((('(', 'fsdp'),), 'which is no regex'),
    ((('kernel', 'model'),), "the spec 'model'; valid: replicated, fsdp"),
    ((('kernel',),), 'a rule is a pair'),
    ((('kernel', '-,fsdp,fsdp'),), "the spec '-,fsdp,fsdp', with an axis twice"),
    ((('nothing_of_the_kind', 'fsdp'),), "'nothing_of_the_kind' is the first match of no array"),
    ((('kernel', 'fsdp'), ('denoiser.*kernel', 'fsdp')), "'denoiser.*kernel' is the first match of no array"),
  ],
)
def test_rules_that_would_do_nothing_or_cannot_be_read(rules, message):
  tree = {'networks': {'denoiser': {'kernel': jax.ShapeDtypeStruct((4, 4), 'f4')}}}
  with pytest.raises(UserError, match=message):
    sharding.check_rules([tree], sharding.rules_of(mesh_config(rules=rules)))


def test_a_rule_that_does_not_divide():
  mesh = sharding.make_mesh(mesh_config(data=1, fsdp=8))
  rules = sharding.rules_of(mesh_config(rules=(('kernel', 'fsdp,-'),)))
  tree = {'kernel': jax.ShapeDtypeStruct((12, 4), 'f4')}
  with pytest.raises(UserError, match=r"splits 'kernel', of shape \(12, 4\).* does not divide"):
    sharding.shardings_of(tree, mesh, rules)


def test_batches_must_divide_over_devices_and_microbatches():
  config = importlib.import_module('configs.digits').get_config('debug')
  mesh = sharding.make_mesh(config.mesh)
  section = config.vae
  loop.check_batch_size(section, 'vae', mesh)
  section.train.microbatches = 2
  with pytest.raises(
    UserError, match='vae.train.batch_size must be a multiple of the 8 devices times 2 micro'
  ):
    loop.check_batch_size(section, 'vae', mesh)
