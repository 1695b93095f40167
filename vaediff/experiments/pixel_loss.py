"""How far a decoder's output is from an image, pixel by pixel: `loss.pixel`."""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from vaediff import checks
from vaediff.errors import UserError
from vaediff.experiments import bounds
from vaediff.models import relaxed_codes
from vaediff.models.autoencoder import Outputs
from vaediff.types import Image

KINDS = ('l1', 'l2', 'logit_laplace')
BOUNDS = {
  'loss.pixel': checks.one_of(KINDS),
  'loss.pixel_weight': bounds.weight(),
  'loss.least_scale': bounds.number(0, 1, above=True),
  'model.pixel_map': bounds.number(0, 0.49),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelLoss:
  """One of them, times a weight.

  Attributes:
    kind: 'l1' and 'l2': the mean absolute and squared error, pixels in [-1, 1]; 'logit_laplace': minus the
      log of its density at the mapped pixels (`relaxed_codes`), nats per number; may be below zero.
    weight: of it.
    margin: of the logit-Laplace.
    least_scale: its b is not below.
  """

  kind: str
  weight: float
  margin: float
  least_scale: float

  @classmethod
  def of(cls, section: ConfigDict) -> 'PixelLoss':
    """Returns that of a stage's section."""
    loss = section.loss
    return cls(
      kind=loss.pixel,
      weight=loss.pixel_weight,
      margin=section.model.pixel_map,
      least_scale=loss.least_scale,
    )

  def __call__(self, x: Image, x_hat: Image, outputs: Outputs) -> Float[Array, ' batch']:
    """Returns the loss of each image.

    Args:
      x: images in [-1, 1].
      x_hat: what they are taken for.
      outputs: of the decoder, of which x_hat is made.
    """
    if self.kind == 'logit_laplace':
      mu, log_b = jnp.split(outputs, 2, axis=-1)
      log_b = relaxed_codes.floored(log_b, math.log(self.least_scale))
      error = relaxed_codes.logit_laplace_nll(x, mu, log_b, self.margin)
    else:
      error = jnp.abs(x - x_hat) if self.kind == 'l1' else jnp.square(x - x_hat)
    return self.weight * jnp.mean(error, axis=(1, 2, 3))


def check(section: ConfigDict) -> None:
  """Raises UserError where loss, pixel map and guard do not go together in a stage's section."""
  is_density, margin = section.loss.pixel == 'logit_laplace', section.model.pixel_map
  if is_density and not margin:
    raise UserError(
      "loss.pixel is 'logit_laplace' and model.pixel_map is 0: a black or white pixel would have an infinite "
      'logit. Set model.pixel_map, as 0.1, or loss.pixel to one of l1, l2'
    )
  if margin and not is_density:
    raise UserError(
      f'model.pixel_map is {margin:g}, which makes the decoder give mu and ln b, but loss.pixel is '
      f'{section.loss.pixel!r}, which reads no ln b: set model.pixel_map to 0, or loss.pixel to logit_laplace'
    )
  if is_density and section.train.spike_factor:
    raise UserError(
      f"train.spike_factor is {section.train.spike_factor:g}: with loss.pixel = 'logit_laplace' the loss may "
      'be below zero, where a multiple of its mean says nothing. Set train.spike_factor to 0'
    )
