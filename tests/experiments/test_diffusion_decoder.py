"""DiVAE: the nine places and ways of codes learn, students of the decoder need no case of their own."""

import dataclasses
import functools
import importlib
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vaediff import experiments, reads
from vaediff.conditions.base import Conditions
from vaediff.conditions.codes import Codes
from vaediff.errors import UserError
from vaediff.experiments.diffusion import make_denoiser
from vaediff.experiments.perceptual import Perceptual, perceptual_of
from vaediff.machine import sharding
from vaediff.models import token_injection
from vaediff.models.functional import Model
from vaediff.modes import train
from vaediff.optim import make_optimizer
from vaediff.run import students
from vaediff.run.trained import Trained
from vaediff.spaces import tokenizers
from vaediff.spaces.pixels import Pixels

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from random_parameters import frozen_of, made  # noqa: E402

STUDENTS = ('distill_2', 'distill_1', 'consistency', 'adversarial', 'matching')
FEW_STEPS = 'divae,distill,consistency,adversarial,matching,debug'


def config_of(variant='divae,debug', **changes):
  config = importlib.import_module('configs.digits').get_config(variant)
  config.update_from_flattened_dict(changes)
  return config


def images(count=8):
  return jnp.asarray(np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1), np.uint8))


# Students -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_students_read_the_same_codes_and_learn_no_variance():
  config = students.resolve(config_of(FEW_STEPS))
  assert config.stages == ('vqvae', 'refiner', *STUDENTS)
  for stage in STUDENTS:
    section = config[stage]
    assert section.conditions == config.refiner.conditions
    assert (section.diffusion.variance, section.sample.variance) == ('fixed', 'large')
    student = experiments.build(config, stage)
    assert set(student.inputs) == {'codes', 'noise'} and set(student.stored) == {'codes'}
    assert student.frozen['tokenizer'].stage == 'vqvae' and student.reconstructs
    state = jax.eval_shape(student.init, jax.random.key(0))
    assert state.networks['denoiser'].params['conv_out']['bias'].shape == (1,)  # the teacher has 2
  with pytest.raises(UserError, match="variance = 'learned' is not distilled"):
    config.distill_1.diffusion.variance = 'learned'
    experiments.build(config, 'distill_1')


@pytest.mark.slow
@pytest.mark.parametrize('stage', ['distill_2', 'consistency', 'adversarial', 'matching'])
def test_one_update_of_each_student(stage):
  config = students.resolve(config_of(FEW_STEPS))
  experiment = experiments.build(config, stage)
  read = frozen_of(experiment)
  assert config[stage].teacher.stage == 'refiner' and read['teacher']['conv_out']['bias'].shape == (2,)
  state = jax.jit(lambda key: experiment.start(experiment.init(key), read))(jax.random.key(0))
  before = read['start' if 'start' in read else 'teacher']['conv_out']['kernel']  # a student, or the teacher
  np.testing.assert_array_equal(state.networks['denoiser'].params['conv_out']['kernel'], before[..., :1])
  ids = jax.random.randint(jax.random.key(3), (8, 4, 4), 0, 16)  # as stored: nothing is encoded
  batch = {'image': images(), 'label': jnp.zeros(8, jnp.int32), 'codes': ids}
  step = jax.jit(experiment.train_step, static_argnames='kind')
  after, metrics = step(state, read, batch, jax.random.key(1), kind=experiment.kind_of(0))
  assert all(np.isfinite(value) for value in metrics.values()) and int(after.step) == 1


# The places and ways ------------------------------------------------------------------------------------


class Nothing(nn.Module):
  """Has a parameter."""

  @nn.compact
  def __call__(self, x):
    return x + self.param('codes', nn.initializers.zeros, ())


class Quarters(tokenizers.Tokenizer):
  """The sign of the mean of each quarter of an image of 4 x 4 pixels."""

  grids, sizes = ((2, 2),), (2,)

  def codes(self, params, x):
    return ((x.reshape(-1, 2, 2, 2, 2).mean(axis=(2, 4)) > 0).astype(jnp.int32),)

  def embed(self, params, codes):
    ones = jnp.ones(codes[0].shape)
    return jnp.stack([2.0 * codes[0] - 1, ones, -ones, 1 - 2.0 * codes[0]], axis=-1)

  def decode(self, params, codes):
    return jnp.repeat(jnp.repeat(codes[0] * 2.0 - 1, 2, axis=1), 2, axis=2)[..., None]


def decoder_of(position, how):
  model = Model(module=Nothing(), inputs=(jax.ShapeDtypeStruct((1, 4, 4, 1), jnp.float32),))
  source = reads.FromStage(stage='quarters', network='quarters', workdir='', model=model)
  one = Codes(
    tokenizer=Quarters(source=source), shape=(2, 2, 4), position=position, how=how, dropout=0.0,
    flip=False, maker=None,
  )  # fmt: skip
  section = config_of().refiner
  section.model.update({'attention_resolutions': (), 'num_heads': 1})
  return one, make_denoiser(section, Pixels(shape=(4, 4, 1)), Conditions((one,)))


OPTIMIZED = {'xla_backend_optimization_level': 2, 'xla_llvm_disable_expensive_passes': False}
"""Of a program of hundreds of updates: what conftest leaves out."""


PLACES = [(position, how) for position in token_injection.POSITIONS for how in token_injection.WAYS]


@pytest.mark.parametrize(  # each takes 20 seconds of a core
  ('position', 'how'),
  [
    pytest.param(*place, marks=pytest.mark.slow if place == ('middle', 'concat') else pytest.mark.long)
    for place in PLACES
  ],
)
def test_every_place_and_way_learns_what_the_codes_say(position, how):
  """Images of random signs: of the mean of a quarter nothing but its code, or the state, tells."""
  one, denoiser = decoder_of(position, how)
  section = config_of().refiner.optim
  section.update({'learning_rate': 5e-3, 'warmup_steps': 10, 'ema_decay': 0.0})
  optimizer = make_optimizer(section, 300).transform

  def losses(params, key, *, shuffled=False):
    key_x, key_loss = jax.random.split(key)
    ids = jax.random.bernoulli(key_x, 0.5, (16, 2, 2)).astype(jnp.int32)
    x = one.tokenizer.decode({}, (ids,))
    seen = jnp.roll(ids, 1, axis=0) if shuffled else ids
    values = one.values({'tokenizer': {}}, {'codes': seen})
    return denoiser.losses({'denoiser': params}, x, values, key_loss, training=True).mean()

  def step(carried, key):
    params, state = carried
    loss, grads = jax.value_and_grad(losses)(params, key)
    updates, state = optimizer.update(grads, state, params)
    return (jax.tree.map(jnp.add, params, updates), state), loss

  @functools.partial(jax.jit, compiler_options=OPTIMIZED)
  def train(params):
    keys = jax.random.split(jax.random.key(1), 300)
    (params, _), found = jax.lax.scan(step, (params, optimizer.init(params)), keys)
    return found, losses(params, jax.random.key(2)), losses(params, jax.random.key(2), shuffled=True)

  found, last, shuffled = train(denoiser.model.init(jax.random.key(0)))
  assert float(found[-20:].mean()) < 0.9 * float(found[0])
  assert float(shuffled) > 1.3 * float(last)


# On data ------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_samples_of_real_digits_are_those_of_a_posterior(tmp_path, one_device):
  """E |x - x'|^2 of a posterior sample is twice, of the mean of 16 17/16 times the posterior mean's."""
  config = students.resolve(config_of('divae', **{'data.data_dir': str(tmp_path / 'data')}))
  train.run_stages(config, tmp_path / 'run', config.stages)
  opened = Trained(config, tmp_path / 'run', 'refiner', sharding.make_mesh(config.mesh))
  image, label = opened.eval_images(297)
  given, wanted = opened.observe(image, label), image / 255

  def error(images):
    return float(np.mean((images / 255 - wanted) ** 2))

  drawn = [opened.draw_all(given, first=number * len(image)) for number in range(16)]
  decoder = error(drawn[0]['x0_codes'])
  single, mean = error(drawn[0]['x0']), error(np.mean([images['x0'] for images in drawn], axis=0))
  shuffled = error(opened.draw_all({name: np.roll(ids, 1, axis=0) for name, ids in given.items()})['x0'])
  print(f'decoder {decoder:.5f}, one sample {single:.5f}, mean of 16 {mean:.5f}, shuffled {shuffled:.5f}')
  assert decoder < 0.0057  # k-means of raw 2x2 patches with as many codes
  assert 1.3 * decoder < single < 2.6 * decoder
  assert 0.9 * decoder < mean < 1.3 * decoder
  assert shuffled > 3 * single


# The perceptual distance ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_perceptual_distance_is_a_term_of_the_loss(monkeypatch):
  config = config_of('unconditional,debug')
  assert perceptual_of(config, 'refiner', Pixels(shape=(8, 8, 1))) is None
  plain = experiments.build(config, 'refiner').denoiser
  asked = []

  class Distance(Perceptual):
    def __call__(self, read, a, b):
      asked.append((a, b))
      return 0.25 * jnp.mean(jnp.square(a - b), axis=(1, 2, 3))

  denoiser = dataclasses.replace(plain, perceptual=Distance(weight=0.25, network='', source=None))
  read, y0 = {'denoiser': made(plain.model, 1)}, images() / 127.5 - 1
  run = lambda one: one.loss_terms(read, y0, {}, jax.random.key(0), training=False)
  without, terms = run(plain), run(denoiser)
  (x0_hat, target), = asked  # fmt: skip
  np.testing.assert_array_equal(target, y0)
  assert float(jnp.abs(x0_hat).max()) <= 1 and np.any(jnp.abs(x0_hat) < 1)
  wanted = 0.25 * jnp.mean(jnp.square(x0_hat - y0), axis=(1, 2, 3))
  np.testing.assert_allclose(terms['perceptual'], wanted, rtol=1e-5)
  np.testing.assert_allclose(terms['loss'], without['loss'] + wanted, rtol=1e-5)


def test_the_perceptual_distance_is_of_pixels():
  changes = {'refiner.loss.perceptual': 'lpips_vgg16', 'refiner.loss.perceptual_weight': 0.1}
  config = config_of('unconditional,wavelet_diffusion,debug', **changes)
  with pytest.raises(UserError, match="loss.perceptual is 'lpips_vgg16', a distance of images; .* 'wavelet'"):
    experiments.build(config, 'refiner')
  denoiser = experiments.build(config_of('unconditional,debug', **changes), 'refiner').denoiser
  assert denoiser.perceptual.weight == 0.1 and set(denoiser.perceptual.frozen) == {'lpips'}
