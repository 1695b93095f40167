"""What stands before the ids of a prior: classes and captions in one table, what is read of it."""

import functools
import importlib
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from some_slow import some_slow

from vaediff import experiments
from vaediff.data import words
from vaediff.errors import UserError
from vaediff.experiments import base
from vaediff.experiments.token_source import Source
from vaediff.spaces.tokenizers import TOKENIZER

sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parents[2])]
from random_parameters import made  # noqa: E402

from configs.stages import text as configs_text  # noqa: E402

CAPTIONS = jnp.array([[2, 5, 6, 3, 0], [2, 7, 3, 0, 0], [2, 8, 5, 9, 3]])
LENGTH, VOCAB = 5, 12
CODES = jnp.arange(48, dtype=jnp.int32).reshape(3, 4, 4) % 16


def build(variant='vqvae,prior', **changes):
  config = importlib.import_module('configs.digits').get_config(f'{variant},debug')
  with config.unlocked():
    config.data.caption_feature = 'caption'
    config.prior.text = configs_text.tokenizer('word', VOCAB, LENGTH)
    config.prior.conditions.text = {'dropout': 0.1}
    config.update_from_flattened_dict({f'prior.{name}': value for name, value in changes.items()})
  return experiments.build(config, 'prior')


FORMS = {
  'stream': {},
  'turned_stream': {'model.style': 'llama'},
  'encoder_decoder': {'model.form': 'encoder_decoder'},
}


@functools.cache
def network(form):
  """(tokens, dropped, a word's row that is changed) -> nats of the same ids, by a network as if trained."""
  experiment = build(**FORMS[form])
  params = made(experiment.models[0], 0)

  @jax.jit
  def run(tokens, dropped, changed):
    table = 'words' if form == 'encoder_decoder' else 'prefix'
    embedding = params[table]['embedding']
    own = {**params, table: {'embedding': embedding.at[changed].multiply(-2.0)}}
    before = experiment.source({words.TOKENS: tokens}, 3, {words.TOKENS: dropped})
    return experiment.nats({'prior': own}, (CODES,), before)['codes']

  return lambda tokens, dropped=(0, 0, 0), changed=1000: run(tokens, jnp.bool_(dropped), changed)


def test_rows_of_classes_null_and_words():
  source = Source(num_classes=10, vocab_size=VOCAB, num_words=LENGTH)
  assert (source.size, source.length) == (23, 6)
  values = {'label': jnp.array([3, 4, 9]), words.TOKENS: CAPTIONS}
  before = source(values, 3, {'label': jnp.bool_([0, 1, 0]), words.TOKENS: jnp.bool_([0, 0, 1])})
  np.testing.assert_array_equal(before.ids[:, -1], [3, 10, 9])
  np.testing.assert_array_equal(before.ids[:, :-1], CAPTIONS + 11)
  np.testing.assert_array_equal(before.mask, [[1, 1, 1, 1, 0, 1], [1, 1, 1, 0, 0, 1], [0, 0, 0, 0, 0, 1]])
  null = source({}, 3)
  np.testing.assert_array_equal(null.ids[:, -1], [10] * 3)
  assert not null.mask[:, :-1].any() and null.mask[:, -1].all()
  both = before.paired(null)
  np.testing.assert_array_equal(both.ids[::2], before.ids)
  np.testing.assert_array_equal(both.mask[1::2], null.mask)


@pytest.mark.parametrize(
  'form', ['stream', *(pytest.param(f, marks=pytest.mark.slow) for f in list(FORMS)[1:])]
)
def test_words_are_read_in_their_order_and_padding_and_dropped_words_are_not(form):
  run = network(form)
  known = run(CAPTIONS)
  np.testing.assert_array_equal(run(CAPTIONS, changed=1 + words.PAD), known)
  changed = np.abs(run(CAPTIONS, changed=1 + 7) - known)
  assert changed[1] > 1e-4 and changed[0] == changed[2] == 0
  dropped = run(CAPTIONS, (1, 0, 1))
  null = run(jnp.zeros_like(CAPTIONS))
  np.testing.assert_array_equal(dropped, jnp.where(jnp.bool_([1, 0, 1]), null, known))
  assert np.abs(null - known).min() > 1e-4
  turned = np.abs(run(CAPTIONS.at[0, 1:3].set(jnp.array([6, 5]))) - known)
  assert turned[0] > 1e-5 and turned[1] == turned[2] == 0


@pytest.mark.parametrize('form', ['stream', pytest.param('encoder_decoder', marks=pytest.mark.slow)])
def test_what_is_drawn_has_the_probability_of_a_whole_pass(form):
  """The cache masks what the whole pass masks: -log p while drawing is that of all ids at once."""
  experiment = build(**FORMS[form])
  model = experiment.models[0]
  params, keys = made(model, 0), jax.random.split(jax.random.key(0), 3)
  before = experiment.source({words.TOKENS: CAPTIONS}, 3)

  @jax.jit
  def run():
    codes, spent = experiment_sample(experiment, model, params, before, keys)
    return codes, spent, experiment.nats({'prior': params}, (codes.reshape(3, 4, 4),), before)['codes']

  _, spent, whole = run()
  np.testing.assert_allclose(spent, whole, rtol=1e-5)


def experiment_sample(experiment, model, params, before, keys):
  from vaediff.models import token_sampling

  return token_sampling.sample(
    lambda: model.apply(params, before.ids, None, before.mask, method='start'),
    lambda codes, n, cache: model.apply(params, codes, n, cache, None, method='step'),
    keys, 16, experiment.rule,
  )  # fmt: skip


@pytest.mark.parametrize('form', some_slow(FORMS, 'stream'))
def test_every_form_takes_a_step_and_is_sampled_with_guidance(form, key):
  experiment = build('vqvae,prior,label', **FORMS[form], **{'sample.guidance_weight': 1.0})
  assert experiment.conditions.droppable == ('label', 'text') and experiment.inputs.keys() == {
    'label', words.TOKENS, 'codes'
  }  # fmt: skip
  state = jax.eval_shape(experiment.init, key)
  read = {TOKENIZER: jax.eval_shape(experiment.tokenizer.source.model.init, key)}
  struct = jax.ShapeDtypeStruct
  given = {'label': struct((2,), jnp.int32), words.TOKENS: struct((2, LENGTH), jnp.int32)}
  batch = {'image': struct((2, 8, 8, 1), jnp.uint8), **given}
  after, _ = jax.eval_shape(experiment.train_step, state, read, batch, key)
  assert jax.tree.structure(after) == jax.tree.structure(state)
  read |= {name: network.params for name, network in state.networks.items()}
  drawn = jax.eval_shape(
    lambda read, keys, given: experiment.sample(read, given, base.sampling_keys(keys)),
    read, jax.eval_shape(lambda key: jax.random.split(key, 2), key), given,
  )  # fmt: skip
  assert drawn['codes'].shape == (2, 4, 4)


def test_captions_are_the_priors_where_a_decoder_follows():
  module = importlib.import_module('configs.digits')
  base_config = importlib.import_module('configs.base')
  for variant in ('divae,prior,text', 'text,divae,prior'):
    data = {**module.DATA, 'caption_feature': 'caption'}
    config = base_config.make('digits', data, module.SIZES, variant)
    assert config.stages == ('vqvae', 'prior', 'refiner')
    assert config.prior.conditions.text.to_dict() == {'dropout': 0.1} and config.prior.text.length == 32
    assert 'text' not in config.refiner and 'text' not in config.refiner.conditions
    assert experiments.build(config, 'prior').source == Source(vocab_size=64, num_words=32)


def test_what_a_prior_does_not_read_is_refused():
  config = importlib.import_module('configs.digits').get_config('vqvae,prior,debug')
  config.prior.sample.captions = ('a red ring',)
  with pytest.raises(UserError, match=r'sample.captions must be \(\) in a stage that reads no captions'):
    experiments.build(config, 'prior')
