"""What a space is: it turns images in [-1, 1] into the maps that are diffused, and back."""

import abc
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vaediff import reads
from vaediff.types import Image, LatentMap, Read


class Space(abc.ABC):
  """Maps in place of images.

  Attributes:
    shape: of one map, (height, width, channels).
    bound: the maps of images are in [-bound, bound], to which x0_hat can be clipped; None = unbounded.
    is_isometric: `encode` and `decode_map` are each other's inverses and, but for one factor, keep lengths:
      what is linear in pixels is linear here, and white noise stays white.
    factor: the sides of the data over those of the images that are decoded.
  """

  shape: tuple[int, ...]
  bound: float | None
  is_isometric = False
  factor: int = 1

  @property
  def frozen(self) -> Mapping[str, reads.Reads]:
    """What it reads; nothing by default."""
    return {}

  @property
  def is_data(self) -> bool:
    """Whether the maps are the images themselves, so that their density is that of the data."""
    return False

  @abc.abstractmethod
  def encode(self, read: Read, x: Image, key: jax.Array | None) -> LatentMap:
    """Returns the maps of images; drawn from a posterior, if there is one, when a key is given."""

  @abc.abstractmethod
  def decode_map(self, read: Read, y: LatentMap) -> Image:
    """Returns the images of maps, not clipped."""

  def decode(self, read: Read, y: LatentMap) -> dict[str, Array]:
    """Returns {'x0': images in [-1, 1]}."""
    return {'x0': jnp.clip(self.decode_map(read, y), -1.0, 1.0)}

  def num_decoder_parameters(self, read: Read) -> int:
    """Returns how many parameters turn maps into images."""
    del read
    return 0
