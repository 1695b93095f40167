"""A stage as one function: it draws what the stage draws; a stage that is none is refused by name."""

import functools
import importlib

import jax
import numpy as np
import pytest

from vaediff import experiments
from vaediff.errors import UserError
from vaediff.machine import sharding
from vaediff.run import config as configs
from vaediff.run import exported, students
from vaediff.run.trained import Trained


@pytest.fixture(scope='module')
def whole(trained):
  """Returns whole(stage): a stage of the digits' run as it is, loaded once."""
  run = trained('digits').run
  config = configs.read(run)
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  return functools.cache(lambda stage: Trained(config, run, stage, mesh))


@pytest.fixture
def opened(whole):
  """Returns opened(stage='refiner', **settings): a stage of the digits' run, deterministic."""

  def opened(stage='refiner', **settings):
    default = {'sampler': 'ddim', 'num_steps': 2} if stage == 'refiner' else {}
    return whole(stage).with_settings(**{**default, **settings})

  return opened


@pytest.mark.slow
@pytest.mark.parametrize('output', exported.OUTPUTS)
def test_the_function_draws_what_the_stage_draws(opened, output):
  stage = opened()
  indices = np.arange(3)
  given = exported.starts(stage, indices)
  assert list(given) == ['noise', 'z'] and all(len(value) == 3 for value in given.values())
  whole = exported.of(stage, given, output)
  wanted = stage.draw(indices)['x0'].astype(np.float32)
  found = np.asarray(jax.jit(whole.apply)(whole.read, given), np.float32)
  straight = np.asarray(jax.jit(whole.straight())(*given.values()), np.float32)
  for image in (found, straight):
    image = image if output == 'uint8' else (image + 1) * 127.5
    assert abs(image - wanted).max() <= (1 if output == 'uint8' else 0.51)
  assert whole.about['stage'] == 'refiner' and 'ddim, num_steps 2' in whole.about['sampling']
  assert whole.ranges['noise'] == 'drawn from N(0, I)'


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'sampler': 'ddpm'}, r"'refiner' draws with 'ddpm', which adds noise in its steps.*sample.sampler to"),
    ({'eta': 0.5}, "draws with 'ddim', which adds noise"),
  ],
)
def test_a_sampler_that_is_no_function_of_its_start_is_refused(opened, settings, message):
  stage = opened(**settings)
  with pytest.raises(UserError, match=message):
    exported.of(stage, exported.starts(stage, np.arange(2)), 'float32')


def test_stages_of_another_kind_are_refused(opened, monkeypatch):
  with pytest.raises(
    UserError, match=r'with 65 forward passes, .* at most 64 .*config\.refiner\.sample\.num_s'
  ):
    exported.check(opened(num_steps=65))
  stage = opened(num_steps=64)
  exported.check(stage)
  monkeypatch.setattr(type(stage.experiment), 'draws_images', False)
  with pytest.raises(UserError, match="'refiner' draws no images"):
    exported.check(stage)
  with stage.config.unlocked():
    stage.config.refiner.update({'experiment': 'quantized', 'quantized': {'stage': 'source'}})
  with pytest.raises(
    UserError, match="of whole numbers.*export 'source' with config.export.weights = 'int8'; or this one"
  ):
    exported.check(stage)


@pytest.mark.slow
def test_one_step_of_a_stochastic_sampler_is_a_function_of_its_start(opened):
  stage = opened(sampler='ddpm', num_steps=1)
  exported.check_program(stage, exported.starts(stage, np.arange(2)))


def test_what_computes_in_bfloat16_is_refused(opened, monkeypatch):
  stage = opened(num_steps=1)
  monkeypatch.setattr(exported.straight, 'types', lambda *args: {'float32', 'bfloat16'})
  with pytest.raises(UserError, match="'refiner', or a stage that it reads, computes in bfloat16"):
    exported.check_program(stage, exported.starts(stage, np.arange(2)))


NOISE, Z, IMAGE = 'drawn from N(0, I)', 'numbers; see the prior of the stage', 'an image in [-1, 1]'


@pytest.mark.parametrize(
  ('name', 'variant', 'stage', 'wanted'),
  [
    ('digits', 'control', 'control',
     {'control': 'numbers in [0, 1]', 'z': Z, 'x0_vae': IMAGE, 'noise': NOISE}),
    ('digits', 'restoration', 'refiner',
     {'degraded': IMAGE, 'known': 'a mask: 1 where a pixel is known, 0 in the hole', 'noise': NOISE}),
    ('digits', 'cascade', 'sr_8',
     {'low': IMAGE, 'low_level': 'a level of noise in [0, 0.5]', 'low_noise': NOISE, 'noise': NOISE}),
    ('digits', 'latent', 'autoencoder',
     {'latents': 'latents as the encoder makes them of images: any numbers'}),
    ('digits', 'formulation1', 'vae', {'z': Z}),
    ('shapes16', 'unclip', 'refiner',
     {'embedding': 'a vector of CLIP, of length 1', 'tokens': 'whole numbers', 'noise': NOISE}),
  ],
)  # fmt: skip
def test_what_the_numbers_of_an_input_are(name, variant, stage, wanted):
  """A control, a mask, noise and latents are no image."""
  config = students.resolve(importlib.import_module(f'configs.{name}').get_config(f'{variant},debug'))
  experiment = experiments.build(config, stage)
  inputs = {name: jax.ShapeDtypeStruct((2, *one.shape), one.dtype) for name, one in experiment.inputs.items()}
  assert exported.ranges(experiment, inputs) == wanted
