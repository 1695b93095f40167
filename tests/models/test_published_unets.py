"""The U-Nets of Improved DDPM, ADM and latent diffusion: parameters to the last one, and their new blocks."""

import importlib
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from some_slow import some_slow

from vaediff import experiments
from vaediff.errors import UserError
from vaediff.models import layers, ports
from vaediff.models.functional import Model
from vaediff.models.ports import Port
from vaediff.models.unet import UNet, prediction_alone
from vaediff.models.unet_blocks import VARIANTS, BlockOptions, ResidualBlock
from vaediff.modes import describe

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent.parent))
from configs import presets  # noqa: E402


def build(size, fields, *, learned=True, channels=3, classes=0, low_resolution=False, text=()):
  named = {}
  if text:  # of vectors: the network that makes them is another
    named['text'] = Port(enters='text', how='transformer', shape=text)
  if low_resolution:
    named['low'] = Port(enters='concat', shape=(size, size, channels))
  if classes:
    named['label'] = Port(enters='vector', shape=(), classes=classes)
  module = UNet(
    **{'num_heads': 1, 'scale_shift_norm': False, 'remat': False, 'dtype': 'float32', **fields},
    image_size=size, image_channels=channels, learned_variance=learned, ports=tuple(named.items()),
  )  # fmt: skip
  shapes = (
    jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32),
    jax.ShapeDtypeStruct((1,), jnp.float32),
  )
  return Model(module=module, inputs=(*shapes, ports.structs(named)))


def shapes_of(model):
  return jax.eval_shape(model.init, jax.random.key(0))


def count(model):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes_of(model)))


@pytest.mark.parametrize(
  ('preset', 'size', 'options', 'parameters'),
  some_slow([
    ('iddpm_imagenet64', 64, {}, 121_063_942),
    ('iddpm_cifar10', 32, {}, 52_546_438),
    ('iddpm_imagenet64_class', 64, {'classes': 1000}, 273_049_350),
    ('iddpm_upsampler_64_256', 256, {'classes': 1000, 'low_resolution': True}, 279_792_390),
    ('iddpm_lsun256', 256, {}, 113_676_678),
    ('iddpm_imagenet64', 64, {'learned': False}, 121_060_483),
    ('iddpm_cifar10', 32, {'learned': False}, 52_542_979),
    ('iddpm_lsun256', 256, {'learned': False}, 113_673_219),
    ('adm64', 64, {'classes': 1000}, 295_904_454),
    ('adm128', 128, {'classes': 1000}, 421_529_606),
    ('adm256', 256, {'classes': 1000}, 553_838_086),
    ('adm256', 256, {}, 552_814_086),
    ('adm256', 256, {'learned': False}, 552_807_171),
    ('adm512', 512, {'classes': 1000}, 558_997_638),
    ('adm_upsampler_64_256', 256, {'classes': 1000, 'low_resolution': True}, 311_795_910),
    ('adm_upsampler_128_512', 512, {'classes': 1000, 'low_resolution': True}, 302_875_782),
    ('ldm_celeba256', 64, {'learned': False}, 274_056_163),
    ('ldm_lsun_church256', 32, {'learned': False, 'channels': 4}, 294_966_916),
    ('stable_diffusion', 64, {'learned': False, 'channels': 4, 'text': (77, 768)}, 859_520_964),
    ('ldm_txt2img', 32, {'learned': False, 'channels': 4, 'text': (77, 1280)}, 872_300_484),
    ('ldm_imagenet256', 64, {'learned': False, 'channels': 3, 'text': (1, 512)}, 400_920_579),
  ], 'iddpm_cifar10', 'iddpm_upsampler_64_256', 'ldm_imagenet256'),
)  # fmt: skip
def test_parameters_are_the_published_networks(preset, size, options, parameters):
  assert count(build(size, presets.UNET[preset], **options)) == parameters


@pytest.mark.parametrize(
  ('variant', 'parameters'),
  some_slow([('ldm_txt2img', 872_300_484), ('stable_diffusion', 859_520_964)], 'stable_diffusion'),
)
def test_configs_of_text_to_image_have_the_published_networks_beside_their_tower(variant, parameters):
  config = importlib.import_module('configs.captions256').get_config(variant)
  shapes = jax.eval_shape(experiments.build(config, 'refiner').denoiser.model.init, jax.random.key(0))
  tower = shapes['tokens_tower']
  whole, own = (sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) for tree in (shapes, tower))
  assert whole - own == parameters and describe.towers(shapes) == ['tokens_tower']


def test_learned_variance_adds_channels_of_the_last_convolution_alone():
  fields = {**presets.UNET['iddpm_cifar10'], 'channels': 32}
  fixed, learned = (shapes_of(build(8, {**fields, 'channel_multipliers': (1,), 'attention_resolutions': ()},
                                    learned=flag)) for flag in (False, True))  # fmt: skip
  assert learned['conv_out']['kernel'].shape == (3, 3, 32, 6)
  assert {k: v for k, v in fixed.items() if k != 'conv_out'} == {
    k: v for k, v in learned.items() if k != 'conv_out'
  }
  assert prediction_alone(fixed, fixed) is fixed


TINY = {
  'channels': 16, 'channel_multipliers': (1, 2), 'num_res_blocks': 1, 'attention_resolutions': (4,),
  'num_heads': 2, 'dropout': 0.0,
}  # fmt: skip


@pytest.mark.parametrize('variant', ['openai', pytest.param('ddim', marks=pytest.mark.slow)])
def test_the_variance_starts_at_zero_and_the_prediction_alone_is_the_same(variant):
  fields = {**TINY, 'channel_multipliers': (1,), 'attention_resolutions': (8,), 'variant': variant}
  model, alone = (build(8, fields, learned=flag) for flag in (True, False))
  params = jax.jit(model.init)(jax.random.key(0))
  x, t = jax.random.normal(jax.random.key(1), (2, 8, 8, 3)), jnp.array([0.3, 1.0])
  output = jax.jit(model.apply)(params, x, t, {})
  assert output.shape == (2, 8, 8, 6)
  np.testing.assert_array_equal(output[..., 3:], 0)
  assert np.any(output[..., :3]) == (variant == 'ddim')
  params = jax.tree.map(lambda leaf: leaf + 0.1, params)
  kept = prediction_alone(params, shapes_of(alone))
  assert jax.tree.map(jnp.shape, kept) == jax.tree.map(lambda leaf: leaf.shape, shapes_of(alone))
  whole, half = jax.jit(model.apply)(params, x, t, {}), jax.jit(alone.apply)(kept, x, t, {})
  np.testing.assert_allclose(half, whole[..., :3], atol=1e-5)


def reference_block(p, x, emb, resize):
  """An AdaGN block whose map after the first norm, and whose input, are resized (arXiv:2105.05233)."""

  def norm(layer, x):
    groups = layers.num_groups(x.shape[-1])
    g = x.reshape(*x.shape[:3], groups, -1)
    mean, var = g.mean((1, 2, 4), keepdims=True), g.var((1, 2, 4), keepdims=True)
    return ((g - mean) / np.sqrt(var + 1e-5)).reshape(x.shape) * layer['scale'] + layer['bias']

  def conv(layer, x):
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1:3]
    taps = [
      padded[:, a : a + height, b : b + width] @ layer['kernel'][a, b] for a in range(3) for b in range(3)
    ]
    return sum(taps) + layer['bias']

  def silu(x):
    return x / (1 + np.exp(-x))

  def resized(x):
    if resize == 'double':
      return x.repeat(2, 1).repeat(2, 2)
    return x.reshape(x.shape[0], x.shape[1] // 2, 2, x.shape[2] // 2, 2, -1).mean((2, 4))

  h = conv(p['conv_1'], resized(silu(norm(p['norm_1'], x))))
  scale, shift = np.split((silu(emb) @ p['emb']['kernel'] + p['emb']['bias'])[:, None, None], 2, axis=-1)
  return resized(x) + conv(p['conv_2'], silu(norm(p['norm_2'], h) * (1 + scale) + shift))


@pytest.mark.parametrize('resize', ['halve', 'double'])
def test_a_residual_block_halves_and_doubles(resize):
  options = BlockOptions(
    variant=VARIANTS['openai'], num_heads=1, dropout=0.0, deterministic=True, scale_shift_norm=True,
    remat=False, dtype=jnp.float32,
  )  # fmt: skip
  block, rng = ResidualBlock(features=16, options=options, resize=resize), np.random.default_rng(0)
  x, emb = rng.normal(size=(2, 4, 4, 16)), rng.normal(size=(2, 8))
  params = jax.eval_shape(block.init, jax.random.key(0), jnp.float32(x), jnp.float32(emb))['params']
  params = jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape), params)
  wanted = reference_block(params, x, emb, resize)
  got = jax.jit(block.apply)({'params': jax.tree.map(jnp.float32, params)}, jnp.float32(x), jnp.float32(emb))
  np.testing.assert_allclose(got, wanted, atol=2e-4)


@pytest.mark.slow
def test_heads_of_so_many_channels():
  """head_channels = 16 is num_heads = 1 at 16 channels and 2 at 32: the same function."""
  one = {**TINY, 'channel_multipliers': (2, 2), 'attention_resolutions': (4, 8)}
  by_number, by_channels = (build(8, {'variant': 'openai', **one, **more}) for more in
                            ({'num_heads': 2}, {'num_heads': 1, 'head_channels': 16}))  # fmt: skip
  assert shapes_of(by_number) == shapes_of(by_channels)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: jnp.float32(0.2 * rng.normal(size=leaf.shape)), shapes_of(by_number))
  x, t = jax.random.normal(jax.random.key(1), (1, 8, 8, 3)), jnp.array([0.3])
  first, second = (jax.jit(model.apply)(params, x, t, {}) for model in (by_number, by_channels))
  np.testing.assert_array_equal(first, second)
  three = build(8, {'variant': 'openai', **one, 'num_heads': 4})
  assert np.max(abs(jax.jit(three.apply)(params, x, t, {}) - first)) > 1e-4


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'head_channels': 12}, r'head_channels is 12, which does not divide the 32 channels'),
    ({'head_channels': -1}, r'head_channels is -1'),
    ({'channel_multipliers': (0.3, 2)}, r'channel_multipliers has 0.3, which makes 4.8 channels'),
  ],
)
def test_sizes_that_do_not_fit_are_refused(fields, message):
  with pytest.raises(UserError, match=message):
    build(8, {'variant': 'openai', **TINY, **fields})
