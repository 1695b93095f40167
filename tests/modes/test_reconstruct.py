"""Images again through the noise that they are made of, or of some of their levels of codes."""

import json
import pathlib
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vaediff.diffusion import inversion
from vaediff.errors import UserError
from vaediff.experiments.denoiser import Denoiser
from vaediff.modes import reconstruct

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import fresh  # noqa: E402

SMOOTH = {'reconstruct.through': 'noise', 'refiner.sample.clip': 'none'}


@pytest.mark.slow
@pytest.mark.parametrize('variant', ['formulation2,z,label', 'unconditional,wavelet_diffusion'])
def test_more_steps_bring_an_image_closer(variant, tmp_path, one_device, monkeypatch):
  trained = fresh.Fresh(variant, tmp_path, **SMOOTH, **{'reconstruct.num_steps': (4, 16, 64)})
  lines = fresh.said(monkeypatch, reconstruct)
  figures = reconstruct.through_noise(trained)
  errors = [figures[f'mse/{steps}'] for steps in (4, 16, 64)]
  assert errors == sorted(errors, reverse=True) and errors[-1] < 0.3 * errors[0], errors
  assert figures['psnr/64'] > figures['psnr/4']
  assert 0.05 < figures['deviation of x_T/64'] < 2.5
  stored = json.loads((tmp_path / 'reconstructions-noise.json').read_text())
  assert stored['num_images'] == 4 and [row['steps'] for row in stored['rows']] == [4, 16, 64]
  assert 'deviation of x_T' in '\n'.join(lines)
  with Image.open(tmp_path / 'reconstructions-noise.png') as picture:
    assert np.asarray(picture).std() > 10


def test_noise_far_from_that_of_samples_is_reported_as_it_is(tmp_path, one_device, monkeypatch):
  """A network that says 0 leaves the image of t_low, scaled: x_T = x0 sigma_1 / sigma_low, far beyond 4."""
  changes = {'reconstruct.num_steps': (4,), 'refiner.sample.batch_size': 3}  # and a batch that is filled up
  trained = fresh.Fresh('unconditional', tmp_path, **SMOOTH, **changes)
  monkeypatch.setattr(Denoiser, 'denoise', lambda self, read, values: lambda y, t: jnp.zeros_like(y))
  figures = reconstruct.through_noise(trained)
  schedule = trained.experiment.denoiser.schedule
  low, end = (schedule.sigma(np.array(t)) for t in (inversion.lowest_time(schedule), 1.0))
  x0 = trained.eval_images(4)[0] / 127.5 - 1
  assert float(end / low) * np.abs(x0).max() > 8
  assert figures['deviation of x_T/4'] == pytest.approx(float(end / low) * x0.std(), rel=1e-3)
  assert figures['mean of x_T/4'] == pytest.approx(float(end / low) * x0.mean(), rel=1e-3)


def test_a_stage_without_noise_is_refused(tmp_path, one_device):
  trained = fresh.Fresh('', tmp_path, 'vae', **SMOOTH)
  with pytest.raises(UserError, match="through = 'noise' needs a diffusion.* stage 'vae' is none.*--stages"):
    reconstruct.through_noise(trained)


def test_a_stage_that_sees_nothing_is_told_of_the_noise(tmp_path, one_device):
  with pytest.raises(UserError, match="reconstruct.through = 'noise'"):
    reconstruct.reconstruct(fresh.Fresh('unconditional', tmp_path))


def test_images_of_some_levels_say_which_and_what_the_others_are(tmp_path, one_device, monkeypatch):
  trained = fresh.Fresh('vqvae2', tmp_path)
  lines = fresh.said(monkeypatch, reconstruct)
  figures = reconstruct.reconstruct(trained)
  assert list(figures) == ['mse/x0_mean_below_top', 'mse/x0']
  assert 'side by side: data, top (below: mean code), all levels' in lines
  with Image.open(tmp_path / 'reconstructions.png') as picture:
    assert np.asarray(picture).std() > 10
  zeros = reconstruct.reconstruct(fresh.Fresh('vqvae2', tmp_path, **{'vqvae2.sample.fill': 'zeros'}))
  assert list(zeros) == ['mse/x0_zeros_below_top', 'mse/x0']
  assert zeros['mse/x0'] == figures['mse/x0']
  assert zeros['mse/x0_zeros_below_top'] != figures['mse/x0_mean_below_top']
