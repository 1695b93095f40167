"""The programs of a stage: one for every kind of update, and what loops do is counted in full."""

import importlib
import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest
from some_slow import some_slow

from vaediff import experiments
from vaediff.errors import UserError
from vaediff.machine import chips, cost, sharding
from vaediff.modes import compile as aot
from vaediff.modes import compile_tables
from vaediff.run import students

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
LEAST = -1.0


def get_config(name='digits', variant='debug'):
  return importlib.import_module(f'configs.{name}').get_config(variant)


def mesh_of(config, count):
  return sharding.make_mesh(config.mesh, jax.devices()[:count])


def test_fsdp_of_four_leaves_a_quarter_of_the_state_on_each_device():
  sizes = {}
  for fsdp in (1, 4):
    config = get_config('digits', '')
    config.mesh.fsdp = fsdp
    experiment = experiments.build(config, 'refiner')
    sizes[fsdp] = aot.train_program(config, 'refiner', experiment, mesh_of(config, 4)).sizes
  params = jax.eval_shape(experiment.networks['denoiser'].init, jax.random.key(0))
  assert sizes[1]['parameter_bytes'] == sizes[1]['ema_bytes'] == cost.num_bytes(params)
  for name in ('parameter_bytes', 'optimizer_bytes', 'ema_bytes'):
    assert sizes[4][name] == pytest.approx(sizes[1][name] / 4, rel=0.01)
  assert sizes[4]['frozen_bytes'] == sizes[1]['frozen_bytes'] > 0


def test_a_batch_smaller_than_the_slice_is_raised_and_noted_one_that_cannot_be_split_is_refused():
  config = get_config()
  experiment = experiments.build(config, 'vae')
  config.vae.train.batch_size = 3
  program = aot.train_program(config, 'vae', experiment, mesh_of(config, 8))
  assert program.batch_size == 8 and 'train.batch_size 3 -> 8' in program.note
  config.vae.train.microbatches = 2  # each is split over the devices
  parts = aot.train_program(config, 'vae', experiments.build(config, 'vae'), mesh_of(config, 8))
  assert parts.batch_size == 16 and 'train.batch_size 3 -> 16' in parts.note
  config.vae.train.microbatches = 1
  config.vae.train.batch_size = 12
  with pytest.raises(UserError, match='config.vae.train.batch_size must be a multiple of the 8 devices'):
    aot.train_program(config, 'vae', experiment, mesh_of(config, 8))


KINDS = {
  'vqgan': (['train', 'train (adversarial)'], {
    'loss.discriminator_start_step': 6, 'loss.adversarial_start_step': 6
  }),
  'ddgan': (['train', 'train (r1)'], {'loss.r1_every_steps': 3}),
  'matching': (['train', 'train (student)'], {}),
}  # fmt: skip


@pytest.mark.parametrize('stage', some_slow(list(KINDS), 'vqgan'))
def test_every_kind_of_update_is_a_program_and_the_one_that_does_not_fit_is_named(stage, monkeypatch, capsys):
  macs = {}

  def compiled(program, stage, slice_, *rest):
    del rest
    macs[program.name] = program.macs
    assert cost.macs(program.function, *program.args) == program.macs  # what is compiled is what is counted
    row = {'topology': slice_.name, 'devices': 4, 'stage': stage, 'program': program.name}
    row |= {'batch_size': 8, 'note': '', 'hbm_bytes': 2**34, 'total_bytes': 2**35, 'temp_bytes': 0}
    return {**row, 'fits': '(' not in program.name}

  monkeypatch.setattr(chips, 'devices', lambda slice_: jax.devices()[:4])
  monkeypatch.setattr(aot, 'compile_program', compiled)
  config = students.resolve(get_config(variant=f'{stage},debug'))
  updates, changes = KINDS[stage]
  config[stage].update_from_flattened_dict({'train.num_steps': 8, **changes})
  named = updates[-1].replace('(', r'\(').replace(')', r'\)')
  refusal = rf'^v5e:2x2: stage {stage}, {named}, batch of 8 on 4 devices needs 32.000 of 16.000 GiB of HBM\. '
  with pytest.raises(UserError, match=refusal):
    aot.compile_mode(config, (stage,), 'v5e:2x2', LEAST)
  assert list(macs) == [*updates, 'sample']
  assert macs[updates[0]] < macs[updates[1]]
  head = capsys.readouterr().out.strip().splitlines()[0]
  assert [part.strip() for part in head.split('  ')][-3:] == [f'{stage} {name}' for name in macs]


def test_microbatches_change_what_is_held_not_what_is_done():
  """XLA counts the loop over them once; the figures count every turn."""
  config = get_config()
  config.vae.train.batch_size = 32
  mesh, programs, rows = mesh_of(config, 1), {}, {}
  for parts in (1, 4):
    config.vae.train.microbatches = parts
    experiment = experiments.build(config, 'vae')
    programs[parts] = aot.train_program(config, 'vae', experiment, mesh)
    rows[parts] = aot.compile_program(programs[parts], 'vae', chips.parse('v5e:1x1'), mesh, LEAST)
  assert programs[4].macs == programs[1].macs == programs[1].macs_once == 4 * programs[4].macs_once
  for name in ('flops', 'compute_seconds'):
    assert rows[4][name] == pytest.approx(rows[1][name], rel=0.1), name
  assert rows[4]['seconds'] > 0.7 * rows[1]['seconds']


@pytest.mark.slow
def test_what_draws_id_by_id_has_a_loop_too():
  config = get_config(variant='vqgan,prior,debug')
  experiment = experiments.build(config, 'prior')
  program = aot.sample_program(config, 'prior', experiment, mesh_of(config, 2))
  assert program.macs > program.macs_once > 0


@pytest.mark.slow
@pytest.mark.parametrize('sampler', ['ddim', 'heun'])
def test_the_samplers_loop_is_told_from_its_setup(sampler):
  config = get_config()
  config.refiner.sample.update({'sampler': sampler, 'num_steps': 10})
  experiment, mesh = experiments.build(config, 'refiner'), mesh_of(config, 2)
  program = aot.sample_program(config, 'refiner', experiment, mesh)
  model, vae = experiment.networks['denoiser'], experiment.frozen['vae'].model
  params = jax.eval_shape(model.init, jax.random.key(0)), jax.eval_shape(vae.init, jax.random.key(0))
  args = jax.tree.map(lambda shape: jnp.zeros((4, *shape.shape[1:])), model.inputs)
  body = cost.macs(model.apply, params[0], *args)
  z = jnp.zeros((4, *experiment.inputs['z'].shape))
  setup = cost.macs(lambda params, z: vae.apply(params, z, method='decode'), params[1], z)
  assert program.macs_once == pytest.approx(setup + body)
  assert program.macs == pytest.approx(setup + experiment.num_function_evaluations * body)


def test_rules_of_the_config_say_where_the_state_lies():
  sizes = {}
  for spec in ('fsdp', 'replicated'):
    config = get_config()
    config.mesh.update({'fsdp': 4, 'rules': (('vae/.*', spec),)})
    experiment = experiments.build(config, 'vae')
    sizes[spec] = aot.train_program(config, 'vae', experiment, mesh_of(config, 4)).sizes
  params = jax.eval_shape(experiment.networks['vae'].init, jax.random.key(0))
  assert sizes['replicated']['parameter_bytes'] == cost.num_bytes(params)
  for name in ('parameter_bytes', 'optimizer_bytes'):
    assert sizes['fsdp'][name] < sizes['replicated'][name] / 2


@pytest.mark.parametrize(
  ('variant', 'stage', 'programs'),
  some_slow([
    ('clip', 'clip', ['train']),
    ('unconditional,label,classifier_guided', 'noisy_classifier', ['train']),
    ('unclip', 'embedding_prior', ['train', 'sample']),  # draws vectors, which it hands on
    ('divae_joint,prior', 'prior', ['train', 'sample']),  # draws ids: this tokenizer has no decoder
  ], 'unconditional,label,classifier_guided', 'divae_joint,prior'),
)  # fmt: skip
def test_only_what_draws_has_a_sampler(variant, stage, programs, monkeypatch):
  def built(program, stage, *rest):
    del rest
    return {'stage': stage, 'program': program.name, 'counted': program.macs > 0}

  monkeypatch.setattr(chips, 'devices', lambda slice_: jax.devices()[:4])
  monkeypatch.setattr(aot, 'compile_program', built)
  config = get_config(variant=f'debug,{variant}')
  rows = aot.compile_for(config, (stage,), 'v5e:2x2', LEAST)
  assert rows == [{'stage': stage, 'program': program, 'counted': True} for program in programs]


@pytest.mark.parametrize('count', [0, 8])
def test_a_program_without_products_has_figures(count):
  """XLA names no FLOPs of what only moves numbers, and no bytes of what does nothing."""
  mesh, where = mesh_of(get_config(), 1), jax.sharding.SingleDeviceSharding(jax.devices()[0])
  program = aot.Program(
    name='sample', function=jax.jit(lambda x: x[::-1]), batch_size=1, dtype='float32', gradient_bytes=0,
    args=(jax.ShapeDtypeStruct((count,), jnp.float32, sharding=where),), macs=0, macs_once=0, note='',
    sizes=dict.fromkeys(('parameter_bytes', 'optimizer_bytes', 'ema_bytes', 'frozen_bytes'), 0),
  )  # fmt: skip
  row = aot.compile_program(program, 'any', chips.parse('v5e:1x1'), mesh, LEAST)
  assert row['fits'] and row['flops'] == 0
  assert row['images_per_second'] == (1 / row['seconds'] if count else float('inf'))
  assert (row['accessed_bytes'] > 0) == (count > 0)
  assert 'estimate, images/s' in compile_tables.table([row])


def test_effort_outside_its_range_is_refused():
  with pytest.raises(UserError, match=r'config.compile.effort must be in \[-1, 1\].*2'):
    aot.compile_for(get_config(), ('vae',), 'v5e:2x2', 2.0)
