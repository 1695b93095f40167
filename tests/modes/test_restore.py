"""Restoration: what the degraded image says holds, and nothing else of the image is seen; what is refused."""

import dataclasses
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from some_slow import some_slow

from vaediff import reads
from vaediff.data import sources, words
from vaediff.diffusion import restoration
from vaediff.errors import UserError
from vaediff.evaluation import networks
from vaediff.experiments import restored as restoring
from vaediff.experiments.base import sampling_keys
from vaediff.experiments.quantized import replaced
from vaediff.modes import explore_restored, restore

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import fresh  # noqa: E402

pytestmark = pytest.mark.usefixtures('quick')
FAST = {'refiner.sample.num_steps': 2, 'refiner.sample.clip': 'none'}


@pytest.fixture
def quick(monkeypatch):
  """No weights of LPIPS are looked for."""
  monkeypatch.delenv('VAEDIFF_WEIGHTS', raising=False)


def degradation(task, **changes):
  fields = {'factor': 2, 'noise_std': 0.2, 'hole_fraction': 0.5, **changes}
  return restoration.Degradation(task=task, **fields)


def keys_of(count):
  keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(count))
  return sampling_keys(keys)


def drawn_maps(trained, one, labels=None, count=4):
  """Images of the maps before they are clipped to what bytes hold, and what was known."""
  data, labels = trained.eval_images(count)
  x0 = jnp.asarray(data / 127.5 - 1, jnp.float32)
  degraded, measured, known = map(jnp.asarray, restore.observe(one, x0, 0))
  drawn = restoring.restored(
    trained.experiment.diffusion, one, fill_rounds=1, is_held=True, start_at_level=True
  )

  def run(read, given, keys):
    given = {**given, **drawn.draw(read, keys, jnp.arange(count))}
    return drawn.space.decode_map(read, drawn.maps(read, {**given, **drawn.seen(read, given)}, keys))

  given = {'degraded': degraded, 'measured': measured, 'known': known, 'label': labels.astype(np.int32)}
  return jax.jit(run)(trained.read, given, keys_of(count)), given


VARIANTS = ['formulation2,z', 'unconditional', 'formulation1', 'label', 'unconditional,wavelet_diffusion']


@pytest.mark.parametrize('variant', some_slow(VARIANTS, 'formulation2,z'))
def test_what_the_degraded_image_says_holds_in_every_space_and_formulation(variant, tmp_path, one_device):
  small = {'refiner.model.channel_multipliers': (1,), 'refiner.model.attention_resolutions': ()}
  trained = fresh.Fresh(variant, tmp_path, **FAST, **small)
  for task in ('super_resolution', 'inpaint'):
    one = degradation(task)
    x, given = drawn_maps(trained, one)
    np.testing.assert_allclose(one.project(x, given['known']), given['measured'], atol=2e-4)
    rest = np.asarray(x - one.project(x, given['known']))
    assert rest.std() > 1e-2  # and the network fills in the rest


@pytest.mark.parametrize(
  'variant', some_slow(['unconditional', 'formulation2', 'unconditional,wavelet_diffusion'], 'formulation2')
)
def test_denoising_starts_at_the_level_of_the_noise_from_the_noisy_image(
  variant, tmp_path, one_device, monkeypatch
):
  trained, started = fresh.Fresh(variant, tmp_path, **FAST), []

  def steps(self, denoise, y, keys, t_start, **more):
    started.append(t_start)
    return y / self.denoiser.schedule.alpha(t_start)

  monkeypatch.setattr(restoring.Restored, 'steps', steps)
  x, given = drawn_maps(trained, degradation('denoise'))
  np.testing.assert_allclose(x, given['degraded'], atol=1e-5)
  level = 0.1 if 'wavelet' in variant else 0.2  # half the noise in halved wavelets
  schedule = trained.experiment.denoiser.schedule
  assert schedule.sigma(started[0]) / schedule.alpha(started[0]) == pytest.approx(level, rel=1e-5)


@pytest.mark.slow
def test_a_vae_sees_the_degraded_image_whose_hole_it_has_filled(tmp_path, one_device):
  trained = fresh.Fresh('formulation1', tmp_path, **FAST)
  one = degradation('inpaint')
  data, labels = trained.eval_images(4)
  degraded, measured, known = restore.observe(one, jnp.asarray(data / 127.5 - 1, jnp.float32), 0)
  given = {'degraded': degraded, 'measured': measured, 'known': known, 'label': labels}

  def image_of(x):
    seen = trained.observe(np.asarray(x, np.float32), labels)
    return np.asarray(jax.jit(trained.experiment.conditions.complete)(trained.read, seen)['x0_vae'])

  wanted = image_of(degraded)
  for rounds in (0, 1, 2):
    drawn = restoring.restored(trained.experiment, one, fill_rounds=rounds, is_held=True, start_at_level=True)
    seen = jax.jit(drawn.seen)(trained.read, given)
    np.testing.assert_allclose(seen['x0_vae'], wanted, atol=1e-4)
    wanted = image_of(np.clip(np.where(known > 0, degraded, wanted), -1, 1))


@pytest.mark.slow
def test_nothing_is_seen_of_the_image_that_is_looked_for(tmp_path, one_device):
  """Where the hole is, another image gives the same restored one."""
  trained = fresh.Fresh('formulation2,z,label', tmp_path, **FAST)
  data, labels = trained.eval_images(4)
  other = data.copy()
  other[:, 2:6, 2:6] = 255 - other[:, 2:6, 2:6]
  one, found = degradation('inpaint'), []
  for image in (data, other):
    observed = restore.observe(one, jnp.asarray(image / 127.5 - 1, jnp.float32), 0)
    found.append(restore.restored(trained, one, observed, labels))
  for name in found[0]:
    np.testing.assert_array_equal(found[0][name], found[1][name])
  assert list(found[0]) == ['restored', 'mean of 2']
  assert not np.array_equal(found[0]['restored'], found[0]['mean of 2'])
  inside = np.zeros((8, 8), bool)
  inside[2:6, 2:6] = True
  np.testing.assert_array_equal(found[0]['restored'][:, ~inside], data[:, ~inside])


@pytest.mark.slow
def test_all_tasks_are_measured_printed_and_drawn(tmp_path, one_device, monkeypatch):
  trained = fresh.Fresh('formulation1', tmp_path, **FAST)
  lines = fresh.said(monkeypatch, restore)
  figures = restore.restore(trained)
  tasks = ('super_resolution', 'inpaint', 'denoise')
  names = ('degraded', 'restored', 'mean of 2')
  wanted = {f'psnr/{task}/{name}' for task in tasks for name in names}  # too small for SSIM
  assert set(figures) == wanted - {'psnr/denoise/mean of 2'}  # DDIM draws nothing: there is one sample
  assert all(0 < value < 60 for value in figures.values())
  text = '\n'.join(lines)
  assert 'colourise is left out: the images of this data set are grey' in text
  assert "4 images of the evaluation split, stage 'refiner', restore.method = 'consistent'" in text
  assert 'ssim: not measured, its window has 11 pixels a side, the images have 8' in text
  stored = json.loads((tmp_path / 'restored.json').read_text())
  assert stored['num_images'] == 4 and stored['figures'] == figures
  for task in tasks:
    with Image.open(tmp_path / f'restored-{task}.png') as picture:
      assert np.asarray(picture).std() > 10


@pytest.mark.slow
def test_the_papers_way_is_still_there(tmp_path, one_device):
  trained = fresh.Fresh('formulation1', tmp_path, **FAST, **{
    'restore.method': 'condition', 'restore.task': 'inpaint', 'restore.num_samples': 1,
  })  # fmt: skip
  data, labels = trained.eval_images(4)
  one = restore.tasks_of(trained)[0]
  observed = restore.observe(one, jnp.asarray(data / 127.5 - 1, jnp.float32), 0)
  found = restore.restored(trained, one, observed, labels)
  assert list(found) == ['restored']
  given = {**trained.observe(observed[0], labels), 'x0_vae': observed[0]}
  wanted = np.where(observed[2] > 0, data, trained.draw_all(given)['x0'])
  np.testing.assert_array_equal(found['restored'], wanted)


@pytest.mark.slow
def test_colours_are_restored_where_there_are_any(tmp_path, one_device, monkeypatch):
  trained = fresh.Fresh(
    'unconditional', tmp_path, **FAST, **{'data.channels': 3, 'restore.task': 'colourise'}
  )
  fresh.said(monkeypatch, restore)
  assert set(restore.restore(trained)) == {
    f'psnr/colourise/{n}' for n in ('degraded', 'restored', 'mean of 2')
  }
  one = degradation('colourise')
  x, given = drawn_maps(trained, one)
  np.testing.assert_allclose(np.asarray(x).mean(-1), given['measured'][..., 0], atol=1e-4)


def test_the_figures_are_means_over_images_and_equal_ones_count_as_rounded():
  opened = networks.Networks(features={}, lpips=None, missing={})
  data = np.zeros((2, 4, 4, 1), np.uint8)
  value = data.copy()
  value[1] += 51  # an error of 0.2: 13.98 dB
  figures = restore.figures_of(opened, data, value)
  assert figures == {'psnr': pytest.approx((58.92 + 13.9794) / 2, abs=1e-3)}


@pytest.mark.parametrize('seed', [0, 3])
def test_an_image_is_degraded_alike_whatever_is_beside_it(seed):
  x0 = jnp.asarray(fresh.images(6)[0] / 127.5 - 1, jnp.float32)
  one = degradation('denoise')
  whole = restore.observe(one, x0, seed)[0]
  np.testing.assert_array_equal(restore.observe(one, x0[:2], seed)[0], whole[:2])
  assert not np.array_equal(restore.observe(one, x0, seed + 1)[0], whole)


# A stage that has learned it ----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_stage_restores_the_task_that_it_has_learned(tmp_path, one_device, monkeypatch):
  changes = {'refiner.conditions.degraded.task': 'inpaint', 'refiner.conditions.degraded.hole': 'random'}
  trained = fresh.Fresh('restoration', tmp_path, **FAST, **changes)
  fresh.said(monkeypatch, restore)
  for method in ('consistent', 'condition'):
    trained.config.restore.method = method
    figures = restore.restore(trained)
    assert set(figures) == {f'psnr/inpaint/{n}' for n in ('degraded', 'restored', 'mean of 2')}
  (one,) = restore.tasks_of(trained)
  assert one.hole == 'random'
  drawn, given = restore.by_method(
    trained, one, restore.observe(one, jnp.zeros((4, 8, 8, 1)), 0), np.zeros(4)
  )
  shown = drawn.draw_all(given)
  np.testing.assert_array_equal(shown['degraded'], restore.as_bytes(given['degraded']))
  trained.config.restore.task = 'denoise'
  with pytest.raises(UserError, match="learned the task 'inpaint'; config.restore.task is 'denoise'"):
    restore.restore(trained)


def test_learned_denoising_starts_from_noise_not_from_the_noisy_image_that_is_read(tmp_path, one_device):
  trained = fresh.Fresh('restoration', tmp_path, **FAST, **{'refiner.conditions.degraded.task': 'denoise'})
  (one,) = restore.tasks_of(trained)
  drawn, _ = restore.by_method(trained, one, restore.observe(one, jnp.zeros((4, 8, 8, 1)), 0), np.zeros(4))
  assert not drawn.experiment.is_held


# Captions -----------------------------------------------------------------------------------------------


def reads_captions(folder, **changes):
  """A stage that reads captions, never trained, and the ids of those of the evaluation images."""
  small = {'refiner.model.channel_multipliers': (1,), 'refiner.model.attention_resolutions': ()}
  trained = fresh.Fresh('text', folder, **FAST, **small, **changes)
  tokens = np.zeros((32, 8), np.int32)
  tokens[:, :3] = [[words.BOS, words.EOS + 1 + i % 10, words.EOS] for i in range(32)]
  trained._sources['eval'] = sources.Beside(source=trained.eval_source, arrays={words.TOKENS: tokens})
  trained.read = {**trained.read, reads.CAPTIONS: {words.TOKENS: tokens[::-1].copy()}}
  return trained, tokens


def test_a_stage_that_reads_captions_is_given_those_of_the_images(tmp_path, one_device, monkeypatch):
  changes = {'restore.task': 'inpaint', 'restore.num_samples': 1, 'restore.num_images': 3}
  trained, tokens = reads_captions(tmp_path, **changes)
  fresh.said(monkeypatch, restore)
  by_method, found = restore.by_method, []
  monkeypatch.setattr(restore, 'by_method', lambda *args: found.append(by_method(*args)) or found[0])
  assert set(restore.restore(trained)) == {'psnr/inpaint/degraded', 'psnr/inpaint/restored'}
  drawn, given = found[0]
  np.testing.assert_array_equal(given[words.TOKENS], tokens[:3])
  other = drawn.draw_all({**given, words.TOKENS: tokens[3:6]})
  assert (other['x0'] != drawn.draw_all(given)['x0']).any()


def test_images_without_captions_are_told_no_words_or_refused(tmp_path, one_device):
  nothing = restore.observe(degradation('inpaint'), jnp.zeros((2, 8, 8, 1)), 0)
  trained, tokens = reads_captions(tmp_path)
  trained.caption_inputs = lambda texts: {words.TOKENS: tokens[[len(text) for text in texts]]}
  _, given = restore.by_method(trained, degradation('inpaint'), nothing, np.zeros(2))
  np.testing.assert_array_equal(given[words.TOKENS], tokens[[0, 0]])
  (text,) = trained.experiment.conditions.each
  always = replaced(trained.experiment, text, dataclasses.replace(text, dropout=0.0))
  trained = trained.with_experiment(always)
  with pytest.raises(UserError, match="stage 'refiner' reads captions.* give each image its caption"):
    restore.by_method(trained, degradation('inpaint'), nothing, np.zeros(2))
  damage = explore_restored.Damage(degradation=degradation('inpaint'))
  explore_restored.check(trained, damage)  # a visitor can write one


# What cannot be restored --------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('variant', 'stage', 'changes', 'message'),
  [
    pytest.param(
      'latent_diffusion', 'refiner', {}, "'consistent' holds the given pixels .* latents have none.*--stages",
      marks=pytest.mark.slow,
    ),
    ('', 'vae', {}, "'consistent' works within the steps of a denoiser, .* stage 'vae' are not"),
    pytest.param(
      'latent', 'ddgan', {}, "'consistent' works within the steps of a denoiser, .* stage 'ddgan' are not",
      marks=pytest.mark.slow,
    ),
    (
      'unconditional',
      '',
      {'restore.method': 'condition'},
      "in place of a VAE's, and stage 'refiner' reads none",
    ),
    ('', '', {'restore.task': 'colourise'}, "config.restore.task is 'colourise': .* are grey"),
    pytest.param(
      'consistency', '', {'restore.task': 'denoise'}, "task is 'denoise': stage 'consistency' is a student",
      marks=pytest.mark.slow,
    ),
    pytest.param(
      '', '', {'restore.task': 'denoise', 'restore.noise_std': 200.0},
      'the level 200; this schedule knows levels', marks=pytest.mark.slow,
    ),
    pytest.param(
      '', '', {'restore.task': 'super_resolution', 'restore.factor': 3}, 'config.restore.factor must be >= 2',
      marks=pytest.mark.slow,
    ),
  ],
)  # fmt: skip
def test_what_cannot_be_restored_is_refused_by_name(variant, stage, changes, message, tmp_path, one_device):
  trained = fresh.Fresh(variant, tmp_path, stage, **changes)
  with pytest.raises(UserError, match=message):
    restore.restore(trained)
