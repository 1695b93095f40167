"""The degraded image as a condition: what it gives, and a stage that reads it."""

import importlib
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff import experiments
from vaediff.conditions import degraded
from vaediff.errors import UserError
from vaediff.experiments import base

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
TASKS = ('super_resolution', 'inpaint', 'colourise', 'denoise')


def made(variant='restoration', **changes):
  config = importlib.import_module('configs.digits').get_config(f'{variant},debug')
  config.data.channels = 3
  config.update_from_flattened_dict(
    {f'refiner.conditions.degraded.{name}': value for name, value in changes.items()}
  )
  return config


def stage(**changes):
  return experiments.build(made(**changes), 'refiner')


def images(count=4, seed=0):
  x = jax.random.uniform(jax.random.key(seed), (count, 8, 8, 3), minval=-1.0, maxval=1.0)
  return jnp.round(x * 127.5) / 127.5


def test_the_variant_is_a_diffusion_alone():
  config = made()
  assert config.stages == ('refiner',) and config.refiner.diffusion.condition == 'none'
  experiment = stage()
  assert experiment.frozen == {} and experiment.conditions.title == 'inpaint'
  assert experiment.reconstructs and experiment.titles == {'degraded': 'degraded', 'x0': 'refined'}


def test_there_is_no_bound_of_an_image_given_a_part_of_it():
  assert stage().likelihood == ''


@pytest.mark.parametrize('task', TASKS)
def test_what_enters_the_network(task):
  experiment = stage(task=task)
  names = {'degraded', 'known'} if task == 'inpaint' else {'degraded'}
  assert experiment.conditions.ports.keys() == names
  assert experiment.inputs.keys() == {*names, 'noise'}
  given = experiment.observe({}, {}, images(), jax.random.key(0))
  for name, struct in experiment.conditions.inputs.items():
    assert given[name].shape == (4, *struct.shape) and given[name].dtype == struct.dtype
  values = experiment.conditions.values({}, given)
  np.testing.assert_array_equal(values['degraded'], given['degraded'])
  assert float(jnp.abs(given['degraded'] - images()).max()) > 0.05


def test_in_wavelets_the_mask_has_the_size_of_the_maps():
  experiment = experiments.build(made('restoration,wavelet_diffusion', hole_fraction=0.25), 'refiner')
  given = experiment.observe({}, {}, images(), None)
  values = experiment.conditions.values({}, given)
  assert values['degraded'].shape == (4, 4, 4, 12) and values['known'].shape == (4, 4, 4, 1)
  known = np.asarray(given['known'])  # the hole, 2 x 2 at the centre, is a quarter of four places
  assert known.sum() == 4 * (64 - 4)
  assert set(np.unique(values['known'])) == {0.75, 1.0}


@pytest.mark.parametrize('changes', [{'task': 'denoise'}, {'task': 'inpaint', 'hole': 'random'}])
def test_without_a_key_an_image_is_degraded_alike_wherever_it_stands(changes):
  experiment = stage(**changes)
  observe = jax.jit(lambda x, key=None: experiment.observe({}, {}, x, key))
  x = images(6)
  whole = observe(x)
  for name, value in observe(x[4:1:-1]).items():
    np.testing.assert_array_equal(value, whole[name][4:1:-1])
  name = 'known' if changes['task'] == 'inpaint' else 'degraded'
  noise = np.asarray(whole[name] - (0 if name == 'known' else x))
  assert len({row.tobytes() for row in noise}) > 3  # and each in its own way
  one, two = (observe(x, jax.random.key(seed))[name] for seed in (1, 2))
  assert not np.array_equal(one, two)
  each = observe(x, jax.random.split(jax.random.key(3), 6))[name]
  np.testing.assert_array_equal(observe(x[:2], jax.random.split(jax.random.key(3), 6)[:2])[name], each[:2])


@pytest.mark.slow
def test_a_train_step_reads_it_and_the_gradient_reaches_it():
  experiment = stage(dropout=0.2)
  state = experiment.init(jax.random.key(0))
  params = state.networks['denoiser'].params
  assert {'null_degraded', 'null_known'} <= params.keys()
  leaves, treedef = jax.tree.flatten(params)
  rng = np.random.default_rng(0)
  read = {
    'denoiser': treedef.unflatten(
      [x + 0.05 * rng.standard_normal(x.shape).astype(np.float32) for x in leaves]
    )
  }
  given = experiment.observe({}, {}, images(), None)

  def total(given):
    values = experiment.conditions.values({}, given)
    y, t = jnp.ones((4, 8, 8, 3)), jnp.full(4, 0.5)
    return jnp.sum(experiment.denoiser.x0_hat(read, values)(y, t)[0])

  gradient = jax.jit(jax.grad(total))(given)
  for name in ('degraded', 'known'):
    assert float(jnp.abs(gradient[name][0]).max()) > 0
    assert float(jnp.abs(gradient[name][1:]).max()) == 0  # image 0 depends on its own alone
  batch = {'image': np.round((np.asarray(images(8)) + 1) * 127.5).astype(np.uint8)}
  step = jax.jit(lambda state, batch, key: experiment.train_step(state, {}, batch, key))
  _, metrics = step(state, batch, jax.random.key(1))
  assert np.isfinite(metrics['loss']) and metrics['grad_norm/denoiser'] > 0


@pytest.mark.slow
def test_a_sample_is_made_on_the_degraded_image_that_is_given():
  experiment = stage()
  params = experiment.init(jax.random.key(0)).networks['denoiser'].params
  given = {**experiment.observe({}, {}, images(2), None), 'noise': jnp.zeros((2, 8, 8, 3))}
  keys = base.sampling_keys(jax.random.split(jax.random.key(0), 2))
  drawn = jax.jit(experiment.sample)({'denoiser': params}, given, keys)
  assert list(drawn) == ['degraded', 'x0'] or set(drawn) == {'degraded', 'x0'}
  np.testing.assert_array_equal(drawn['degraded'], given['degraded'])
  assert experiment.draw({}, keys, jnp.arange(2)).keys() == {'noise'}  # of nothing it is not drawn


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'task': 'sharpen'}, "conditions.degraded.task is 'sharpen'; valid: super_resolution, inpaint"),
    (
      {'task': 'super_resolution', 'factor': 3},
      'conditions.degraded.factor must be >= 2 and divide the image',
    ),
    ({'factor': 1}, 'conditions.degraded.factor must be >= 2, got 1'),
    ({'noise_std': 0.0}, 'conditions.degraded.noise_std must be > 0, got 0.0'),
    ({'noise_std': math.nan}, 'conditions.degraded.noise_std must be > 0, got nan'),
    ({'hole_fraction': 1.0}, r'conditions.degraded.hole_fraction must be in \(0, 1\), got 1.0'),
    ({'hole': 'left'}, "conditions.degraded.hole is 'left'; valid: center, random"),
    ({'dropout': 1.0}, r'conditions.degraded.dropout must be in \[0, 1\), got 1.0'),
  ],
)
def test_bad_settings_are_refused(changes, message):
  with pytest.raises(UserError, match=f'config.refiner: {message}'):
    stage(**changes)


def test_grey_images_have_no_colours_to_learn():
  config = made(task='colourise')
  config.data.channels = 1
  with pytest.raises(UserError, match='task = colourise needs images with colours; .* have 1 channel'):
    experiments.build(config, 'refiner')


def test_a_stage_says_what_it_has_learned():
  assert degraded.learned_by(stage(task='denoise').conditions).task == 'denoise'
  other = importlib.import_module('configs.digits').get_config('unconditional,label,debug')
  assert degraded.learned_by(experiments.build(other, 'refiner').conditions) is None
