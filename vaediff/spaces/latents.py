"""The latents of a frozen autoencoder, scaled by statistics that were measured over the training images."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from ml_collections import ConfigDict

from vaediff import checks, reads
from vaediff.errors import UserError
from vaediff.spaces import encoders
from vaediff.spaces.base import Space
from vaediff.types import Image, LatentMap, Read

SCALINGS = ('std', 'max', 'tanh')
POSTERIORS = ('sample', 'mean')
BOUNDS = {
  'autoencoder.scaling': checks.one_of(SCALINGS),
  'autoencoder.posterior': checks.one_of(POSTERIORS),
}
LATENTS = 'latents'
"""The measurement of an autoencoder's latents, and the name that it is read by."""
RANGE = 'latents as the encoder makes them of images: any numbers'
"""What their numbers are, in words."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latents(Space):
  """The scaled latents of a frozen autoencoder (LDM, LDDGAN).

  Attributes:
    shape: (height, width, channels).
    source: the autoencoder.
    statistics: of its latents.
    decoder: a light decoder that takes the place of its own, or None.
    scaling: 'std' (mean 0 and deviation 1 per channel), 'max' (over the largest magnitude, into [-1, 1]) or
      'tanh' (as they are: the autoencoder bounds them).
    posterior: 'sample' or 'mean' of a KL bottleneck.
  """

  shape: tuple[int, int, int]
  source: reads.FromStage
  statistics: reads.Measured
  decoder: reads.FromStage | None
  scaling: str
  posterior: str

  @property
  def bound(self) -> float | None:
    """1, but for latents of unit deviation."""
    return None if self.scaling == 'std' else 1.0

  @property
  def frozen(self) -> Mapping[str, reads.Reads]:
    """The autoencoder, its statistics, and the light decoder if there is one."""
    found = {'autoencoder': self.source, LATENTS: self.statistics}
    return found | ({'decoder': self.decoder} if self.decoder else {})

  def scale(self, read: Read) -> tuple[Array, Array]:
    """Returns mean and scale [1, 1, 1, channels or 1]: y = (z - mean) / scale."""
    found = read[LATENTS]
    if self.scaling == 'std':
      mean, scale = found['mean'], jnp.maximum(found['std'], 1e-6)
    else:
      largest = jnp.max(jnp.maximum(jnp.abs(found['min']), jnp.abs(found['max'])))
      mean, scale = jnp.zeros(1), largest[None] if self.scaling == 'max' else jnp.ones(1)
    return mean.reshape(1, 1, 1, -1), scale.reshape(1, 1, 1, -1)

  def encode(self, read: Read, x: Image, key: jax.Array | None) -> LatentMap:
    """Returns the scaled latents of images."""
    noise = None
    if key is not None and self.posterior == 'sample':
      noise = jax.random.normal(key, (x.shape[0], *self.shape))
    mean, scale = self.scale(read)
    return (encoders.encode(self.source.model, read['autoencoder'], x, noise) - mean) / scale

  def decode_map(self, read: Read, y: LatentMap) -> Image:
    """Returns the decoded latents."""
    mean, scale = self.scale(read)
    z = y * scale + mean
    if self.decoder is None:
      return encoders.decode(self.source.model, read['autoencoder'], z)
    z = encoders.quantized(self.source.model, read['autoencoder'], z)
    return self.decoder.model.apply(read['decoder'], z)

  def num_decoder_parameters(self, read: Read) -> int:
    """Returns those of the light decoder, or of the autoencoder's own with its codes."""
    if self.decoder:
      return sum(leaf.size for leaf in jax.tree.leaves(read['decoder']))
    known = read['autoencoder']
    trees = [known[name] for name in ('decoder', encoders.CODES) if name in known]
    return sum(leaf.size for leaf in jax.tree.leaves(trees))


def standard(channels: int) -> dict[str, np.ndarray]:
  """Returns the statistics of latents of mean 0 and deviation 1: of no meaning, but of the right shapes."""
  ones = np.ones(channels, np.float32)
  return {'mean': 0 * ones, 'std': ones, 'min': -ones, 'max': ones}


def latent_space(config: ConfigDict, stage: str, *, bounded: bool) -> Latents:
  """Returns the space of the latents of the autoencoder that `config.<stage>.autoencoder` names.

  Args:
    config: of the run.
    stage: that models the latents.
    bounded: its network's output is in [-1, 1].

  Raises:
    UserError: for a value that is not allowed, or values that contradict each other.
  """
  checks.check(config[stage], BOUNDS)
  named = config[stage].autoencoder
  source = encoders.autoencoder_of(config, named.stage, named.workdir, 'autoencoder.stage')
  taught = config[named.stage].model
  if named.scaling == 'tanh' and taught.bottleneck != 'none':
    raise UserError(
      f"autoencoder.scaling = 'tanh' takes latents as bounded, which needs {named.stage}.model.bottleneck = "
      f"'none', got {taught.bottleneck!r}; use 'std' or 'max'"
    )
  if named.scaling == 'std' and bounded:
    raise UserError(
      "autoencoder.scaling = 'std' makes latents beyond [-1, 1], which model.bounded = True (a tanh at the "
      "end) cannot reach; set model.bounded = False, or scale by 'max'"
    )
  return Latents(
    shape=encoders.latent_shape(taught, config.data),
    source=source,
    statistics=reads.Measured(
      stage=named.stage,
      workdir=named.workdir,
      measurement=LATENTS,
      neutral=lambda: standard(taught.latent_channels),
    ),
    decoder=encoders.light_decoder_of(config, named) if named.decoder_stage else None,
    scaling=named.scaling,
    posterior=named.posterior,
  )
