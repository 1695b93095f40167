"""Haar wavelets of the images; those of an image in [-1, 1] are in [-2, 2], and are halved."""

import dataclasses
from collections.abc import Mapping

import jax

from vaediff import reads
from vaediff.models import wavelets
from vaediff.types import Image, LatentMap, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wavelets:
  """Half of the four bands of one orthonormal Haar transform, in [-1, 1] (WaveDiff, arXiv:2211.16152)."""

  shape: tuple[int, int, int]

  @property
  def frozen(self) -> Mapping[str, reads.FromStage]:
    """Nothing."""
    return {}

  def from_image(self, frozen: dict[str, Params], x: Image, key: jax.Array | None) -> LatentMap:
    """Returns the bands LL, LH, HL, HH along the channels."""
    del frozen, key
    return wavelets.haar(x) / 2

  def to_image(self, frozen: dict[str, Params], y: LatentMap) -> Image:
    """Returns the images of bands."""
    del frozen
    return wavelets.inverse_haar(2 * y)
