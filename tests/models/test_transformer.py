"""Published counts; a cache changes nothing; what each id is given of prefix, places and ids above."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from some_slow import some_slow

from configs.presets import PRIOR as SIZES
from vaediff.errors import UserError
from vaediff.machine import cost
from vaediff.models import token_sampling
from vaediff.models.transformer import Decoder, EncoderDecoder
from vaediff.models.transformer_blocks import hidden_width, rotated, rotations

WIDTH, CODES, GRID = 32, 11, (4, 4)
TINY = {'grid': GRID, 'codebook_size': CODES, 'width': WIDTH, 'num_layers': 2, 'num_heads': 4}


def count(module, *args):
  return cost.num_parameters(jax.eval_shape(module.init, jax.random.key(0), *args))


def ids(grid, batch=1):
  return jnp.zeros((batch, grid[0] * grid[1]), jnp.int32)


@pytest.mark.parametrize(
  ('size', 'codes', 'places', 'wanted'),
  some_slow([
    ('taming_1024x24', 1024, 512, 304_932_864),
    ('taming_1408x40', 8192, 348, 975_876_352),
    ('taming_1536x36', 8192, 348, 1_045_638_144),
    ('taming_1536x48', 16_384, 256, 1_410_640_896),
  ], 'taming_1024x24'),
)  # fmt: skip
def test_counts_of_taming(size, codes, places, wanted):
  """2VC + BC + L(12C^2 + 13C) + 2C, the prefix given as vectors."""
  module = Decoder(grid=(1, places), codebook_size=codes, source_size=0, **SIZES[size])
  assert module.num_places == places
  width = SIZES[size]['width']
  assert count(module, ids((1, places)), jnp.zeros((1, 1, width))) == wanted


@pytest.mark.parametrize(
  ('size', 'wanted'),
  some_slow([
    ('llamagen_b', 110_888_448),
    ('llamagen_l', 342_910_976),
    ('llamagen_xl', 774_699_520),
    ('llamagen_xxl', 1_410_972_672),
    ('llamagen_3b', 3_096_659_200),
  ], 'llamagen_b'),
)  # fmt: skip
def test_counts_of_llamagen(size, wanted):
  """Of 16,384 codes and 1,000 classes."""
  module = Decoder(grid=(16, 16), codebook_size=16_384, source_size=1001, **SIZES[size])
  assert count(module, ids((16, 16)), jnp.zeros((1, 1), jnp.int32)) == wanted


def test_count_of_encoder_and_decoder():
  module = EncoderDecoder(
    grid=(16, 16), codebook_size=512, style='gpt', width=256, num_layers=6, num_heads=8, source_size=1024,
    source_length=32, num_encoder_layers=4,
  )  # fmt: skip
  assert count(module, ids((16, 16)), jnp.zeros((1, 32), jnp.int32)) == 10_078_976


def test_hidden_layer_of_swiglu():
  widths = (64, 768, 1024, 1280, 1536, 3200)
  assert tuple(map(hidden_width, widths)) == (256, 2048, 2816, 3584, 4096, 8704)


# The cache ---------------------------------------------------------------------------------------------


@functools.cache
def tiny(kind, length, above=()):
  """Returns a tiny transformer and random parameters, the head too: a zero head would hide every mistake."""
  if kind == 'both':
    module = EncoderDecoder(
      **TINY, style='gpt', source_size=7, source_length=length, num_encoder_layers=1, above=above
    )
  else:
    module = Decoder(**TINY, style=kind, source_size=7, source_length=length, above=above)
  grids = [jnp.zeros((1, *grid), jnp.int32) for grid, _ in above]
  shapes = jax.eval_shape(
    module.init, jax.random.key(0), ids(GRID), jnp.zeros((1, length), jnp.int32), *grids
  )
  leaves, treedef = jax.tree.flatten(shapes)
  rng = np.random.default_rng(0)
  scale = lambda shape: 0.3 if len(shape) > 1 else 1.0
  params = treedef.unflatten(
    [jnp.asarray(scale(x.shape) * rng.standard_normal(x.shape), jnp.float32) for x in leaves]
  )
  return module, params


def sources(length, batch, seed=1):
  return jnp.asarray(np.random.default_rng(seed).integers(0, 7, (batch, length)), jnp.int32)


def draw(module, params, source, keys, rule, above=()):
  """Returns ids and nats of the one scan; where it is guided, source 6 guides."""
  batch = len(source)
  if rule.guidance_weight:
    source = token_sampling.paired(source, jnp.full_like(source, 6))
    above = tuple(token_sampling.paired(grid, grid) for grid in above)
  context = module.apply(params, *above, method='context') if above else None
  codes, nats = token_sampling.sample(
    lambda: module.apply(params, source, context, method='start'),
    lambda codes, n, cache: module.apply(params, codes, n, cache, context, method='step'),
    keys, module.num_tokens, rule,
  )  # fmt: skip
  assert codes.shape == (batch, module.num_tokens)
  return codes, nats


@pytest.mark.parametrize(
  ('kind', 'length'),
  some_slow(list(itertools.product(['gpt', 'llama', 'both'], [1, 7])), ('llama', 1), ('both', 7)),
)
def test_a_cache_changes_nothing(kind, length):
  """Logits of every id with a cache and without; what was drawn has the probability it was drawn with."""
  module, params = tiny(kind, length)
  source, keys = sources(length, 5), jax.random.split(jax.random.key(3), 5)
  codes, nats = jax.jit(lambda keys: draw(module, params, source, keys, token_sampling.Rule()))(keys)
  full = jax.jit(lambda codes: module.apply(params, codes, source))(codes)
  assert float(jnp.std(full)) > 0.3

  @jax.jit
  def cached():
    logits, cache = module.apply(params, source, method='start')

    def one(cache, n):
      logits, cache = module.apply(params, codes[:, n - 1], n, cache, method='step')
      return cache, logits

    _, others = jax.lax.scan(one, cache, jnp.arange(1, module.num_tokens))
    return jnp.concatenate([logits[:, None], jnp.swapaxes(others, 0, 1)], axis=1)

  np.testing.assert_allclose(cached(), full, atol=2e-5)
  np.testing.assert_allclose(jnp.sum(token_sampling.nats(full, codes), axis=1), nats, rtol=1e-5)


def without_cache(module, params, source, keys, rule):
  """Draws every id of a whole new pass."""
  codes = jnp.zeros((len(source), module.num_tokens), jnp.int32)
  null = jnp.full_like(source, 6)
  apply = jax.jit(lambda codes, source: module.apply(params, codes, source))
  for n in range(module.num_tokens):
    logits = apply(codes, source)[:, n]
    if rule.guidance_weight:
      logits = token_sampling.guided(logits, apply(codes, null)[:, n], rule.guidance_weight)
    drawn = token_sampling.categorical(keys, jnp.int32(n), token_sampling.limited(logits, rule))
    codes = codes.at[:, n].set(drawn)
  return codes


@pytest.mark.slow
@pytest.mark.parametrize('weight', [0.0, 1.0])
def test_the_scan_draws_what_whole_passes_draw_and_each_row_is_alone(weight):
  module, params = tiny('llama', 1)
  source, keys = sources(1, 5), jax.random.split(jax.random.key(4), 5)
  rule = token_sampling.Rule(guidance_weight=weight)
  run = jax.jit(lambda source, keys: draw(module, params, source, keys, rule))
  codes, nats = run(source, keys)
  np.testing.assert_array_equal(codes, without_cache(module, params, source, keys, rule))
  alone, nats_alone = run(source[2:3], keys[2:3])
  np.testing.assert_array_equal(alone[0], codes[2])
  np.testing.assert_allclose(nats_alone[0], nats[2], rtol=1e-5)


def test_the_null_of_the_prefix_reaches_the_logits():
  module, params = tiny('gpt', 1)
  codes = ids(GRID)
  of = jax.jit(lambda row: module.apply(params, codes, jnp.full((1, 1), row)))
  assert float(jnp.min(jnp.max(jnp.abs(of(0) - of(6)), axis=-1))) > 1e-3  # at every place


@pytest.mark.parametrize('kind', some_slow(['gpt', 'llama', 'both'], 'llama'))
def test_an_id_is_given_those_before_it_alone(kind):
  module, params = tiny(kind, 2)
  source, codes = sources(2, 1), jnp.asarray(np.arange(16)[None] % CODES, jnp.int32)
  apply = jax.jit(lambda codes: module.apply(params, codes, source))
  before, after = apply(codes), apply(codes.at[0, 5].set(9))
  changed = np.any(np.asarray(before != after)[0], axis=-1)
  assert not changed[:6].any() and changed[6:].all()


def test_words_that_are_masked_are_not_read():
  module, params = tiny('both', 7)
  source, codes = sources(7, 1), ids(GRID)
  mask = jnp.arange(7)[None] < 4
  run = jax.jit(lambda source, mask: module.apply(params, codes, source, mask=mask))
  of = lambda source: run(source, mask)
  np.testing.assert_array_equal(of(source), of(source.at[0, 5].set((source[0, 5] + 1) % 7)))
  assert np.any(of(source) != of(source.at[0, 3].set((source[0, 3] + 1) % 7)))
  assert np.isfinite(run(source, jnp.zeros((1, 7), bool))).all()


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['gpt', 'llama', 'both'])
def test_ids_above_are_added_where_the_id_below_them_is_predicted(kind):
  above = (((2, 2), 5),)
  module, params = tiny(kind, 2, above)
  source, codes, top = sources(2, 1), ids(GRID), jnp.asarray([[[0, 1], [2, 3]]])
  apply = jax.jit(lambda top: module.apply(params, codes, source, top))
  changed = np.any(np.asarray(apply(top) != apply(top.at[0, 0, 1].set(4)))[0], axis=-1)
  assert not changed[:2].any() and changed[2:].all()  # the upper right quarter starts at place 2
  keys = jax.random.split(jax.random.key(0), 1)
  drawn, nats = draw(module, params, source, keys, token_sampling.Rule(), (top,))
  np.testing.assert_allclose(
    jnp.sum(token_sampling.nats(module.apply(params, drawn, source, top), drawn)), nats[0], rtol=1e-5
  )


def test_rotation_is_of_differences_of_rows_and_columns_and_leaves_the_prefix():
  turns = rotations((3, 4), 8, 1)
  assert turns.shape == (13, 4, 2)
  np.testing.assert_allclose(turns[0], [[1, 0]] * 4)
  # pairs: row x 1, row x 1/100, column x 1, column x 1/100
  np.testing.assert_allclose(turns[1 + 2 * 4 + 3, :, 1], np.sin([2, 0.02, 3, 0.03]), rtol=1e-5)
  x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 1, 1, 8)), jnp.float32)
  at = lambda row, column: rotated(x, turns[1 + 4 * row + column][None])[0, 0, 0]
  np.testing.assert_allclose(jnp.dot(at(0, 0), at(1, 2)), jnp.dot(at(1, 1), at(2, 3)), rtol=1e-5)
  assert abs(float(jnp.dot(at(0, 0), at(1, 2)) - jnp.dot(at(0, 0), at(2, 1)))) > 1e-3


def test_the_head_of_llama_is_zero_at_first_and_dropout_is_of_training():
  module = Decoder(**{**TINY, 'num_layers': 1}, style='llama', source_size=3, dropout=0.5)
  codes, source = ids(GRID), jnp.zeros((1, 1), jnp.int32)
  params = jax.jit(module.init)(jax.random.key(0), codes, source)
  assert not np.any(jax.jit(module.apply)(params, codes, source))
  module, params = Decoder(**TINY, style='gpt', source_size=7, dropout=0.5, remat=True), tiny('gpt', 1)[1]
  plain = jax.jit(module.apply)(params, codes, source)
  np.testing.assert_allclose(plain, jax.jit(tiny('gpt', 1)[0].apply)(params, codes, source), atol=1e-5)
  train = lambda key: module.apply(params, codes, source, deterministic=False, rngs={'dropout': key})
  dropped = jax.jit(train)(jax.random.key(1))
  assert np.max(np.abs(dropped - plain)) > 0.1


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'style': 'bert'}, "model.style is 'bert'; valid: gpt, llama"),
    ({'num_heads': 5}, 'model.num_heads is 5, which does not divide model.width 32'),
    ({'style': 'llama', 'num_heads': 16}, 'model.width / model.num_heads is 2: .* a multiple of 4'),
    ({'above': (((3, 2), 5),)}, 'a grid of 3 x 2, which does not divide .* 4 x 4'),
    ({'dtype': 'float16'}, 'float16'),
  ],
)
def test_refusals(changes, message):
  with pytest.raises(UserError, match=message):
    Decoder(**{**TINY, 'style': 'gpt', 'source_size': 3, **changes})


def test_an_encoder_and_decoder_has_one_style():
  with pytest.raises(UserError, match="model.style is 'llama'; an encoder and decoder has the style 'gpt'"):
    EncoderDecoder(**TINY, style='llama', source_size=3)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['gpt', 'llama', 'both'])
def test_bfloat16_is_float32_but_for_its_rounding(kind):
  module, params = tiny(kind, 2)
  codes = jnp.asarray(np.random.default_rng(2).integers(0, CODES, (3, GRID[0] * GRID[1])), jnp.int32)
  logits = {
    dtype: jax.jit(module.clone(dtype=dtype).apply)(params, codes, sources(2, 3))
    for dtype in ('float32', 'bfloat16')
  }
  assert all(value.dtype == jnp.float32 for value in logits.values())
  apart = jnp.abs(logits['bfloat16'] - logits['float32'])
  assert 0 < float(apart.mean()) < 0.05 * float(jnp.std(logits['float32']))
