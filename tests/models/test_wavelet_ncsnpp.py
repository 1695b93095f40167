import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vaediff.errors import UserError
from vaediff.machine import cost
from vaediff.models import ncsnpp_blocks, wavelets
from vaediff.models.functional import Model
from vaediff.models.ncsnpp import NcsnPlusPlus
from vaediff.models.wavelet_ncsnpp import FrequencyDownBlock, FrequencyUpBlock, WaveletNcsnPlusPlus

pytestmark = pytest.mark.slow  # networks of the denoising GANs: many programs to compile

TINY = {
  'channels': 8,
  'channel_multipliers': (1, 2),
  'num_res_blocks': 1,
  'attention_resolutions': (),
  'latent_dim': 5,
  'num_mapping_layers': 0,
  'dropout': 0.0,
  'patch_size': 1,
  'bounded': True,
  'remat': False,
  'dtype': 'float32',
  'out_channels': 12,
  'mapping_dim': 12,
}
OPTIONS = ncsnpp_blocks.BlockOptions(dropout=0.0, deterministic=True, remat=False, dtype=jnp.float32)
SWITCHES = ('use_frequency_bottleneck', 'use_frequency_skips', 'use_residual')
OFF = dict.fromkeys(SWITCHES, False)


def model_of(module, size=8, condition_channels=0) -> Model:
  struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  condition = struct(1, size, size, condition_channels) if condition_channels else None
  inputs = (struct(1, size, size, 12), struct(1), struct(1, module.latent_dim), condition)
  return Model(module=module, inputs=inputs)


def build(size=8, condition_channels=0, **changes) -> Model:
  return model_of(WaveletNcsnPlusPlus(**{**TINY, **changes}), size, condition_channels)


def shapes(model: Model):
  return jax.eval_shape(model.init, jax.random.key(0))


def random_params(model: Model, rng):
  # Not the module's own initialisation, whose zeros would hide most of the network.
  draw = lambda leaf: jnp.float32(rng.normal(size=leaf.shape) / max(1, np.prod(leaf.shape[:-1])) ** 0.5)
  return jax.tree.map(draw, shapes(model))


def random_inputs(rng, batch=2):
  normal = lambda *shape: jnp.float32(rng.normal(size=shape))
  return normal(batch, 8, 8, 12), jnp.arange(batch, dtype=jnp.float32), normal(batch, 5)


def apply(model: Model, params, *args, **kwargs):
  return jax.jit(model.apply)(params, *args, **kwargs)


@pytest.fixture
def rng():
  return np.random.default_rng(0)


@pytest.mark.parametrize(
  ('channels', 'multipliers', 'size', 'mapping', 'parameters', 'giga_macs'),
  [
    (128, (1, 2, 2, 2), 32, 4, 55_585_292, '7.13'),  # STL-10
    (64, (1, 2, 2, 2, 4), 128, 3, 31_485_452, '28.42'),  # CelebA-HQ and LSUN Church, 256 pixels
    (64, (1, 1, 2, 2, 4, 4), 256, 3, 44_853_004, '73.95'),  # CelebA-HQ, 512 pixels
  ],
)
def test_parameters_and_cost_are_the_published_networks(
  channels, multipliers, size, mapping, parameters, giga_macs
):
  """Phung et al. 2023 print 31.48 million parameters and 28.54 G for the second."""
  model = build(
    size,
    channels=channels,
    channel_multipliers=multipliers,
    num_res_blocks=2,
    attention_resolutions=(16,),
    latent_dim=100,
    num_mapping_layers=mapping,
    mapping_dim=256,
  )
  params = shapes(model)
  assert cost.num_parameters(params) == parameters
  assert f'{cost.macs(model.apply, params, *model.inputs) / 1e9:.2f}' == giga_macs


@pytest.mark.parametrize('switches', list(itertools.product((True, False), repeat=3)))
def test_switches_change_their_part_only(switches):
  params = shapes(build(**dict(zip(SWITCHES, switches, strict=True)), remat=True))
  plain = shapes(model_of(NcsnPlusPlus(**TINY)))
  _, skips, residual = switches
  assert set(plain) - set(params) == (set() if residual else {'down_0_pyramid'})
  assert ('conv_highs' in params['up_1_double']) == skips
  if residual:
    assert params['down_0_pyramid']['kernel'].shape == (3, 3, 4 * 12, 8)
  for name in ('conv_in', 'middle_res_1', 'down_0_halve', 'up_0_res_0', 'conv_out'):
    assert params[name] == plain[name]


def test_without_its_frequencies_it_is_the_plain_network(rng):
  one_level = {'channel_multipliers': (1,)}
  wavelet, plain = build(**OFF, **one_level), model_of(NcsnPlusPlus(**{**TINY, **one_level}))
  assert shapes(wavelet) == shapes(plain)
  params, inputs = random_params(wavelet, rng), random_inputs(rng)
  np.testing.assert_allclose(apply(wavelet, params, *inputs), apply(plain, params, *inputs), atol=1e-6)


def convolve(x, layer, groups=1):
  numbers = ('NHWC', 'HWIO', 'NHWC')
  y = jax.lax.conv_general_dilated(
    x, layer['kernel'], (1, 1), 'SAME', dimension_numbers=numbers, feature_group_count=groups
  )
  return y + layer['bias'][None, None, None]


def multiply(x, layer):
  return x @ layer['kernel'] + layer['bias'].reshape((1,) * (x.ndim - 1) + (-1,))


def adapt(x, style, layer):
  return jax.nn.silu(ncsnpp_blocks.AdaptiveGroupNorm().apply({'params': layer}, x, style))


def block_and_inputs(block, rng, *extra):
  normal = lambda *shape: jnp.float32(rng.normal(size=shape))
  x, emb, style = normal(2, 6, 4, 8), normal(2, 10), normal(2, 7)
  module = block(features=4, options=OPTIONS)
  structs = jax.eval_shape(module.init, jax.random.key(0), x, *extra, emb, style)
  params = jax.tree.map(lambda leaf: normal(*leaf.shape), structs)['params']
  return jax.jit(module.apply), params, x, emb, style


def second_half(h, p, emb, style):
  h = h + multiply(jax.nn.silu(emb), p['emb'])[:, None, None]
  return convolve(adapt(h, style, p['norm_2']), p['conv_2'])


def test_down_block_is_the_formula(rng):
  run, p, x, emb, style = block_and_inputs(FrequencyDownBlock, rng)
  y, highs = run({'params': p}, x, emb, style)
  bands = np.split(np.asarray(wavelets.haar(convolve(adapt(x, style, p['norm_1']), p['conv_1']))), 4, axis=-1)
  for actual, expected in zip(highs, bands[1:], strict=True):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-3)
  skip = np.asarray(multiply(x, p['skip'])).reshape(2, 3, 2, 2, 2, 4).mean(axis=(2, 4))  # LL / 2
  expected = (second_half(jnp.asarray(bands[0] / 2), p, emb, style) + skip) / np.sqrt(2)
  np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-2)


def test_up_block_is_the_formula(rng):
  highs = tuple(jnp.float32(rng.normal(size=(2, 6, 4, 5))) for _ in range(3))
  run, p, x, emb, style = block_and_inputs(FrequencyUpBlock, rng, highs)
  assert p['conv_highs']['kernel'].shape == (3, 3, 5, 12)
  y = run({'params': p}, x, highs, emb, style)
  bands = []
  for i, high in enumerate(highs):
    # Every band has a convolution to itself.
    own = {name: leaf[..., 4 * i : 4 * (i + 1)] for name, leaf in p['conv_highs'].items()}
    bands.append(2.0 * convolve(high / 2.0, own))
  h = convolve(adapt(x, style, p['norm_1']), p['conv_1'])
  h = wavelets.inverse_haar(jnp.concatenate([2.0 * h, *bands], axis=-1))
  skip = wavelets.inverse_haar(jnp.concatenate([2.0 * multiply(x, p['skip']), *bands], axis=-1))
  expected = (second_half(h, p, emb, style) + skip) / np.sqrt(2)
  np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-2)


class MiddleAlone(WaveletNcsnPlusPlus):
  @nn.compact
  def __call__(self, h, emb, style):
    return self._middle(h, emb, style, OPTIONS)


def test_middle_treats_the_low_band_apart(rng):
  """With branches of zero every block divides what it reads by sqrt(2), and the high bands pass the first."""
  module = MiddleAlone(**{**TINY, 'channel_multipliers': (1,)})
  h, emb, style = jnp.float32(rng.normal(size=(1, 8, 8, 8))), jnp.zeros((1, 32)), jnp.zeros((1, 12))
  structs = jax.eval_shape(module.init, jax.random.key(0), h, emb, style)
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), structs)
  bands = jnp.split(wavelets.haar(module.apply(zeros, h, emb, style)), 4, axis=-1)
  expected = jnp.split(wavelets.haar(h), 4, axis=-1)
  # Low band: first block, attention, second block, second block again; high bands: attention, second block.
  np.testing.assert_allclose(bands[0], expected[0] / 4.0, atol=1e-6)
  for actual, high in zip(bands[1:], expected[1:], strict=True):
    np.testing.assert_allclose(actual, high / 2.0, atol=1e-6)


def test_output_at_initialisation_is_almost_zero(rng):
  model = build()
  # XLA's own generator: of this many draws the default one compiles for a long time.
  params = jax.jit(model.init)(jax.random.key(0, impl='rbg'))
  y = apply(model, params, *random_inputs(rng))
  assert y.shape == (2, 8, 8, 12) and y.dtype == jnp.float32
  assert 0.0 < jnp.abs(y).max() < 1e-3


def test_every_input_matters_to_its_own_example(rng):
  model = build(condition_channels=2)
  params = random_params(model, rng)
  x_t, t, z = random_inputs(rng)
  condition = jnp.float32(rng.normal(size=(2, 8, 8, 2)))
  run = jax.jit(model.apply)
  y = run(params, x_t, t, z, condition)
  for changed in (
    (x_t.at[1].add(0.5), t, z, condition),
    (x_t, t.at[1].add(1.0), z, condition),
    (x_t, t, z.at[1].multiply(-1.0), condition),
    (x_t, t, z, condition.at[1].add(0.5)),
  ):
    other = run(params, *changed)
    np.testing.assert_allclose(y[0], other[0], atol=1e-6)
    assert jnp.abs(y[1] - other[1]).max() > 1e-3


def test_bfloat16_and_remat_are_close_and_return_float32(rng):
  exact, rough = build(bounded=False), build(bounded=False, dtype='bfloat16')
  params, inputs = random_params(exact, rng), random_inputs(rng)
  assert shapes(exact) == shapes(rough)
  a, b = apply(exact, params, *inputs), apply(rough, params, *inputs)
  assert b.dtype == jnp.float32
  assert 0.0 < jnp.abs(a - b).max() < 0.05 * jnp.abs(a).max()
  remat = build(bounded=False, remat=True)
  assert shapes(remat) == shapes(exact)
  np.testing.assert_allclose(apply(remat, params, *inputs), a, rtol=1e-4, atol=1e-5)
  primitives = str(jax.make_jaxpr(jax.grad(lambda p: remat.apply(p, *inputs).sum()))(params))
  assert 'checkpoint' in primitives or 'remat' in primitives


def test_mistakes_are_user_errors():
  with pytest.raises(UserError, match="model.dtype is 'float16'"):
    build(dtype='float16')
  with pytest.raises(UserError, match='x_t is 6 x 6, .* 2 levels .*bottleneck need multiples of 4'):
    shapes(build(6))
  shapes(build(6, use_frequency_bottleneck=False))
