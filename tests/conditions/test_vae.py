"""A VAE's image and code as a condition, and several conditions side by side."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vaediff import reads
from vaediff.conditions import make_conditions, prior, vae
from vaediff.conditions.base import Condition, Conditions, key_of
from vaediff.conditions.vae import VaeCondition
from vaediff.conditions.weight import Weight
from vaediff.errors import UserError
from vaediff.models.functional import Model
from vaediff.models.ports import Port
from vaediff.spaces.pixels import Pixels
from vaediff.spaces.wavelets import Wavelets
from vaediff.types import Values

SIZE, LATENT = 4, 3
SHAPE = (SIZE, SIZE, 1)


class Linear(nn.Module):
  """q(z | x) has `scale` times the first pixels for a mean, and deviation 1/2; an image is all one number."""

  def setup(self):
    self.scale = self.param('scale', nn.initializers.ones, ())

  def __call__(self, x):
    return self.decode(self.encode(x)[0])

  def encode(self, x):
    mean = self.scale * x[:, 0, :LATENT, 0]
    return mean, jnp.full(mean.shape, 2 * np.log(0.5))

  def decode(self, z):
    return jnp.broadcast_to(z.mean(axis=1)[:, None, None, None], (z.shape[0], *SHAPE)) / self.scale


MODEL = Model(module=Linear(), inputs=(jax.ShapeDtypeStruct((1, *SHAPE), jnp.float32),))
READ = {'vae': {'scale': jnp.float32(2.0)}, 'prior': {}}


def condition(**changes):
  fields = {
    'source': reads.FromStage(stage='vae', network='vae', workdir='', model=MODEL),
    'prior': prior.measured('vae', ''),
    'space': Pixels(shape=SHAPE),
    'image_shape': SHAPE,
    'latent_dim': LATENT,
    'reads_image': True,
    'reads_code': True,
    'dropout': 0.25,
    'x0_vae_source': 'sample',
    'title': 'formulation1+z',
  }
  return VaeCondition(**{**fields, **changes})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Number(Condition):
  """A number that is read as it is, and dropped by itself."""

  name: str = 'number'
  title: str = 'n'
  dropout: float = 0.5

  @property
  def ports(self):
    return {'number': Port(enters='vector', shape=(), droppable=self.dropout > 0)}

  @property
  def inputs(self):
    return {'number': jax.ShapeDtypeStruct((), jnp.float32)}

  def observe(self, read, batch, x, key):
    return {'number': x.mean(axis=(1, 2, 3)) if key is None else jax.random.normal(key, x.shape[:1])}

  def draw(self, read, keys, indices):
    return {'number': jax.vmap(jax.random.normal)(keys)}

  def values(self, read, given):
    return {'number': given['number']}


def images(count=5):
  return jax.random.uniform(jax.random.key(1), (count, *SHAPE), minval=-1.0, maxval=1.0)


def keys(seed, count):
  return jax.random.split(jax.random.key(seed), count)


def equal(a: Values, b: Values):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


# The VAE ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('droppable', [True, False])
@pytest.mark.parametrize(('image', 'code'), [(True, True), (True, False), (False, True)])
def test_its_ports_are_what_the_network_reads(image, code, droppable):
  one = condition(reads_image=image, reads_code=code, dropout=0.1 if droppable else 0.0)
  expected = {}
  if image:
    expected['x0_vae'] = Port(enters='concat', shape=SHAPE, droppable=droppable)
  if code:
    expected['z'] = Port(enters='vector', shape=(LATENT,), droppable=droppable)
  assert one.ports == expected
  # z can be given in any case: x0_vae is decoded of it
  assert set(one.inputs) == ({'z', 'x0_vae'} if image else {'z'})
  assert one.inputs['z'].shape == (LATENT,)
  assert one.titles == ({'x0_vae': 'VAE'} if image else {})
  given = {'z': jnp.ones((2, LATENT)), 'x0_vae': jnp.zeros((2, *SHAPE))}
  values = one.values(READ, given)
  equal(values, {name: given[name] for name in expected})
  assert all(values[name].shape[1:] == port.shape for name, port in one.ports.items())
  equal(one.shown(given), {'x0_vae': given['x0_vae']} if image else {})


def test_it_reads_the_vae_and_its_prior():
  one = condition()
  assert set(one.frozen) == {'vae', 'prior'} and one.reconstructs and one.name == 'vae'
  assert isinstance(one.frozen['vae'], reads.FromStage) and isinstance(one.frozen['prior'], reads.Measured)
  assert one.frozen['prior'].stage == 'vae' and one.frozen['prior'].neutral() == {}


def test_it_observes_the_mean_or_with_a_key_a_draw_of_the_posterior():
  one, x = condition(), images()
  mean = 2 * np.asarray(x)[:, 0, :LATENT, 0]
  equal(one.observe(READ, {}, x, None), {'z': mean})
  z = one.observe(READ, {}, x, jax.random.key(7))['z']
  np.testing.assert_allclose(z, mean + 0.5 * jax.random.normal(jax.random.key(7), mean.shape), atol=1e-6)


def test_with_a_key_per_image_each_sees_its_own():
  one, x = condition(), images()
  z = one.observe(READ, {}, x, keys(7, 5))['z']
  alone = one.observe(READ, {}, x[2:3], keys(7, 5)[2:3])['z']
  np.testing.assert_array_equal(z[2:3], alone)
  noise = jax.vmap(lambda key: jax.random.normal(key, (LATENT,)))(keys(7, 5))
  np.testing.assert_allclose(z, 2 * x[:, 0, :LATENT, 0] + 0.5 * noise, atol=1e-6)


@pytest.mark.parametrize('key', [None, 3])
def test_what_is_stored_is_read_instead_of_made(key):
  one, x = condition(x0_vae_source='precomputed'), images()
  assert {name: (s.shape, s.dtype) for name, s in one.stored.items()} == {
    'x0_vae': (SHAPE, jnp.uint8),
    'z': ((LATENT,), jnp.float32),
  }
  stored = {'x0_vae': x / 2, 'z': jnp.ones((5, LATENT))}
  key = None if key is None else jax.random.key(key)
  seen = one.observe(READ, {'label': jnp.zeros(5, jnp.int32), **stored}, x, key)
  equal(seen, stored)
  equal(one.complete({}, seen), stored)  # and the VAE is not asked
  # where nothing is stored beside the images, as in evaluation, it looks at them
  assert set(one.observe(READ, {}, x, None)) == {'z'}


@pytest.mark.parametrize('source', vae.SOURCES)
def test_training_draws_where_the_source_is_a_sample(source):
  one, x = condition(x0_vae_source=source), images()
  assert (one.stored != {}) == (source == 'precomputed')
  conditions, key = Conditions((one,)), lambda: jax.random.key(2)
  training = conditions.observe(READ, {}, x, key(), training=True)
  equal(training, one.observe(READ, {}, x, key() if source == 'sample' else None))
  # with a key and outside training it is a draw, whatever the source
  equal(conditions.observe(READ, {}, x, key()), one.observe(READ, {}, x, key()))


def test_it_draws_the_prior_it_reads():
  one = condition()
  normal = one.draw(READ, keys(3, 500), jnp.arange(500))
  equal(normal, {'z': prior.draw({}, keys(3, 500), LATENT)})
  assert normal['z'].std() == pytest.approx(1.0, abs=0.06)
  mixture = {'weights': jnp.ones(1), 'means': jnp.full((1, LATENT), 5.0), 'diag': jnp.full((1, LATENT), 0.1)}
  fitted = one.draw({**READ, 'prior': mixture}, keys(3, 500), jnp.arange(500))['z']
  assert fitted.mean() == pytest.approx(5.0, abs=0.02) and fitted.std() == pytest.approx(0.1, abs=0.01)
  alone = one.draw(READ, keys(3, 500)[9:10], jnp.arange(1))
  np.testing.assert_array_equal(alone['z'], normal['z'][9:10])


def test_a_given_image_takes_the_place_of_the_decoded_code():
  one, z = condition(), jnp.arange(6.0).reshape(2, LATENT)
  complete = one.complete(READ, {'z': z, 'noise': jnp.zeros(2)})
  np.testing.assert_allclose(complete['x0_vae'], np.broadcast_to([[[[0.5]]], [[[2.0]]]], (2, *SHAPE)))
  assert set(complete) == {'z', 'noise', 'x0_vae'}
  given = {'z': z, 'x0_vae': images(2)}
  equal(one.complete(READ, given), given)


def test_the_network_reads_x0_vae_in_the_space_of_its_state():
  space = Wavelets(shape=(SIZE // 2, SIZE // 2, 4))
  one, x = condition(space=space), images(2)
  assert one.ports['x0_vae'].shape == space.shape and one.inputs['x0_vae'].shape == SHAPE
  values = one.values(READ, {'x0_vae': x, 'z': jnp.ones((2, LATENT))})
  np.testing.assert_array_equal(values['x0_vae'], space.encode({}, x, None))
  np.testing.assert_array_equal(one.shown({'x0_vae': x})['x0_vae'], x)  # shown as the image it is
  np.testing.assert_allclose(values['x0_vae'][..., 0], x.reshape(2, 2, 2, 2, 2).mean(axis=(2, 4)), atol=1e-6)


def test_its_part_of_a_bound_is_the_divergence_from_the_standard_normal():
  x = images()
  mean, var = 2 * np.asarray(x)[:, 0, :LATENT, 0], 0.25
  kl = 0.5 * (mean**2 + var - 1 - np.log(var)).sum(axis=1)
  nats = condition().nats(READ, x)
  assert set(nats) == {'kl'}
  np.testing.assert_allclose(nats['kl'], kl, rtol=1e-5)


# Of a config ------------------------------------------------------------------------------------------


def of_config(variant='debug', **changes):
  config = importlib.import_module('configs.digits').get_config(variant)
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  return make_conditions(config, 'refiner', Pixels(shape=(8, 8, 1)))


@pytest.mark.parametrize(
  ('variant', 'names', 'values', 'title'),
  [
    ('unconditional,debug', [], [], 'none'),
    ('formulation1,debug', ['vae'], ['x0_vae'], 'formulation1'),
    ('formulation2,z,debug', ['vae'], ['x0_vae', 'z'], 'formulation2+z'),
  ],
)
def test_the_config_says_what_is_read(variant, names, values, title):
  conditions = of_config(variant)
  assert [one.name for one in conditions.each] == names
  assert [name for name, _ in conditions.named_ports] == values and conditions.title == title
  assert not conditions.droppable and not any(port.droppable for port in conditions.ports.values())
  assert conditions.reconstructs == bool(names)


def test_the_code_alone_can_be_read():
  changes = {'refiner.diffusion.condition': 'none', 'refiner.diffusion.z_conditioning': True}
  conditions = of_config(**changes)
  assert list(conditions.ports) == ['z'] and list(conditions.inputs) == ['z'] and conditions.title == 'none+z'


def test_the_guidance_weight_comes_last_where_it_is_an_input():
  changes = {'refiner.model.guidance_embedding': True, 'refiner.sample.guidance_weight': 1.5}
  conditions = of_config('guided,z,debug', **changes)
  assert [name for name, _ in conditions.named_ports] == ['x0_vae', 'z', 'guidance']
  assert conditions.droppable == ('vae',)
  assert conditions.each[-1] == Weight(weight=1.5)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'refiner.vae.stage': 'refiner'}, "vae.stage is 'refiner', which is no VAE stage of this config"),
    ({'refiner.conditions.tea': {'dropout': 0.1}}, "conditions has a section 'tea'"),
  ],
)
def test_what_is_no_condition_is_refused(changes, message):
  with pytest.raises(UserError, match=message):
    of_config(**changes)


# Several conditions -----------------------------------------------------------------------------------


def several(**changes):
  return Conditions((condition(**changes), Number(), Weight(weight=0.75)))


def test_together_they_are_the_union_of_each():
  conditions = several()
  assert [name for name, _ in conditions.named_ports] == ['x0_vae', 'z', 'number', 'guidance']
  assert list(conditions.inputs) == ['z', 'x0_vae', 'number', 'guidance']
  assert set(conditions.frozen) == {'vae', 'prior'}
  assert conditions.title == 'formulation1+z+n' and conditions.reconstructs
  assert conditions.droppable == ('vae', 'number')
  assert Conditions().ports == {} and Conditions().title == 'none' and not Conditions().reconstructs
  x = images()
  given = conditions.complete(READ, conditions.observe(READ, {}, x, None))
  values = conditions.values(READ, given)
  assert list(values) == ['x0_vae', 'z', 'number', 'guidance']
  assert list(conditions.shown(given)) == ['x0_vae'] and list(conditions.nats(READ, x)) == ['kl']


def test_the_first_gets_the_key_itself_and_condition_k_one_of_its_own():
  """So that a condition that is added changes nothing that the others draw."""
  conditions, x = several(), images()
  number = conditions.each[1]
  drawn = conditions.draw(READ, keys(4, 5), jnp.arange(5))
  own = jax.vmap(lambda key: jax.random.fold_in(key, 2**32 - 2))(keys(4, 5))
  equal(drawn, {
    'z': prior.draw({}, keys(4, 5), LATENT),
    'number': jax.vmap(jax.random.normal)(own),
    'guidance': jnp.full(5, 0.75),
  })  # fmt: skip
  key = lambda: jax.random.key(5)
  seen = conditions.observe(READ, {}, x, key())
  equal(seen, {
    **conditions.each[0].observe(READ, {}, x, key()),
    **number.observe(READ, {}, x, jax.random.fold_in(key(), 2**32 - 2)),
    'guidance': jnp.full(5, 0.75),
  })  # fmt: skip
  alone = Conditions((conditions.each[0],)).draw(READ, keys(4, 5), jnp.arange(5))
  equal(alone, {'z': drawn['z']})


@pytest.mark.parametrize('number', [0, 1, 2])
def test_keys_are_of_the_batch_or_of_each_image(number):
  one, many = jax.random.key(6), keys(7, 3)
  expected = lambda key: jax.random.fold_in(key, 2**32 - 1 - number) if number else key
  data = lambda key: np.asarray(jax.random.key_data(key))
  np.testing.assert_array_equal(data(key_of(one, number)), data(expected(one)))
  np.testing.assert_array_equal(data(key_of(many, number)), [data(expected(key)) for key in many])


def test_no_condition_has_a_key_that_the_first_splits_off():
  """A part of a split is the key with its number folded in: z would be the noise of another condition."""
  data = lambda key: tuple(np.asarray(jax.random.key_data(key)).tolist())
  of_others = {data(key_of(jax.random.key(6), number)) for number in range(1, 6)}
  of_first = {data(part) for count in range(2, 9) for part in jax.random.split(jax.random.key(6), count)}
  assert len(of_others) == 5 and not of_others & of_first


def test_each_condition_is_dropped_whole_and_by_its_own_chance():
  key = lambda: jax.random.key(8)
  masks = several().drop(key(), 4000)
  assert set(masks) == {'x0_vae', 'z', 'number'}  # the weight is always read
  equal(masks, {
    'x0_vae': jax.random.bernoulli(key(), 0.25, (4000,)),
    'z': jax.random.bernoulli(key(), 0.25, (4000,)),
    'number': jax.random.bernoulli(jax.random.fold_in(key(), 2**32 - 2), 0.5, (4000,)),
  })  # fmt: skip
  first, second = np.asarray(masks['z']), np.asarray(masks['number'])
  assert first.mean() == pytest.approx(0.25, abs=0.03) and second.mean() == pytest.approx(0.5, abs=0.03)
  assert (first & second).mean() == pytest.approx(0.125, abs=0.02)  # independent of one another
  assert set(several(dropout=0.0).drop(key(), 4)) == {'number'}
  assert several(reads_code=False).drop(key(), 4).keys() == {'x0_vae', 'number'}
  assert Conditions().drop(key(), 4) == {}


@pytest.mark.parametrize(
  ('names', 'values'),
  [
    ((), set()),
    (('vae',), {'x0_vae', 'z'}),
    (('number',), {'number'}),
    (('vae', 'number'), {'x0_vae', 'z', 'number'}),
    (('guidance',), set()),
  ],
)
def test_guidance_goes_without_the_conditions_that_it_names(names, values):
  masks = several().without(names, 6)
  assert set(masks) == values
  assert all(mask.shape == (6,) and bool(mask.all()) for mask in masks.values())
  assert several(dropout=0.0).without(('vae',), 6) == {}


def test_the_weight_is_the_configured_one_unless_one_is_given():
  one = Weight(weight=0.75)
  assert one.ports == {'guidance': Port(enters='vector', shape=())}
  assert one.inputs['guidance'].shape == () and one.dropout == 0 and not one.reconstructs and one.title == ''
  expected = {'guidance': jnp.full(5, 0.75)}
  equal(one.observe({}, {}, images(), None), expected)
  equal(one.observe({}, {}, images(), jax.random.key(0)), expected)
  equal(one.draw({}, keys(0, 5), jnp.arange(5)), expected)
  given = {'guidance': jnp.arange(5.0), 'z': jnp.zeros((5, LATENT))}
  equal(one.values({}, given), {'guidance': jnp.arange(5.0)})
