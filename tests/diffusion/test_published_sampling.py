"""DiffuseVAE's own samplers: what its code made of a network with random weights, from the same noise.

diffusevae_sampling.npz has, for one example of 8x8x3, the images that the official code made, and eps, the
output of its network at each step, first step first. The network is not here: its outputs are played again,
whatever they are asked for. Clipping is active nearly everywhere.
"""

import functools
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff.diffusion import gaussian, grids, samplers, schedules

LINEAR = schedules.LinearBeta()
GRIDS = {'uniform': 'published_uniform', 'quad': 'published_quadratic'}


@functools.cache
def stored():
  with np.load(pathlib.Path(__file__).parent / 'diffusevae_sampling.npz') as file:
    return dict(file)


def replay(eps, times, *, both):
  """Returns a denoiser whose network gave these eps at these times."""
  known, eps = jnp.asarray(times[:-1], jnp.float32), jnp.asarray(eps)

  def denoise(y, t):
    here = eps[jnp.argmin(jnp.abs(known - t[0]))]
    x0_hat = gaussian.to_x0('eps', here, y, t, LINEAR)
    clipped = jnp.clip(x0_hat, -1, 1)
    return (clipped, x0_hat) if both else clipped

  return denoise


@pytest.mark.parametrize('form', [1, 2])
@pytest.mark.parametrize('kind', GRIDS)
def test_ddim_keeps_the_eps_of_the_network(kind, form):
  data = stored()
  times = grids.time_grid(LINEAR, GRIDS[kind], 10)
  np.testing.assert_allclose(times[:-1][::-1] * 1000 - 1, data[f'indices_{kind}'], atol=1e-9)
  eps, wanted = data[f'ddim_{kind}_form{form}_eps'], data[f'ddim_{kind}_form{form}']
  run = functools.partial(
    samplers.SAMPLERS['ddim'], schedule=LINEAR, y=jnp.asarray(data['noise']),
    keys=jax.random.split(jax.random.key(0), 1), num_steps=10, grid=GRIDS[kind],
  )  # fmt: skip
  got = run(replay(eps, times, both=True), recompute_eps=False)
  np.testing.assert_allclose(got, wanted, atol=5e-5)
  assert (
    np.max(abs(run(replay(eps, times, both=False)) - wanted)) > 0.1
  )  # eps of the clipped image is another


@pytest.mark.parametrize('form', [1, 2])
@pytest.mark.parametrize('variance', ['large', 'small'])
def test_ddpm_on_the_published_times(variance, form, monkeypatch):
  data, keys = stored(), jax.random.split(jax.random.key(0), 1)
  noise = jnp.asarray(data[f'step_noise_form{form}'])
  given = types.SimpleNamespace(fold_in=lambda key, k: k, normal=lambda k, shape: noise[k])
  monkeypatch.setattr(samplers, 'jax', types.SimpleNamespace(vmap=jax.vmap, lax=jax.lax, random=given))
  times = grids.time_grid(LINEAR, 'published_uniform', 20)
  np.testing.assert_allclose(times[:-1][::-1] * 1000 - 1, data['indices_ddpm'], atol=1e-9)
  got = samplers.SAMPLERS['ddpm'](
    replay(data[f'ddpm_fixed{variance}_form{form}_eps'], times, both=False), LINEAR,
    jnp.asarray(data['noise']), keys, num_steps=20, grid='published_uniform', variance=variance,
  )  # fmt: skip
  np.testing.assert_allclose(got, data[f'ddpm_fixed{variance}_form{form}'], atol=5e-5)


@pytest.mark.parametrize('eta', [0.0, 0.7])
def test_without_clipping_both_eps_are_the_same(eta):
  def denoise(y, t):
    return 0.4 * y

  def keys():
    return jax.random.split(jax.random.key(1), 3)

  y = jax.random.normal(jax.random.key(0), (3, 5))
  once = samplers.SAMPLERS['ddim'](denoise, LINEAR, y, keys(), num_steps=7, eta=eta)
  kept = samplers.SAMPLERS['ddim'](
    lambda y, t: (denoise(y, t), denoise(y, t)), LINEAR, y, keys(), num_steps=7, eta=eta, recompute_eps=False
  )
  np.testing.assert_allclose(kept, once, atol=1e-5)
