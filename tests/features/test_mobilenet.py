"""MobileNetV2 against PyTorch: directly, and through figures that PyTorch computed.

`python tests/evaluation/test_mobilenet.py` writes those figures anew; it needs PyTorch and prepared weights.
"""

import json
import pathlib

import jax
import numpy as np
import pytest
from sklearn.datasets import load_sample_image

from vaediff.errors import UserError
from vaediff.features import mobilenet
from vaediff.weights import published, tensors

GOLDEN = pathlib.Path(__file__).with_name('golden_mobilenet.json')
CHANNELS = (
  *(16, 24, 24, 32, 32, 32, 64, 64, 64, 64),
  *(96, 96, 96, 160, 160, 160, 320),
)
STRIDES = (1, 2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1)


def convolutions():
  """(name of the convolution, of its norm, shape, stride, groups, activation) in order, block by block."""
  yield [('features.0.0', 'features.0.1', (32, 3, 3, 3), 2, 1, True)]
  before = 32
  for index, (after, stride) in enumerate(zip(CHANNELS, STRIDES, strict=True), 1):
    name = f'features.{index}.conv'
    wide = before if index == 1 else 6 * before
    block = [
      (f'{name}.0.0', f'{name}.0.1', (wide, before, 1, 1), 1, 1, True),
      (f'{name}.1.0', f'{name}.1.1', (wide, 1, 3, 3), stride, wide, True),
      (f'{name}.2', f'{name}.3', (after, wide, 1, 1), 1, 1, False),
    ]
    if index == 1:
      block = [
        (f'{name}.0.0', f'{name}.0.1', (wide, 1, 3, 3), stride, wide, True),
        (f'{name}.1', f'{name}.2', (after, wide, 1, 1), 1, 1, False),
      ]
    yield block
    before = after
  yield [('features.18.0', 'features.18.1', (1280, 320, 1, 1), 1, 1, True)]


def random_state():
  random = np.random.RandomState(0)
  state = {}
  for block in convolutions():
    for conv, norm, shape, _, _, active in block:
      fan_in = np.prod(shape[1:])
      state[f'{conv}.weight'] = random.standard_normal(shape) * np.sqrt((2 if active else 1) / fan_in)
      state[f'{norm}.weight'] = random.uniform(0.5, 1.5, shape[0])
      state[f'{norm}.bias'] = 0.1 * random.standard_normal(shape[0])
      state[f'{norm}.running_mean'] = 0.1 * random.standard_normal(shape[0])
      state[f'{norm}.running_var'] = random.uniform(0.5, 1.5, shape[0])
  state['classifier.1.weight'] = random.standard_normal((1000, 1280)) / np.sqrt(1280)
  state['classifier.1.bias'] = 0.1 * random.standard_normal(1000)
  return {key: value.astype(np.float32) for key, value in state.items()}


def images(channels=3, size=32):
  """Smooth colours with an edge, and noise; not square, and upsampled to an odd width."""
  y, x = np.mgrid[:size, : size + 3]
  smooth = np.stack([7 * x, 5 * y, x * y // 4], -1) % 256
  smooth[size // 4 : size // 2, size // 3 : size // 2] = (200, 40, 90)
  noise = np.random.RandomState(3).randint(256, size=smooth.shape)
  return np.stack([smooth, noise]).astype(np.uint8)[..., :channels]


def flower():
  """A photograph of a dahlia, 107 x 160."""
  return np.ascontiguousarray(load_sample_image('flower.jpg')[::4, ::4])[None]


def torch_apply(state, image):
  import torch
  import torch.nn.functional as F

  tensors = {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in state.items()}
  x = torch.from_numpy(image).permute(0, 3, 1, 2).float()
  height, width = x.shape[2:]
  if min(height, width) < 96:
    factor = 96 / min(height, width)
    x = F.interpolate(x, size=(round(height * factor), round(width * factor)), mode='bilinear')
  x = x.expand(-1, 3, -1, -1) / 255
  mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
  std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
  x = (x - mean) / std
  with torch.no_grad():
    for block in convolutions():
      shortcut = x
      for conv, norm, shape, stride, groups, active in block:
        padding = shape[2] // 2
        x = F.conv2d(x, tensors[f'{conv}.weight'], stride=stride, padding=padding, groups=groups)
        parts = [tensors[f'{norm}.{key}'] for key in ('running_mean', 'running_var', 'weight', 'bias')]
        x = F.batch_norm(x, *parts, eps=1e-5)
        x = F.relu6(x) if active else x
      if len(block) == 3 and x.shape == shortcut.shape:
        x = x + shortcut
    features = x.mean((2, 3))
    logits = F.linear(features, tensors['classifier.1.weight'], tensors['classifier.1.bias'])
  return {'features': features.numpy(), 'logits': logits.numpy()}


def relative(actual, expected):
  expected = np.asarray(expected)
  return np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()


def published_state():
  folder = tensors.folder()
  if not (folder / 'mobilenetv2.safetensors').is_file():
    pytest.skip(f'weights of mobilenetv2 are not in {folder}: run --mode=prepare')
  return published.require('mobilenetv2', folder)[0]


def figures(result):
  """What is committed: the first eight features and logits of each image."""
  return {key: np.asarray(value)[:, :8].tolist() for key, value in result.items()}


def run(extractor, image):
  return jax.device_get(jax.jit(extractor.apply)(extractor.params, image))


@pytest.fixture(scope='module')
def extractor(tmp_path_factory):
  """The network with random weights."""
  folder = tmp_path_factory.mktemp('weights')
  tensors.save(folder / 'mobilenetv2.safetensors', random_state(), {})
  return mobilenet.load(folder)


def test_outputs_equal_golden(extractor):
  golden = json.loads(GOLDEN.read_text())['random']
  result = run(extractor, images())
  assert (extractor.name, extractor.num_features) == ('mobilenetv2', 1280)
  assert '96' in extractor.resize and len(extractor.fingerprint) == 64
  assert result['features'].shape == (2, 1280) and result['logits'].shape == (2, 1000)
  for key, value in figures(result).items():
    assert relative(value, golden[key]) < 1e-4


@pytest.mark.parametrize('channels, size', [(3, 32), (1, 32), (3, 97)])
def test_outputs_equal_torch(extractor, channels, size):
  pytest.importorskip('torch', reason='PyTorch is not installed: pip install torch')
  image = images(channels, size)
  actual, expected = run(extractor, image), torch_apply(random_state(), image)
  assert relative(actual['features'], expected['features']) < 1e-4
  assert relative(actual['logits'], expected['logits']) < 1e-4


def test_published_outputs_equal_golden():
  published_state()
  golden = json.loads(GOLDEN.read_text())['published']
  extractor = mobilenet.load(tensors.folder())
  for key, value in figures(run(extractor, images())).items():
    assert relative(value, golden[key]) < 1e-4
  assert run(extractor, flower())['logits'].argmax() == golden['flower']


def test_published_outputs_equal_torch():
  state = published_state()
  pytest.importorskip('torch', reason='PyTorch is not installed: pip install torch')
  extractor = mobilenet.load(tensors.folder())
  actual, expected = run(extractor, images()), torch_apply(state, images())
  assert relative(actual['features'], expected['features']) < 1e-4
  assert relative(actual['logits'], expected['logits']) < 1e-4


def test_convert_ignores_counters():
  state = random_state()
  with_counters = state | {'features.0.1.num_batches_tracked': np.asarray(7)}
  assert mobilenet.convert(with_counters).keys() == mobilenet.convert(state).keys()


def test_convert_refuses_missing_tensor():
  state = random_state()
  del state['features.4.conv.1.1.running_var']
  with pytest.raises(UserError, match=r"'features.4.conv.1.1.running_var' is missing; 262 are needed"):
    mobilenet.convert(state)


def test_convert_refuses_other_shape():
  state = random_state()
  state['classifier.1.bias'] = state['classifier.1.bias'][:10]
  with pytest.raises(UserError, match=r"'classifier.1.bias' is float32 \(10,\)"):
    mobilenet.convert(state)


def test_convert_refuses_unknown_tensor():
  with pytest.raises(UserError, match="'extra' is not one of its 262"):
    mobilenet.convert(random_state() | {'extra': np.zeros(3, np.float32)})


def test_unprepared_weights_are_refused(tmp_path):
  with pytest.raises(UserError, match='run --mode=prepare'):
    mobilenet.load(tmp_path)


def golden():
  """The committed figures, all by PyTorch."""
  return {
    'random': figures(torch_apply(random_state(), images())),
    'published': {
      **figures(torch_apply(published_state(), images())),
      'flower': int(torch_apply(published_state(), flower())['logits'].argmax()),
    },
  }


if __name__ == '__main__':
  GOLDEN.write_text(json.dumps(golden(), indent=1) + '\n')
