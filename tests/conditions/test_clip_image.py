"""The vector of an image as a condition: where it enters, what is dropped, whose samples it is."""

import functools
import importlib
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff import experiments
from vaediff.conditions.clip_image import AS_TOKENS
from vaediff.data import words
from vaediff.errors import UserError
from vaediff.models.ports import Port
from vaediff.run import students

TESTS = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / 'experiments'), str(TESTS.parent)]
from random_parameters import made  # noqa: E402

Z = 'embedding'


def config_of(variant='unclip', name='shapes16', **changes):
  config = importlib.import_module(f'configs.{name}').get_config(f'{variant},debug')
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  return students.resolve(config)


def build(variant='unclip', stage='refiner', **changes):
  return experiments.build(config_of(variant, **changes), stage)


def clip_image_of(experiment):
  return next(one for one in experiment.conditions.each if one.name == 'clip_image')


@functools.cache
def network():
  """The decoder with random parameters, and (vectors, drop) -> its output."""
  experiment = build()
  denoiser, read = experiment.denoiser, {'denoiser': made(experiment.denoiser.model, 0)}
  y, t = jax.random.normal(jax.random.key(1), (4, 16, 16, 3)), jnp.full(4, 0.5)
  tokens = jnp.zeros((4, 32), jnp.int32)

  @jax.jit
  def run(given, drop):
    values = clip_image_of(experiment).values({}, {Z: given})
    return denoiser.output(read, y, t, {**values, words.TOKENS: tokens}, drop)

  return experiment, read, run


def vectors(count=4, seed=2):
  z = jax.random.normal(jax.random.key(seed), (count, 8))
  return z / jnp.linalg.norm(z, axis=1, keepdims=True)


def masks(*drop):
  return dict.fromkeys((Z, AS_TOKENS), jnp.array(drop, bool))


@pytest.mark.slow
def test_it_enters_beside_the_time_and_as_tokens():
  experiment, read, run = network()
  one = clip_image_of(experiment)
  values = one.values({}, {Z: vectors()})
  np.testing.assert_allclose(jnp.mean(values[Z] ** 2, axis=1), 1, rtol=1e-5)
  np.testing.assert_array_equal(values[Z], values[AS_TOKENS])
  assert one.ports[Z].enters == 'vector' and one.ports[AS_TOKENS].made == (4, 8)
  params = read['denoiser']
  assert params['embedding_mlp']['dense_0']['kernel'].shape[0] == 8
  assert params['embedding_tokens_words']['kernel'].shape == (8, 32)
  y, t = jax.random.normal(jax.random.key(1), (1, 16, 16, 3)), jnp.full(1, 0.5)

  @jax.jit
  def reach(beside, tokens):
    given = {Z: beside, AS_TOKENS: tokens, words.TOKENS: jnp.zeros((1, 32), jnp.int32)}
    return jax.grad(lambda values: jnp.sum(experiment.denoiser.output(read, y, t, {**given, **values}) ** 2))(
      {Z: beside, AS_TOKENS: tokens}
    )

  for moved in reach(values[Z][:1], values[AS_TOKENS][:1]).values():
    assert np.abs(moved).max() > 1e-5
  assert set(clip_image_of(build(**{'refiner.conditions.clip_image.num_tokens': 0})).ports) == {Z}


@pytest.mark.slow
def test_what_is_dropped_is_read_of_no_vector_and_row_i_of_vector_i():
  _, _, run = network()
  known = run(vectors(), masks(0, 0, 0, 0))
  dropped = run(vectors(), masks(1, 0, 0, 1))
  np.testing.assert_array_equal(dropped[1:3], known[1:3])
  np.testing.assert_array_equal(dropped[::3], run(-vectors(), masks(1, 0, 0, 1))[::3])
  assert np.abs(dropped - known)[::3].max(axis=(1, 2, 3)).min() > 1e-4
  other = run(vectors().at[2].set(vectors()[0]), masks(0, 0, 0, 0))
  assert (np.delete(other, 2, 0) == np.delete(known, 2, 0)).all() and np.abs(other[2] - known[2]).max() > 1e-4


def test_vectors_and_captions_are_dropped_by_their_own_chances():
  conditions = build().conditions
  drop = conditions.drop(jax.random.key(0), 8000)
  assert set(drop) == {Z, AS_TOKENS, words.TOKENS}
  np.testing.assert_array_equal(drop[Z], drop[AS_TOKENS])
  assert float(drop[Z].mean()) == pytest.approx(0.1, abs=0.015)
  assert float(drop[words.TOKENS].mean()) == pytest.approx(0.5, abs=0.025)
  both = float((drop[Z] & drop[words.TOKENS]).mean())
  assert both == pytest.approx(0.05, abs=0.012)


@pytest.mark.slow
def test_the_vector_is_that_of_the_clip_stage_or_what_is_stored():
  one = clip_image_of(build())
  x = jax.random.uniform(jax.random.key(1), (3, 16, 16, 3), minval=-1.0, maxval=1.0)
  read = {'clip': made(one.clip.model, 0)}
  seen = jax.jit(lambda x: one.observe(read, {}, x, None))(x)
  np.testing.assert_allclose(np.linalg.norm(seen[Z], axis=1), 1, rtol=1e-5)
  stored = vectors(3)
  assert one.observe({}, {Z: stored}, x, None)[Z] is stored
  assert one.stored == {Z: jax.ShapeDtypeStruct((8,), jnp.float32)}
  assert clip_image_of(build(**{'refiner.train.flip': True})).stored == {}
  with pytest.raises(UserError, match='embedding must be 8 numbers per image, .* got \\(4,\\)'):
    one.values({}, {Z: jnp.zeros((3, 4))})


OF_CAPTIONS = {
  'refiner.conditions.clip_image.of': 'caption',
  'refiner.conditions.clip_image.prior_stage': '',
}


@pytest.mark.slow
def test_vectors_of_captions_follow_from_the_captions_unless_they_are_given():
  experiment = build(**OF_CAPTIONS)
  one, x = clip_image_of(experiment), jnp.zeros((3, 16, 16, 3))
  assert (one.seen, one.stored, one.maker, one.reconstructs) == ((), {}, None, False)
  assert experiment.depth == 0 and experiment.conditions.title == 'clip_caption+text'
  tokens = jnp.zeros((3, 32), jnp.int32).at[:, :3].set(jnp.array([[1, 5, 2], [1, 7, 2], [1, 5, 2]]))
  read = {'clip': made(one.clip.model, 0)}
  given = experiment.conditions.observe(read, {words.TOKENS: tokens}, x, None)
  assert set(given) == {words.TOKENS}
  seen = jax.jit(lambda tokens: experiment.conditions.complete(read, {words.TOKENS: tokens}))(tokens)[Z]
  np.testing.assert_allclose(seen, one.clip.model.apply(read['clip'], tokens, method='texts'), atol=1e-6)
  np.testing.assert_array_equal(seen[0], seen[2])
  assert np.abs(seen[0] - seen[1]).max() > 1e-3
  own = vectors(3)
  assert experiment.conditions.complete({}, {words.TOKENS: tokens, Z: own})[Z] is own


def test_the_prior_feeds_it_and_is_sampled_before_every_stage_of_a_cascade():
  one = clip_image_of(build())
  assert (one.maker.stage, one.maker.feeds, one.maker.depth) == ('embedding_prior', Z, 1)
  assert build().depth == 1 and build(stage='embedding_prior').depth == 0
  for variant in ('unclip,cascade', 'cascade,unclip'):
    config = config_of(variant)
    assert config.stages == ('clip', 'embedding_prior', 'base', 'sr_16')
    base, larger = (experiments.build(config, stage) for stage in config.stages[2:])
    assert (base.depth, larger.depth) == (1, 2)
    assert set(larger.inputs) & {Z, words.TOKENS} == set() and {Z, words.TOKENS} <= set(base.inputs)
  config = config_of('unclip,adversarial')
  assert config.stages == ('clip', 'embedding_prior', 'refiner', 'adversarial')
  assert config.adversarial.conditions == config.refiner.conditions
  assert config_of('text,clip,unclip').stages == ('clip', 'embedding_prior', 'refiner')


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'stage': 'refiner'}, "conditions.clip_image.stage is 'refiner', which is no CLIP stage"),
    ({'stage': 'nothing'}, "conditions.clip_image.stage is 'nothing', which is no CLIP stage"),
    ({'prior_stage': 'clip'}, "prior_stage is 'clip', which is no prior of vectors"),
    ({'workdir': 'other'}, "whose vectors are those of 'clip' \\(workdir ''\\), .* \\(workdir 'other'\\)"),
    ({'dropout': 1.0}, 'conditions.clip_image.dropout must be in'),
    ({'of': 'words'}, "conditions.clip_image.of is 'words'; valid: image, caption"),
    ({'of': 'caption'}, "of is 'caption', and prior_stage is 'embedding_prior', .* set prior_stage to ''"),
  ],
)
def test_what_cannot_be_read_is_refused(changes, message):
  with pytest.raises(UserError, match=message):
    build(**{f'refiner.conditions.clip_image.{name}': value for name, value in changes.items()})


def test_a_port_of_words_that_are_made_is_one_vector():
  with pytest.raises(ValueError, match='A text port cannot have shape'):
    Port(enters='text', how='attention', shape=(3, 8), made=(4, 8))
  with pytest.raises(ValueError, match='A vector port cannot have shape'):
    Port(enters='vector', shape=(8,), made=(4, 8))


def test_vectors_of_captions_need_captions_read_by_the_same_tokenizer():
  config = config_of(**OF_CAPTIONS)
  with config.unlocked():
    config.refiner.text.length = 16
  for workdir in ('', 'elsewhere'):
    with config.unlocked():
      config.refiner.conditions.clip_image.workdir = workdir
    with pytest.raises(UserError, match="text.length is 16, but 32 in the stage 'clip'"):
      experiments.build(config, 'refiner')
  with config.unlocked():
    del config.refiner.conditions.text
  with pytest.raises(UserError, match="of is 'caption', but the stage reads no captions"):
    experiments.build(config, 'refiner')


def test_no_words_have_no_vector():
  with pytest.raises(UserError, match='config.refiner.sample.captions has no words at place 1'):
    build(**OF_CAPTIONS, **{'refiner.sample.captions': ('a disc', ' ')})
