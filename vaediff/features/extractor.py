"""What a feature network is to the rest: a name, a fingerprint, and a pure function of uint8 images."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from vaediff.types import ImageBytes, Params

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Of ImageNet's RGB in [0, 1]. The scaling layer of LPIPS, stated for [-1, 1], is the same map."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extractor:
  """A feature network, ready to run.

  Attributes:
    name: 'inception', 'mobilenetv2', 'vgg16' or 'classifier'; figures are named after it.
    resize: in words, how images of any size reach the network; figures of two ways are never compared.
    fingerprint: sha256 of the weights, hexadecimal; see `weights.fingerprint`.
    num_features: length d of a feature vector.
    params: the weights.
    apply: (params, uint8 images [n, h, w, 1 | 3]) -> {'features': float32 [n, d]}, and for a classifier
      'logits' [n, k]. Pure; to be jitted by the caller.
  """

  name: str
  resize: str
  fingerprint: str
  num_features: int
  params: Params
  apply: Callable[[Params, ImageBytes], dict[str, jax.Array]]


def to_rgb(image: jax.Array) -> jax.Array:
  """Returns images with three channels: grey ones are repeated."""
  return jnp.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image


def upsample_to(image: jax.Array, least: int) -> jax.Array:
  """Returns float32 images whose shorter side has at least `least` pixels: bilinear, half-pixel centres."""
  image = image.astype(jnp.float32)
  count, height, width, channels = image.shape
  if min(height, width) >= least:
    return image
  factor = least / min(height, width)
  shape = (count, round(height * factor), round(width * factor), channels)
  return jax.image.resize(image, shape, 'bilinear', antialias=False)


def imagenet_input(image: jax.Array, least: int) -> jax.Array:
  """Returns uint8 images [n, h, w, 1 | 3] as ImageNet networks take them: large enough, RGB, standardised."""
  image = to_rgb(upsample_to(image, least)) / 255
  mean, std = (jnp.array(value).reshape(1, 1, 1, 3) for value in (IMAGENET_MEAN, IMAGENET_STD))
  return (image - mean) / std
