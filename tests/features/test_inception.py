"""Inception-v3 of Frechet distances against a second implementation: PyTorch functions over a table.

The expected numbers of random weights are in golden_inception.json, so that the main comparison needs no
PyTorch; `python tests/evaluation/test_inception.py` computes them anew.
"""

import functools
import json
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff.errors import UserError
from vaediff.features import inception
from vaediff.weights import tensors, torch_file

HERE = pathlib.Path(__file__).parent
GOLDEN = HERE / 'golden_inception.json'
TORCH = 'PyTorch is not installed: pip install torch'
TOLERANCE = 1e-4


# Every convolution: name, channels in and out, kernel rows and columns, stride, padding of rows and columns.
def table():
  rows = []

  def add(name, inputs, outputs, kernel=1, stride=1, padding=None):
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    rows.append((name, inputs, outputs, kernel, stride, (0, 0) if padding is None else padding))

  add('Conv2d_1a_3x3', 3, 32, 3, 2)
  add('Conv2d_2a_3x3', 32, 32, 3)
  add('Conv2d_2b_3x3', 32, 64, 3, 1, (1, 1))
  add('Conv2d_3b_1x1', 64, 80)
  add('Conv2d_4a_3x3', 80, 192, 3)
  for name, inputs, pool in [('5b', 192, 32), ('5c', 256, 64), ('5d', 288, 64)]:
    block = f'Mixed_{name}.branch'
    add(f'{block}1x1', inputs, 64)
    add(f'{block}5x5_1', inputs, 48)
    add(f'{block}5x5_2', 48, 64, 5, 1, (2, 2))
    add(f'{block}3x3dbl_1', inputs, 64)
    add(f'{block}3x3dbl_2', 64, 96, 3, 1, (1, 1))
    add(f'{block}3x3dbl_3', 96, 96, 3, 1, (1, 1))
    add(f'{block}_pool', inputs, pool)
  add('Mixed_6a.branch3x3', 288, 384, 3, 2)
  add('Mixed_6a.branch3x3dbl_1', 288, 64)
  add('Mixed_6a.branch3x3dbl_2', 64, 96, 3, 1, (1, 1))
  add('Mixed_6a.branch3x3dbl_3', 96, 96, 3, 2)
  row, column = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))
  for name, width in [('6b', 128), ('6c', 160), ('6d', 160), ('6e', 192)]:
    block = f'Mixed_{name}.branch'
    add(f'{block}1x1', 768, 192)
    add(f'{block}7x7_1', 768, width)
    add(f'{block}7x7_2', width, width, *row)
    add(f'{block}7x7_3', width, 192, *column)
    add(f'{block}7x7dbl_1', 768, width)
    add(f'{block}7x7dbl_2', width, width, *column)
    add(f'{block}7x7dbl_3', width, width, *row)
    add(f'{block}7x7dbl_4', width, width, *column)
    add(f'{block}7x7dbl_5', width, 192, *row)
    add(f'{block}_pool', 768, 192)
  add('Mixed_7a.branch3x3_1', 768, 192)
  add('Mixed_7a.branch3x3_2', 192, 320, 3, 2)
  add('Mixed_7a.branch7x7x3_1', 768, 192)
  add('Mixed_7a.branch7x7x3_2', 192, 192, *row)
  add('Mixed_7a.branch7x7x3_3', 192, 192, *column)
  add('Mixed_7a.branch7x7x3_4', 192, 192, 3, 2)
  for name, inputs in [('7b', 1280), ('7c', 2048)]:
    block = f'Mixed_{name}.branch'
    add(f'{block}1x1', inputs, 320)
    add(f'{block}3x3_1', inputs, 384)
    add(f'{block}3x3_2a', 384, 384, (1, 3), 1, (0, 1))
    add(f'{block}3x3_2b', 384, 384, (3, 1), 1, (1, 0))
    add(f'{block}3x3dbl_1', inputs, 448)
    add(f'{block}3x3dbl_2', 448, 384, 3, 1, (1, 1))
    add(f'{block}3x3dbl_3a', 384, 384, (1, 3), 1, (0, 1))
    add(f'{block}3x3dbl_3b', 384, 384, (3, 1), 1, (1, 0))
    add(f'{block}_pool', inputs, 192)
  return rows


# The order in which the branches of a block run and are joined; names in a tuple see the same map.
BRANCHES = {
  '5': (('1x1',), ('5x5_1', '5x5_2'), ('3x3dbl_1', '3x3dbl_2', '3x3dbl_3'), ('average', '_pool')),
  '6a': (('3x3',), ('3x3dbl_1', '3x3dbl_2', '3x3dbl_3'), ('halve',)),
  '6': (
    ('1x1',),
    ('7x7_1', '7x7_2', '7x7_3'),
    ('7x7dbl_1', '7x7dbl_2', '7x7dbl_3', '7x7dbl_4', '7x7dbl_5'),
    ('average', '_pool'),
  ),
  '7a': (('3x3_1', '3x3_2'), ('7x7x3_1', '7x7x3_2', '7x7x3_3', '7x7x3_4'), ('halve',)),
  '7b': (
    ('1x1',),
    ('3x3_1', ('3x3_2a', '3x3_2b')),
    ('3x3dbl_1', '3x3dbl_2', ('3x3dbl_3a', '3x3dbl_3b')),
    ('average', '_pool'),
  ),
  '7c': (
    ('1x1',),
    ('3x3_1', ('3x3_2a', '3x3_2b')),
    ('3x3dbl_1', '3x3dbl_2', ('3x3dbl_3a', '3x3dbl_3b')),
    ('maximum', '_pool'),
  ),
}


@functools.cache
def random_state():
  """Weights that let activations neither vanish nor explode, by the port's names."""
  random = np.random.default_rng(20151205)
  state = {}
  for name, inputs, outputs, kernel, _, _ in table():
    shape = (outputs, inputs, *kernel)
    state[f'{name}.conv.weight'] = random.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
    state[f'{name}.bn.weight'] = random.uniform(0.8, 1.2, outputs)
    state[f'{name}.bn.bias'] = random.normal(0.0, 0.1, outputs)
    state[f'{name}.bn.running_mean'] = random.normal(0.0, 0.1, outputs)
    state[f'{name}.bn.running_var'] = random.uniform(0.5, 1.5, outputs)
  state['fc.weight'] = random.standard_normal((1008, 2048)) / np.sqrt(2048)
  state['fc.bias'] = random.normal(0.0, 0.1, 1008)
  return {name: value.astype(np.float32) for name, value in state.items()}


@functools.cache
def random_images(count, height, width, channels=3):
  """Uint8 noise of several scales: none of the network's borders sees a constant."""
  random = np.random.default_rng([count, height, width, channels])
  coarse = random.uniform(-80, 80, (count, height // 4 + 1, width // 4 + 1, channels))
  coarse = coarse.repeat(4, axis=1).repeat(4, axis=2)[:, :height, :width]
  fine = random.uniform(0, 96, (count, height, width, channels))
  return np.clip(80 + coarse + fine, 0, 255).astype(np.uint8)


def small_images():
  """The last map has 3 x 2 pixels, the fewest for which its pool matters along both axes, unequally."""
  return random_images(2, 139, 107).astype(np.float32) / 127.5 - 1


def reference(image):
  """Features and logits by PyTorch, batch norm not merged; image: float32 [n, h, w, 3] in [-1, 1]."""
  import torch
  from torch.nn import functional as F

  state = {name: torch.from_numpy(value) for name, value in random_state().items()}
  options = {name: (stride, padding) for name, _, _, _, stride, padding in table()}
  pools = {
    'average': lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    'maximum': lambda x: F.max_pool2d(x, 3, 1, 1),
    'halve': lambda x: F.max_pool2d(x, 3, 2),
  }

  def conv(x, name):
    stride, padding = options[name]
    x = F.conv2d(x, state[f'{name}.conv.weight'], None, stride, padding)
    mean, variance = state[f'{name}.bn.running_mean'], state[f'{name}.bn.running_var']
    return F.relu(
      F.batch_norm(x, mean, variance, state[f'{name}.bn.weight'], state[f'{name}.bn.bias'], eps=1e-3)
    )

  def run(x, block, steps):
    for step in steps:
      if isinstance(step, tuple):
        x = torch.cat([run(x, block, [name]) for name in step], 1)
      else:
        x = pools[step](x) if step in pools else conv(x, f'{block}.branch{step}')
    return x

  with torch.no_grad():
    x = torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))
    for name in ['1a_3x3', '2a_3x3', '2b_3x3', 'halve', '3b_1x1', '4a_3x3', 'halve']:
      x = pools[name](x) if name in pools else conv(x, f'Conv2d_{name}')
    for name in ['5b', '5c', '5d', '6a', '6b', '6c', '6d', '6e', '7a', '7b', '7c']:
      branches = BRANCHES.get(name) or BRANCHES[name[0]]
      x = torch.cat([run(x, f'Mixed_{name}', steps) for steps in branches], 1)
    features = x.mean((2, 3))
    return features.numpy(), F.linear(features, state['fc.weight']).numpy()


def reference_pytorch(image):
  import torch
  from torch.nn import functional as F

  x = torch.from_numpy(image.transpose(0, 3, 1, 2).astype(np.float32) / 255)
  x = F.interpolate(x, (299, 299), mode='bilinear', align_corners=False)
  return (2 * x - 1).numpy().transpose(0, 2, 3, 1)


def reference_tf1(image):
  count, height, width, channels = image.shape
  output = np.zeros((count, 299, 299, channels))
  pixel = image.astype(np.float64)
  for i in range(299):
    y = i * height / 299
    top, bottom = int(y), min(int(y) + 1, height - 1)
    for j in range(299):
      x = j * width / 299
      left, right = int(x), min(int(x) + 1, width - 1)
      a = pixel[:, top, left] + (x - left) * (pixel[:, top, right] - pixel[:, top, left])
      b = pixel[:, bottom, left] + (x - left) * (pixel[:, bottom, right] - pixel[:, bottom, left])
      output[:, i, j] = a + (y - top) * (b - a)
  return ((output - 128) / 128).astype(np.float32)


REFERENCE_RESIZES = {'pytorch': reference_pytorch, 'tf1': reference_tf1}


def error(actual, expected):
  """The largest difference over the largest value."""
  return float(np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max())


@functools.cache
def params():
  return inception.convert(random_state())


@functools.cache
def forward():
  return jax.jit(lambda params, image: inception.InceptionV3().apply({'params': params}, image))


@functools.cache
def small_output():
  return jax.device_get(forward()(params(), jnp.asarray(small_images())))


@functools.cache
def large_output():
  """One image of 32 pixels by both resizes, in one batch: the network is compiled once."""
  image = jnp.asarray(random_images(1, 32, 32))
  batch = jnp.concatenate([resize(image) for resize in inception.RESIZES.values()])
  return jax.device_get(forward()(params(), batch))


def golden_numbers():
  """What the file holds, by PyTorch alone."""
  image = random_images(1, 32, 32)
  cases = {'small': small_images()} | {name: resize(image) for name, resize in REFERENCE_RESIZES.items()}
  numbers = {}
  for name, case in cases.items():
    features, logits = reference(case)
    numbers[name] = {
      'features': features[0, :8].tolist(),
      'mean_feature': float(np.abs(features).mean()),
      'logits': logits[0, :8].tolist(),
    }
  return numbers


def check_golden(name, features, logits):
  expected = json.loads(GOLDEN.read_text())[name]
  scale = expected['mean_feature']
  np.testing.assert_allclose(features[0, :8], expected['features'], rtol=TOLERANCE, atol=TOLERANCE * scale)
  np.testing.assert_allclose(logits[0, :8], expected['logits'], rtol=TOLERANCE, atol=TOLERANCE * scale)
  np.testing.assert_allclose(np.abs(features).mean(), scale, rtol=TOLERANCE)


def test_golden_numbers():
  check_golden('small', small_output()['features'], small_output()['logits'])
  for index, name in enumerate(inception.RESIZES):
    part = slice(index, index + 1)
    check_golden(name, large_output()['features'][part], large_output()['logits'][part])


def test_equals_pytorch_at_a_small_size():
  pytest.importorskip('torch', reason=TORCH)
  features, logits = reference(small_images())
  assert features.shape == (2, 2048) and logits.shape == (2, 1008)
  assert 0.05 < features.mean() < 20 and error(features[:1], features[1:]) > 0.01  # nothing vanished
  assert error(small_output()['features'], features) < TOLERANCE
  assert error(small_output()['logits'], logits) < TOLERANCE


def test_equals_pytorch_through_both_resizes():
  pytest.importorskip('torch', reason=TORCH)
  image = random_images(1, 32, 32)
  assert list(inception.RESIZES) == list(REFERENCE_RESIZES)
  features, logits = reference(np.concatenate([resize(image) for resize in REFERENCE_RESIZES.values()]))
  assert error(features[:1], features[1:]) > 0.01  # the two ways differ
  for index in range(2):
    assert error(large_output()['features'][index], features[index]) < TOLERANCE
    assert error(large_output()['logits'][index], logits[index]) < TOLERANCE


OTHERS = [(1, 32, 32), (1, 299, 299), (1, 1, 2)]


@pytest.mark.parametrize('shape', [(1, 32, 32), (2, 28, 41), (1, 299, 299), (1, 340, 500), (1, 1, 2)])
def test_resize_pytorch(shape):
  pytest.importorskip('torch', reason=TORCH)
  image = random_images(*shape)
  actual = inception.resize_pytorch(jnp.asarray(image))
  np.testing.assert_allclose(actual, reference_pytorch(image), atol=2e-5)


@pytest.mark.parametrize(
  'shape', [(2, 28, 41), (1, 340, 310), *(pytest.param(shape, marks=pytest.mark.slow) for shape in OTHERS)]
)
def test_resize_tf1(shape):
  image = random_images(*shape)
  np.testing.assert_allclose(inception.resize_tf1(jnp.asarray(image)), reference_tf1(image), atol=1e-4)


def test_resize_by_hand():
  """Two pixels, 0 and 254: where the first output pixels are taken from."""
  image = jnp.zeros((1, 1, 2, 1), jnp.uint8).at[0, 0, 1, 0].set(254)
  # Half-pixel centres: the input position is (j + 1/2) 2/299 - 1/2, below zero as far as j = 74.
  row = (np.asarray(inception.resize_pytorch(image))[0, 0, :, 0] + 1) * 127.5
  np.testing.assert_allclose(row[:75], 0, atol=1e-4)
  np.testing.assert_allclose(row[149], 127, atol=1e-3)
  np.testing.assert_allclose(row[224:], 254, atol=1e-4)
  # Corners: the input position is j 2/299, past the last pixel from j = 150 on.
  row = np.asarray(inception.resize_tf1(image))[0, 0, :, 0] * 128 + 128
  np.testing.assert_allclose(row[:3], [0, 254 * 2 / 299, 254 * 4 / 299], atol=1e-3)
  np.testing.assert_allclose(row[150:], 254, atol=1e-4)


@pytest.mark.parametrize('resize', inception.RESIZES.values())
def test_grey_equals_repeated_rgb(resize):
  grey = random_images(2, 28, 28, 1)
  actual, expected = resize(jnp.asarray(grey)), resize(jnp.asarray(grey.repeat(3, axis=-1)))
  assert actual.shape == (2, 299, 299, 3)
  np.testing.assert_array_equal(actual, expected)


def test_average_pool_leaves_the_border_out():
  x = np.arange(12, dtype=np.float32).reshape(1, 3, 4, 1)
  actual = np.asarray(inception._average(jnp.asarray(x)))[0, :, :, 0]
  assert actual[0, 0] == (0 + 1 + 4 + 5) / 4
  assert actual[0, 1] == (0 + 1 + 2 + 4 + 5 + 6) / 6
  assert actual[1, 1] == (0 + 1 + 2 + 4 + 5 + 6 + 8 + 9 + 10) / 9
  assert actual[2, 3] == (6 + 7 + 10 + 11) / 4
  np.testing.assert_array_equal(inception._average(jnp.ones((1, 5, 5, 2))), np.ones((1, 5, 5, 2)))


@pytest.mark.slow
def test_last_pool_is_a_maximum():
  x = -np.arange(1.0, 10.0, dtype=np.float32).reshape(1, 3, 3, 1)  # negative: padding must not count as 0
  expected = -np.float32([[1, 1, 2], [1, 1, 2], [4, 4, 5]])
  np.testing.assert_array_equal(inception._maximum(jnp.asarray(x))[0, :, :, 0], expected)
  image = jnp.asarray(small_images()[:1])
  averaged = jax.jit(inception.InceptionV3(last_pool=inception._average).apply)({'params': params()}, image)
  features, expected = np.asarray(averaged['features'])[0], small_output()['features'][0]
  np.testing.assert_allclose(features[:-192], expected[:-192], rtol=1e-4, atol=1e-4)
  assert error(features[-192:], expected[-192:]) > 0.1  # the branch of the pool, and nothing else


def test_tensors_of_the_port():
  state = random_state()
  assert len(state) == 94 * 5 + 2
  assert sum(value.size for value in state.values()) + 94 == 23_885_486  # as published, with the counters
  assert inception._torch_shapes() == {name: value.shape for name, value in state.items()}


def test_batch_norm_is_merged():
  state, name = random_state(), 'Mixed_6b.branch7x7_2'
  layer = params()['Mixed_6b']['branch7x7_2']
  deviation = np.sqrt(state[f'{name}.bn.running_var'][5].astype(np.float64) + 1e-3)
  gain = state[f'{name}.bn.weight'][5] / deviation
  assert layer['kernel'].shape == (1, 7, 128, 128)
  np.testing.assert_allclose(
    layer['kernel'][0, 2, 3, 5], state[f'{name}.conv.weight'][5, 3, 0, 2] * gain, rtol=1e-6
  )
  bias = state[f'{name}.bn.bias'][5] - gain * state[f'{name}.bn.running_mean'][5]
  np.testing.assert_allclose(layer['bias'][5], bias, rtol=1e-5)
  np.testing.assert_array_equal(params()['fc']['kernel'], state['fc.weight'].T)


def test_convert_checks_the_tensors():
  state = random_state()
  key = 'Mixed_7b.branch3x3_2a.bn.running_var'
  missing = {name: value for name, value in state.items() if name != key}
  with pytest.raises(UserError, match=rf"lack '{key}', of shape \(384,\)"):
    inception.convert(missing)
  with pytest.raises(UserError, match="hold 'AuxLogits.conv0.conv.weight', which the network does not have"):
    inception.convert(state | {'AuxLogits.conv0.conv.weight': np.zeros((128, 768, 1, 1), np.float32)})
  with pytest.raises(UserError, match=r"'fc.weight' has shape \(1000, 2048\), not \(1008, 2048\)"):
    inception.convert(state | {'fc.weight': np.zeros((1000, 2048), np.float32)})
  with pytest.raises(UserError, match=r"'Mixed_6b.branch7x7_2.conv.weight' has shape \(128, 128, 7, 1\)"):
    name = 'Mixed_6b.branch7x7_2.conv.weight'
    inception.convert(state | {name: state[name].swapaxes(2, 3)})


def same_params(first, second):
  assert jax.tree.structure(first) == jax.tree.structure(second)
  jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.slow
def test_files_of_both_formats_are_the_same(tmp_path):
  state = random_state()
  counters = {f'{name}.bn.num_batches_tracked': np.array(7, np.int64) for name, *_ in table()}
  write_state = runpy.run_path(str(HERE.parent / 'weights' / 'test_torch_file.py'))['write_state']
  write_state(tmp_path / 'net.pth', state | counters)
  inception.convert_file(tmp_path / 'net.pth', tmp_path / 'net.safetensors')
  stored, metadata = tensors.load(tmp_path / 'net.safetensors')
  assert sorted(stored) == sorted(state)
  assert metadata == {'source_sha256': torch_file.sha256_of(tmp_path / 'net.pth'), 'source': 'net.pth'}

  first = inception.load(str(tmp_path / 'net.pth'), 'pytorch')
  second = inception.load(str(tmp_path / 'net.safetensors'), 'tf1')
  assert first.fingerprint == second.fingerprint == tensors.fingerprint(state)
  same_params(first.params, second.params)
  same_params(first.params, params())
  assert (first.name, first.num_features) == ('inception', 2048)
  assert first.resize == 'pytorch (bilinear, half-pixel centres, to 299)'
  assert second.resize == 'tf1 (bilinear, pixel corners, to 299)'
  image = jax.ShapeDtypeStruct((3, 28, 28, 1), jnp.uint8)
  for extractor in (first, second):
    shapes = jax.eval_shape(extractor.apply, extractor.params, image)
    assert {name: value.shape for name, value in shapes.items()} == {
      'features': (3, 2048),
      'logits': (3, 1008),
    }


def test_apply_resizes_and_runs(tmp_path, monkeypatch):
  """The function of the extractor, with a stand-in for the network that shows what reaches it."""
  tensors.save(tmp_path / 'net.safetensors', random_state(), {})
  image = jnp.asarray(random_images(1, 32, 32))

  class Shows:
    init = staticmethod(inception.InceptionV3().init)  # its shapes are asked for once in a process

    def apply(self, variables, image):
      return {'features': image, 'logits': variables['params']['fc']['kernel']}

  monkeypatch.setattr(inception, 'InceptionV3', Shows)
  for name, resize in inception.RESIZES.items():
    extractor = inception.load(str(tmp_path / 'net.safetensors'), name)
    output = extractor.apply(extractor.params, image)
    np.testing.assert_array_equal(output['features'], resize(image))
    np.testing.assert_array_equal(output['logits'], random_state()['fc.weight'].T)


def test_load_errors(tmp_path):
  with pytest.raises(
    UserError, match='config.evaluate.inception_weights .*pt_inception-2015-12-05-6726825d.pth'
  ):
    inception.load('', 'pytorch')
  with pytest.raises(UserError, match=r"'clean': choose one of \('pytorch', 'tf1'\)"):
    inception.load('', 'clean')
  with pytest.raises(UserError, match='net.npz: the file must end in .pth or .safetensors'):
    inception.load(str(tmp_path / 'net.npz'), 'tf1')
  with pytest.raises(UserError, match='net.safetensors does not exist'):
    inception.load(str(tmp_path / 'net.safetensors'), 'tf1')
  with pytest.raises(UserError, match='net.pth does not exist'):
    inception.load(str(tmp_path / 'net.pth'), 'tf1')
  published = tmp_path / inception.PUBLISHED
  published.write_bytes(b'not it')
  with pytest.raises(UserError, match='should begin with 6726825d'):
    inception.load(str(published), 'tf1')
  with pytest.raises(UserError, match='should begin with 6726825d'):
    inception.convert_file(published, tmp_path / 'net.safetensors')
  with pytest.raises(UserError, match='must end in .safetensors'):
    inception.convert_file(published, tmp_path / 'net.npz')
  assert not (tmp_path / 'net.safetensors').exists()


def test_small_images_are_refused():
  with pytest.raises(UserError, match='75 pixels or more, not 80x74'):
    forward()(params(), jnp.zeros((1, 80, 74, 3)))


if __name__ == '__main__':
  GOLDEN.write_text(json.dumps(golden_numbers(), indent=2) + '\n')
