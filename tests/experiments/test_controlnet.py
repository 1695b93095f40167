"""A control of a locked diffusion: what it begins as, in which order it learns, how it is added and moved."""

import dataclasses
import functools
import importlib
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff import experiments, reads
from vaediff.conditions import control
from vaediff.errors import UserError
from vaediff.experiments import controlled, controlnet
from vaediff.experiments.denoiser import Denoiser
from vaediff.machine import sharding
from vaediff.models.controlnet import is_up
from vaediff.models.unet import convert_formulation
from vaediff.run import students

sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parents[2])]
from random_parameters import SEEDS, made  # noqa: E402

SEEDS |= {'base': 21, 'tuned': 22, 'control_control_low': 23}
COUNT = 4
TWO = {'control.sample.controls': (('control_low', 0.5),)}


def get(variant='unconditional,control', **changes):
  config = importlib.import_module('configs.digits').get_config(f'{variant},debug')
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  return students.resolve(config)


def build(variant='unconditional,control', stage='control', **changes):
  return experiments.build(get(variant, **changes), stage)


def read_of(experiment, *, begun=False):
  """Random networks for all that it reads; its own too, or those that training begins as."""

  def one(name, source):
    match source:
      case reads.FromStage():
        return made(source.model, SEEDS[name])
      case reads.Measured():
        return jax.tree.map(jnp.asarray, source.neutral())
      case reads.Published():
        return jax.tree.map(jnp.asarray, source.load())

  sources = {**experiment.frozen, **experiment.for_sampling}
  frozen = {name: one(name, source) for name, source in sources.items()}
  if not begun:
    return {**frozen, **{name: made(model, 30) for name, model in experiment.networks.items()}}
  begin = jax.jit(lambda frozen: experiment.start(experiment.init(jax.random.key(0)), frozen).eval_params)
  return {**frozen, **begin(frozen)}


def batch_of(count=COUNT, seed=0):
  rng = np.random.default_rng(seed)
  return {
    'image': jnp.asarray(rng.integers(0, 256, (count, 8, 8, 1), np.uint8)),
    'label': jnp.arange(count, dtype=jnp.int32),
    'mask': jnp.ones(count),
  }


def inputs_of(experiment, read, seed=3):
  """A state, times, and values as training sees them."""
  seen = jax.jit(lambda *args: experiment.examples(*args, training=False))
  _, values = seen(read, batch_of(), jax.random.key(seed))
  y = jax.random.normal(jax.random.key(seed + 1), (COUNT, *experiment.space.shape))
  return y, jnp.linspace(0.1, 1.0, COUNT), values


def output_of(denoiser, read, inputs):
  y, t, values = inputs
  return jax.jit(denoiser.output)(read, y, t, values)


def base_of(experiment, network='base'):
  """The denoiser of the base stage, as it would be without a control."""
  fields = {field.name: getattr(experiment.denoiser, field.name) for field in dataclasses.fields(Denoiser)}
  return Denoiser(**{**fields, 'network': network})


# What it begins as ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
  'variant',
  [
    'unconditional,control',
    pytest.param('formulation1,z,label,control', marks=pytest.mark.slow),
    pytest.param('formulation2,control', marks=pytest.mark.slow),
    pytest.param('formulation2,latent_diffusion,control', marks=pytest.mark.slow),
    pytest.param('unconditional,wavelet_diffusion,control_low', marks=pytest.mark.slow),
  ],
)
def test_at_step_0_the_output_is_the_bases_bit_for_bit(variant):
  experiment = build(variant, stage=variant.split(',')[-1])
  read = read_of(experiment, begun=True)
  inputs = inputs_of(experiment, read)
  assert control.CONTROL in inputs[2]
  begun, alone = output_of(experiment.denoiser, read, inputs), output_of(base_of(experiment), read, inputs)
  np.testing.assert_array_equal(begun, alone)
  assert float(jnp.abs(alone).max()) > 0.1
  copy, own = read['base'], read['control']['unet']
  assert {name: jax.tree.map(np.shape, copy[name]) for name in own} == jax.tree.map(np.shape, own)
  np.testing.assert_array_equal(own['conv_in']['kernel'], copy['conv_in']['kernel'])


def moved(before, after):
  return any(jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.any(a != b)), before, after)))


@pytest.mark.slow
def test_the_gradient_reaches_the_zero_convolutions_then_the_copy_then_the_inside_of_the_hint():
  experiment = build()
  frozen = {'base': made(experiment.frozen['base'].model, 21)}
  assert list(experiment.networks) == ['control'] and set(experiment.frozen) == {'base'}
  state = experiment.start(jax.jit(experiment.init)(jax.random.key(0)), frozen)
  update = jax.jit(experiment.train_step)
  found = []
  for number in range(3):
    params = state.networks['control'].params
    state, metrics = update(state, frozen, batch_of(), jax.random.key(number))
    after = state.networks['control'].params
    found.append(
      {
        'zeros': [moved(params[name], after[name]) for name in params if name.startswith('zero_')],
        'copy': [moved(part, after['unet'][name]) for name, part in params['unet'].items()],
        'last': moved(params['hint']['out'], after['hint']['out']),
        'inside': [
          moved(params['hint'][name], after['hint'][name]) for name in params['hint'] if name != 'out'
        ],
      }
    )
    assert np.isfinite(metrics['loss'])
  parts = len(params['unet'])
  assert [each['zeros'] for each in found] == [[True] * 5] * 3
  assert [each['copy'] for each in found] == [[False] * parts, [True] * parts, [True] * parts]
  assert [each['last'] for each in found] == [False, True, True]
  assert [each['inside'] for each in found] == [[False] * 3, [False] * 3, [True] * 3]


@pytest.mark.slow
def test_an_unlocked_base_learns_its_way_up_alone():
  experiment = build(**{'control.base_locked': False, 'control.optim.weight_decay': 0.1})
  assert set(experiment.networks) == {'control', 'denoiser'}
  frozen = {'base': made(experiment.frozen['base'].model, 21)}
  state = experiment.start(jax.jit(experiment.init)(jax.random.key(0)), frozen)
  state, _ = jax.jit(experiment.train_step)(state, frozen, batch_of(), jax.random.key(1))
  for after in (state.networks['denoiser'].params, state.networks['denoiser'].ema_params):
    assert {name: moved(part, after[name]) for name, part in frozen['base'].items()} == {
      name: is_up(name) for name in frozen['base']
    }


@pytest.mark.slow
def test_one_device_equals_eight():
  config = get()
  experiment = experiments.build(config, 'control')
  frozen = {'base': experiment.frozen['base'].model.init(jax.random.key(5))}
  frozen['base']['conv_out']['kernel'] += 0.1  # at initialisation it lets nothing through
  batch = batch_of(16)

  def one_update(mesh):
    state = experiment.start(experiment.init(jax.random.key(7)), frozen)
    state, there = sharding.replicate((state, frozen), mesh)
    own = jax.device_put(batch, sharding.batch_sharding(mesh))
    return jax.jit(experiment.train_step)(state, there, own, sharding.replicate(jax.random.key(8), mesh))[0]

  one, eight = (
    jax.device_get(one_update(sharding.make_mesh(config.mesh, devices)).networks['control'].params)
    for devices in (jax.devices()[:1], jax.devices())
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), one, eight)


# How it is added -----------------------------------------------------------------------------------


@functools.cache
def trained():
  """Two controls of one base with random parameters, what they read, and inputs."""
  experiment = build('unconditional,control,control_low', **TWO)
  read = read_of(experiment)
  return experiment, read, inputs_of(experiment, read)


def residuals(denoiser, read, inputs):
  y, t, values = inputs

  def run(read):
    own = denoiser.inputs(y, t, values, {})
    return denoiser.residuals(read, denoiser.controlled(read), own, values, None)

  return jax.jit(run)(read)


def only(experiment, *branches, **strengths):
  """The denoiser with some of its controls, at other strengths."""
  chosen = [
    dataclasses.replace(one, **({'strengths': strengths['strengths']} if strengths else {}))
    for one in branches
  ]
  return dataclasses.replace(experiment.denoiser, branches=tuple(chosen))


@pytest.mark.slow
def test_several_controls_are_added_with_their_weights():
  experiment, read, inputs = trained()
  first, second = experiment.denoiser.branches
  assert (first.strengths, second.strengths) == ((1.0,) * 5, (0.5,) * 5)
  assert (first.value, second.value) == ('control', 'control_control_low')
  both = residuals(experiment.denoiser, read, inputs)
  own = residuals(only(experiment, first), read, inputs)
  other = residuals(only(experiment, second, strengths=(1.0,) * 5), read, inputs)
  for a, b, c in zip(both, own, other, strict=True):
    assert float(jnp.abs(b).max()) > 1e-3 and float(jnp.abs(c).max()) > 1e-3
    np.testing.assert_allclose(a, b + 0.5 * c, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_strength_0_is_the_base_bit_for_bit():
  experiment, read, inputs = trained()
  alone = output_of(base_of(experiment), read, inputs)
  off = only(experiment, *experiment.denoiser.branches, strengths=(0.0,) * 5)
  np.testing.assert_array_equal(output_of(off, read, inputs), alone)
  y, t, values = inputs
  without = {name: value for name, value in values.items() if not name.startswith('control')}
  np.testing.assert_array_equal(output_of(experiment.denoiser, read, (y, t, without)), alone)
  assert float(jnp.abs(output_of(experiment.denoiser, read, inputs) - alone).max()) > 1e-3


def test_strengths_by_depth():
  def of(**sample):
    changes = {f'control.sample.{name}': value for name, value in sample.items()}
    return build(**changes).denoiser.branches[0].strengths

  assert of(strength=0.5) == (0.5,) * 5
  assert of(strengths=(0.0, 0.25, 0.5, 0.75, 1.0), strength=2.0) == (0.0, 0.5, 1.0, 1.5, 2.0)
  np.testing.assert_allclose(of(depth='decay'), [0.825**4, 0.825**3, 0.825**2, 0.825, 1])
  assert of(depth='resolution') == (1, 1, 2, 2, 2)  # sides 8, 8, 4, 4, 4
  middle = build(**{'control.only_middle': True}).denoiser.branches[0].strengths
  assert middle == (0, 0, 0, 0, 1)
  assert controlled.weighed(jnp.ones(1), 0.0) is None


@pytest.mark.slow
def test_in_the_conditional_branch_alone():
  """The weaker branch is then the base without its conditions."""
  changes = {'refiner.sample.guidance_weight': 1.0}
  both = build('unconditional,label,control', **changes)
  one = build('unconditional,label,control', **changes, **{'control.sample.branches': 'conditional'})
  read = read_of(both)
  y, t, values = inputs_of(both, read)
  null = jax.jit(lambda y, t: one.denoiser.x0_hat(read, values, ('label',))(y, t))(y, t)
  base_null = jax.jit(lambda y, t: base_of(both).x0_hat(read, values, ('label',))(y, t))(y, t)
  np.testing.assert_array_equal(null, base_null)
  controlled_null = jax.jit(lambda y, t: both.denoiser.x0_hat(read, values, ('label',))(y, t))(y, t)
  assert float(jnp.abs(controlled_null - null).max()) > 1e-3
  with_it = [
    jax.jit(lambda y, t, d=d: d.x0_hat(read, values)(y, t))(y, t) for d in (both.denoiser, one.denoiser)
  ]
  np.testing.assert_array_equal(*with_it)
  guided = jax.jit(lambda y, t: one.denoiser.guided(read, values)(y, t))(y, t)
  np.testing.assert_allclose(guided, 2 * with_it[0] - null, atol=2e-4)


@pytest.mark.slow
def test_both_formulations_keep_their_shift():
  """With the first convolutions of base and copy converted, they are one model in two coordinates."""
  second, first = build('formulation2,control'), build('formulation1,control')
  read = read_of(second)
  inputs = inputs_of(second, read)
  convert = functools.partial(convert_formulation, to=1, image_channels=1)
  copy = {**read['control'], 'unet': convert(read['control']['unet'])}
  converted = {**read, 'base': convert(read['base']), 'control': copy}
  wanted = output_of(second.denoiser, read, inputs)
  np.testing.assert_allclose(output_of(first.denoiser, converted, inputs), wanted, atol=2e-4)
  half = {**converted, 'control': read['control']}  # a copy that reads the state of the other formulation
  assert float(jnp.abs(output_of(first.denoiser, half, inputs) - wanted).max()) > 1e-2


# How it is moved -----------------------------------------------------------------------------------


def transferred(how):
  config = get(
    **{'control.sample.transfer.stage': 'refiner', 'control.sample.transfer.workdir': 'elsewhere',
       'control.sample.transfer.how': how}
  )  # fmt: skip
  with config.unlocked():
    config.control_transfer = config.refiner.copy_and_resolve_references()  # as of the other run
  return experiments.build(config, 'control')


@pytest.mark.slow
def test_a_transfer_by_offset_is_the_control_moved_by_what_the_base_was():
  offset, as_is, plain = transferred('offset'), transferred('as_is'), build()
  (source,) = offset.for_sampling.values()
  assert (source.stage, source.workdir, source.network) == ('refiner', 'elsewhere', 'denoiser')
  read = read_of(offset)
  inputs = inputs_of(plain, read)
  difference = jax.tree.map(jnp.subtract, read['tuned'], read['base'])
  copy = {
    name: jax.tree.map(jnp.add, part, difference[name]) for name, part in read['control']['unet'].items()
  }
  by_hand = {'base': read['tuned'], 'control': {**read['control'], 'unet': copy}}
  np.testing.assert_allclose(
    output_of(offset.denoiser, read, inputs), output_of(plain.denoiser, by_hand, inputs), rtol=1e-5, atol=1e-5
  )
  kept = {'base': read['tuned'], 'control': read['control']}
  wanted = output_of(plain.denoiser, kept, inputs)
  np.testing.assert_array_equal(output_of(as_is.denoiser, read, inputs), wanted)
  same = {**read, 'tuned': read['base']}  # a base that was not tuned
  np.testing.assert_allclose(
    output_of(offset.denoiser, same, inputs), output_of(plain.denoiser, read, inputs), rtol=1e-5, atol=1e-5
  )
  assert offset.alone().denoiser.transfer == '' and not offset.alone().for_sampling


@pytest.mark.slow
def test_a_stage_that_trains_is_drawn_with_its_own_control_alone():
  experiment, _, _ = trained()
  assert set(experiment.for_sampling) == {'control_control_low'}
  assert set(experiment.inputs) == {'control', 'control_control_low', 'noise'}
  alone = experiment.alone()
  assert len(alone.denoiser.branches) == 1 and not alone.for_sampling
  assert set(alone.inputs) == {'control', 'noise'} and alone.borrowed == ('control',)


# Validation ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_validation_says_how_far_samples_follow_their_control():
  experiment = build('formulation2,control').alone()
  read = read_of(experiment, begun=True)
  metrics = jax.jit(experiment.eval_step)(read, batch_of(), jax.random.key(0))
  assert {'loss', 'edge_f1', 'edge_precision', 'edge_recall', 'control_range'} == set(metrics)
  assert set(metrics) <= set(experiment.metrics)
  assert 0 < float(metrics['edge_f1']) <= 1 and float(metrics['control_range']) == 1
  numbers = lambda metrics: {name: float(value) for name, value in metrics.items()}
  assert experiment.warnings(numbers(metrics)) == ()
  blank = {**batch_of(), 'image': jnp.zeros((COUNT, 8, 8, 1), jnp.uint8)}
  of_blank = jax.jit(experiment.eval_step)(read, blank, jax.random.key(0))
  assert float(of_blank['edge_f1']) == 0  # of samples that have edges
  (said,) = experiment.warnings(numbers(of_blank))
  assert 'the control images are all the same everywhere' in said
  quiet = dataclasses.replace(experiment, score_steps=0)
  assert set(jax.jit(quiet.eval_step)(read, batch_of(), jax.random.key(0))) == {'loss'}


# The config ----------------------------------------------------------------------------------------


def test_its_section_is_its_bases_with_what_it_changes():
  config = get('unconditional,label,control')
  own, base = config.control, config.refiner
  assert own.model == base.model and own.diffusion == base.diffusion and own.conditions == base.conditions
  assert own.train.batch_size == base.train.batch_size and own.optim != base.optim
  assert set(own.sample) - set(base.sample) == {
    'control', 'strength', 'strengths', 'depth', 'branches', 'controls', 'transfer'
  }  # fmt: skip
  assert students.resolve(config.copy_and_resolve_references()) == config
  elsewhere = get('formulation1,control', **{'control.base.workdir': 'other'})
  assert elsewhere.control.vae.workdir == 'other' and elsewhere.refiner.vae.workdir == ''
  source = experiments.build(elsewhere, 'control').frozen['base']
  assert (source.stage, source.workdir, source.section) == ('refiner', 'other', 'control')


def test_captions_are_dropped_more_often_than_by_the_base():
  shapes = importlib.import_module('configs.shapes16')
  config = students.resolve(shapes.get_config('text,mini,control'))
  assert config.stages == ('refiner', 'control')
  assert (config.refiner.conditions.text.dropout, config.control.conditions.text.dropout) == (0.1, 0.5)
  assert config.control.text == config.refiner.text
  experiment = experiments.build(config, 'control')
  assert 'tokens_tower' in jax.eval_shape(experiment.base_source.model.init, jax.random.key(0))
  own = jax.eval_shape(experiment.networks['control'].init, jax.random.key(0))
  assert 'tokens_mlp' in own['unet'] and 'tokens_tower' not in own['unet']


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'control.base.stage': 'vae'}, "config.control.base.stage is 'vae', which is no stage"),
    ({'control.base.stage': 'distill_1'}, "'distill_1'.* A student is no base, but .*sample.transfer"),
    ({'control.control.kind': 'depth'}, "control.kind is 'depth'; valid: edges, low_resolution"),
    ({'control.control.kind': 'low_resolution', 'control.control.factor': 3}, 'factor is 3: it must divide'),
    ({'control.hint.strides': (2, 1)}, r'hint.strides is \(2, 1\)'),
    ({'control.sample.strengths': (1.0, 0.5)}, 'sample.strengths has 2 numbers; it must have 5'),
    ({'control.sample.depth': 'random'}, "sample.depth is 'random'"),
    ({'control.sample.control': ('',)}, 'sample.control must be files'),
    ({'control.sample.control': (3,)}, 'sample.control must be files'),
    ({'control.sample.controls': ('control_low',)}, r'must be pairs \(stage of a control, weight\)'),
    ({'control.sample.controls': (('refiner', 1.0),)}, "'refiner', which is no stage of a control"),
    ({'control.sample.controls': (('control', 1.0),)}, "names 'control', which is there already"),
    ({'control.sample.transfer.stage': 'vae'}, "sample.transfer.stage is 'vae', which is no stage"),
    ({'control.sample.transfer.stage': 'refiner', 'control.base_locked': False}, 'a way up of its own'),
  ],
)
def test_what_does_not_fit_is_refused(changes, message):
  with pytest.raises(UserError, match=message):
    build(**changes)


def test_controls_of_two_bases_are_not_added():
  with pytest.raises(UserError, match="'control_low', whose base is .*'other'.*one locked base"):
    build('unconditional,control,control_low', **TWO, **{'control_low.base.workdir': 'other'})
  with pytest.raises(UserError, match='whose base is .*unlocked'):
    build('unconditional,control,control_low', **TWO, **{'control_low.base_locked': False})


def test_a_control_is_transferred_to_a_network_of_the_same_architecture_alone():
  changes = {'control.sample.transfer.stage': 'refiner', 'control.sample.transfer.workdir': 'elsewhere'}
  config = get(**changes)
  with config.unlocked():
    config.control_transfer = config.refiner.copy_and_resolve_references()
    config.control_transfer.model.channels = 16
  with pytest.raises(UserError, match="whose network has another .* than the base 'refiner'"):
    experiments.build(config, 'control')
  with config.unlocked():
    config.control_transfer = config.refiner.copy_and_resolve_references()
    config.control_transfer.diffusion.schedule = 'cosine'
  with pytest.raises(UserError, match="diffusion.schedule is 'cosine'"):
    experiments.build(config, 'control')


@pytest.mark.parametrize(('one', 'two'), [(1, 2), (2, 1)])
def test_a_control_is_transferred_within_a_formulation_alone(one, two):
  """The shapes of both are the same, and the states that they read are not."""
  changes = {'control.sample.transfer.stage': 'refiner', 'control.sample.transfer.workdir': 'elsewhere'}
  own, other = f'formulation{one}', f'formulation{two}'
  config = get(f'{own},control', **changes)
  with config.unlocked():
    config.control_transfer = config.refiner.copy_and_resolve_references()
  assert experiments.build(config, 'control').denoiser.transfer
  with config.unlocked():
    config.control_transfer.diffusion.condition = other
  with pytest.raises(UserError, match=f"diffusion.condition is '{other}', but that of this one is '{own}'"):
    experiments.build(config, 'control')


def test_a_controlled_stage_teaches_no_student():
  config = importlib.import_module('configs.digits').get_config('unconditional,control,distill,debug')
  config.distill.teacher.stage = 'control'
  with pytest.raises(UserError, match="teacher.stage is 'control', which is no stage before it"):
    students.resolve(config)


def test_the_stages_of_a_control_in_any_order():
  for variant in ('control,unconditional', 'unconditional,control', 'control,label,unconditional'):
    assert get(variant).stages == ('refiner', 'control')
  assert get('control,formulation2').stages == ('vae', 'refiner', 'control')
  assert get('control,latent_diffusion').stages == ('autoencoder', 'vae', 'refiner', 'control')
  assert get('control,control_low').stages[-2:] == ('control', 'control_low')
  assert get('control,control_low').control_low.control.kind == 'low_resolution'
  assert controlnet.HANDED == ('control', 'controls', 'transfer')
