"""Codes as a condition: what the network reads of them, what is stored, what is refused."""

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
from vaediff.conditions import codes
from vaediff.errors import UserError
from vaediff.models.functional import Model
from vaediff.run import checkpoint, frozen, students
from vaediff.spaces import tokenizers
from vaediff.storage import identity

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / 'experiments'))
from random_parameters import frozen_of, made  # noqa: E402


def config_of(variant='divae,debug', name='digits', **changes):
  config = importlib.import_module(f'configs.{name}').get_config(variant)
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  return students.resolve(config)


def build(variant='divae,debug', stage='refiner', **changes):
  return experiments.build(config_of(variant, **changes), stage)


def codes_of(experiment):
  return next(one for one in experiment.conditions.each if one.name == 'codes')


def images(count=4):
  return jax.random.uniform(jax.random.key(1), (count, 8, 8, 1), minval=-1.0, maxval=1.0)


def test_the_network_reads_the_codes_of_the_nearest_vectors():
  one, x = codes_of(build()), images()
  params = made(one.tokenizer.source.model, 0)
  read = {'tokenizer': params}
  encode = lambda x: one.tokenizer.source.model.apply(params, x, method='encode')[0]
  seen, z = jax.jit(lambda x: (one.observe(read, {}, x, None), encode(x)))(x)
  distances = ((z[..., None, :] - params['codes'][None, None, None]) ** 2).sum(-1)
  assert set(seen) == {'codes'} == set(one.inputs) and seen['codes'].dtype == jnp.int32
  np.testing.assert_array_equal(seen['codes'], distances.argmin(-1))
  assert len(np.unique(seen['codes'])) > 3
  values = one.values(read, seen)
  assert set(values) == set(one.ports) == {'codes'}
  np.testing.assert_array_equal(values['codes'], params['codes'][seen['codes']])
  assert values['codes'].shape[1:] == one.ports['codes'].shape == (4, 4, 2)
  assert one.ports['codes'].enters == 'middle' and one.ports['codes'].how == 'concat'


def test_what_is_stored_are_the_ids_of_images_that_are_not_mirrored():
  one = codes_of(build())
  assert one.stored == {'codes': jax.ShapeDtypeStruct((4, 4), jnp.int32)}
  stored = jnp.arange(64, dtype=jnp.int32).reshape(4, 4, 4) % 16
  assert one.observe({}, {'codes': stored}, images(), None)['codes'] is stored  # nothing is encoded
  assert codes_of(build(**{'refiner.train.flip': True})).stored == {}


@pytest.mark.slow
def test_mirrored_images_are_encoded_as_they_are_seen():
  experiment = build(**{'refiner.train.flip': True})
  one = codes_of(experiment)
  read = {'tokenizer': made(one.tokenizer.source.model, 0)}
  seen = []
  object.__setattr__(one, 'observe', lambda read, batch, x, key: seen.append(x) or type(one).observe(
    one, read, batch, x, key
  ))  # fmt: skip
  pixels = jnp.asarray(np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), np.uint8))
  y0, values = experiment.examples(read, {'image': pixels}, jax.random.key(0), training=True)
  np.testing.assert_array_equal(seen[0], y0)
  mirrored = [bool(np.any(row != pixel)) for row, pixel in zip(y0, pixels / 127.5 - 1, strict=True)]
  assert 0 < sum(mirrored) < 8
  np.testing.assert_array_equal(values['codes'], one.values(read, one.observe(read, {}, y0, None))['codes'])


@pytest.mark.slow
def test_beside_a_sample_is_the_image_of_the_tokenizers_decoder():
  one = codes_of(build())
  model = one.tokenizer.source.model
  read = {'tokenizer': made(model, 0)}
  ids = jax.random.randint(jax.random.key(3), (2, 4, 4), 0, 16)
  shown = one.shown(jax.jit(lambda ids: one.complete(read, {'codes': ids}))(ids))
  decoded = model.apply(read['tokenizer'], read['tokenizer']['codes'][ids], method='decode')
  assert list(shown) == list(one.titles) == ['x0_codes']
  np.testing.assert_allclose(shown['x0_codes'], decoded, atol=1e-5)


@pytest.mark.slow
def test_ids_that_are_given_make_the_sample():
  experiment = build(**{'refiner.sample.num_steps': 2, 'refiner.sample.sampler': 'ddim'})
  read = {**frozen_of(experiment), 'denoiser': made(experiment.denoiser.model, 1)}
  assert experiment.reconstructs and 'codes' in experiment.inputs
  keys = experiments.base.sampling_keys(jax.random.split(jax.random.key(0), 3))
  draw = jax.jit(lambda given: experiment.sample(read, given, keys))
  ids = jnp.zeros((3, 4, 4), jnp.int32).at[1].set(5)
  start = {'noise': jnp.broadcast_to(jax.random.normal(jax.random.key(1), (1, 8, 8, 1)), (3, 8, 8, 1))}
  drawn = draw({**start, 'codes': ids})
  assert list(drawn) == ['x0', 'x0_codes']
  np.testing.assert_array_equal(drawn['x0'][0], drawn['x0'][2])
  assert np.abs(drawn['x0'][0] - drawn['x0'][1]).max() > 1e-3
  assert experiment.draw(read, keys, jnp.arange(3)).keys() == {'noise'}  # ids are not drawn of nothing


def test_a_bound_counts_each_id_as_one_of_all_codes():
  experiment = build()
  assert experiment.likelihood
  nats = codes_of(experiment).nats({}, images())
  np.testing.assert_allclose(nats['codes'], np.full(4, 16 * np.log(16)), rtol=1e-6)


def test_codes_are_dropped_alone():
  experiment = build('divae,guided,label,debug')
  assert experiment.conditions.droppable == ('codes', 'label')
  drop = experiment.conditions.drop(jax.random.key(0), 400)
  assert set(drop) == {'codes', 'label'} and np.any(drop['codes'] != drop['label'])
  assert 0.05 < float(drop['codes'].mean()) < 0.16
  assert set(experiment.conditions.without(('codes',), 2)) == {'codes'}
  shapes = jax.eval_shape(experiment.denoiser.model.init, jax.random.key(0))
  assert shapes['null_codes'].shape == (2,)


class Pair(nn.Module):
  """Codes of two levels."""

  @nn.compact
  def __call__(self, x):
    return x + self.param('codes', nn.initializers.zeros, ())


class Levels(tokenizers.Tokenizer):
  """Two levels: means of all pixels and of quarters, in four steps."""

  grids, sizes = ((1, 1), (2, 2)), (4, 8)

  def codes(self, params, x):
    means = [x.mean(axis=(1, 2, 3)).reshape(-1, 1, 1), x.reshape(-1, 2, 4, 2, 4).mean(axis=(2, 4))]
    return tuple(jnp.int32(jnp.clip(jnp.round(mean + 1.5), 0, 3)) for mean in means)

  def embed(self, params, codes):
    coarse = jnp.broadcast_to(codes[0], codes[1].shape)
    return jnp.stack([coarse, codes[1]], axis=-1).astype(jnp.float32)

  def decode(self, params, codes):
    return jnp.repeat(jnp.repeat(codes[1] / 1.5 - 1, 4, axis=1), 4, axis=2)[..., None]


def test_of_several_levels_the_coarse_one_comes_first():
  model = Model(module=Pair(), inputs=(jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32),))
  source = reads.FromStage(stage='pair', network='pair', workdir='', model=model)
  tokenizer = Levels(source=source)
  one = dataclasses.replace(codes_of(build()), tokenizer=tokenizer, shape=tokenizer.embedded)
  assert one.shape == (2, 2, 2)
  assert {name: struct.shape for name, struct in one.inputs.items()} == {'codes_0': (1, 1), 'codes_1': (2, 2)}
  assert one.stored == one.inputs
  seen = one.observe({'tokenizer': {}}, {}, images(), None)
  values = one.values({'tokenizer': {}}, seen)
  assert list(values) == ['codes']
  np.testing.assert_array_equal(values['codes'][..., 1], seen['codes_1'])
  nats = one.nats({}, images())['codes']
  np.testing.assert_allclose(nats, np.full(4, np.log(4) + 4 * np.log(8)), rtol=1e-6)
  assert codes.maker_of(config_of(), 'refiner', 2) is None
  fed = config_of('divae,prior,debug')
  assert codes.maker_of(fed, 'refiner', 2).feeds == 'codes_1'


@pytest.mark.parametrize(
  ('ids', 'message'),
  [
    (np.zeros((1, 2, 2), np.int32), "codes must be ids, 4 x 4 .* as the tokenizer 'vqvae' .* got 2 x 2 of"),
    (np.zeros((1, 4, 4), np.float32), 'codes must be ids, 4 x 4 whole numbers .* got 4 x 4 of type float32'),
  ],
)
def test_ids_of_another_grid_or_type_are_refused(ids, message):
  with pytest.raises(UserError, match=message):
    codes_of(build()).ids({'codes': jnp.asarray(ids)})


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'position': 'bottom'}, "config.refiner: conditions.codes.position is 'bottom'; valid: encoder, middle"),
    ({'how': 'multiply'}, "conditions.codes.how is 'multiply'; valid: concat, add, attention"),
    ({'training': 'thawed'}, "conditions.codes.training is 'thawed'; valid: frozen, joint, warm"),
    ({'dropout': 1.0}, r'conditions.codes.dropout must be in \[0, 1\), got 1.0'),
    ({'stage': 'refiner'}, "conditions.codes.stage is 'refiner', the stage itself; name one"),
    ({'stage': 'absent'}, "conditions.codes.stage is 'absent', which is no tokenizer of this config"),
    ({'prior_stage': 'prior'}, "conditions.codes.prior_stage is 'prior', which is no stage of this config"),
  ],
)
def test_what_cannot_be_is_refused(changes, message):
  with pytest.raises(UserError, match=message):
    build(**{f'refiner.conditions.codes.{name}': value for name, value in changes.items()})


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'prior_stage': 'refiner'}, "prior_stage is 'refiner', which draws no ids; name a stage with the exper"),
    ({'prior_stage': 'vqvae'}, "prior_stage is 'vqvae', which draws no ids"),
    ({'stage': 'copy'}, "prior_stage is 'prior', whose tokenizer.stage is 'vqvae', but .* of 'refiner' are "
     "those of 'copy'"),
    ({'training': 'joint'}, "tokenizer.stage is 'vqvae', but the codes of 'refiner' are those of 'refiner'"),
  ],
)  # fmt: skip
def test_a_stage_that_draws_no_ids_of_the_same_tokenizer_is_refused(changes, message):
  """On the same grid and below the same number of codes: their shapes do not tell them apart."""
  config = config_of('divae,prior,debug')
  with config.unlocked():
    config.copy = config.vqvae.copy_and_resolve_references()
    config.refiner.conditions.codes.update(changes)
  with pytest.raises(UserError, match=message):
    experiments.build(config, 'refiner')


def test_a_student_of_another_run_knows_nothing_of_its_prior():
  named = {'stage': 'vqvae', 'workdir': '/runs/a', 'training': 'frozen', 'prior_stage': 'prior'}
  assert codes.for_student(named, 'refiner', '/runs/a')['prior_stage'] == ''
  assert codes.for_student(named, 'refiner', '')['prior_stage'] == 'prior'


def test_a_tokenizer_that_was_trained_anew_is_refused(monkeypatch, tmp_path):
  experiment = build()
  stored = {checkpoint.ID: 'own', 'frozen': {'tokenizer': 'first'}}
  monkeypatch.setattr(checkpoint, 'load_meta', lambda folder, step=0: stored)
  for now, refused in (('first', False), ('second', True)):
    monkeypatch.setattr(checkpoint, 'identity_of', lambda folder, step=0, now=now: now)
    assert frozen.ids(experiment, tmp_path) == {'tokenizer': now}
    if not refused:
      frozen.check_ids(experiment, tmp_path, tmp_path / 'refiner')
    else:
      with pytest.raises(identity.Stale, match="the network 'tokenizer'"):
        frozen.check_ids(experiment, tmp_path, tmp_path / 'refiner')


def test_a_stage_without_codes_is_refused():
  with pytest.raises(UserError, match="vqvae.model.bottleneck is 'kl', which has no codes"):
    build(**{'vqvae.model.bottleneck': 'kl', 'vqvae.model.codebook_size': 0})


def test_a_grid_that_is_not_that_of_the_bottom_level_is_refused():
  levels = {'refiner.model.channel_multipliers': (1, 2, 2)}
  message = r'codes has a grid of 4 x 4, but .* has 2 x 2: .* 3 levels; take log2 f \+ 1 = 2 levels for f = 2'
  with pytest.raises(UserError, match=message):
    build(**levels)
  assert build(**levels, **{'refiner.conditions.codes.how': 'attention'})


# A tokenizer that the diffusion trains ----------------------------------------------------------------


JOINT = {'refiner.train.batch_size': 16}


def batch(count=16):
  return {'image': jnp.asarray(np.random.default_rng(1).integers(0, 256, (count, 8, 8, 1), np.uint8))}


def largest(tree):
  return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


@functools.cache
def stepped():
  """A joint experiment, a state before and after one update from random parameters, and the metrics.

  Without a weight of the commitment: what the encoder gets is the gradient of the denoising loss alone.
  """
  changes = {'vqvae.loss.commitment_weight': 0.0, 'refiner.optim.warmup_steps': 0}
  experiment = build('divae_joint,debug', **JOINT, **changes)
  state = jax.jit(experiment.init)(jax.random.key(0))
  network = state.networks['denoiser']
  network = network.replace(params=made(experiment.denoiser.model, 1))  # a fresh one passes no gradient on
  state = state.replace(networks={**state.networks, 'denoiser': network})
  after, metrics = jax.jit(experiment.train_step)(state, {}, batch(), jax.random.key(2))
  return experiment, state, after, metrics


def test_a_frozen_tokenizer_is_not_trained():
  experiment = build('divae,debug', **JOINT)
  state, read = jax.eval_shape(experiment.init, jax.random.key(0)), frozen_of(experiment)
  after, metrics = jax.eval_shape(experiment.train_step, state, read, batch(), jax.random.key(2))
  assert set(after.networks) == {'denoiser'} and set(read) == {'tokenizer'} and after.extra == {}
  assert set(metrics) == {'loss', 'simple', 'bound', 'grad_norm/denoiser'}


@pytest.mark.slow
def test_the_loss_trains_encoder_and_codes_of_a_joint_one():
  experiment, state, after, metrics = stepped()
  assert set(experiment.networks) == {'denoiser', 'tokenizer'} and experiment.frozen == {}
  before, now = (one.networks['tokenizer'].params for one in (state, after))
  assert set(now) == {'encoder', 'codes'}  # there is no decoder but the diffusion
  assert float(metrics['grad_norm/tokenizer']) > 1e-4
  assert largest(jax.tree.map(jnp.subtract, now['encoder'], before['encoder'])) > 1e-5
  assert float(metrics['commitment']) > 0 and float(metrics['codebook/used']) > 0.2
  # the first codes are vectors of the batch, then follow them; neither optimizer nor average moves them
  book = after.extra['codebook']
  assert np.any(now['codes'] != before['codes']) and bool(book['started'])
  smoothed = book['counts'].sum() * (book['counts'] + 1e-5) / (book['counts'].sum() + 16e-5)
  followed = np.isclose(now['codes'], book['sums'] / smoothed[:, None], atol=1e-5).all(axis=1)
  assert np.all(followed | np.isclose(now['codes'], book['sums'], atol=1e-5).all(axis=1))
  np.testing.assert_array_equal(after.networks['tokenizer'].ema_params['codes'], now['codes'])


def test_the_commitment_is_a_term_of_the_loss_by_its_weight():
  conditions = build('divae_joint,debug', **JOINT).conditions
  terms, values = {'loss': jnp.float32([1.0, 2.0])}, {'commitment': jnp.float32([4.0, 8.0])}
  found = conditions.with_losses(terms, values)
  np.testing.assert_allclose(found['loss'], [2.0, 4.0])  # 1/4, of vqvae.loss.commitment_weight
  np.testing.assert_array_equal(found['commitment'], values['commitment'])
  assert conditions.with_losses(terms, {}) == terms  # of images that are not trained on


@pytest.mark.slow
def test_a_warm_one_begins_as_the_trained_one():
  experiment = build('divae_warm,debug', **JOINT)
  read = frozen_of(experiment)
  assert set(read) == {'first_tokenizer'}
  state = jax.jit(lambda key: experiment.start(experiment.init(key), read))(jax.random.key(0))
  network, known = state.networks['tokenizer'], read['first_tokenizer']
  for tree in (network.params, network.ema_params):
    jax.tree.map(np.testing.assert_array_equal, tree, {part: known[part] for part in ('encoder', 'codes')})
  kept = state.extra['codebook']
  np.testing.assert_allclose(kept['sums'] / kept['counts'][:, None], known['codes'], rtol=1e-6)
  assert bool(kept['started'])  # no vectors of the batch take their place
  settings = experiment.conditions.trained['tokenizer'].settings
  assert settings['restart_below'] > 0  # nor do they where the first batch has none near them
  assert kept['counts'].min() * settings['codebook_decay'] > settings['restart_below']


@pytest.mark.slow
def test_samples_of_a_joint_one_are_made_of_its_own_ids():
  experiment, _, after, _ = stepped()
  read = after.eval_params
  x = batch(2)['image'] / 127.5 - 1
  seen = jax.jit(lambda x: experiment.observe(read, {}, x))(x)
  assert set(seen) == {'codes'} and experiment.reconstructs and experiment.stored == {}
  assert experiment.titles == {}
  values = experiment.conditions.values(read, experiment.conditions.complete(read, seen))
  np.testing.assert_array_equal(values['codes'], read['tokenizer']['codes'][seen['codes']])
  assert experiment.conditions.shown(experiment.conditions.complete(read, seen)) == {}


def test_a_student_reads_the_tokenizer_of_a_joint_teacher():
  config = config_of('divae_joint,distill,debug', **JOINT)
  assert config.stages == ('refiner', 'distill_2', 'distill_1')
  for stage in ('distill_2', 'distill_1'):
    named = config[stage].conditions.codes
    assert (named.stage, named.training) == ('refiner', 'frozen')
    student = experiments.build(config, stage)
    source = student.frozen['tokenizer']
    assert (source.stage, source.network) == ('refiner', 'tokenizer')
    assert set(student.networks) == {'denoiser'}
    shapes = jax.eval_shape(source.model.init, jax.random.key(0))
    known = jax.eval_shape(build('divae_joint,debug', **JOINT).networks['tokenizer'].init, jax.random.key(0))
    assert jax.tree.map(lambda leaf: leaf.shape, shapes) == jax.tree.map(lambda leaf: leaf.shape, known)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'vqvae.loss.entropy_weight': 0.1}, "vqvae.loss.entropy_weight is 0.1, .*'joint'.* set it to 0"),
    ({'vqvae.loss.codebook': 'gradient'}, "training is 'joint', which takes .* loss.codebook = 'ema'"),
    ({'refiner.train.batch_size': 1}, 'share the 16 vectors of a batch'),
    ({'refiner.conditions.codes.stage': 'refiner'}, "codes.stage is 'refiner', the stage itself"),
  ],
)
def test_tokenizers_that_cannot_be_trained_so_are_refused(changes, message):
  with pytest.raises(UserError, match=message):
    build('divae_joint,debug', **{**JOINT, **changes})


def test_a_student_trains_no_tokenizer():
  config = config_of('divae,distill,debug')
  config.distill_1.conditions.codes.training = 'joint'
  with pytest.raises(UserError, match='a student trains no tokenizer: it reads that of its teacher'):
    experiments.build(config, 'distill_1')


def test_students_that_need_ids_of_nothing_are_refused():
  with pytest.raises(UserError, match='data_free_fraction is 0.5, which needs .*; codes is seen in an image'):
    build('divae,distill,debug', 'distill_2', **{'distill.data_free_fraction': 0.5})


def test_a_diffusion_that_trains_no_tokenizer_is_none():
  config = config_of('divae,debug')
  with pytest.raises(UserError, match="'refiner' is a diffusion that trains no tokenizer"):
    tokenizers.tokenizer_of(config, 'refiner', '', 'tokenizer.stage')
