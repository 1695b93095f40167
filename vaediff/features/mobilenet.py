"""MobileNetV2 as an extractor (Sandler et al. 2018, arXiv:1801.04381; table 2, width 1, 1000 classes).

The arithmetic is that of torchvision's network in evaluation mode. Batch norm is folded into the
convolutions when the weights are loaded. A 1x1 convolution is a dot product, and the depthwise 3x3
convolution nine shifted products: XLA's grouped convolution takes 7 to 25 times as long on CPUs.
"""

import pathlib
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy.typing import NDArray

from vaediff.features.extractor import Extractor, imagenet_input
from vaediff.types import ImageBytes, Params
from vaediff.weights import published, tensors

LEAST = 96
RESIZE = f'bilinear (half-pixel centres) to at least {LEAST}'
EPSILON = 1e-5
NUM_FEATURES = 1280
NUM_CLASSES = 1000
STEM = 32
STAGES = (
  (1, 16, 1, 1),
  (6, 24, 2, 2),
  (6, 32, 3, 2),
  (6, 64, 4, 2),
  (6, 96, 3, 1),
  (6, 160, 3, 2),
  (6, 320, 1, 1),
)
"""(expansion, channels, number of blocks, stride of the first block), table 2 of the paper."""


def load(folder: pathlib.Path) -> Extractor:
  """Returns MobileNetV2: features [n, 1280] before the classifier, logits [n, 1000] of ImageNet.

  Raises:
    UserError: the weights were not prepared.
  """
  state, _ = published.require('mobilenetv2', folder)
  return Extractor(
    name='mobilenetv2',
    resize=RESIZE,
    fingerprint=tensors.fingerprint(state),
    num_features=NUM_FEATURES,
    params=convert(state),
    apply=apply,
  )


def blocks() -> Iterator[tuple[str, int, int, int, int]]:
  """Yields (name, channels in, channels between, channels out, stride) of the 17 inverted residuals."""
  index, before = 1, STEM
  for expansion, channels, repeats, first_stride in STAGES:
    for repeat in range(repeats):
      yield f'features.{index}', before, expansion * before, channels, 1 if repeat else first_stride
      index, before = index + 1, channels


def layers() -> Iterator[tuple[str, str, tuple[int, ...]]]:
  """Yields (convolution, its batch norm, shape [out, in, height, width]) by torchvision's names."""
  yield 'features.0.0', 'features.0.1', (STEM, 3, 3, 3)
  last = STEM
  for name, before, between, after, _ in blocks():
    at = 0
    if between != before:  # the first block has nothing to expand
      yield f'{name}.conv.0.0', f'{name}.conv.0.1', (between, before, 1, 1)
      at = 1
    yield f'{name}.conv.{at}.0', f'{name}.conv.{at}.1', (between, 1, 3, 3)
    yield f'{name}.conv.{at + 1}', f'{name}.conv.{at + 2}', (after, between, 1, 1)
    last = after
  yield 'features.18.0', 'features.18.1', (NUM_FEATURES, last, 1, 1)


def convert(state: Mapping[str, NDArray]) -> Params:
  """Returns the parameters from a state dict under torchvision's names, batch norm folded in.

  Args:
    state: 262 tensors; the counters `num_batches_tracked` may be there and are ignored.

  Returns:
    {convolution: {'kernel': [3, 3, in, out], for 1x1 [in, out], for depthwise [3, 3, channels],
    'bias': [out]}}, and 'classifier' like a 1x1 convolution.

  Raises:
    UserError: names the first tensor that is missing, unknown or of another shape.
  """
  shapes: dict[str, tuple[int, ...]] = {}
  for conv, norm, shape in layers():
    shapes[f'{conv}.weight'] = shape
    for part in ('weight', 'bias', 'running_mean', 'running_var'):
      shapes[f'{norm}.{part}'] = shape[:1]
  shapes |= {'classifier.1.weight': (NUM_CLASSES, NUM_FEATURES), 'classifier.1.bias': (NUM_CLASSES,)}
  needed = {key: value for key, value in state.items() if not key.endswith('.num_batches_tracked')}
  tensors = published.check(needed, shapes, 'mobilenetv2')
  params: Params = {}
  for conv, norm, shape in layers():
    wide = {key: tensors[f'{norm}.{key}'].astype(np.float64) for key in ('weight', 'bias')}
    variance = tensors[f'{norm}.running_var'].astype(np.float64)
    scale = wide['weight'] / np.sqrt(variance + EPSILON)
    kernel = tensors[f'{conv}.weight'] * scale[:, None, None, None]
    bias = wide['bias'] - tensors[f'{norm}.running_mean'] * scale
    if shape[2] == 1:
      kernel = kernel[:, :, 0, 0].T
    elif shape[1] == 1:
      kernel = kernel[:, 0].transpose(1, 2, 0)
    else:
      kernel = kernel.transpose(2, 3, 1, 0)
    params[conv] = {'kernel': kernel.astype(np.float32), 'bias': bias.astype(np.float32)}
  params['classifier'] = {'kernel': tensors['classifier.1.weight'].T, 'bias': tensors['classifier.1.bias']}
  return params


def apply(params: Params, image: ImageBytes) -> dict[str, jax.Array]:
  """Returns {'features': [n, 1280], 'logits': [n, 1000]}, float32, of uint8 images [n, h, w, 1 | 3]."""
  x = relu6(stem(params['features.0.0'], imagenet_input(image, LEAST)))
  for name, before, between, after, stride in blocks():
    shortcut = x
    at = 0
    if between != before:
      x = relu6(dense(params[f'{name}.conv.0.0'], x))
      at = 1
    x = relu6(depthwise(params[f'{name}.conv.{at}.0'], x, stride))
    x = dense(params[f'{name}.conv.{at + 1}'], x)
    if stride == 1 and before == after:
      x += shortcut
  x = relu6(dense(params['features.18.0'], x))
  features = x.mean((1, 2))
  return {'features': features, 'logits': dense(params['classifier'], features)}


def stem(params: Params, x: Float[Array, 'n h w c']) -> Float[Array, 'n h2 w2 d']:
  """Returns the 3x3 convolution with stride 2 and one pixel of zeros on every side."""
  y = jax.lax.conv_general_dilated(
    x,
    params['kernel'],
    window_strides=(2, 2),
    padding=((1, 1), (1, 1)),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    precision=jax.lax.Precision.HIGHEST,
  )
  return y + expand(params['bias'], y.ndim)


def depthwise(params: Params, x: Float[Array, 'n h w c'], stride: int) -> Float[Array, 'n h2 w2 c']:
  """Returns the depthwise 3x3 convolution with one pixel of zeros on every side."""
  _, height, width, _ = x.shape
  # The last row and column that the middle of the kernel visits, counted from the padded corner.
  bottom, right = (height - 1) // stride * stride + 1, (width - 1) // stride * stride + 1
  padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  total = expand(params['bias'], x.ndim)
  for i in range(3):
    for j in range(3):
      shifted = padded[:, i : i + bottom : stride, j : j + right : stride]
      total = total + shifted * expand(params['kernel'][i, j], x.ndim)
  return total


def dense(params: Params, x: Float[Array, '*batch c']) -> Float[Array, '*batch d']:
  """Returns the linear map of the last axis: a 1x1 convolution, or the classifier."""
  y = jnp.dot(x, params['kernel'], precision=jax.lax.Precision.HIGHEST)
  return y + expand(params['bias'], y.ndim)


def expand(vector: jax.Array | NDArray, ndim: int) -> jax.Array:
  """Returns the vector with leading axes of length 1, `ndim` axes in all."""
  return jnp.reshape(vector, (1,) * (ndim - 1) + vector.shape)


def relu6(x: Float[Array, '*shape']) -> Float[Array, '*shape']:
  """Returns the values clipped to [0, 6]."""
  return jnp.clip(x, 0, 6)
