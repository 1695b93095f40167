"""The perceptual distance (LPIPS) as a term of a loss, or nothing."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from vaediff import reads
from vaediff.errors import UserError
from vaediff.features import vgg
from vaediff.spaces import Space
from vaediff.types import Image, Read
from vaediff.weights import tensors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perceptual:
  """Weighted LPIPS of image pairs, or nothing; the weights of its network are frozen."""

  weight: float
  network: str
  source: reads.Published | None

  @classmethod
  def of(cls, name: str, weight: float, weights_dir: str) -> 'Perceptual':
    """Returns the distance of a config: '' or weight 0 is none."""
    if weight < 0:
      raise UserError(f'loss.perceptual_weight must be >= 0, got {weight}')
    if not name or weight == 0:
      return cls(weight=0.0, network='', source=None)
    network = vgg.check_network(name.removeprefix('lpips_'))
    folder = tensors.folder(weights_dir)
    return cls(
      weight=weight,
      network=network,
      source=reads.Published(load=lambda: vgg.load_lpips(network, folder).params),
    )

  @property
  def frozen(self) -> Mapping[str, reads.Reads]:
    """The network that the stage must be given."""
    return {'lpips': self.source} if self.source else {}

  def __call__(self, read: Read, a: Image, b: Image) -> Float[Array, ' batch']:
    """Returns weight * LPIPS per pair of images in [-1, 1]."""
    if self.source is None:
      return jnp.zeros(a.shape[0])
    return self.weight * vgg.distance_in_unit_range(self.network, read['lpips'], a, b)


def perceptual_of(config: ConfigDict, stage: str, space: Space) -> Perceptual | None:
  """Returns the perceptual distance of a stage's loss; None where it has none, as of students.

  Raises:
    UserError: where the maps are no images.
  """
  section = config[stage]
  if 'teacher' in section:
    return None
  loss = section.loss
  found = Perceptual.of(loss.perceptual, loss.perceptual_weight, config.evaluate.weights_dir)
  if found.source and not space.is_data:
    raise UserError(
      f'loss.perceptual is {loss.perceptual!r}, a distance of images; the maps of space = {section.space!r} '
      "are none: use 'pixel', or loss.perceptual = ''"
    )
  return found if found.source else None
