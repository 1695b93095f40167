"""What a space is: it turns images in [-1, 1] into the maps that are diffused, and back."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import jax

from vaediff import reads
from vaediff.types import Image, LatentMap, Params


@runtime_checkable
class Space(Protocol):
  """Maps of `shape` (height, width, channels) in place of images; `frozen` is what it reads."""

  shape: tuple[int, int, int]
  frozen: Mapping[str, reads.FromStage]

  def from_image(self, frozen: dict[str, Params], x: Image, key: jax.Array | None) -> LatentMap:
    """Returns the maps of images; drawn from a posterior, if there is one, when a key is given."""
    ...

  def to_image(self, frozen: dict[str, Params], y: LatentMap) -> Image:
    """Returns the images of maps, not clipped."""
    ...
