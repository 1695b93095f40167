"""Pixels: the images themselves are diffused."""

import dataclasses

import jax

from vaediff.spaces.base import Space
from vaediff.types import Image, LatentMap, Read


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pixels(Space):
  """The images themselves (DDPM, DDGAN)."""

  shape: tuple[int, int, int]
  bound: float | None = 1.0

  @property
  def is_data(self) -> bool:
    """They are."""
    return True

  @property
  def is_isometric(self) -> bool:
    """Where they are the images themselves."""
    return self.is_data

  def encode(self, read: Read, x: Image, key: jax.Array | None) -> LatentMap:
    """Returns x."""
    del read, key
    return x

  def decode_map(self, read: Read, y: LatentMap) -> Image:
    """Returns y."""
    del read
    return y
