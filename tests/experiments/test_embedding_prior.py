"""A prior of vectors: what it learns of, which sample it keeps, what is refused."""

import dataclasses
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
from vaediff.data import words
from vaediff.errors import UserError
from vaediff.experiments.base import sampling_keys
from vaediff.models.functional import Model

sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parents[2])]
from random_parameters import made  # noqa: E402

SIZE, COUNT = 8, 3
NO_WORDS = [words.BOS, words.EOS, *[words.PAD] * 30]


def config_of(**changes):
  config = importlib.import_module('configs.shapes16').get_config('unclip,debug')
  config.update_from_flattened_dict({f'embedding_prior.{name}': value for name, value in changes.items()})
  return config


def build(**changes):
  return experiments.build(config_of(**changes), 'embedding_prior')


@pytest.fixture(scope='module')
def read():
  experiment = build()
  found = {name: source.neutral() for name, source in experiment.frozen.items() if hasattr(source, 'neutral')}
  return {
    **found,
    'clip': made(experiment.space.source.model, 0), 'denoiser': made(experiment.denoiser.model, 1),
  }  # fmt: skip


def tokens_of(count=COUNT):
  tokens = np.zeros((count, 32), np.int32)
  tokens[:, 0], tokens[:, 1], tokens[:, 2] = words.BOS, 4 + np.arange(count) % 40, words.EOS
  return jnp.asarray(tokens)


@pytest.mark.slow
def test_what_is_learned_is_the_stored_vector_or_that_of_the_image(read):
  experiment = build()
  pixels = jnp.asarray(np.random.default_rng(0).integers(0, 256, (COUNT, 16, 16, 3), np.uint8))
  batch = {'image': pixels, words.TOKENS: tokens_of(), 'label': jnp.zeros(COUNT, jnp.int32)}
  run = jax.jit(lambda batch: experiment.examples(read, batch, jax.random.key(0), training=True))
  y0, values = run(batch)
  z = experiment.store(read, {}, pixels / 127.5 - 1.0)
  np.testing.assert_allclose(y0, z['embedding'], atol=1e-5)  # neutral statistics change nothing
  np.testing.assert_allclose(np.linalg.norm(y0, axis=1), 1, rtol=1e-5)
  assert set(values) == set(experiment.text.ports) and values['clip_caption'].shape == (COUNT, SIZE)
  stored, _ = run({**batch, **jax.tree.map(lambda x: -x, z)})
  np.testing.assert_allclose(stored, -y0, atol=1e-5)
  assert set(experiment.stored) == {'embedding'} == set(experiment.handed)
  assert build(**{'train.flip': True}).stored == {}
  assert (
    experiment.metrics == {'loss': False} and not experiment.draws_images and experiment.diffusion is None
  )


@pytest.mark.slow
def test_a_caption_is_read_by_the_clip_stage_and_one_of_no_words_by_none(read):
  experiment = build()
  tokens = tokens_of().at[1].set(jnp.array(NO_WORDS))
  values = experiment.conditions.values(read, {words.TOKENS: tokens})
  model = experiment.space.source.model
  told = model.apply(read['clip'], tokens, method='texts')
  vectors = experiment.text.vectors(values)
  np.testing.assert_allclose(vectors[::2], told[::2], atol=1e-5)
  np.testing.assert_array_equal(vectors[1], 0)
  np.testing.assert_array_equal(values['clip_words_read'].sum(axis=1), [3, 0, 3])
  words_of = model.apply(read['clip'], tokens, method='encoded').words
  np.testing.assert_allclose(values['clip_words'][0], words_of[0], atol=1e-5)


class Known(nn.Module):
  """x0_hat of x0 ~ N(0, I), whatever it reads: alpha_t x_t, with one parameter."""

  schedule: object

  @nn.compact
  def __call__(self, x_t, t, values={}, drop={}, *, deterministic=True):  # noqa: B006
    return self.param('one', nn.initializers.ones, ()) * self.schedule.alpha(t)[:, None] * x_t


def known(experiment):
  """The best network for vectors of unit variance, which are anywhere on the sphere."""
  denoiser = experiment.denoiser
  model = Model(module=Known(denoiser.schedule), inputs=denoiser.model.inputs)
  return dataclasses.replace(experiment, denoiser=dataclasses.replace(denoiser, model=model))


def cosines_of(read, candidates, count, num_steps):
  """Cosines of samples of the best network and their captions' vectors, in deviations of a random one's."""
  experiment = known(build(**{'sample.candidates': candidates, 'sample.num_steps': num_steps}))
  assert experiment.num_function_evaluations == num_steps * candidates
  one = {**read, 'denoiser': {'one': jnp.ones(())}, reads.CAPTIONS: {words.TOKENS: tokens_of(3)}}

  @jax.jit
  def run(keys):
    own = sampling_keys(keys)
    given = experiment.draw(one, own, jnp.arange(count))
    values = experiment.conditions.values(one, given)
    return experiment.sample(one, given, own)['embedding'], experiment.text.vectors(values)

  z, told = run(jax.random.split(jax.random.key(3), count))
  np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, rtol=1e-5)
  return np.sum(np.asarray(z) * np.asarray(told), axis=1) * np.sqrt(SIZE)


@pytest.mark.slow
def test_the_best_of_several_has_the_cosine_of_order_statistics(read):
  """On the sphere of d dimensions a cosine has variance 1/d; the best of k is that of k normal numbers."""
  before = -np.inf
  for candidates, expected in ((1, 0.0), (2, 0.564), (4, 1.029)):
    cosines = cosines_of(read, candidates, 3000, 4)
    assert cosines.mean() == pytest.approx(expected, abs=0.06)
    assert (cosines > before - 1e-4).all()  # more candidates are the same ones, and others
    before = cosines


class Same(nn.Module):
  """x0_hat is the state: a sample is what it starts from."""

  def __call__(self, x_t, t, values={}, drop={}, *, deterministic=True):  # noqa: B006
    return x_t


class Told(Conditions):
  """The vector of the caption is given."""

  def values(self, read, given):
    return {'clip_caption': given['clip_caption']}


def test_a_sample_starts_from_noise_of_the_temperature():
  """With statistics that are not neutral: else a vector of unit length is the same at every temperature."""
  changes = {'sample.candidates': 1, 'sample.num_steps': 1, 'sample.sampler': 'ddim'}
  experiment = build(**changes, **{'sample.temperature': 0.5})
  model = Model(module=Same(), inputs=())
  denoiser = dataclasses.replace(experiment.denoiser, model=model, conditions=Told())
  experiment = dataclasses.replace(experiment, denoiser=denoiser)
  rng = np.random.default_rng(0)
  noise, mean = rng.standard_normal((COUNT, SIZE), np.float32), rng.standard_normal(SIZE, np.float32)
  std = rng.uniform(0.5, 2, SIZE).astype(np.float32)
  read = {'denoiser': {}, 'embedding': {'mean': mean, 'std': std}}
  given = {'noise': noise, 'clip_caption': np.ones((COUNT, SIZE), np.float32)}
  run = jax.jit(lambda given, keys: experiment.sample(read, given, sampling_keys(keys))['embedding'])
  found = run(given, jax.random.split(jax.random.key(0), COUNT))
  z = 0.5 * noise * std + mean
  np.testing.assert_allclose(found, z / np.linalg.norm(z, axis=1, keepdims=True), atol=1e-4)


def test_the_best_of_two_is_never_worse_than_the_first(read):
  one, two = (cosines_of(read, candidates, 60, 2) for candidates in (1, 2))
  assert (two > one - 1e-4).all()
  assert 0.2 < (two > one + 1e-2).mean() < 0.8  # of about half the second is kept


@pytest.mark.slow
def test_sample_i_depends_on_row_i_alone(read):
  experiment = build()
  keys = lambda: jax.random.split(jax.random.key(5), 4)
  run = jax.jit(
    lambda keys, tokens, noise: experiment.sample(
      read, {words.TOKENS: tokens, 'noise': noise}, sampling_keys(keys)
    )['embedding']
  )
  noise = jax.random.normal(jax.random.key(6), (4, SIZE))
  whole = run(keys(), tokens_of(4), noise)
  rows = jnp.array([2, 0, 2, 1])
  np.testing.assert_allclose(run(keys()[rows], tokens_of(4)[rows], noise[rows]), whole[rows], atol=1e-5)
  assert np.abs(whole[0] - whole[2]).max() > 1e-3


def test_guidance_is_against_no_caption(read):
  experiment = build(**{'sample.guidance_weight': 2.0, 'sample.candidates': 1, 'sample.num_steps': 5})
  assert experiment.num_function_evaluations == 10 and experiment.can_be_guided
  y, t = jax.random.normal(jax.random.key(1), (COUNT, SIZE)), jnp.full(COUNT, 0.5)

  @jax.jit
  def run(tokens):
    values = experiment.conditions.values(read, {words.TOKENS: tokens})
    guided = experiment.denoiser.denoise(read, values)(y, t)
    return guided, experiment.denoiser.x0_hat(read, values)(y, t)

  guided, conditional = run(tokens_of())
  _, none = run(jnp.broadcast_to(jnp.array(NO_WORDS), (COUNT, 32)))
  np.testing.assert_allclose(guided, conditional + 2 * (conditional - none), atol=1e-4)
  assert np.abs(conditional - none).max() > 1e-3


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'clip.stage': 'embedding_prior'}, "clip.stage is 'embedding_prior', which is no CLIP stage"),
    ({'text.length': 16}, "text.length is 16, but 32 in the stage 'clip' .* set both to the same value"),
    (
      {'conditions.text.dropout': 0.0, 'sample.guidance_weight': 1.0},
      'sample.guidance_weight is 1.0; .* trained with conditions.text.dropout > 0',
    ),
    (
      {'sample.candidates': 0},
      'sample.candidates must be a whole number >= 1|sample.candidates must be >= 1',
    ),
    ({'sample.captions': ('', 'a ring'), 'conditions.text.dropout': 0.0}, 'sample.captions has no words'),
  ],
)
def test_what_cannot_be_is_refused(changes, message):
  with pytest.raises(UserError, match=message):
    build(**changes)
