"""Haar wavelets of the images; those of an image in [-1, 1] are in [-2, 2], and are halved."""

import dataclasses

import jax

from vaediff.models import wavelets
from vaediff.spaces.base import Space
from vaediff.types import Image, LatentMap, Read


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wavelets(Space):
  """Half of the four bands of one orthonormal Haar transform, in [-1, 1] (WaveDiff, arXiv:2211.16152)."""

  shape: tuple[int, int, int]
  bound: float | None = 1.0

  is_isometric = True

  def encode(self, read: Read, x: Image, key: jax.Array | None) -> LatentMap:
    """Returns the bands LL, LH, HL, HH along the channels."""
    del read, key
    return wavelets.haar(x) / 2

  def decode_map(self, read: Read, y: LatentMap) -> Image:
    """Returns the images of bands."""
    del read
    return wavelets.inverse_haar(2 * y)
