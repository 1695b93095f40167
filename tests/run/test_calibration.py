"""Records of a sampler: each is of one call of the network, whatever the number of devices."""

import dataclasses
import importlib
import pathlib
import sys

import as_trained
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from vaediff import experiments
from vaediff.diffusion import samplers
from vaediff.errors import UserError
from vaediff.experiments import recorded
from vaediff.machine import sharding
from vaediff.run import calibration, draw
from vaediff.run.trained import Trained
from vaediff.storage import files, identity

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
pytestmark = pytest.mark.xdist_group('calibration')  # one worker: the tests share what is dear

SECTION = ConfigDict(
  {'kind': 'steps', 'num_samples': 12, 'steps': 3, 'mean': 0.4, 'std': 0.4, 'seed': 1, 'batch_size': 4}
)
EVERY_STEP = ConfigDict({**SECTION.to_dict(), 'steps': 0, 'num_samples': 10})


@dataclasses.dataclass
class Stage(Trained):
  """What calibration asks of an opened stage, without a training."""

  experiment: object
  read: dict
  workdir: pathlib.Path
  ids: dict
  devices: int = 1
  stage: str = 'refiner'

  @property
  def made_of(self):
    return self.ids

  @property
  def settings(self):
    return ConfigDict(dict(self.experiment.diffusion.settings))

  def with_experiment(self, experiment):
    return dataclasses.replace(self, experiment=experiment)

  def draw(self, indices, given, seed, *, handed):
    config = importlib.import_module('configs.base').default()
    mesh = sharding.make_mesh(config.mesh, jax.devices()[: self.devices])
    run = MADE.setdefault(self.devices, draw.Drawer(self.experiment, mesh, 0, (8, 8, 1), no_source))
    return run(jax.device_put(self.read, sharding.replicated(mesh)), indices, given, seed, handed=handed)


def no_source():
  raise AssertionError('images are opened, though nothing needs to be observed')


MADE = {}
"""By number of devices: what draws."""


@pytest.fixture(scope='module')
def stage(tmp_path_factory):
  config = importlib.import_module('configs.digits').get_config('formulation2,z,debug')
  config.refiner.sample.update({'sampler': 'ddim', 'num_steps': 5, 'grid': 'quadratic'})
  experiment = experiments.build(config, 'refiner')
  denoiser = as_trained.params_of(experiment.denoiser.model.init)
  vae = as_trained.params_of(experiment.frozen['vae'].model.init, 1, deviation=0.0)
  read = {'denoiser': denoiser, 'vae': vae, 'prior': {}}
  ids = {"the stage 'refiner'": 'aa', 'the settings': 'bb'}
  return Stage(experiment, read, tmp_path_factory.mktemp('run'), ids)


def test_steps_of_the_two_rules():
  times = np.linspace(1, 0.01, 100)
  kept = calibration.kept_steps(SECTION, times)
  np.testing.assert_array_equal(kept, [[0, 50, 99]] * 4)
  every = ConfigDict({**SECTION.to_dict(), 'steps': 0, 'num_samples': 200})
  np.testing.assert_array_equal(calibration.kept_steps(every, times), [np.arange(100)] * 2)

  normal = ConfigDict({**SECTION.to_dict(), 'kind': 'normal', 'num_samples': 20_000})
  kept = calibration.kept_steps(normal, times)
  assert kept.shape == (20_000, 1)
  t = times[kept[:, 0]]
  assert np.median(t) == pytest.approx(0.4, abs=0.02)
  # beyond 1 lie 6.7 % of N(0.4, 0.4^2), below 0 15.9 %: clamped to the first and the last step
  assert np.mean(kept == 0) == pytest.approx(0.067, abs=0.01)
  assert np.mean(kept == 99) == pytest.approx(0.159 + 0.007, abs=0.01)


def test_state_and_time_of_a_record_are_of_the_same_step(stage):
  """A step of DDIM from each record leads to the next one of its image; of mirrored times it does not."""
  records = calibration.load(stage, EVERY_STEP)
  diffusion = stage.experiment.diffusion
  times = recorded.times_of(diffusion)
  assert len(records) == 10 and (np.diff(times) < 0).all()
  np.testing.assert_array_equal(records.step, np.tile(np.arange(5), 2))
  np.testing.assert_allclose(records.t, np.tile(times, 2), rtol=1e-6)
  assert records.y.dtype == np.float32 and set(records.values) == {'z', 'x0_vae'}

  @jax.jit
  def x0_hat(t):
    y, values = jax.tree.map(jnp.asarray, (records.y, records.values))
    return diffusion.denoiser.denoise(stage.read, values)(y, t)

  table = samplers.SAMPLERS['ddim'].table(diffusion.denoiser.schedule, np.append(times, 0.0))

  def error(t):
    keep, current = (np.tile(x, 2)[:, None, None, None] for x in (table.keep, table.current))
    following = keep * records.y + current * np.asarray(x0_hat(jnp.asarray(t)))
    last = np.arange(10) % 5 == 4
    return np.abs(following[~last] - records.y[np.flatnonzero(~last) + 1]).max()

  assert error(records.t) < 1e-4
  assert error(records.t.reshape(2, 5)[:, ::-1].ravel()) > 0.01


def test_records_are_stored_with_what_they_are_of(stage):
  records = calibration.load(stage, EVERY_STEP)
  path = calibration.path_of(stage, EVERY_STEP)
  assert [p for p in path.parent.iterdir() if p.name.startswith('.')] == []
  path_time = path.stat().st_mtime_ns
  again = calibration.load(stage, ConfigDict({**EVERY_STEP.to_dict(), 'batch_size': 2}))
  assert path.stat().st_mtime_ns == path_time
  for one, other in ((records.y, again.y), (records.t, again.t), (records.values['z'], again.values['z'])):
    np.testing.assert_array_equal(one, other)

  other = dataclasses.replace(stage, ids={"the stage 'refiner'": 'cc', 'the settings': 'bb'})
  with pytest.raises(identity.Stale, match="the stage 'refiner' aa, which is cc now.*Remove"):
    calibration.load(other, EVERY_STEP)
  stored = files.read_npz(path)
  files.write_npz(path, {**stored, 'y': stored['y'].astype(np.float64)})
  with pytest.raises(files.Damaged, match='float64'):
    calibration.load(stage, EVERY_STEP)
  path.unlink()


@pytest.mark.slow
def test_any_number_of_devices_records_the_same(stage):
  """And a calibration that is cut off leaves nothing: what is drawn again is the same."""
  path = calibration.path_of(stage, SECTION)
  one = calibration.load(stage, SECTION)
  assert len(one) == 12 and sorted(set(one.step)) == [0, 2, 4]
  path.unlink()
  eight = calibration.load(dataclasses.replace(stage, devices=8), SECTION)
  path.unlink()
  np.testing.assert_allclose(one.y, eight.y, atol=2e-5)
  np.testing.assert_array_equal(one.t, eight.t)
  np.testing.assert_allclose(one.values['x0_vae'], eight.values['x0_vae'], atol=1e-5)


def test_a_stage_without_a_sampler_is_refused(stage):
  other = dataclasses.replace(stage, experiment=type('Plain', (), {'diffusion': None})())
  with pytest.raises(UserError, match="stage 'refiner' has no sampler"):
    calibration.load(other, SECTION)
  with pytest.raises(UserError, match='quantize.calibration.kind'):
    calibration.load(stage, ConfigDict({**SECTION.to_dict(), 'kind': 'all'}))
