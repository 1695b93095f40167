"""Pixels: the images themselves are diffused."""

import dataclasses
from collections.abc import Mapping

import jax

from vaediff import reads
from vaediff.types import Image, LatentMap, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pixels:
  """The images themselves (DDGAN)."""

  shape: tuple[int, int, int]

  @property
  def frozen(self) -> Mapping[str, reads.FromStage]:
    """Nothing."""
    return {}

  def from_image(self, frozen: dict[str, Params], x: Image, key: jax.Array | None) -> LatentMap:
    """Returns x."""
    del frozen, key
    return x

  def to_image(self, frozen: dict[str, Params], y: LatentMap) -> Image:
    """Returns y."""
    del frozen
    return y
