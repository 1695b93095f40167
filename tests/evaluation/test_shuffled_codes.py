"""The loss with the codes of other images, on a denoiser whose loss is known."""

import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from vaediff.data import sources
from vaediff.evaluation import shuffled_codes
from vaediff.machine import sharding
from vaediff.models.ports import Port
from vaediff.run.trained import Trained

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'modes'))
import fresh  # noqa: E402

PORTS = {
  'map': Port(enters='concat', shape=(2, 2, 1)),
  'code': Port(enters='vector', shape=(1,)),
  'useless': Port(enters='vector', shape=(1,)),
  'number': Port(enters='vector', shape=()),
}


class Diffusion:
  """An image is all one number, and so is its code; the loss is (code - image)^2 plus noise."""

  def __init__(self):
    self.diffusion, self.denoiser = self, self
    self.conditions = types.SimpleNamespace(ports=PORTS)

  def examples(self, read, batch, key, *, training):
    assert not training
    number = batch['image'][:, 0, 0, 0].astype(jnp.float32)
    noise = jax.random.normal(key, number.shape)  # of a posterior
    values = {'map': noise, 'code': number[:, None], 'useless': noise[:, None], 'number': noise}
    return number[:, None, None, None], values

  def losses(self, read, y0, values, key, *, training):
    assert not training
    off = (values['code'][:, 0] - y0[:, 0, 0, 0]) ** 2
    return read['scale'] * off + jax.random.uniform(key, off.shape)


class Opened(Trained):
  """A stage that nothing is read for."""

  def __init__(self):
    pass


def opened(images, **changes):
  images = np.broadcast_to(np.asarray(images, np.uint8)[:, None, None, None], (len(images), 2, 2, 1))
  source = sources.ArraySource(
    images=images, labels=np.zeros(len(images), np.int32), label_names=(), num_classes=1
  )
  settings = {'num_bound': 100, 'num_bound_times': 50, 'batch_size': 4, **changes}
  trained = Opened()
  trained.experiment, trained.stage, trained.read = Diffusion(), 'refiner', {'scale': jnp.float32(2)}
  trained._sources = {'eval': source}
  trained.mesh = sharding.make_mesh(ConfigDict({'data': -1, 'fsdp': 1, 'rules': ()}))
  trained.config = ConfigDict({'evaluate': settings, 'refiner': {'sample': {'seed': 0}}})
  return trained


def test_only_the_code_that_is_read_changes_the_loss(one_device):
  images = [0, 1, 3, 7, 9, 4]
  found = shuffled_codes.figures(opened(images))
  assert set(found) == {
    'denoising_loss', 'denoising_loss/code of others', 'denoising_loss/rise by code of others',
    'denoising_loss/useless of others', 'denoising_loss/rise by useless of others',
  }  # fmt: skip
  assert found['denoising_loss'].value == pytest.approx(0.5, abs=0.06) and found['denoising_loss'].n == 6
  # the code of image i is that of i + 1, of the last that of the first; noise and times are the same
  rises = 2.0 * (np.roll(images, -1) - images) ** 2
  rise = found['denoising_loss/rise by code of others']
  assert rise.value == pytest.approx(rises.mean(), rel=1e-5)
  assert rise.spread == pytest.approx(rises.std(ddof=1) / np.sqrt(6), rel=1e-5)
  useless = found['denoising_loss/rise by useless of others']
  assert useless.value == pytest.approx(0, abs=1e-7) and useless.spread == pytest.approx(0, abs=1e-7)


def test_the_losses_of_an_image_do_not_depend_on_its_batch(one_device):
  images = [0, 1, 3, 7, 9]
  sets = [shuffled_codes.losses_of(opened(images), ('code',), 5, 3, size) for size in (1, 4, 5)]
  for other in sets[1:]:
    for name in ('', 'code'):
      np.testing.assert_allclose(other[name], sets[0][name], rtol=1e-6)
  assert len(np.unique(sets[0][''])) == 5  # each image has noise of its own


def test_a_loss_that_is_not_finite_is_said_and_no_mean_made(one_device):
  trained = opened([0, 1, 3])
  trained.read = {'scale': jnp.float32(np.inf)}
  found = shuffled_codes.figures(trained)
  assert 'not finite for 3 of 3' in found['denoising_loss/code of others'].missing


def test_nothing_is_measured_where_nothing_is_read_or_asked_for(one_device):
  student = opened([0, 1])
  student.experiment = types.SimpleNamespace(diffusion=Diffusion())
  plain = opened([0, 1])
  plain.experiment.conditions.ports = {'map': PORTS['map'], 'number': PORTS['number']}
  no_diffusion = opened([0, 1])
  no_diffusion.experiment = types.SimpleNamespace(diffusion=None)
  for trained in (student, plain, no_diffusion, opened([0, 1], num_bound=0)):
    assert shuffled_codes.figures(trained) == {}
  alone = shuffled_codes.figures(opened([5]))
  assert alone['denoising_loss/code of others'].missing.endswith('at least 2')


@pytest.mark.slow
@pytest.mark.parametrize('variant', ['formulation2,pca', 'formulation1,z'])
def test_a_network_that_reads_a_code_has_another_loss_with_others(variant, tmp_path, one_device):
  trained = fresh.Fresh(variant, tmp_path)
  name = variant.partition(',')[2]
  found = shuffled_codes.figures(trained)
  assert set(found) == {
    'denoising_loss', f'denoising_loss/{name} of others', f'denoising_loss/rise by {name} of others'
  }  # fmt: skip
  assert found['denoising_loss'].value > 0 and found['denoising_loss'].n == 8
  assert found[f'denoising_loss/rise by {name} of others'].spread > 0  # untrained: up or down
