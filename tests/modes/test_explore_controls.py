"""Controls by the shape of an input, whatever its name; directions of codes."""

import dataclasses
import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from vaediff.conditions.base import Condition, Conditions
from vaediff.errors import UserError
from vaediff.experiments.base import InSpace
from vaediff.models.ports import Port
from vaediff.modes import explore_controls as controls
from vaediff.run import directions
from vaediff.run.trained import Trained

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import fresh  # noqa: E402

FLOAT, WHOLE = jnp.float32, jnp.int32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weather(Condition):
  """A condition that this package does not have: a sky, its mood, how warm it is, the last days, a map."""

  name = 'weather'
  title = 'weather'
  dropout = 0.0

  @property
  def ports(self):
    return {'mood': Port(enters='vector', shape=(), classes=4)}

  @property
  def inputs(self):
    shapes = {'sky': (5,), 'warmth': (), 'map': (8, 8, 3), 'satellite': (8, 8, 1), 'odd': (3, 3)}
    return {name: jax.ShapeDtypeStruct(shape, FLOAT) for name, shape in shapes.items()} | {
      'mood': jax.ShapeDtypeStruct((), WHOLE), 'days': jax.ShapeDtypeStruct((7,), WHOLE),
    }  # fmt: skip

  def observe(self, read, batch, x, key):
    sky = x.reshape(len(x), -1)[:, :5]
    return {'sky': sky, 'map': jnp.repeat(x, 3, -1), 'days': jnp.zeros((len(x), 7), WHOLE)}

  def draw(self, read, keys, indices):
    return {'sky': jnp.zeros((len(indices), 5)), 'warmth': jnp.ones(len(indices))}

  def values(self, read, given):
    return {}


class Toy(InSpace):
  """As much of a stage as controls look at."""

  space = types.SimpleNamespace(shape=(8, 8, 1), factor=1)
  conditions = Conditions((Weather(),))
  networks = init = train_step = eval_step = maps = None


class ToyTrained(Trained):
  """The stage, opened."""

  captions = ()
  eval_source = types.SimpleNamespace(label_names=())
  settings = types.SimpleNamespace(guidance_weight=0.0, aug_level=0.0)

  def __init__(self):
    data = ConfigDict({'image_size': 8, 'channels': 1, 'num_classes': 10})
    self.experiment, self.read, self.config = Toy(), {}, types.SimpleNamespace(data=data)


def test_a_new_condition_has_its_controls_by_itself():
  found, notes = controls.controls_for(ToyTrained())
  kinds = {one.name: one.kind for one in found}
  assert kinds == {
    'sky': controls.CODE, 'warmth': controls.NUMBER, 'map': controls.SEEN, 'satellite': controls.PICTURE,
    'mood': controls.CLASS, 'days': controls.SEEN, 'noise': controls.SEED,
  }  # fmt: skip
  by_name = {one.name: one for one in found}
  assert by_name['mood'].choices == ('0', '1', '2', '3')  # of its port, not of the data
  assert by_name['sky'].drawn and by_name['sky'].seen and not by_name['map'].drawn
  assert notes == ('odd has a shape that no control is known for, (3, 3): it stays as drawn',)


def test_without_the_data_classes_have_numbers_alone():
  class Lost:
    @property
    def label_names(self):
      raise UserError('the data are not here')

  class Away(ToyTrained):
    eval_source = Lost()

  assert {one.name for one in controls.controls_for(Away())[0]} >= {'mood', 'sky'}


def test_directions_move_their_code_alone():
  given = {'z': np.ones((2, 3), np.float32), 'noise': np.ones((2, 4), np.float32)}
  one = controls.Direction(name='z/a', title='', group='', of='z', vector=np.array([0, 2, 0.5]), most=3.0)
  found = controls.moved(given, [one], {'z/a': -1.5, 'unknown': 9.0})
  np.testing.assert_allclose(found['z'], [[1, -2, 0.25]] * 2)
  assert found['noise'] is given['noise'] and given['z'].min() == 1 and found['z'].dtype == np.float32


@pytest.mark.slow
def test_directions_are_those_of_the_vae_and_of_classes(tmp_path, one_device, monkeypatch):
  trained = fresh.Fresh('formulation1', tmp_path)
  arrays = {
    'mean': np.zeros(16, np.float32),
    'directions': np.eye(16, 2, dtype=np.float32),
    'deviation': np.float32([2, 0.5]),
  }
  monkeypatch.setattr(directions, 'leading', lambda trained, number: arrays)
  found, notes = controls.directions_of(trained, controls.controls_for(trained)[0], 2, 3.0, 32)
  groups = {group: [one for one in found if one.group == group] for group in {one.group for one in found}}
  np.testing.assert_allclose([one.vector[:2] for one in groups[controls.PRINCIPAL]], [[2, 0], [0, 0.5]])
  assert [one.most for one in groups[controls.PRINCIPAL]] == [3.0, 3.0] and notes == ()
  data, labels = trained.eval_images(32)
  codes = trained.observe(data, labels)['z']
  of_class = groups[controls.OF_CLASSES]
  assert [one.title for one in of_class] == [str(label) for label in np.unique(labels)]
  wanted = codes[labels == 3].mean(axis=0) - codes.mean(axis=0)
  np.testing.assert_allclose(of_class[3].vector, wanted, atol=1e-5)


def test_where_nothing_is_known_of_a_code_its_numbers_move(monkeypatch):
  def unknown(trained, number):
    raise UserError('starts from no code of a VAE')

  monkeypatch.setattr(directions, 'leading', unknown)
  trained = ToyTrained()
  trained.eval_images = lambda count: (np.zeros((4, 8, 8, 1), np.uint8), np.zeros(4, np.int32))
  found, notes = controls.directions_of(trained, controls.controls_for(trained)[0], 2, 3.0, 32)
  assert [one.name for one in found] == [f'sky/{k}' for k in range(5)]
  np.testing.assert_array_equal(np.stack([one.vector for one in found]), np.eye(5))
  assert notes == ('starts from no code of a VAE',)


@pytest.mark.parametrize(
  ('variant', 'stage', 'wanted'),
  [
    pytest.param('', 'vae', {'z': 'code'}, marks=pytest.mark.slow),
    ('unconditional', '', {'noise': 'seed'}),
    pytest.param('latent', 'ddgan', {'noise': 'seed'}, marks=pytest.mark.slow),
    pytest.param(
      'formulation2,z,label', '', {'z': 'code', 'x0_vae': 'picture', 'label': 'class', 'noise': 'seed'},
      marks=pytest.mark.slow,
    ),
    pytest.param('divae', '', {'codes': 'seen', 'noise': 'seed'}, marks=pytest.mark.slow),
    pytest.param(
      'restoration', '', {'degraded': 'seen', 'known': 'seen', 'noise': 'seed'}, marks=pytest.mark.slow
    ),
  ],
)  # fmt: skip
def test_stages_of_every_kind_have_controls(variant, stage, wanted, tmp_path, one_device):
  changes = {'refiner.conditions.degraded.task': 'inpaint'} if variant == 'restoration' else {}
  trained = fresh.Fresh(variant, tmp_path, stage, **changes)
  found, notes = controls.controls_for(trained)
  assert {one.name: one.kind for one in found} == wanted and notes == ()
