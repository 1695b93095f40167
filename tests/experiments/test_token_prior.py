"""The prior of ids: what it refuses, a hierarchy of a known joint distribution, flips, nulls."""

import dataclasses
import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from some_slow import some_slow

from vaediff import experiments, reads
from vaediff.conditions.base import Conditions
from vaediff.errors import UserError
from vaediff.experiments import base, token_prior
from vaediff.machine import sharding
from vaediff.models import token_sampling
from vaediff.models.functional import Model
from vaediff.models.transformer import Decoder
from vaediff.optim import make_optimizer
from vaediff.spaces.tokenizers import TOKENIZER, Tokenizer


def made(variant='vqvae,prior,label,debug', **changes):
  config = importlib.import_module('configs.digits').get_config(variant)
  config.update_from_flattened_dict(changes)
  return config


def build(variant='vqvae,prior,label,debug', **changes):
  return experiments.build(made(variant, **changes), 'prior')


# Refusals, before anything is compiled ------------------------------------------------------------------


@pytest.mark.parametrize(
  ('variant', 'changes', 'message'),
  [
    (
      'label', {'sample.guidance_weight': 1.0, 'conditions.label.dropout': 0.0},
      'guidance_weight is 1.0; .*dropout > 0',
    ),
    ('', {'sample.guidance_weight': 0.5}, 'guidance_weight is 0.5; above 0 .*variant label'),
    ('', {'sample.labels': (3,)}, r'sample.labels must be \(\) in a stage that reads no label'),
    ('label', {'sample.labels': (10,)}, 'sample.labels must be classes of this data set, 0 ... 9'),
    ('', {'sample.top_k': 17}, r'sample.top_k must be in 0 ... 16, the codes of .vqvae., got 17'),
    ('', {'sample.top_k': -1}, 'sample.top_k must be >= 0, got -1'),
    ('', {'sample.top_p': 0.0}, 'sample.top_p must be > 0, got 0.0'),
    ('', {'sample.top_p': 1.5}, 'sample.top_p must be <= 1, got 1.5'),
    ('', {'sample.temperature': -0.1}, 'sample.temperature must be >= 0, got -0.1'),
    ('', {'loss.keep_probability': 0.0}, 'loss.keep_probability must be > 0'),
    ('', {'model.num_heads': 3}, 'model.num_heads is 3, which does not divide model.width 16'),
    ('', {'model.form': 'encoder'}, 'model.form is .encoder.; valid: decoder, encoder_decoder'),
    ('', {'model.style': 'llama', 'model.form': 'encoder_decoder'}, 'an encoder and decoder has the style'),
    ('', {'tokenizer.stage': 'vae'}, 'tokenizer.stage is .vae., which is no tokenizer of this config'),
  ],
)  # fmt: skip
def test_refusals(variant, changes, message, monkeypatch):
  config = made(f'vqvae,prior,{variant}{"," if variant else ""}debug')
  config.update_from_flattened_dict({f'prior.{name}': value for name, value in changes.items()})
  monkeypatch.setattr(jax, 'jit', None)
  with pytest.raises(UserError, match=message):
    experiments.build(config, 'prior')


def test_a_label_needs_classes_and_no_other_condition_is_read():
  config = made()
  config.data.num_classes = 0
  with pytest.raises(UserError, match='conditions.label needs a data set with classes'):
    experiments.build(config, 'prior')
  config = made()
  with config.prior.conditions.unlocked():
    config.prior.conditions.degraded = {'dropout': 0.0}
  with pytest.raises(UserError, match="conditions has a section 'degraded'; a token prior reads label"):
    experiments.build(config, 'prior')


def test_a_level_that_says_nothing_is_refused():
  experiment = build()
  rng = np.random.default_rng(0)
  experiment.check_stored({'codes': rng.integers(0, 16, (50, 4, 4)).astype(np.int32)})
  two = np.zeros((50, 4, 4), np.int32)
  two[:25] = 3
  experiment.check_stored({'codes': two})  # a perplexity of 2
  two[25] = 3
  with pytest.raises(UserError, match='of the tokenizer .vqvae. have a perplexity of 2 over .* 16'):
    experiment.check_stored({'codes': two})
  for wrong in (16, -1):
    two[0, 0, 0] = wrong
    with pytest.raises(UserError, match=f"the ids 'codes' hold {wrong}; .* of 16 codes are 0 ... 15"):
      experiment.check_stored({'codes': two})


@pytest.mark.parametrize(
  ('variant', 'stages', 'tokenizer'),
  some_slow([
    ('prior', ('vqvae', 'prior'), 'vqvae'),
    ('vqgan,prior', ('vqgan', 'prior'), 'vqgan'),
    ('prior,label', ('vqvae', 'prior'), 'vqvae'),
    ('divae,prior,label', ('vqvae', 'prior', 'refiner'), 'vqvae'),
    ('label,prior', ('vqvae', 'prior'), 'vqvae'),
    ('label,divae,prior', ('vqvae', 'prior', 'refiner'), 'vqvae'),
    ('divae,distill,prior', ('vqvae', 'prior', 'refiner', 'distill'), 'vqvae'),
    ('vqgan,divae,prior,distill', ('vqgan', 'prior', 'refiner', 'distill'), 'vqgan'),
  ], 'vqgan,prior', 'label,divae,prior'),
)  # fmt: skip
def test_the_prior_comes_between_tokenizer_and_decoder(variant, stages, tokenizer):
  config = made(variant)
  assert config.stages == stages and config.prior.tokenizer.stage == tokenizer
  assert ('label' in config.prior.conditions) == ('label' in variant)
  assert experiments.build(config, 'prior').tokenizer.source.stage == tokenizer
  if 'refiner' in stages:
    assert set(config.refiner.conditions) - {'vae'} == {'codes'}  # the classes are the prior's alone
    (maker,) = experiments.build(config, 'refiner').makers
    assert (maker.stage, maker.feeds, maker.depth) == ('prior', 'codes', 1)
    theirs = experiments.build(config, 'prior').handed
    own = experiments.build(config, 'refiner').inputs
    assert theirs.keys() <= own.keys() and own['codes'] == theirs['codes']


# A known tokenizer -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Halves(Tokenizer):
  """Two levels of ids of images of 2x2 pixels: which half is bright; and of each pixel its value."""

  network = 'halves'
  grids = ((1, 1), (2, 2))
  sizes = (3, 4)

  def codes(self, params, x):
    value = jnp.round((x[..., 0] + 1) * 1.5).astype(jnp.int32)
    return value[:, :1, :1] % 3, value

  def embed(self, params, codes):
    return codes[1][..., None].astype(jnp.float32)

  def decode(self, params, codes):
    return codes[1][..., None] / 1.5 - 1


OPTIM = importlib.import_module('configs.parts').optim(1e-2)


def halves(**changes):
  """A prior of two levels, each a tiny transformer."""
  tiny = {'style': 'gpt', 'width': 16, 'num_layers': 1, 'num_heads': 2, 'source_size': 1}
  ids = lambda *shape: jax.ShapeDtypeStruct((1, *shape), jnp.int32)
  levels = (((1, 1), 3), ((2, 2), 4))
  models = (
    Model(module=Decoder(grid=(1, 1), codebook_size=3, **tiny), inputs=(ids(1), ids(1))),
    Model(
      module=Decoder(grid=(2, 2), codebook_size=4, above=levels[:1], **tiny),
      inputs=(ids(4), ids(1), ids(1, 1)),
    ),
  )
  source = reads.FromStage(stage='halves', network='halves', workdir='', model=models[0])
  settings = {
    'tokenizer': Halves(source=source),
    'models': models,
    'conditions': Conditions(),
    'optimizer': make_optimizer(OPTIM, 100),
    'rule': token_sampling.Rule(),
    'keep_probability': 1.0,
    'flip': False,
    'microbatches': 1,
    'dimensions': 4,
  }
  return token_prior.TokenPrior(**{**settings, **changes})


TOP = np.array([0.5, 0.3, 0.2])
BELOW = np.array([[0.7, 0.1, 0.1, 0.1], [0.1, 0.1, 0.4, 0.4], [0.0, 0.0, 0.0, 1.0]])
"""p(top), and p(value of each place | top) but that a place repeats the one before with probability 1/2."""


def known(rng, count):
  top = rng.choice(3, count, p=TOP)
  draw = lambda: np.array([rng.choice(4, p=BELOW[one]) for one in top])
  places = [draw()]
  for _ in range(3):
    places.append(np.where(rng.random(count) < 0.5, places[-1], draw()))
  return {
    'codes_0': top.reshape(-1, 1, 1).astype(np.int32),
    'codes_1': np.stack(places, axis=1).reshape(-1, 2, 2).astype(np.int32),
  }


def log_p(ids):
  """-log p of ids by the known distribution, of each level."""
  top, below = ids['codes_0'][:, 0, 0], ids['codes_1'].reshape(-1, 4)
  spent = -np.log(BELOW[top, below[:, 0]])
  for n in range(1, 4):
    spent = spent - np.log(0.5 * (below[:, n] == below[:, n - 1]) + 0.5 * BELOW[top, below[:, n]])
  return {'codes_0': -np.log(TOP[top]), 'codes_1': spent}


@pytest.fixture(scope='module')
def learned():
  """A hierarchy trained on the known distribution until it knows it."""
  experiment = halves()
  state = jax.jit(experiment.init)(jax.random.key(0))
  step = jax.jit(lambda state, batch, key: experiment.train_step(state, {}, batch, key))
  rng = np.random.default_rng(0)
  data = known(rng, 20_000)
  image = np.zeros((500, 2, 2, 1), np.uint8)
  for number in range(400):
    rows = rng.integers(0, 20_000, 500)
    batch = {'image': image, **{name: ids[rows] for name, ids in data.items()}}
    state, metrics = step(state, batch, jax.random.key(number))
  return experiment, state, metrics


@pytest.mark.slow
def test_a_hierarchy_learns_a_known_joint_distribution(learned):
  experiment, state, metrics = learned
  held_out = known(np.random.default_rng(1), 4000)
  batch = {'image': np.zeros((4000, 2, 2, 1), np.uint8), 'mask': np.ones(4000, np.float32), **held_out}
  read = state.eval_params
  assert set(read) == {'prior_0', 'prior_1'} and {'grad_norm/prior_0', 'grad_norm/prior_1'} <= set(metrics)
  keys = jax.random.split(jax.random.key(0), 1)
  found = jax.jit(lambda batch: experiment.bound(read, batch, keys, 0))(batch)
  wanted = log_p(held_out)
  for name in wanted:
    assert abs(float(np.mean(found[name]) - np.mean(wanted[name]))) < 0.02 * len(held_out[name][0].ravel())
    assert np.sqrt(np.mean((np.asarray(found[name]) - wanted[name]) ** 2)) < 0.25
  figures = jax.jit(lambda batch: experiment.eval_step(read, batch, jax.random.key(0)))(batch)
  assert figures.keys() <= experiment.metrics.keys()
  total = float(np.mean(found['codes_0'] + found['codes_1']))
  np.testing.assert_allclose(figures['loss'], total / 5, rtol=1e-5)
  np.testing.assert_allclose(figures['bits_per_dimension'], total / 4 / math.log(2), rtol=1e-5)
  np.testing.assert_allclose(figures['nats_per_token/codes_1'], np.mean(found['codes_1']) / 4, rtol=1e-5)


@pytest.mark.slow
def test_samples_of_a_hierarchy_have_the_joint_distribution_and_follow_what_is_given(learned):
  experiment, state, _ = learned
  read = {**state.eval_params, TOKENIZER: {}}
  keys = lambda: base.sampling_keys(jax.random.split(jax.random.key(5), 4000))
  run = jax.jit(lambda given: experiment.sample(read, given, keys()))
  drawn = run({})
  assert set(drawn) == {'codes_0', 'codes_1', 'x0'}
  top, below = np.asarray(drawn['codes_0'])[:, 0, 0], np.asarray(drawn['codes_1']).reshape(-1, 4)
  np.testing.assert_allclose(np.bincount(top, minlength=3) / 4000, TOP, atol=0.04)
  for one in range(3):
    share = np.bincount(below[top == one].ravel(), minlength=4) / (4 * np.sum(top == one))
    np.testing.assert_allclose(share, BELOW[one], atol=0.06)
  repeats = np.mean(below[top == 0][:, 1] == below[top == 0][:, 0])
  assert abs(repeats - (0.5 + 0.5 * np.sum(BELOW[0] ** 2))) < 0.05
  np.testing.assert_allclose(drawn['x0'][..., 0], drawn['codes_1'] / 1.5 - 1, atol=1e-6)
  given = run({'codes_0': np.full((4000, 1, 1), 2, np.int32)})
  assert np.mean(np.asarray(given['codes_1']) == 3) > 0.95 and np.all(np.asarray(given['codes_0']) == 2)
  both = {name: np.asarray(drawn[name])[::-1] for name in ('codes_0', 'codes_1')}
  np.testing.assert_array_equal(run(both)['codes_1'], both['codes_1'])
  with pytest.raises(UserError, match=r'codes_0 must be ids on a grid of \(1, 1\), got \(2, 1\)'):
    run({'codes_0': np.zeros((4000, 2, 1), np.int32)})


def test_ids_that_are_not_kept_are_any():
  experiment = halves(keep_probability=0.25)
  codes = (jnp.zeros((4000, 1, 1), jnp.int32), jnp.zeros((4000, 2, 2), jnp.int32))
  for ids, size in zip(experiment.corrupted(codes, jax.random.key(0)), (3, 4), strict=True):
    share = np.bincount(np.asarray(ids).ravel(), minlength=size) / ids.size
    np.testing.assert_allclose(share[1:], 0.75 / size, atol=0.03)
  assert halves().corrupted(codes, jax.random.key(0)) is codes


def test_with_flips_the_ids_of_both_views_are_stored_and_one_is_read():
  experiment = halves(flip=True)
  assert {name: struct.shape for name, struct in experiment.stored.items()} == {
    'codes_0': (2, 1, 1), 'codes_1': (2, 2, 2),
  }  # fmt: skip
  image = np.random.default_rng(0).integers(0, 4, (64, 2, 2, 1)) * 85
  x = jnp.asarray(image / 127.5 - 1, jnp.float32)
  stored = experiment.store({TOKENIZER: {}}, {}, x)
  plain, mirrored = (Halves.codes(None, {}, view)[1] for view in (x, x[:, :, ::-1]))
  np.testing.assert_array_equal(stored['codes_1'], jnp.stack([plain, mirrored], axis=1))
  batch = {'image': jnp.asarray(image, jnp.uint8)}
  for known_ids in (stored, {}):  # stored, or made of the images
    ids = experiment.ids({TOKENIZER: {}}, {**batch, **known_ids}, jax.random.key(1))
    is_plain = np.all(ids[1] == plain, axis=(1, 2))
    is_mirrored = np.all(ids[1] == mirrored, axis=(1, 2))
    assert np.all(is_plain | is_mirrored) and 10 < np.sum(is_mirrored & ~is_plain) < 50
    # the levels are of one view
    np.testing.assert_array_equal(ids[0][:, 0, 0], ids[1][:, 0, 0] % 3)
    np.testing.assert_array_equal(experiment.ids({TOKENIZER: {}}, {**batch, **known_ids}, None)[1], plain)


def test_a_label_that_is_dropped_is_the_null():
  experiment = build()
  labels = {'label': jnp.asarray([3, 4, 5])}
  rows = lambda *args: experiment.source(*args).ids
  np.testing.assert_array_equal(rows(labels, 3), [[3], [4], [5]])
  drop = {'label': jnp.asarray([False, True, False])}
  np.testing.assert_array_equal(rows(labels, 3, drop), [[3], [10], [5]])
  np.testing.assert_array_equal(rows({}, 2), [[10], [10]])
  assert experiment.models[0].module.source_size == 11 and experiment.source(labels, 3).mask is None
  plain = build('vqvae,prior,debug')
  assert plain.models[0].module.source_size == 1 and not plain.classes
  np.testing.assert_array_equal(plain.source({}, 2).ids, [[0], [0]])


def test_what_is_declared():
  experiment = build(**{'prior.sample.labels': (7, 3)})
  ids = jax.ShapeDtypeStruct((4, 4), jnp.int32)
  assert dict(experiment.handed) == {'codes': ids} and experiment.inputs.keys() == {'label', 'codes'}
  assert experiment.frozen[TOKENIZER].stage == 'vqvae' and experiment.networks.keys() == {'prior'}
  assert experiment.classes == (7, 3) and experiment.models[0].module.source_size == 11
  assert experiment.id_sizes == {'codes': 16} and experiment.num_tokens == 16


def test_ids_of_a_tokenizer_without_a_decoder_are_drawn_alone(key):
  """A diffusion that has trained it decodes them: it is fed the ids."""
  config = made('divae_joint,prior,debug', **{'refiner.train.batch_size': 16})
  assert config.stages == ('refiner', 'prior') and config.refiner.conditions.codes.prior_stage == 'prior'
  experiment = experiments.build(config, 'prior')
  model = experiment.tokenizer.source.model
  assert not experiment.draws_images and build().draws_images
  state = jax.eval_shape(experiment.init, key)
  read = {name: network.params for name, network in state.networks.items()}
  drawn = jax.eval_shape(
    lambda read, keys: experiment.sample(read, {}, base.sampling_keys(keys)),
    {**read, TOKENIZER: jax.eval_shape(model.init, key)},
    jax.eval_shape(lambda key: jax.random.split(key, 2), key),
  )
  assert {name: ids.shape for name, ids in drawn.items()} == {'codes': (2, 4, 4)}


@pytest.mark.parametrize(
  'changes',
  [
    pytest.param({'prior.model.form': 'encoder_decoder'}, marks=pytest.mark.slow),
    pytest.param({'prior.model.remat': True}, marks=pytest.mark.slow),
    {'prior.model.style': 'llama', 'prior.train.microbatches': 2, 'prior.loss.keep_probability': 0.9},
  ],
)
def test_all_forms_and_styles_take_a_step_and_are_sampled(changes, key):
  experiment = build(**changes, **{'prior.sample.guidance_weight': 1.0})
  state = jax.eval_shape(experiment.init, key)
  read = {TOKENIZER: jax.eval_shape(experiment.tokenizer.source.model.init, key)}
  struct = jax.ShapeDtypeStruct
  batch = {'image': struct((2, 8, 8, 1), jnp.uint8), 'label': struct((2,), jnp.int32)}
  after, _ = jax.eval_shape(experiment.train_step, state, read, batch, key)
  assert jax.tree.structure(after) == jax.tree.structure(state)
  read |= {name: network.params for name, network in state.networks.items()}
  drawn = jax.eval_shape(
    lambda read, keys, label: experiment.sample(read, {'label': label}, base.sampling_keys(keys)),
    read, jax.eval_shape(lambda key: jax.random.split(key, 2), key), batch['label'],
  )  # fmt: skip
  assert drawn['codes'].shape == (2, 4, 4) and drawn['x0'].shape == (2, 8, 8, 1)


@pytest.mark.slow
def test_one_device_equals_eight():
  """Two updates on given ids, with dropped labels and ids that are replaced."""
  experiment = build(**{'prior.loss.keep_probability': 0.9})
  random = np.random.default_rng(0)
  batches = [
    {
      'image': np.zeros((8, 8, 8, 1), np.uint8),
      'label': random.integers(0, 10, 8).astype(np.int32),
      'codes': random.integers(0, 16, (8, 4, 4)).astype(np.int32),
    }
    for _ in range(2)
  ]
  read = {TOKENIZER: jax.jit(experiment.tokenizer.source.model.init)(jax.random.key(1))}
  states = []
  for count in (1, 8):
    where = sharding.batch_sharding(sharding.make_mesh(made().mesh, jax.devices()[:count]))
    state, step = jax.jit(experiment.init)(jax.random.key(0)), jax.jit(experiment.train_step)
    for number, batch in enumerate(batches):
      state, metrics = step(state, read, jax.device_put(batch, where), jax.random.key(number))
    states.append((jax.device_get(state), float(metrics['loss'])))
  (one, loss), (eight, other) = states
  assert loss == pytest.approx(other, rel=1e-5) and len(where.device_set) == 8
  for name in one.networks:
    pairs = (state.networks[name].params for state in (one, eight))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *pairs)
