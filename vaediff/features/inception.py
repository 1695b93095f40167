"""The Inception-v3 that Frechet inception distances are defined on: the ImageNet graph of 2015-12-05.

It differs from the usual Inception-v3 (Szegedy et al. 2015, 1512.00567) in three ways: 1008 classes;
average pools that leave the padding out of the mean; and in the last block a maximum pool where all
others have an average. Weights are those of the PyTorch port, whose tensor names the modules here bear;
its batch norms are merged into the convolutions as they are loaded.
"""

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax import lax
from jaxtyping import Array, Float

from vaediff.errors import UserError
from vaediff.features.extractor import Extractor, to_rgb
from vaediff.storage import places
from vaediff.types import ImageBytes, Params
from vaediff.weights import published, tensors, torch_file

PUBLISHED = 'pt_inception-2015-12-05-6726825d.pth'
SIDE = 299
LEAST_SIDE = 75
NUM_FEATURES, NUM_CLASSES = 2048, 1008
EPSILON = 1e-3
BATCH_NORM = ('weight', 'bias', 'running_mean', 'running_var')

# TensorFloat-32 and bfloat16 products would shift features by more than runs differ.
PRECISION = lax.Precision.HIGHEST


def _conv(
  x: jax.Array,
  name: str,
  features: int,
  kernel: tuple[int, int] = (1, 1),
  stride: int = 1,
  padding: str = 'SAME',
) -> jax.Array:
  """Convolution, its batch norm merged in, and ReLU, as a submodule of the caller.

  With the odd kernels and stride 1 used here, 'SAME' pads both sides alike.
  """
  conv = nn.Conv(features, kernel, (stride, stride), padding, precision=PRECISION, name=name)
  return nn.relu(conv(x))


def _average(x: jax.Array) -> jax.Array:
  return nn.avg_pool(x, (3, 3), (1, 1), ((1, 1), (1, 1)), count_include_pad=False)


def _maximum(x: jax.Array) -> jax.Array:
  return nn.max_pool(x, (3, 3), (1, 1), ((1, 1), (1, 1)))


def _halve(x: jax.Array) -> jax.Array:
  return nn.max_pool(x, (3, 3), (2, 2), 'VALID')


def _join(*branches: jax.Array) -> jax.Array:
  return jnp.concatenate(branches, axis=-1)


class BlockA(nn.Module):
  """Keeps the side: 1x1, 5x5, twice 3x3, and a pool of `pool_features` channels."""

  pool_features: int

  @nn.compact
  def __call__(self, x: Float[Array, 'n h w c']) -> Float[Array, 'n h w d']:
    """See the class."""
    one = _conv(x, 'branch1x1', 64)
    five = _conv(_conv(x, 'branch5x5_1', 48), 'branch5x5_2', 64, (5, 5))
    double = _conv(_conv(x, 'branch3x3dbl_1', 64), 'branch3x3dbl_2', 96, (3, 3))
    double = _conv(double, 'branch3x3dbl_3', 96, (3, 3))
    return _join(one, five, double, _conv(_average(x), 'branch_pool', self.pool_features))


class BlockB(nn.Module):
  """Halves the side: 3x3, twice 3x3, and a pool."""

  @nn.compact
  def __call__(self, x: Float[Array, 'n h w c']) -> Float[Array, 'n h2 w2 d']:
    """See the class."""
    three = _conv(x, 'branch3x3', 384, (3, 3), 2, 'VALID')
    double = _conv(_conv(x, 'branch3x3dbl_1', 64), 'branch3x3dbl_2', 96, (3, 3))
    return _join(three, _conv(double, 'branch3x3dbl_3', 96, (3, 3), 2, 'VALID'), _halve(x))


class BlockC(nn.Module):
  """Keeps the side: 1x1, once and twice 7x7 as rows and columns `width` channels wide, and a pool."""

  width: int

  @nn.compact
  def __call__(self, x: Float[Array, 'n h w c']) -> Float[Array, 'n h w d']:
    """See the class."""
    one = _conv(x, 'branch1x1', 192)
    seven = _conv(_conv(x, 'branch7x7_1', self.width), 'branch7x7_2', self.width, (1, 7))
    seven = _conv(seven, 'branch7x7_3', 192, (7, 1))
    double = _conv(_conv(x, 'branch7x7dbl_1', self.width), 'branch7x7dbl_2', self.width, (7, 1))
    double = _conv(double, 'branch7x7dbl_3', self.width, (1, 7))
    double = _conv(double, 'branch7x7dbl_4', self.width, (7, 1))
    double = _conv(double, 'branch7x7dbl_5', 192, (1, 7))
    return _join(one, seven, double, _conv(_average(x), 'branch_pool', 192))


class BlockD(nn.Module):
  """Halves the side: 3x3, 7x7 as a row and a column followed by 3x3, and a pool."""

  @nn.compact
  def __call__(self, x: Float[Array, 'n h w c']) -> Float[Array, 'n h2 w2 d']:
    """See the class."""
    three = _conv(_conv(x, 'branch3x3_1', 192), 'branch3x3_2', 320, (3, 3), 2, 'VALID')
    seven = _conv(_conv(x, 'branch7x7x3_1', 192), 'branch7x7x3_2', 192, (1, 7))
    seven = _conv(seven, 'branch7x7x3_3', 192, (7, 1))
    return _join(three, _conv(seven, 'branch7x7x3_4', 192, (3, 3), 2, 'VALID'), _halve(x))


class BlockE(nn.Module):
  """Keeps the side: 1x1, two branches that fan out into a row and a column, and a pool."""

  pool: Callable[[jax.Array], jax.Array]

  @nn.compact
  def __call__(self, x: Float[Array, 'n h w c']) -> Float[Array, 'n h w d']:
    """See the class."""
    one = _conv(x, 'branch1x1', 320)
    three = _conv(x, 'branch3x3_1', 384)
    three = _join(_conv(three, 'branch3x3_2a', 384, (1, 3)), _conv(three, 'branch3x3_2b', 384, (3, 1)))
    double = _conv(_conv(x, 'branch3x3dbl_1', 448), 'branch3x3dbl_2', 384, (3, 3))
    double = _join(
      _conv(double, 'branch3x3dbl_3a', 384, (1, 3)), _conv(double, 'branch3x3dbl_3b', 384, (3, 1))
    )
    return _join(one, three, double, _conv(self.pool(x), 'branch_pool', 192))


class InceptionV3(nn.Module):
  """Images in [-1, 1] -> 'features' [n, 2048], the mean of the last map, and 'logits' [n, 1008].

  The logits are without the bias of the last layer, as the Inception Score was defined (arXiv:1606.03498 and
  its code).

  Attributes:
    last_pool: the pool of the last block; any but the default is another network.

  Raises:
    UserError: images smaller than 75 pixels.
  """

  last_pool: Callable[[jax.Array], jax.Array] = _maximum

  @nn.compact
  def __call__(self, image: Float[Array, 'n h w 3']) -> dict[str, jax.Array]:
    """See the class."""
    height, width = image.shape[1:3]
    if min(height, width) < LEAST_SIDE:
      raise UserError(
        f'Inception needs images of {LEAST_SIDE} pixels or more, not {height}x{width}: resize them'
      )
    x = _conv(image, 'Conv2d_1a_3x3', 32, (3, 3), 2, 'VALID')
    x = _conv(x, 'Conv2d_2a_3x3', 32, (3, 3), 1, 'VALID')
    x = _halve(_conv(x, 'Conv2d_2b_3x3', 64, (3, 3)))
    x = _conv(x, 'Conv2d_3b_1x1', 80)
    x = _halve(_conv(x, 'Conv2d_4a_3x3', 192, (3, 3), 1, 'VALID'))
    for name, pool_features in {'Mixed_5b': 32, 'Mixed_5c': 64, 'Mixed_5d': 64}.items():
      x = BlockA(pool_features, name=name)(x)
    x = BlockB(name='Mixed_6a')(x)
    for name, channels in {'Mixed_6b': 128, 'Mixed_6c': 160, 'Mixed_6d': 160, 'Mixed_6e': 192}.items():
      x = BlockC(channels, name=name)(x)
    x = BlockD(name='Mixed_7a')(x)
    x = BlockE(_average, name='Mixed_7b')(x)
    x = BlockE(self.last_pool, name='Mixed_7c')(x)
    features = jnp.mean(x, axis=(1, 2))
    last = nn.Dense(NUM_CLASSES, use_bias=False, precision=PRECISION, name='fc')
    return {'features': features, 'logits': last(features)}


@functools.cache
def _kernel_shapes() -> dict[str, tuple[int, ...]]:
  """Shapes of the kernels by dotted module name, without computing any."""
  image = jax.ShapeDtypeStruct((1, LEAST_SIDE, LEAST_SIDE, 3), jnp.float32)
  params = jax.eval_shape(InceptionV3().init, jax.random.key(0), image)['params']
  flat = traverse_util.flatten_dict(params, sep='.')
  return {name.removesuffix('.kernel'): flat[name].shape for name in flat if name.endswith('.kernel')}


def _torch_shapes() -> dict[str, tuple[int, ...]]:
  """Shapes of the tensors of the PyTorch port by name."""
  shapes = {}
  for name, kernel in _kernel_shapes().items():
    if name == 'fc':
      shapes |= {'fc.weight': kernel[::-1], 'fc.bias': kernel[1:]}
    else:
      height, width, inputs, outputs = kernel
      shapes[f'{name}.conv.weight'] = (outputs, inputs, height, width)
      shapes |= {f'{name}.bn.{part}': (outputs,) for part in BATCH_NORM}
  return shapes


def convert(state: Mapping[str, np.ndarray]) -> Params:
  """Returns the parameters of `InceptionV3` from the tensors of the PyTorch port.

  The running statistics of a batch norm never change here, so that it is one scale and one shift per
  channel: they go into the convolution before it.

  Args:
    state: arrays by the port's names; `num_batches_tracked` may be there or not and is not used.

  Raises:
    UserError: a tensor is missing, unknown, or of another shape.
  """
  state = _drop_counters(state)
  shapes = _torch_shapes()
  hint = f'these are not the weights of {PUBLISHED}'
  for name, shape in shapes.items():
    if name not in state:
      raise UserError(f'Inception weights lack {name!r}, of shape {shape}: {hint}')
    if np.shape(state[name]) != shape:
      raise UserError(f'Inception weights: {name!r} has shape {np.shape(state[name])}, not {shape}: {hint}')
    if state[name].dtype.kind != 'f':
      raise UserError(f'Inception weights: {name!r} is {state[name].dtype.name}, not of floats: {hint}')
    published.check_finite(state[name], name, 'inception')
  for name in state:
    if name not in shapes:
      raise UserError(f'Inception weights hold {name!r}, which the network does not have: {hint}')
  params = {}
  for name in _kernel_shapes():
    if name == 'fc':
      params['fc.kernel'] = jnp.asarray(state['fc.weight'].T, jnp.float32)
      continue
    weight, shift, mean, variance = (state[f'{name}.bn.{part}'].astype(np.float64) for part in BATCH_NORM)
    scale = weight / np.sqrt(variance + EPSILON)
    kernel = state[f'{name}.conv.weight'].transpose(2, 3, 1, 0) * scale
    params[f'{name}.kernel'] = jnp.asarray(kernel, jnp.float32)
    params[f'{name}.bias'] = jnp.asarray(shift - mean * scale, jnp.float32)
  return traverse_util.unflatten_dict(params, sep='.')


def _drop_counters(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Leaves out the counters of training batches, which old files lack."""
  return {name: value for name, value in state.items() if not name.endswith('.num_batches_tracked')}


def resize_pytorch(image: ImageBytes) -> Float[Array, 'n 299 299 3']:
  """Returns images of 299x299 in [-1, 1] by bilinear interpolation between the centres of pixels.

  Nothing is smoothed when images shrink. It is the preprocessing of pytorch-fid.
  """
  image = to_rgb(image).astype(jnp.float32)
  shape = (image.shape[0], SIDE, SIDE, 3)
  return jax.image.resize(image, shape, 'bilinear', antialias=False, precision=PRECISION) / 127.5 - 1.0


def resize_tf1(image: ImageBytes) -> Float[Array, 'n 299 299 3']:
  """Returns images of 299x299 in [-1, 127/128] by bilinear interpolation between the corners of pixels.

  Output pixel i shows the input at i * input side / 299, clamped to the last pixel, as TensorFlow 1
  resized (align_corners=False). It is the preprocessing of the original distances and of torch-fidelity.
  """
  image = to_rgb(image).astype(jnp.float32)
  rows, columns = (jnp.asarray(_corner_weights(side)) for side in image.shape[1:3])
  image = jnp.einsum('ih,nhwc->niwc', rows, image, precision=PRECISION)
  image = jnp.einsum('jw,niwc->nijc', columns, image, precision=PRECISION)
  return (image - 128.0) / 128.0


def _corner_weights(side: int) -> np.ndarray:
  """Returns the matrix [299, side] that interpolates one axis for `resize_tf1`."""
  position = np.arange(SIDE, dtype=np.float32) * (np.float32(side) / np.float32(SIDE))
  lower = np.minimum(np.floor(position).astype(np.int64), side - 1)
  upper = np.minimum(lower + 1, side - 1)
  fraction = position - lower
  matrix = np.zeros((SIDE, side), np.float32)
  np.add.at(matrix, (np.arange(SIDE), lower), 1.0 - fraction)
  np.add.at(matrix, (np.arange(SIDE), upper), fraction)
  return matrix


RESIZES = {'pytorch': resize_pytorch, 'tf1': resize_tf1}
"""Ways from images of any size to the network; distances of two ways must not be compared."""
_RESIZE_TEXTS = {
  'pytorch': f'pytorch (bilinear, half-pixel centres, to {SIDE})',
  'tf1': f'tf1 (bilinear, pixel corners, to {SIDE})',
}


def load(path: str, resize: str) -> Extractor:
  """Returns the network with weights from a file, reading uint8 images of any size.

  Args:
    path: the published .pth file, or the .safetensors file that `convert_file` writes from it.
    resize: one of `RESIZES`.

  Raises:
    UserError: unknown resize; no path; a file that is missing, damaged or of another network.
  """
  if resize not in RESIZES:
    raise UserError(f'Inception resize {resize!r}: choose one of {tuple(RESIZES)}')
  if not path:
    raise UserError(
      'Inception weights not given, they come from you: set config.evaluate.inception_weights to the'
      f' published {PUBLISHED} or a safetensors file converted from it'
    )
  state = _read(places.expanded(path, 'config.evaluate.inception_weights'))

  def apply(params: Params, image: ImageBytes) -> dict[str, Any]:
    return InceptionV3().apply({'params': params}, RESIZES[resize](image))

  return Extractor(
    name='inception',
    resize=_RESIZE_TEXTS[resize],
    fingerprint=tensors.fingerprint(state),
    num_features=NUM_FEATURES,
    params=convert(state),
    apply=apply,
  )


def convert_file(source: pathlib.Path, target: pathlib.Path) -> None:
  """Writes the tensors of the published .pth file, unchanged and by the same names, as .safetensors.

  Raises:
    UserError: source is missing, damaged or of another network; target does not end in .safetensors.
  """
  if target.suffix != '.safetensors':
    raise UserError(f'{target}: the converted file must end in .safetensors, name it so')
  state = _read(source)
  convert(state)  # for its checks
  tensors.save(target, state, {'source_sha256': torch_file.sha256_of(source), 'source': source.name})


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns the tensors of a file of either format, without the counters."""
  match path.suffix:
    case '.pth':
      torch_file.check_named_hash(path)
      return _drop_counters(torch_file.read(path))
    case '.safetensors':
      return _drop_counters(tensors.load(path)[0])
  raise UserError(f'Inception weights {path}: the file must end in .pth or .safetensors')
