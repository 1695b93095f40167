"""What imported networks compute, against what the official code did; and the names there and back."""

import jax
import numpy as np
import published
import pytest

from vaediff.models import wavelets
from vaediff.models.discriminator import TimeDiscriminator
from vaediff.models.functional import Model
from vaediff.run import adopting
from vaediff.run.published import exported
from vaediff.spaces import encoders
from vaediff.weights import families, state_dicts
from vaediff.weights.families import base

PREFIX = {
  published.STAGE2: {'refiner': 'target_network.decoder.', 'vae': 'vae.'},
  'ddgan_content/content': {'ddgan': 'ema.'},
}
"""Before the names of the tensors that a stage got, where there is something."""


QUICK = (published.STAGE1, 'lddgan_autoencoder_free/tanh')


@pytest.mark.parametrize(
  'name', [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in published.NAMES]
)
def test_official_names_and_back_are_equal_tensors(name):
  plan, stored = published.planned(name), published.tensors_of(published.file_of(name))
  for stage, networks in plan.networks.items():
    for network, found in networks.items():
      family = exported.family_of(plan.config, stage, network)
      made = exported.official(plan.config, stage, family, published.flat(found.average))
      prefix = 'netD_dict.' if network == 'discriminator' else PREFIX.get(name, {}).get(stage, '')
      assert len(made) > 30
      for key, value in made.items():
        np.testing.assert_array_equal(value, stored[f'{prefix}{key}'])
      if name not in PREFIX:
        assert set(made) == set(stored)


def close(found, wanted, tolerance=1e-5):
  assert found.shape == wanted.shape
  assert np.max(np.abs(found - wanted)) <= tolerance


def vector(array):
  return array.reshape(len(array), -1)


def test_the_vae():
  plan, data = published.planned(published.STAGE1), published.arrays_of(published.STAGE1)
  experiment, params = plan.experiments['vae'], plan.networks['vae']['vae'].average
  mean, logvar = published.applied(experiment, 'vae', params, 2 * data['image01'] - 1, method='encode')
  close(mean, vector(data['mean']))
  close(logvar, vector(data['logvar']))
  close(published.applied(experiment, 'vae', params, mean, method='decode'), 2 * data['reconstruction01'] - 1)
  assert plan.steps == {'vae': 17} and plan.config.vae.train.num_steps == 17


@pytest.mark.slow
def test_the_vae_of_the_second_stage_and_both_u_nets():
  plan, data = published.planned(published.STAGE2), published.arrays_of(published.STAGE2)
  vae, refiner = plan.networks['vae']['vae'], plan.networks['refiner']['denoiser']
  experiment, t = plan.experiments['refiner'], (data['timestep'] + 1).astype(np.float32) / 1000
  x = 2 * data['image01'] - 1
  mean, _ = published.applied(plan.experiments['vae'], 'vae', vae.average, x, method='encode')
  close(mean, vector(data['vae_mean']))
  for params, wanted in ((refiner.params, 'output_online'), (refiner.average, 'output_target_ema')):
    found = published.applied(experiment, 'denoiser', params, data['x_t'], t, {'x0_vae': data['x0_vae']})
    close(found, data[wanted], 2e-5)
  assert plan.steps == {'vae': 1, 'refiner': 17}


U_NETS = ('diffusevae_unet_ddim/small_cond', 'diffusevae_unet_openai/small_cond_z')


@pytest.mark.slow
@pytest.mark.parametrize('name', [name for name in U_NETS if name in published.NAMES])
def test_u_nets(name):
  plan, data = published.planned(name), published.arrays_of(name)
  t = (data['timestep'] + 1).astype(np.float32) / 1000
  values = {key: data[key] for key in ('x0_vae', 'z') if key in data}
  params = plan.networks['refiner']['denoiser'].average
  found = published.applied(plan.experiments['refiner'], 'denoiser', params, data['x_t'], t, values)
  close(found, data['output'], 2e-5)
  assert plan.config.refiner.model.variant == name.split('_')[2].split('/')[0]


GENERATORS = (
  'ddgan_content/content',
  'ddgan_generator/generator',
  'wavediff_generator/wavelet',
  'wavediff_generator/plain_12_channels',
)


@pytest.mark.slow
@pytest.mark.parametrize('name', [name for name in GENERATORS if name in published.NAMES])
def test_generators(name):
  plan, data = published.planned(name), published.arrays_of(name)
  found, inputs = (
    plan.networks['ddgan']['generator'],
    (data['x_t'], data['timestep'].astype(np.float32), data['z']),
  )
  outputs = {'output': found.average}
  if 'output_raw' in data:
    outputs = {'output_ema': found.average, 'output_raw': found.params}
  for key, params in outputs.items():
    made = published.applied(plan.experiments['ddgan'], 'generator', params, *inputs, None)
    close(made, data[key])


@pytest.mark.slow
@pytest.mark.parametrize('name', ['wavelet', 'plain_12_channels'])
def test_the_other_order_of_bands_swaps_what_goes_in_and_comes_out(name):
  name = f'wavediff_generator/{name}'
  config = published.config_of(name, **{'adopt.band_order': 'pytorch_wavelets'})
  plan, data = adopting.planned(config, ('ddgan',)), published.arrays_of(name)
  assert plan.config.adopt.band_order == 'pytorch_wavelets'
  order = np.r_[0:3, 6:9, 3:6, 9:12]
  params = plan.networks['ddgan']['generator'].average
  inputs = (data['x_t'][..., order], data['timestep'].astype(np.float32), data['z'])
  found = published.applied(plan.experiments['ddgan'], 'generator', params, *inputs, None)
  close(found, data['output'][..., order])


def test_the_orders_of_bands_are_those_of_the_two_libraries():
  with np.load(published.HERE / 'haar.npz') as stored:
    image, ours, theirs = (
      np.moveaxis(stored[key], 1, -1) for key in ('image', 'bands_wavecnet', 'bands_pytorch_wavelets')
    )
  bands = np.asarray(jax.jit(wavelets.haar)(image))
  np.testing.assert_allclose(bands, ours, atol=1e-6)
  np.testing.assert_allclose(bands, theirs[..., np.r_[0:3, 6:9, 3:6, 9:12]], atol=1e-6)


@pytest.mark.slow
def test_a_discriminator_in_the_published_groups():
  name = 'ddgan_discriminators/small'
  file = state_dicts.opened(published.HERE / f'{name}.pt')
  (part,) = families.parts(file.shapes)
  fields = part.fields()
  assert fields == {'variant': 'small', 'channels': 4, 'time_dim': 16, 'num_layers': 4, 'inputs': 6}
  with np.load(published.HERE / f'{name}.npz') as stored:
    data = {key: np.moveaxis(value, 1, -1) if value.ndim == 4 else value for key, value in stored.items()}
  for order in ('strided', 'consecutive'):
    module = TimeDiscriminator(
      dtype='float32', group_order=order, **{key: value for key, value in fields.items() if key != 'inputs'}
    )
    x = data['x_t_2'][:1]
    model = Model(module=module, inputs=(x, np.zeros(1, np.float32), x))
    own = {
      path: leaf.shape for path, leaf in adopting.leaves_of(jax.eval_shape(model.init, jax.random.key(0)))
    }
    entries = part.family.entries(own, {})
    assert base.problems(entries, own, part.shapes) == []
    params = adopting.tree_of(base.to_own(entries, own, file.read(file.shapes)))
    for batch in (4, 8):
      logits = data[f'logits_{batch}'][:, 0]
      inputs = (data[f'x_t_{batch}'], data[f'timestep_{batch}'].astype(np.float32), data[f'x_next_{batch}'])
      made = jax.jit(lambda params, *inputs, model=model: model.apply(params, *inputs))(params, *inputs)
      apart = np.max(np.abs(np.asarray(made) - logits)) / np.max(np.abs(logits))
      assert (apart < 1e-5) == (order == 'strided' or batch == 4)


AUTOENCODERS = ('ldm_autoencoder_vq/vq', 'ldm_autoencoder_kl/kl', 'lddgan_autoencoder_free/tanh')


@pytest.mark.slow
@pytest.mark.parametrize('name', [name for name in AUTOENCODERS if name in published.NAMES])
def test_autoencoders(name):
  plan, data = published.planned(name), published.arrays_of(name)
  experiment, found = plan.experiments['autoencoder'], plan.networks['autoencoder']['autoencoder'].average
  model, kind = experiment.autoencoder, plan.config.autoencoder.model.bottleneck
  mean, logvar = published.applied(experiment, 'autoencoder', found, data['image'], method='encode')
  close(mean, data[{'vq': 'prequant', 'kl': 'mean', 'none': 'encoded'}[kind]])
  if kind == 'kl':
    close(logvar, data['logvar'])
  decoded = jax.jit(lambda params, z: encoders.decode(model, params, z))(found, data['latent'])
  close(np.asarray(decoded), data['decoded_with_quantizer' if kind == 'vq' else 'decoded'])
