"""VGG16, AlexNet and LPIPS against PyTorch: directly, and through figures that PyTorch computed.

`python tests/evaluation/test_vgg.py` writes those figures anew; it needs PyTorch and prepared weights.
"""

import json
import pathlib

import jax
import numpy as np
import pytest

from vaediff.errors import UserError
from vaediff.features import vgg
from vaediff.weights import published, tensors

GOLDEN = pathlib.Path(__file__).with_name('golden_vgg.json')
VGG16 = {
  **{'conv1_1': (3, 3, 64), 'conv1_2': (3, 64, 64)},
  **{'conv2_1': (3, 64, 128), 'conv2_2': (3, 128, 128)},
  **{'conv3_1': (3, 128, 256), 'conv3_2': (3, 256, 256), 'conv3_3': (3, 256, 256)},
  **{'conv4_1': (3, 256, 512), 'conv4_2': (3, 512, 512), 'conv4_3': (3, 512, 512)},
  **{'conv5_1': (3, 512, 512), 'conv5_2': (3, 512, 512), 'conv5_3': (3, 512, 512)},
}
ALEXNET = {
  **{'conv1': (11, 3, 64), 'conv2': (5, 64, 192), 'conv3': (3, 192, 384)},
  **{'conv4': (3, 384, 256), 'conv5': (3, 256, 256)},
}
LAYERS = {'vgg16': VGG16, 'alexnet': ALEXNET}
TAPS = {
  'vgg16': ('conv1_2', 'conv2_2', 'conv3_3', 'conv4_3', 'conv5_3'),
  'alexnet': tuple(ALEXNET),
}
NETWORKS = tuple(LAYERS)


def random_state(network):
  random = np.random.RandomState(0)
  state = {}
  for layer, (size, before, after) in LAYERS[network].items():
    kernel = random.standard_normal((size, size, before, after)) * np.sqrt(2 / (size * size * before))
    state[f'{layer}.kernel'] = kernel.astype(np.float32)
    state[f'{layer}.bias'] = (0.1 * random.standard_normal(after)).astype(np.float32)
  for index, layer in enumerate(TAPS[network], 1):
    state[f'lin{index}.weight'] = random.uniform(size=LAYERS[network][layer][2]).astype(np.float32)
  return state


def photo(size=48):
  """Smooth colours, an edge and some grain, from integers only."""
  y, x = np.mgrid[:size, : size + 8]
  base = np.stack([3 * x, 2 * y + x, x * y // 20], -1) % 256
  base[size // 4 : size // 2, size // 3 : size // 2] = (200, 40, 90)
  grain = np.random.RandomState(3).randint(-8, 9, base.shape)
  return np.clip(base + grain, 0, 255).astype(np.uint8)[None]


def noisy(image, sigma):
  noise = np.random.RandomState(4).standard_normal(image.shape)
  return np.clip(np.round(image + 255 * sigma * noise), 0, 255).astype(np.uint8)


def pair(channels=3):
  a = np.concatenate([photo(), noisy(photo(), 0.3)])[..., :channels]
  return a, noisy(a, 0.1)


def torch_maps(network, state, image):
  import torch
  import torch.nn.functional as F

  x = torch.from_numpy(image).permute(0, 3, 1, 2).float()
  height, width = x.shape[2:]
  if min(height, width) < 64:
    factor = 64 / min(height, width)
    x = F.interpolate(x, size=(round(height * factor), round(width * factor)), mode='bilinear')
  x = x.expand(-1, 3, -1, -1) / 127.5 - 1
  shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]  # as LPIPS states its scaling layer
  scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
  x = (x - shift) / scale
  maps = []
  for layer, (size, _, _) in LAYERS[network].items():
    pooled_before = network == 'vgg16' and layer[4] > '1' and layer.endswith('_1')
    if pooled_before:
      x = F.max_pool2d(x, 2)
    if layer in ('conv2', 'conv3'):
      x = F.max_pool2d(x, 3, stride=2)
    kernel = torch.from_numpy(state[f'{layer}.kernel']).permute(3, 2, 0, 1)
    first = layer == 'conv1'
    x = F.conv2d(
      x, kernel, torch.from_numpy(state[f'{layer}.bias']), stride=4 if first else 1,
      padding=2 if first else size // 2,
    )  # fmt: skip
    x = F.relu(x)
    if layer in TAPS[network]:
      maps.append(x)
  return maps


def torch_features(state, image):
  import torch
  import torch.nn.functional as F

  with torch.no_grad():
    return F.max_pool2d(torch_maps('vgg16', state, image)[-1], 2).mean((2, 3)).numpy()


def torch_lpips(network, state, a, b):
  import torch

  with torch.no_grad():
    total = 0
    for index, (x, y) in enumerate(
      zip(torch_maps(network, state, a), torch_maps(network, state, b), strict=True), 1
    ):
      x = x / (x.norm(dim=1, keepdim=True) + 1e-10)
      y = y / (y.norm(dim=1, keepdim=True) + 1e-10)
      lin = torch.from_numpy(state[f'lin{index}.weight'])[None, :, None, None]
      total = total + ((x - y) ** 2 * lin).sum(1).mean((1, 2))
    return total.numpy()


def relative(actual, expected):
  expected = np.asarray(expected)
  return np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()


def golden_features(extractor):
  return np.asarray(jax.jit(extractor.apply)(extractor.params, pair()[0])['features'])[:, ::16]


def published_state(network):
  folder = tensors.folder()
  if not (folder / f'lpips_{network}.safetensors').is_file():
    pytest.skip(f'weights of lpips_{network} are not in {folder}: run --mode=prepare')
  return published.require(f'lpips_{network}', folder)[0]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('weights')
  for network in NETWORKS:
    tensors.save(folder / f'lpips_{network}.safetensors', random_state(network), {})
  return folder


@pytest.fixture(scope='module', params=NETWORKS)
def lpips(request, folder):
  """The distance over random weights, compiled."""
  loaded = vgg.load_lpips(request.param, folder)
  compiled = jax.jit(loaded.apply)
  return lambda a, b: np.asarray(compiled(loaded.params, a, b))


def test_features_equal_golden(folder):
  extractor = vgg.load(folder)
  assert (extractor.name, extractor.num_features) == ('vgg16', 512)
  assert '64' in extractor.resize and len(extractor.fingerprint) == 64
  assert relative(golden_features(extractor), json.loads(GOLDEN.read_text())['random']['features']) < 1e-4


@pytest.mark.parametrize('channels', [1, 3])
def test_features_equal_torch(folder, channels):
  pytest.importorskip('torch', reason='PyTorch is not installed: pip install torch')
  extractor = vgg.load(folder)
  image = pair(channels)[0]
  actual = jax.jit(extractor.apply)(extractor.params, image)['features']
  assert actual.shape == (2, 512)
  assert relative(actual, torch_features(random_state('vgg16'), image)) < 1e-4


@pytest.mark.parametrize('network', NETWORKS)
def test_lpips_equals_golden(folder, network):
  loaded = vgg.load_lpips(network, folder)
  assert loaded.name == f'lpips_{network}' and '64' in loaded.resize and len(loaded.fingerprint) == 64
  actual = jax.jit(loaded.apply)(loaded.params, *pair())
  assert actual.shape == (2,) and actual.dtype == np.float32
  np.testing.assert_allclose(actual, json.loads(GOLDEN.read_text())['random'][loaded.name], rtol=1e-4)


@pytest.mark.parametrize('network', NETWORKS)
@pytest.mark.parametrize('size', [33, 70])
def test_lpips_equals_torch(folder, network, size):
  pytest.importorskip('torch', reason='PyTorch is not installed: pip install torch')
  loaded = vgg.load_lpips(network, folder)
  a = photo(size)
  b = noisy(a, 0.1)
  actual = jax.jit(loaded.apply)(loaded.params, a, b)
  np.testing.assert_allclose(actual, torch_lpips(network, random_state(network), a, b), rtol=1e-4)


def test_lpips_of_grey_images_equals_torch(folder):
  pytest.importorskip('torch', reason='PyTorch is not installed: pip install torch')
  loaded = vgg.load_lpips('alexnet', folder)
  a, b = pair(channels=1)
  actual = jax.jit(loaded.apply)(loaded.params, a, b)
  np.testing.assert_allclose(actual, torch_lpips('alexnet', random_state('alexnet'), a, b), rtol=1e-4)


def test_lpips_of_equal_images_is_zero(lpips):
  a, _ = pair()
  np.testing.assert_array_equal(lpips(a, a), np.zeros(2))


def test_lpips_is_symmetric(lpips):
  a, b = pair()
  np.testing.assert_allclose(lpips(a, b), lpips(b, a), rtol=1e-6)


def test_lpips_grows_with_noise(lpips):
  a, _ = pair()
  distances = [lpips(a, noisy(a, sigma)) for sigma in (0, 0.05, 0.2, 0.5)]
  assert (np.diff(distances, axis=0) > 0).all()


def test_black_images_give_finite_distances(lpips):
  black = np.zeros_like(pair()[0])
  assert np.isfinite(lpips(black, pair()[0])).all()


@pytest.mark.parametrize('network', NETWORKS)
def test_published_lpips_equals_golden(network):
  published_state(network)
  loaded = vgg.load_lpips(network, tensors.folder())
  golden = json.loads(GOLDEN.read_text())['published'][loaded.name]
  np.testing.assert_allclose(jax.jit(loaded.apply)(loaded.params, *pair()), golden, rtol=1e-4)


@pytest.mark.parametrize('network', NETWORKS)
def test_published_lpips_equals_torch(network):
  state = published_state(network)
  pytest.importorskip('torch', reason='PyTorch is not installed: pip install torch')
  loaded = vgg.load_lpips(network, tensors.folder())
  actual = jax.jit(loaded.apply)(loaded.params, *pair())
  np.testing.assert_allclose(actual, torch_lpips(network, state, *pair()), rtol=1e-4)


def test_published_features_equal_golden_and_torch():
  state = published_state('vgg16')
  extractor = vgg.load(tensors.folder())
  actual = golden_features(extractor)
  assert relative(actual, json.loads(GOLDEN.read_text())['published']['features']) < 1e-4
  pytest.importorskip('torch', reason='PyTorch is not installed: pip install torch')
  assert relative(actual, torch_features(state, pair()[0])[:, ::16]) < 1e-4


def test_convert_refuses_missing_tensor():
  state = random_state('alexnet')
  del state['conv3.bias']
  with pytest.raises(UserError, match=r"'conv3.bias' is missing"):
    vgg.convert(state, 'alexnet')


def test_convert_refuses_other_shape():
  state = random_state('alexnet')
  state['lin2.weight'] = state['lin2.weight'][:-1]
  with pytest.raises(UserError, match=r"'lin2.weight' is float32 \(191,\)"):
    vgg.convert(state, 'alexnet')


def test_convert_refuses_unknown_tensor():
  with pytest.raises(UserError, match=r"'fc6.kernel' is not one of its 15"):
    vgg.convert(random_state('alexnet') | {'fc6.kernel': np.zeros((2, 2), np.float32)}, 'alexnet')


def test_unknown_network_is_refused(folder):
  with pytest.raises(UserError, match='squeezenet'):
    vgg.load_lpips('squeezenet', folder)


def test_unprepared_weights_are_refused(tmp_path):
  with pytest.raises(UserError, match='run --mode=prepare'):
    vgg.load(tmp_path)


def golden():
  """The committed figures, all by PyTorch."""
  figures = {}
  for kind, state_of in (('random', random_state), ('published', published_state)):
    states = {network: state_of(network) for network in NETWORKS}
    figures[kind] = {
      'features': torch_features(states['vgg16'], pair()[0])[:, ::16].tolist(),
      **{f'lpips_{name}': torch_lpips(name, state, *pair()).tolist() for name, state in states.items()},
    }
  return figures


if __name__ == '__main__':
  GOLDEN.write_text(json.dumps(golden(), indent=1) + '\n')
