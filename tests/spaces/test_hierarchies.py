"""Codes on several grids: what a prior and a decoder read of the stage that trains them."""

import importlib

import as_trained
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff.errors import UserError
from vaediff.models import codebook
from vaediff.spaces import hierarchies, tokenizers

pytestmark = pytest.mark.xdist_group('hierarchies')  # one worker: the tests share what is dear


def config_of(**changes):
  config = importlib.import_module('configs.digits').get_config('vqvae2,debug')
  config.data.image_size = 16
  config.update_from_flattened_dict({'vqvae2.model.num_levels': 3, **changes})
  return config


@pytest.fixture(scope='module')
def made():
  """A tokenizer of three levels, parameters whose codes are spread as the vectors are, images, and ids."""
  tokenizer = tokenizers.tokenizer_of(config_of(), 'vqvae2', '', 'prior.tokenizer.stage')
  model = tokenizer.source.model
  x = jax.random.uniform(jax.random.key(1), (6, 16, 16, 1), minval=-1.0)
  # larger than they start, so that what a level says is not lost on the way
  started = as_trained.params_of(model.init, deviation=0.0)
  params, books = jax.tree.map(lambda leaf: 3 * np.asarray(leaf), started), []

  def spread(level, z):
    books.append(codebook.data_init(z, jax.random.key(2), 8).codes)
    return codebook.lookup(books[level], codebook.nearest(z, books[level]))

  hierarchies.walk(model, params, x, spread)
  keys = map(hierarchies.codes_key, model.module.names)
  params = {**params, **dict(zip(keys, books, strict=True))}
  return tokenizer, params, x, jax.jit(tokenizer.codes)(params, x)


def test_a_tokenizer_has_all_levels_coarse_first(made):
  tokenizer, _, _, ids = made
  assert tokenizer.grids == ((1, 1), (2, 2), (4, 4)) and tokenizer.sizes == (8, 8, 8)
  assert [level.shape for level in ids] == [(6, 1, 1), (6, 2, 2), (6, 4, 4)]
  assert all(level.dtype == jnp.int32 and level.min() >= 0 and level.max() < 8 for level in ids)
  assert len(np.unique(ids[2])) > 2
  assert tokenizer.embedded == (4, 4, 3 * 4) and tokenizer.network == 'hierarchy'


def test_the_map_of_ids_holds_the_codes_of_the_finest_level_as_they_are(made):
  tokenizer, params, _, ids = made
  last = tokenizer.embed(params, ids)[..., -4:]
  np.testing.assert_array_equal(last, params['codes_bottom'][ids[2]])
  np.testing.assert_array_equal(codebook.nearest(last, params['codes_bottom']), ids[2])


def test_ids_decode_to_the_reconstruction(made):
  """Up to the rounding of z + (e - z), which the network trains with."""
  tokenizer, params, x, ids = made
  decoded = jax.jit(tokenizer.decode)(params, ids)
  np.testing.assert_allclose(decoded, tokenizer.source.model.apply(params, x), atol=1e-5)
  assert float(jnp.abs(decoded - x).mean()) > 0.01


def vectors_of(model, params, x, ids):
  """Returns the vectors of each level, where these ids take their place."""
  found = []

  def at_ids(level, z):
    found.append(z)
    return hierarchies.codes_of(model, params)[level][ids[level]]

  hierarchies.walk(model, params, x, at_ids)
  return found


def test_each_level_changes_the_image_and_those_below(made):
  tokenizer, params, x, ids = made
  model = tokenizer.source.model
  whole, image = tokenizer.embed(params, ids), tokenizer.decode(params, ids)
  for level in range(3):
    without = hierarchies.embed(model, params, ids, {level: jnp.zeros(4)})
    assert float(jnp.abs(hierarchies.decode(model, params, without) - image).max()) > 1e-4
    # the finest level's own channels are the last, and no other level has a part in them
    last = jnp.zeros((6, 4, 4, 4)) if level == 2 else whole[..., -4:]
    np.testing.assert_array_equal(without[..., -4:], last)
  # the vectors of the bottom are made with the codes of the top
  other = {**params, 'codes_top': params['codes_top'] + 1.0}
  vectors = [vectors_of(model, tree, x, ids) for tree in (params, other)]
  np.testing.assert_array_equal(vectors[0][0], vectors[1][0])
  assert float(jnp.abs(vectors[0][2] - vectors[1][2]).max()) > 1e-3


@pytest.mark.parametrize(
  ('size', 'levels', 'message'),
  [
    (28, 4, r'data.image_size is 28, but with model.num_levels = 4 .* multiple of 32, such as 32, or set '
     r'model.num_levels to 1'),
    (8, 3, r'data.image_size is 8, .* multiple of 16, such as 16, or set model.num_levels to 1 or 2'),
    (30, 1, r'data.image_size is 30, .* multiple of 4, such as 32$'),
  ],
)  # fmt: skip
def test_a_side_that_the_levels_do_not_divide_is_refused(size, levels, message):
  config = config_of(**{'data.image_size': size, 'vqvae2.model.num_levels': levels})
  with pytest.raises(UserError, match=message):
    tokenizers.tokenizer_of(config, 'vqvae2', '', 'prior.tokenizer.stage')


def test_perplexity_is_that_of_the_codes_in_use():
  assert tokenizers.perplexity(np.array([8, 4, 2, 1, 1, 0, 0, 0]) / 16) == pytest.approx(3.66801617, rel=1e-7)
  assert tokenizers.perplexity(np.full(512, 1 / 512)) == pytest.approx(512)
  assert tokenizers.perplexity(np.array([0.0, 1.0])) == 1.0


def test_frequencies_without_a_measurement_are_equal(made):
  usage = tokenizers.frequencies(made[0])
  assert (usage.stage, usage.measurement, usage.workdir) == ('vqvae2', 'code_frequencies', '')
  found = usage.neutral()
  assert [found[tokenizers.level_key(level)].sum() for level in range(3)] == [1.0, 1.0, 1.0]
