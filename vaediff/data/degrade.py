"""Images made worse at random, one key per image: blur, resizing, noise. On the device, in [-1, 1].

`blur` is the augmentation of a cascade's high resolutions (Ho et al. 2021, arXiv:2106.15282, section 4.4);
`bsr` a short form of the degradations of BSRGAN (Zhang et al. 2021, arXiv:2103.14006), shuffled per image.
Of these, compression is left out: a JPEG coder runs on the host.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vaediff.types import Image, Keys

BLUR_SHARE = 0.5
"""Of the images that `blur` blurs."""
BLUR = (0.4, 0.6)
"""Deviations of its kernel, in pixels."""
BSR_BLUR = (0.1, 1.2)
BSR_SCALE = (0.5, 1.0)
"""Of the sides, before they are what they were."""
BSR_NOISE = (2 / 255, 25 / 255)
"""Deviations, of pixels in [0, 1]."""

One = Float[Array, 'height width channels']


def blur(x: Image, keys: Keys) -> Image:
  """Returns half of the images blurred by a 3x3 Gaussian kernel of deviation U(0.4, 0.6)."""

  def each(x: One, key: jax.Array) -> One:
    key_whether, key_sigma = jax.random.split(key)
    sigma = jax.random.uniform(key_sigma, minval=BLUR[0], maxval=BLUR[1])
    return jnp.where(jax.random.bernoulli(key_whether, BLUR_SHARE), blurred(x, sigma), x)

  return jax.vmap(each)(x, keys)


def bsr(x: Image, keys: Keys) -> Image:
  """Returns every image blurred, made smaller and large again, and noised, in an order of its own.

  The kernel is 3x3 of deviation U(0.1, 1.2), the side is multiplied by U(0.5, 1), each way by one of nearest,
  linear and cubic interpolation, and the noise has a deviation of U(2, 25) / 255; clipped to [-1, 1].
  """

  def each(x: One, key: jax.Array) -> One:
    key_order, key_blur, key_resize, key_noise = jax.random.split(key, 4)
    sigma = jax.random.uniform(key_blur, minval=BSR_BLUR[0], maxval=BSR_BLUR[1])
    key_deviation, key_eps = jax.random.split(key_noise)
    deviation = jax.random.uniform(key_deviation, minval=BSR_NOISE[0], maxval=BSR_NOISE[1])
    eps = 2 * deviation * jax.random.normal(key_eps, x.shape)
    rows, columns = smaller_and_back(key_resize, *x.shape[:2])
    order = jax.random.permutation(key_order, 3)
    for place in range(3):
      resized = jnp.einsum('ij,kl,jlc->ikc', rows, columns, x)
      options = jnp.stack([blurred(x, sigma), resized, x + eps])
      x = options[order[place]]
    return jnp.clip(x, -1.0, 1.0)

  return jax.vmap(each)(x, keys)


def blurred(x: One, sigma: Float[Array, '']) -> One:
  """Returns the image under a 3x3 Gaussian kernel; what is beyond an edge is as the edge."""
  side = jnp.exp(-0.5 / sigma**2)
  kernel = jnp.stack([side, jnp.ones(()), side]) / (1 + 2 * side)
  for axis in (0, 1):
    around = jnp.pad(x, [(1, 1) if a == axis else (0, 0) for a in range(3)], mode='edge')
    parts = [jax.lax.slice_in_dim(around, k, k + x.shape[axis], axis=axis) for k in range(3)]
    x = sum(weight * part for weight, part in zip(kernel, parts, strict=True))
  return x


def smaller_and_back(key: jax.Array, height: int, width: int) -> list[Array]:
  """Returns what rows and columns are multiplied by: to a random part of the sides and back.

  Each way has a random interpolation, the same for rows and columns.
  """
  key_scale, key_down, key_up = jax.random.split(key, 3)
  scale = jax.random.uniform(key_scale, minval=BSR_SCALE[0], maxval=BSR_SCALE[1])
  down, up = (jax.random.randint(k, (), 0, len(KERNELS)) for k in (key_down, key_up))
  found = []
  for whole in (height, width):
    part = jnp.maximum(jnp.round(scale * whole), 1.0)
    there = jax.lax.switch(down, _chosen(whole), jnp.float32(whole), part)
    back = jax.lax.switch(up, _chosen(whole), part, jnp.float32(whole))
    found.append(back @ there)
  return found


def resizing(
  most: int, before: Float[Array, ''], after: Float[Array, ''], kernel: str
) -> Float[Array, 'most most']:
  """Returns the matrix that resizes rows of `before` numbers to rows of `after`, both at most `most`.

  As `jax.image.resize` does with antialiasing, but the lengths may be traced; the other rows are 0.

  Args:
    most: the length of both rows in memory.
    before: how many numbers of a row there are.
    after: how many there will be.
    kernel: of `KERNELS`.
  """
  places = jnp.arange(most, dtype=jnp.float32)
  ratio = before / after
  wanted = (places + 0.5) * ratio
  if kernel == 'nearest':
    weights = (jnp.floor(wanted)[:, None] == places[None, :]).astype(jnp.float32)
  else:
    wide = jnp.maximum(ratio, 1.0)
    weights = KERNELS[kernel](jnp.abs(wanted[:, None] - 0.5 - places[None, :]) / wide)
  weights = jnp.where(places[None, :] < before, weights, 0.0)
  total = jnp.sum(weights, axis=1, keepdims=True)
  inside = (places[:, None] < after) & (total != 0)
  return jnp.where(inside, weights / jnp.where(total == 0, 1.0, total), 0.0)


def _linear(distance: Array) -> Array:
  return jnp.maximum(0.0, 1.0 - distance)


def _cubic(distance: Array) -> Array:
  """Keys (1981) with a = -1/2."""
  near = (1.5 * distance - 2.5) * distance**2 + 1.0
  far = ((-0.5 * distance + 2.5) * distance - 4.0) * distance + 2.0
  return jnp.where(distance <= 1, near, jnp.where(distance < 2, far, 0.0))


KERNELS: dict[str, Callable[[Array], Array]] = {'nearest': _linear, 'linear': _linear, 'cubic': _cubic}
"""By interpolation: distance, in pixels, -> weight; the nearest one is found without."""


def _chosen(most: int) -> list[Callable[[Array, Array], Array]]:
  return [lambda before, after, kernel=kernel: resizing(most, before, after, kernel) for kernel in KERNELS]
