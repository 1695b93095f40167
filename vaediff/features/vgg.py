"""VGG16 and AlexNet up to their last convolution, and LPIPS on top of them.

LPIPS is Zhang et al. 2018 (arXiv:1801.03924), eq. 1, with their linear weights of version 0.1:
d(a, b) = sum over five layers l of the spatial mean of w_l . (f_l(a) - f_l(b))^2, where f_l is the
feature map with every pixel's channel vector scaled to unit length.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float
from numpy.typing import NDArray

from vaediff.errors import UserError
from vaediff.features.extractor import Extractor, imagenet_input
from vaediff.types import Image, ImageBytes, Params
from vaediff.weights import published, tensors

LEAST = 64
RESIZE = f'bilinear (half-pixel centres) to at least {LEAST}'
EPSILON = 1e-10
NUM_FEATURES = 512


class Vgg16(nn.Module):
  """The 13 convolutions of VGG16 (arXiv:1409.1556, column D)."""

  @nn.compact
  def __call__(self, x: Float[Array, 'n h w 3']) -> list[jax.Array]:
    """Returns the maps after the last ReLU of each of the five stages, then the fifth map max-pooled."""
    taps = []
    for stage, (channels, depth) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)], 1):
      for index in range(1, depth + 1):
        x = nn.relu(conv(channels, 3, 1, 1, f'conv{stage}_{index}')(x))
      taps.append(x)
      x = nn.max_pool(x, (2, 2), strides=(2, 2))
    return [*taps, x]


class AlexNet(nn.Module):
  """The five convolutions of the one-tower AlexNet (arXiv:1404.5997)."""

  @nn.compact
  def __call__(self, x: Float[Array, 'n h w 3']) -> list[jax.Array]:
    """Returns the maps after each of the five ReLUs."""
    taps = [nn.relu(conv(64, 11, 4, 2, 'conv1')(x))]
    for channels, size, pool, name in (
      (192, 5, True, 'conv2'),
      (384, 3, True, 'conv3'),
      (256, 3, False, 'conv4'),
      (256, 3, False, 'conv5'),
    ):
      x = nn.max_pool(taps[-1], (3, 3), strides=(2, 2)) if pool else taps[-1]
      taps.append(nn.relu(conv(channels, size, 1, size // 2, name)(x)))
    return taps


def conv(channels: int, size: int, stride: int, padding: int, name: str) -> nn.Conv:
  """Returns a square convolution in full float32, on accelerators as well: distances are compared."""
  return nn.Conv(
    channels,
    (size, size),
    strides=(stride, stride),
    padding=padding,
    precision=jax.lax.Precision.HIGHEST,
    name=name,
  )


NETWORKS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
  'vgg16': (Vgg16(), (64, 128, 256, 512, 512)),
  'alexnet': (AlexNet(), (64, 192, 384, 256, 256)),
}
"""By name: the module, and the channels of its five taps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lpips:
  """A perceptual distance of two images, ready to run.

  Attributes:
    name: 'lpips_vgg16' or 'lpips_alexnet'; figures are named after it.
    resize: in words, how images of any size reach the network.
    fingerprint: sha256 of the weights, hexadecimal; see `tensors.fingerprint`.
    params: the weights.
    apply: (params, uint8 images a, b [n, h, w, 1 | 3]) -> float32 [n], at least 0. Pure; to be jitted by
      the caller.
  """

  name: str
  resize: str
  fingerprint: str
  params: Params
  apply: Callable[[Params, ImageBytes, ImageBytes], jax.Array]


def load(folder: pathlib.Path) -> Extractor:
  """Returns VGG16 as an extractor: features [n, 512] are the spatial means of the fifth pooled map.

  The published weights end with the convolutions, so that this is not the 4096-wide layer that papers
  use for precision and recall.

  Raises:
    UserError: the weights (those of LPIPS) were not prepared.
  """
  state, _ = published.require('lpips_vgg16', folder)
  params = {layer: value for layer, value in convert(state).items() if layer in published.VGG16_LAYERS}
  return Extractor(
    name='vgg16',
    resize=RESIZE,
    fingerprint=fingerprint(params),
    num_features=NUM_FEATURES,
    params=params,
    apply=features,
  )


def load_lpips(network: str, folder: pathlib.Path) -> Lpips:
  """Returns LPIPS over 'vgg16' or 'alexnet'.

  Raises:
    UserError: unknown network, or its weights were not prepared.
  """
  check_network(network)
  state, _ = published.require(f'lpips_{network}', folder)
  params = convert(state, network)
  return Lpips(
    name=f'lpips_{network}',
    resize=RESIZE,
    fingerprint=fingerprint(params),
    params=params,
    apply=lambda params, a, b: distance(network, params, a, b),
  )


def convert(state: Mapping[str, NDArray], network: str = 'vgg16') -> Params:
  """Returns the parameters of a network and its LPIPS weights from flat tensors.

  Args:
    state: `<layer>.kernel` [height, width, in, out], `<layer>.bias` [out], `lin<i>.weight` [channels].
    network: 'vgg16' or 'alexnet'.

  Returns:
    {layer: {'kernel', 'bias'}} for the convolutions, {'lin<i>': {'weight'}} for the taps.

  Raises:
    UserError: names the first tensor that is missing, unknown or of another shape.
  """
  module, taps = NETWORKS[check_network(network)]
  image = jax.ShapeDtypeStruct((1, LEAST, LEAST, 3), jnp.float32)
  variables = jax.eval_shape(module.init, jax.random.key(0), image)
  shapes = {
    f'{layer}.{part}': value.shape
    for layer, parts in variables['params'].items()
    for part, value in parts.items()
  }
  shapes |= {f'{lin}.weight': (size,) for lin, size in zip(published.LIN_LAYERS, taps, strict=True)}
  params: Params = {}
  for key, value in published.check(state, shapes, f'lpips_{network}').items():
    layer, part = key.split('.')
    params.setdefault(layer, {})[part] = value
  return params


def features(params: Params, image: ImageBytes) -> dict[str, jax.Array]:
  """Returns {'features': float32 [n, 512]} of uint8 images [n, h, w, 1 | 3]."""
  pooled = Vgg16().apply({'params': params}, imagenet_input(image, LEAST))[-1]
  return {'features': pooled.mean((1, 2))}


def distance(network: str, params: Params, a: ImageBytes, b: ImageBytes) -> Float[Array, ' n']:
  """Returns LPIPS of uint8 images [n, h, w, 1 | 3] in pairs (Zhang et al. 2018, eq. 1)."""
  return compare(network, params, imagenet_input(a, LEAST), imagenet_input(b, LEAST))


def distance_in_unit_range(network: str, params: Params, a: Image, b: Image) -> Float[Array, ' n']:
  """Returns LPIPS of images in [-1, 1], 1 or 3 channels: the same figure, to be trained on."""
  return compare(network, params, *(imagenet_input((x + 1) * 127.5, LEAST) for x in (a, b)))


def compare(
  network: str, params: Params, a: Float[Array, 'n h w 3'], b: Float[Array, 'n h w 3']
) -> Float[Array, ' n']:
  """Returns LPIPS of standardised images in pairs."""
  module, taps = NETWORKS[network]
  convolutions = {layer: value for layer, value in params.items() if layer not in published.LIN_LAYERS}
  pairs = zip(
    module.apply({'params': convolutions}, a)[: len(taps)],
    module.apply({'params': convolutions}, b)[: len(taps)],
    strict=True,
  )
  total = jnp.zeros(len(a))
  for lin, (map_a, map_b) in zip(published.LIN_LAYERS, pairs, strict=True):
    square = jnp.square(unit_length(map_a) - unit_length(map_b)).mean((1, 2))
    total += jnp.dot(square, params[lin]['weight'], precision=jax.lax.Precision.HIGHEST)
  return total


def unit_length(x: Float[Array, 'n h w c']) -> Float[Array, 'n h w c']:
  """Returns the map with every pixel's channel vector scaled to length 1; a zero vector stays zero."""
  square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  positive = square > 0  # the root has no finite slope at zero
  length = jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)
  return x / (length + EPSILON)


def fingerprint(params: Params) -> str:
  """Returns the fingerprint of the tensors {layer: {part: array}}."""
  flat = {f'{layer}.{part}': value for layer, parts in params.items() for part, value in parts.items()}
  return tensors.fingerprint({name: np.asarray(value) for name, value in flat.items()})


def check_network(network: str) -> str:
  """Returns the network's name.

  Raises:
    UserError: it is unknown.
  """
  if network not in NETWORKS:
    raise UserError(f'LPIPS network {network!r} is unknown: choose one of {tuple(NETWORKS)}')
  return network
