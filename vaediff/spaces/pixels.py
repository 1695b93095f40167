"""Pixels: the images themselves are diffused, or smaller ones, the first stage of a cascade."""

import dataclasses

import jax

from vaediff.models import layers
from vaediff.spaces.base import Space
from vaediff.types import Image, LatentMap, Read


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pixels(Space):
  """The images themselves (DDPM, DDGAN), or the means of `factor` x `factor` pixels (CDM, arXiv:2106.15282).

  Attributes:
    shape: of what is diffused, (height, width, channels).
    factor: the sides of the data over those of what is diffused; decoded images are as small.
  """

  shape: tuple[int, int, int]
  factor: int = 1
  bound: float | None = 1.0

  @property
  def is_data(self) -> bool:
    """They are, but for smaller ones."""
    return self.factor == 1

  @property
  def is_isometric(self) -> bool:
    """Where they are the images themselves."""
    return self.is_data

  def encode(self, read: Read, x: Image, key: jax.Array | None) -> LatentMap:
    """Returns x, or the means of its pixels."""
    del read, key
    return x if self.factor == 1 else layers.average_pool(x, self.factor)

  def decode_map(self, read: Read, y: LatentMap) -> Image:
    """Returns y: pixels are the map."""
    del read
    return y
