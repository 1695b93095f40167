"""Pixels on the device: scaling between bytes and [-1, 1], and horizontal flips.

Images cross to the device as uint8; `to_unit_range` is called first in a step and is the only
scaling in the package. A flip is drawn once (`random_flip`) and applied to every image of the
example (`flip`), so that an image and the image it is conditioned on turn together.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Key, Shaped, UInt8

from vaediff.types import Batch, Image, Mask


def to_unit_range(
  images: UInt8[Array, '*batch height width channels'],
) -> Float32[Array, '*batch height width channels']:
  """Returns images in [-1, 1], x / 127.5 - 1: byte 0 is -1 and byte 255 is +1 exactly."""
  return images.astype(jnp.float32) / 127.5 - 1.0


def to_bytes(images: Image) -> UInt8[Array, 'batch height width channels']:
  """Returns the nearest bytes of images in [-1, 1]; others are clipped, NaN is 0 (see `finite_rows`)."""
  scaled = jnp.round((images.astype(jnp.float32) + 1.0) * 127.5)
  return jnp.nan_to_num(jnp.clip(scaled, 0.0, 255.0), nan=0.0).astype(jnp.uint8)


def finite_rows(images: Image) -> Bool[Array, ' batch']:
  """Returns of which images every pixel is finite: those of which `to_bytes` hides nothing."""
  return jnp.isfinite(images).all((1, 2, 3))


def random_flip(key: Key[Array, ''], batch_size: int) -> Mask:
  """Returns which examples of a batch to mirror: each with probability 1/2, independently."""
  return jax.random.bernoulli(key, 0.5, (batch_size,))


def flip(
  images: Shaped[Array, 'batch height width channels'], mask: Mask
) -> Shaped[Array, 'batch height width channels']:
  """Returns images mirrored left to right where `mask` is true; of any dtype."""
  return jnp.where(mask[:, None, None, None], images[:, :, ::-1, :], images)


def prepare(batch: Batch, key: jax.Array | None) -> Batch:
  """Returns a batch whose images (uint8, all of them) are in [-1, 1].

  With a key every image of an example is mirrored, or none, with probability 1/2.
  """
  images = {name: to_unit_range(value) for name, value in batch.items() if value.dtype == jnp.uint8}
  if key is not None:
    mask = random_flip(key, len(batch['image']))
    images = {name: flip(value, mask) for name, value in images.items()}
  return {**batch, **images}
