"""The network of a control: its sizes, what it adds at first, how it is moved to another base."""

import importlib
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff import experiments
from vaediff.errors import UserError
from vaediff.models import controlnet, unet_sizes
from vaediff.models.ports import Port
from vaediff.models.unet import UNet, with_residuals
from vaediff.modes import describe
from vaediff.run import students

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

FIELDS = {
  'variant': 'openai', 'image_size': 8, 'image_channels': 1, 'channels': 8, 'channel_multipliers': (1, 2),
  'num_res_blocks': 1, 'attention_resolutions': (4,), 'num_heads': 2, 'dropout': 0.0,
  'scale_shift_norm': False, 'coordinates': True, 'remat': False, 'dtype': 'float32',
}  # fmt: skip


def shapes_of(model):
  return jax.eval_shape(model.init, jax.random.key(0))


def count(tree):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.slow
def test_the_published_control_of_stable_diffusion_has_its_parameters(capsys):
  config = importlib.import_module('configs.captions256').get_config('stable_diffusion_control')
  config = students.resolve(config)
  assert config.stages == ('autoencoder', 'refiner', 'control')
  experiment = experiments.build(config, 'control')
  shapes = shapes_of(experiment.networks['control'])
  zeros = [part for name, part in shapes.items() if name.startswith('zero_')]
  assert count(shapes) == 361_279_120 and len(zeros) == 13
  assert (count(zeros), count(shapes['hint'])) == (11_479_680, 1_086_480)
  assert not describe.towers(shapes['unet'])  # the words are the base's
  assert experiment.networks['control'].module.hint_strides == (1, 1, 2, 1, 2, 1, 2)
  (row,) = [row for row in describe.describe(config, ('control',)) if row['network'] == 'control']
  assert row['parameters'] == 361_279_120 and '361,279,120' in capsys.readouterr().out


def test_maps_and_their_sides():
  unet = UNet(**FIELDS)
  assert unet_sizes.map_sides(unet) == (8, 8, 4, 4, 4)
  x, t = jnp.zeros((1, 8, 8, 1)), jnp.ones(1)
  params = jax.eval_shape(unet.init, jax.random.key(0), x, t)
  added = jnp.zeros((1, 8, 8, 8))
  run = lambda p: unet.apply(p, x, t, {}, {}, {}, added, deterministic=True, method='maps')
  assert tuple(each.shape[1] for each in jax.eval_shape(run, params)) == (8, 8, 4, 4, 4)
  three = UNet(**{**FIELDS, 'channel_multipliers': (1, 2, 2), 'num_res_blocks': 2})
  assert unet_sizes.map_sides(three) == (8, 8, 8, 4, 4, 4, 2, 2, 2, 2)


def test_residuals_join_their_maps():
  maps = [jnp.ones(2), 2 * jnp.ones(2)]
  assert with_residuals(maps, None) is maps
  first, second = with_residuals(maps, [None, 3 * jnp.ones(2)])
  assert first is maps[0]
  np.testing.assert_array_equal(second, [5, 5])
  with pytest.raises(ValueError, match='has 2 maps that residuals are added to, got 1'):
    with_residuals(maps, [None])


def test_the_hint_becomes_as_small_as_the_maps():
  assert controlnet.strides_of(1, 3) == (1, 1, 1)
  assert controlnet.strides_of(4, 3) == (1, 2, 2)
  assert controlnet.strides_of(2, 3, (2, 1, 1)) == (2, 1, 1)
  module = controlnet.HintEncoder((4, 6), (2, 2), 8, jnp.float32)
  x = jax.random.uniform(jax.random.key(0), (2, 16, 16, 3))
  output, params = module.init_with_output(jax.random.key(1), x)
  assert output.shape == (2, 4, 4, 8) and not output.any()
  assert params['params']['conv_0']['kernel'].shape == (3, 3, 3, 4)


@pytest.mark.parametrize(
  ('factor', 'layers', 'chosen', 'message'),
  [
    (8, 2, (), r'hint.channels has 2 convolutions, which cannot halve .* 1/8 .* at least 3'),
    (3, 3, (), r'cannot halve a control image to 1/3'),
    (4, 3, (1, 1, 2), r'hint.strides is \(1, 1, 2\): .* as many .* 3, and their product must be 4'),
    (2, 3, (1, 2), r'hint.strides is \(1, 2\)'),
  ],
)
def test_strides_that_do_not_fit_are_refused(factor, layers, chosen, message):
  with pytest.raises(UserError, match=message):
    controlnet.strides_of(factor, layers, chosen)


@pytest.mark.slow
def test_a_copy_has_all_but_the_way_up_and_moves_with_its_base():
  label = Port(enters='vector', shape=(), classes=3, droppable=True)
  unet = UNet(**FIELDS, ports=(('label', label),))
  inputs = jnp.zeros((1, 8, 8, 1)), jnp.ones(1), {'label': jnp.zeros(1, jnp.int32)}
  base = jax.eval_shape(unet.init, jax.random.key(0), *inputs)['params']
  module = controlnet.ControlNet(unet=unet, hint_channels=(4,), hint_strides=(1,))
  control = jax.eval_shape(module.init, jax.random.key(0), *inputs, jnp.zeros((1, 8, 8, 1)))['params']
  assert set(control['unet']) == {name for name in base if not controlnet.is_up(name)}
  assert control['unet'] == {name: base[name] for name in control['unet']}
  assert set(base) - set(control['unet']) == {'up_0', 'up_1', 'norm_out', 'conv_out'}
  assert {'unet', 'hint', *(f'zero_{i}' for i in range(5))} == set(control)

  def filled(tree, value):
    return jax.tree.map(lambda leaf: jnp.full(leaf.shape, value), tree)

  begun = controlnet.copied(filled(control, 1.0), filled(base, 5.0))
  assert {float(leaf.min()) for leaf in jax.tree.leaves(begun['unet'])} == {5.0}
  assert {float(leaf.max()) for leaf in jax.tree.leaves(begun['hint'])} == {1.0}
  moved = controlnet.moved(filled(control, 1.0), filled(base, 5.0), filled(base, 5.25))
  assert {float(leaf.max()) for leaf in jax.tree.leaves(moved['unet'])} == {1.25}
  rest = {name: part for name, part in moved.items() if name != 'unet'}
  assert {float(leaf.max()) for leaf in jax.tree.leaves(rest)} == {1.0}
