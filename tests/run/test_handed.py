"""What a stage hands to the one that it feeds: ids as they are, by name, and otherwise its image."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from vaediff.errors import UserError
from vaediff.evaluation import sweep
from vaediff.experiments import base
from vaediff.machine import sharding
from vaediff.reads import Sampled
from vaediff.run import checkpoint
from vaediff.run.opened import Opened
from vaediff.run.trained import Trained

IDS = jax.ShapeDtypeStruct((2, 2), jnp.int32)
CONFIG = {
  'data': {'image_size': 2, 'channels': 1},
  'mesh': {'data': -1, 'fsdp': 1, 'rules': ()},
  **{name: {'sample': {'seed': 4, 'batch_size': 4}} for name in ('maker', 'reader')},
}


class Maker(base.Experiment):
  """Draws ids that no byte could hold, and two images; one has the name of an input of the reader."""

  networks, init, train_step, eval_step = {}, None, None, None  # it is not trained here
  handed = {'codes_0': IDS, 'codes_1': IDS}
  inputs = {'label': jax.ShapeDtypeStruct((), jnp.int32)}

  def draw(self, read, keys, indices):
    return {'label': indices % 10}

  def sample(self, read, given, keys):
    ids = 1000 * (1 + given['label'].reshape(-1, 1, 1)) + jnp.arange(4).reshape(1, 2, 2)
    image = jnp.full((len(ids), 2, 2, 1), 1.0)
    return {'codes_0': ids, 'codes_1': -ids, 'low': -image, 'x0': image}


class ImagesAlone(Maker):
  handed = {}

  def sample(self, read, given, keys):
    drawn = super().sample(read, given, keys)
    return {name: drawn[name] for name in ('low', 'x0')}


class IdsAlone(Maker):
  draws_images = False

  def sample(self, read, given, keys):
    drawn = super().sample(read, given, keys)
    return {name: drawn[name] for name in self.handed}


class OfClasses(Maker):
  classes = (7, 3)
  num_groups = 2


class OtherGrid(Maker):
  handed = {'codes_0': IDS, 'codes_1': jax.ShapeDtypeStruct((4, 4), jnp.int32)}


class Reader(base.Experiment):
  """Shows what it was given."""

  networks, init, train_step, eval_step = {}, None, None, None
  inputs = {'codes_0': IDS, 'codes_1': IDS}
  feeds = 'codes_1'

  @property
  def makers(self):
    return (Sampled(stage='maker', workdir='', feeds=self.feeds, depth=1),)

  def observe(self, read, batch, x, key=None):
    return {name: jnp.zeros((len(x), *struct.shape), struct.dtype) for name, struct in self.inputs.items()}

  def sample(self, read, given, keys):
    return {'x0': jnp.concatenate([jnp.sign(given[name] * 1.0)[..., None] for name in self.inputs], axis=1)}


class ReaderOfImages(Reader):
  """The next stage of a cascade, whose maker shows an image of the input's own name beside its samples."""

  inputs = {'low': jax.ShapeDtypeStruct((2, 2, 1), jnp.float32)}
  feeds = 'low'

  def sample(self, read, given, keys):
    return {'x0': given['low']}


def opened(reader, maker, stages=('reader', 'maker')):
  """A trained stage without a checkpoint, and the one that feeds it."""
  config, found = ConfigDict(CONFIG), []
  for stage, experiment in zip(stages, (reader, maker), strict=True):
    trained = object.__new__(Trained)
    trained.config, trained.workdir, trained.stage = config, pathlib.Path('none'), stage
    trained.mesh = sharding.make_mesh(config.mesh)
    trained.experiment, trained.read, trained._sources, trained._makers = experiment, {}, {}, {}
    trained._prepare()
    found.append(trained)
  for source in reader.makers:
    found[0]._makers[source] = found[1]
  return found


@pytest.fixture(autouse=True)
def trained_makers(one_device, monkeypatch):
  monkeypatch.setattr(Trained, 'has_maker', lambda self, source: True)


def test_ids_are_handed_over_as_they_are():
  reader, maker = opened(Reader(), Maker())
  found = reader.inputs_from_makers(np.array([3, 5]), {}, 4)
  assert set(found) == {'codes_0', 'codes_1'} and found['codes_0'].dtype == np.int32
  np.testing.assert_array_equal(found['codes_0'][:, 0, 1], [4001, 6001])
  np.testing.assert_array_equal(found['codes_1'], -found['codes_0'])
  assert reader.draws_alone
  np.testing.assert_array_equal(reader.draw(np.array([3]))['x0'][0, :, 0, 0], [255, 255, 0, 0])


def test_samples_are_of_the_classes_of_the_stage_that_feeds_them():
  reader, maker = opened(Reader(), OfClasses())
  assert reader.class_source is maker.experiment and maker.class_source is maker.experiment
  np.testing.assert_array_equal(reader.class_source.classes_of(np.arange(3)), [7, 3, 7])
  reader, _ = opened(Reader(), Maker())
  assert reader.class_source is reader.experiment and reader.class_source.classes_of(np.arange(3)) is None


def test_images_alone_are_shown_and_the_rest_is_asked_for():
  _, maker = opened(Reader(), Maker())
  drawn = maker.draw(np.array([3, 5]))
  assert list(drawn) == ['low', 'x0'] and all(value.dtype == np.uint8 for value in drawn.values())
  both = maker.draw(np.array([3, 5]), handed=True)
  assert list(both) == ['codes_0', 'codes_1', 'low', 'x0']
  np.testing.assert_array_equal(both['x0'], drawn['x0'])


def test_ids_are_handed_over_where_there_is_no_image_of_them():
  reader, maker = opened(Reader(), IdsAlone())
  assert set(reader.inputs_from_makers(np.array([3, 5]), {}, 4)) == {'codes_0', 'codes_1'}
  assert reader.draws_alone and not maker.draws_alone
  assert list(reader.draw(np.array([3]))) == ['x0']
  with pytest.raises(UserError, match="stage 'maker' draws no images"):
    maker.draw(np.array([3]))


def test_what_is_given_is_not_drawn():
  reader, _ = opened(Reader(), Maker())
  ids = np.full((1, 2, 2), 7, np.int32)
  assert set(reader.inputs_from_makers(np.array([3]), {'codes_0': ids}, 4)) == {'codes_1'}
  assert reader.inputs_from_makers(np.array([3]), {'codes_0': ids, 'codes_1': ids}, 4) == {}


def test_an_image_of_the_name_of_the_input_is_not_what_feeds_it():
  """The maker shows its own small image by that name: what it hands on is its sample."""
  reader, _ = opened(ReaderOfImages(), ImagesAlone())
  np.testing.assert_array_equal(reader.inputs_from_makers(np.array([3]), {}, 4)['low'], np.ones((1, 2, 2, 1)))
  reader, _ = opened(ReaderOfImages(), Maker())  # it hands over ids too, which are no input here
  np.testing.assert_array_equal(reader.inputs_from_makers(np.array([3]), {}, 4)['low'], np.ones((1, 2, 2, 1)))


def test_ids_of_another_grid_are_refused():
  reader, _ = opened(Reader(), OtherGrid())
  with pytest.raises(UserError, match=r"'reader' reads codes_1 of shape \(2, 2\).* stage 'maker'.*\(4, 4\)"):
    reader.inputs_from_makers(np.array([3]), {}, 4)


class Uneven(Maker):
  """Draws numbers that rounding makes differ where a program is not compiled as a whole; hands them over."""

  handed = {'start': jax.ShapeDtypeStruct((64,), jnp.float32)}
  traced = []

  def draw(self, read, keys, indices):
    self.traced.append(len(indices))
    noise = jax.vmap(lambda key: jax.random.normal(key, (64,)))(keys.noise)
    return {'start': jnp.sin(3 * noise) * jnp.exp(noise) / 7 + noise}

  def sample(self, read, given, keys):
    return {'start': given['start'], 'x0': jnp.zeros((len(given['start']), 2, 2, 1))}


@pytest.mark.parametrize('count', [1, 3])
def test_what_is_drawn_has_the_bits_that_samples_are_made_of(count):
  _, maker = opened(Reader(), Uneven())
  indices, Uneven.traced[:] = np.arange(5, 5 + count), []
  for candidate in (None, 0, 1):
    samples = maker.draw(indices, seed=7, handed=True, candidate=candidate)['start']
    np.testing.assert_array_equal(maker.draw_inputs(indices, 7, candidate)['start'], samples)
  traced = len(Uneven.traced)
  for seed in range(8, 12):  # another seed or candidate is no other program
    maker.draw_inputs(indices, seed)
    maker.draw_inputs(indices, seed, seed)
  assert len(Uneven.traced) == traced


def test_what_images_are_made_of_is_found_out_once(monkeypatch):
  reader, maker = opened(Reader(), Maker())
  asked = []
  for trained in (reader, maker):
    trained.opened, trained._ids = Opened(trained.stage, pathlib.Path(trained.stage)), {'vae': 'an id'}
  monkeypatch.setattr(checkpoint, 'identity_of', lambda folder, step=0: asked.append(folder.name) or 'its id')
  found = reader.made_of
  assert found["the stage 'reader'"] == 'its id' and found["the network 'vae'"] == 'an id'
  found.clear()  # a copy: what a caller does with it is his own
  assert set(reader.made_of) > {"the samples of 'maker'", 'the settings'} and asked == ['maker', 'reader']
  assert maker.made_of and asked == ['maker', 'reader']
  other = reader.with_experiment(Reader())  # opened from the same checkpoint, whose id stays what it was
  assert "the samples of 'maker'" in other.made_of and asked == ['maker', 'reader']


class Multiplies(Reader):
  """A product of the ids of both grids: 8 multiply-accumulates."""

  def sample(self, read, given, keys):
    first, second = (given[name].astype(jnp.float32) for name in self.inputs)
    return {'x0': jnp.einsum('bij,bjk->bik', first, second)[..., None]}


def test_the_cost_of_a_sample_is_told_where_several_grids_are_handed_over():
  reader, _ = opened(Multiplies(), Maker())
  assert sweep.giga_macs(reader) == pytest.approx(8e-9)


class Costs(Maker):
  """Its image is a product of two constant matrices: 8 multiply-accumulates."""

  def sample(self, read, given, keys):
    drawn = super().sample(read, given, keys)
    low = drawn['low'][..., 0] * 2.0
    return {**drawn, 'x0': jnp.einsum('bij,bjk->bik', low, low)[..., None]}


class CostsAlone(Costs):
  handed = {}

  def sample(self, read, given, keys):
    return {'x0': super().sample(read, given, keys)['x0']}


@pytest.mark.parametrize(('maker', 'alone'), [(Costs, 1), (CostsAlone, 3)])
def test_the_cost_of_the_best_of_several_is_that_of_all_candidates_in_each_stage(maker, alone):
  """Candidates of what is fed are those of the last stage; where it ranks none, an image's are its own."""
  ranks = lambda count: {'stage': 'clip', 'workdir': '', 'candidates': count}
  reader, fed = opened(Multiplies(), maker())
  reader.config, fed.config = (one.config.copy_and_resolve_references() for one in (reader, fed))
  fed.config.maker.sample.rerank = ranks(3)
  assert sweep.giga_macs(fed) == pytest.approx(24e-9)
  assert sweep.giga_macs(reader) == pytest.approx((8 + alone * 8) * 1e-9)
  reader.config.reader.sample.rerank = ranks(5)
  assert sweep.giga_macs(reader) == pytest.approx(5 * 16e-9)
