"""A smaller image as a condition: what the network reads, what is refused, what a dropped example sees."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from some_slow import some_slow

from vaediff import experiments
from vaediff.errors import UserError
from vaediff.reads import Sampled
from vaediff.spaces.pixels import Pixels


def build(stage='sr_8', variant='cascade,debug', name='digits', **changes):
  config = importlib.import_module(f'configs.{name}').get_config(variant)
  config.update_from_flattened_dict(changes)
  return experiments.build(config, stage)


def low_of(experiment):
  return next(one for one in experiment.conditions.each if one.name == 'low_resolution')


def images(count=4, side=8):
  return jax.random.uniform(jax.random.key(1), (count, side, side, 1), minval=-1.0, maxval=1.0)


def test_nothing_of_another_stage_is_read_in_training():
  for stage in ('base', 'sr_8'):
    assert build(stage).frozen == {}
  assert build('base').makers == () and build('base').depth == 0
  assert build().makers == (Sampled(stage='base', workdir='', feeds='low', depth=1),)


def test_the_network_reads_the_mean_of_pixels_as_large_as_the_state():
  one, x = low_of(build()), images()
  seen = one.observe({}, {}, x, None)
  assert set(seen) == {'low'} and seen['low'].shape == (4, 4, 4, 1)
  np.testing.assert_allclose(seen['low'][:, 1, 2], x[:, 2:4, 4:6].mean(axis=(1, 2)), atol=1e-6)
  values = one.values({}, seen)
  assert set(values) == set(one.ports) == {'low', 'low_level'}
  assert values['low'].shape[1:] == one.ports['low'].shape == (8, 8, 1)
  for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
    np.testing.assert_array_equal(values['low'][:, row::2, column::2], seen['low'])
  np.testing.assert_array_equal(values['low_level'], np.zeros(4))
  np.testing.assert_array_equal(one.shown(seen)['low'], values['low'])


def test_noise_is_added_before_the_image_is_made_larger():
  one, x = low_of(build()), images()
  seen = one.observe_in_training({}, {}, x, jax.random.key(2))
  assert set(seen) == {'low', 'low_level', 'low_noise'} and seen['low_noise'].shape == (4, 4, 4, 1)
  np.testing.assert_array_equal(seen['low'], one.observe({}, {}, x, None)['low'])
  values = one.values({}, seen)
  np.testing.assert_array_equal(values['low'][:, ::2, ::2], values['low'][:, 1::2, 1::2])
  level = np.asarray(seen['low_level'])[:, None, None, None]
  alpha, sigma = one.noising.schedule.alpha(level), one.noising.schedule.sigma(level)
  np.testing.assert_allclose(
    values['low'][:, ::2, ::2], alpha * seen['low'] + sigma * seen['low_noise'], atol=1e-4
  )
  np.testing.assert_array_equal(one.shown(seen)['low'][:, ::2, ::2], seen['low'])  # shown without noise


@pytest.mark.parametrize('augmentation', some_slow(['blur', 'bsr', 'none'], 'blur', 'none'))
def test_other_augmentations_are_of_training_alone_and_have_no_level(augmentation):
  one, x = low_of(build(**{'sr_8.conditions.low_resolution.augmentation': augmentation})), images(32)
  assert set(one.ports) == set(one.inputs) == {'low'} and one.max_level == 0
  clean = one.observe({}, {}, x, jax.random.key(0))['low']
  worse = one.observe_in_training({}, {}, x, jax.random.key(0))['low']
  assert np.any(worse != clean) == (augmentation != 'none')
  assert one.draw({}, jax.random.split(jax.random.key(0), 2), jnp.arange(2)) == {}


def test_a_dropped_example_sees_neither_the_image_nor_the_level():
  experiment = build(**{'sr_8.conditions.low_resolution.dropout': 0.1})
  denoiser = experiment.denoiser
  assert set(denoiser.conditions.without(('low_resolution',), 2)) == {'low', 'low_level'}
  drop = denoiser.conditions.drop(jax.random.key(0), 500)
  np.testing.assert_array_equal(drop['low'], drop['low_level'])
  assert 0.05 < float(drop['low'].mean()) < 0.15
  shapes = jax.eval_shape(denoiser.model.init, jax.random.key(0))
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: jnp.float32(0.3 * rng.normal(size=leaf.shape)), shapes)
  assert params['null_low'].shape == (8, 8, 1) and params['null_low_level'].shape == (8,)
  run = jax.jit(lambda values, mask: denoiser.output(
    {'denoiser': params}, images(2), jnp.full(2, 0.5), values, {'low': mask, 'low_level': mask}
  ))  # fmt: skip
  first = {'low': images(2), 'low_level': jnp.float32([0.1, 0.4])}
  second = {'low': -first['low'], 'low_level': jnp.float32([0.3, 0.0])}
  level = {**first, 'low_level': second['low_level']}
  everyone, nobody = jnp.ones(2, bool), jnp.zeros(2, bool)
  np.testing.assert_array_equal(run(first, everyone), run(second, everyone))
  for other in (second, level):  # but for who is not dropped, both matter
    assert np.all(np.abs(run(first, nobody) - run(other, nobody)).max(axis=(1, 2, 3)) > 1e-4)


@pytest.mark.slow
def test_the_level_has_no_effect_at_first():
  denoiser = build().denoiser
  params = jax.jit(denoiser.model.init)(jax.random.key(0))
  assert not np.any(params['low_level_mlp']['dense_1']['kernel'])
  assert np.any(params['low_level_mlp']['dense_0']['kernel'])


def test_there_is_no_bound_of_an_image_given_a_part_of_it():
  assert build().likelihood == '' and build('base').likelihood == ''
  assert build('refiner', 'unconditional,debug').likelihood


# Of a config ------------------------------------------------------------------------------------------


def test_stages_of_a_large_image():
  experiments_of = {stage: build(stage, 'cascade', 'emoji64') for stage in ('base', 'sr_32', 'sr_64')}
  assert {name: one.space.shape[0] for name, one in experiments_of.items()} == {
    'base': 16, 'sr_32': 32, 'sr_64': 64
  }  # fmt: skip
  assert [one.depth for one in experiments_of.values()] == [0, 1, 2]
  assert experiments_of['sr_32'].makers[0].stage == 'base' and low_of(experiments_of['sr_32']).pool == 4
  assert experiments_of['sr_64'].makers[0].stage == 'sr_32' and low_of(experiments_of['sr_64']).pool == 2
  x = images(2, 64)
  np.testing.assert_allclose(
    Pixels(shape=(16, 16, 1), factor=4).encode({}, x, None)[:, 3, 5],
    x[:, 12:16, 20:24].mean(axis=(1, 2)), atol=1e-6,
  )  # fmt: skip


def test_a_label_conditions_every_stage():
  for variant in ('cascade,label,debug', 'label,cascade,debug'):
    for stage in ('base', 'sr_8'):
      assert build(stage, variant).conditions.ports['label'].classes == 10


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'factor': 3}, 'factor is 3: it must divide the side of the images of the stage, 8'),
    (
      {'factor': 4},
      "stage is 'base', whose images have 4 pixels a side; .* factor is 4: 2 are needed",
    ),
    ({'factor': 1}, r'conditions.low_resolution.factor must be in \[2, 64\], got 1'),
    ({'stage': 'none'}, "stage is 'none', which is no stage of this config that draws images"),
    ({'stage': 'sr_8'}, 'sr_8 <- sr_8 would feed each other in a circle'),
    ({'augmentation': 'jpeg'}, "augmentation is 'jpeg'; valid: none, noise, blur, bsr"),
    ({'max_level': 1.5}, r'max_level must be in \[0, 1\], got 1.5'),
  ],
)
def test_what_cannot_be_is_refused(changes, message):
  changes = {f'sr_8.conditions.low_resolution.{name}': value for name, value in changes.items()}
  with pytest.raises(UserError, match=message):
    build(**changes)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'sr_8.sample.aug_level': 0.6}, 'sample.aug_level is 0.6, outside .*low_resolution.max_level = 0.5'),
    (
      {'sr_8.sample.aug_level': 0.1, 'sr_8.conditions.low_resolution.augmentation': 'blur'},
      'sample.aug_level is 0.1, but the network reads no level',
    ),
    ({'sr_8.space': 'wavelet'}, "conditions.low_resolution needs space = 'pixel', got 'wavelet'"),
  ],
)
def test_levels_and_spaces_that_cannot_be_are_refused(changes, message):
  with pytest.raises(UserError, match=message):
    build(**changes)


def test_the_level_of_the_last_stage_must_be_one_of_all_before_it():
  changes = {'sr_32.conditions.low_resolution.max_level': 0.2, 'sr_64.sample.aug_level': 0.3}
  with pytest.raises(UserError, match="sample.aug_level is 0.3, .* 'sr_32' is trained at levels up to 0.2"):
    build('sr_64', 'cascade,debug', 'emoji64', **changes)


@pytest.mark.parametrize(('factor', 'space'), [(3, 'pixel'), (2, 'wavelet')])
def test_a_factor_that_cannot_be_is_refused(factor, space):
  changes = {'base.space_factor': factor, 'base.space': space}
  with pytest.raises(UserError, match=f'space_factor is {factor}: it must divide data.image_size = 8'):
    build('base', **changes)


@pytest.mark.parametrize('shape', [(8, 8, 1), (2, 2, 1), (4, 4, 3)])
def test_a_small_image_of_another_size_is_refused(shape):
  one = low_of(build())
  with pytest.raises(UserError, match=r'low-resolution image must be 4 x 4 x 1, 1/2 of .* 8 x 8; got '):
    one.values({}, {'low': jnp.zeros((1, *shape))})
