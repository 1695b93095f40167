"""The latents of a frozen autoencoder, scaled by statistics that were measured over the training images."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array
from ml_collections import ConfigDict

from vaediff import reads
from vaediff.errors import UserError
from vaediff.spaces import encoders
from vaediff.types import Image, LatentMap, Params

SCALINGS = ('std', 'max', 'tanh')
POSTERIORS = ('sample', 'mean')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latents:
  """The scaled latents of a frozen autoencoder (LDDGAN).

  Attributes:
    shape: (height, width, channels).
    source: the autoencoder, with the statistics of its latents.
    decoder: a light decoder that takes the place of its own, or None.
    scaling: 'std' (mean 0 and deviation 1 per channel), 'max' (over the largest magnitude, into [-1, 1]) or
      'tanh' (as they are: the autoencoder bounds them).
    posterior: 'sample' or 'mean' of a KL bottleneck.
  """

  shape: tuple[int, int, int]
  source: reads.FromStage
  decoder: reads.FromStage | None
  scaling: str
  posterior: str

  @property
  def frozen(self) -> Mapping[str, reads.FromStage]:
    """The autoencoder, and the light decoder if there is one."""
    return {'autoencoder': self.source} | ({'decoder': self.decoder} if self.decoder else {})

  def scale(self, frozen: dict[str, Params]) -> tuple[Array, Array]:
    """Returns mean and scale [1, 1, 1, channels or 1]: y = (z - mean) / scale."""
    found = frozen['autoencoder' + reads.STATISTICS]
    if self.scaling == 'std':
      mean, scale = found['mean'], jnp.maximum(found['std'], 1e-6)
    else:
      largest = jnp.max(jnp.maximum(jnp.abs(found['min']), jnp.abs(found['max'])))
      mean, scale = jnp.zeros(1), largest[None] if self.scaling == 'max' else jnp.ones(1)
    return mean.reshape(1, 1, 1, -1), scale.reshape(1, 1, 1, -1)

  def from_image(self, frozen: dict[str, Params], x: Image, key: jax.Array | None) -> LatentMap:
    """Returns the scaled latents of images."""
    noise = None
    if key is not None and self.posterior == 'sample':
      noise = jax.random.normal(key, (x.shape[0], *self.shape))
    mean, scale = self.scale(frozen)
    return (encoders.encode(self.source.model, frozen['autoencoder'], x, noise) - mean) / scale

  def to_image(self, frozen: dict[str, Params], y: LatentMap) -> Image:
    """Returns the decoded latents."""
    mean, scale = self.scale(frozen)
    z = y * scale + mean
    if self.decoder is None:
      return encoders.decode(self.source.model, frozen['autoencoder'], z)
    return self.decoder.model.apply(frozen['decoder'], encoders.quantized(frozen['autoencoder'], z))


def latent_space(config: ConfigDict, stage: str) -> Latents:
  """Returns the space of the latents of the autoencoder that `config.<stage>.autoencoder` names."""
  named, bounded = config[stage].autoencoder, config[stage].model.bounded
  if named.scaling not in SCALINGS:
    raise UserError(f'autoencoder.scaling is {named.scaling!r}; valid: {", ".join(SCALINGS)}')
  if named.posterior not in POSTERIORS:
    raise UserError(f'autoencoder.posterior is {named.posterior!r}; valid: {", ".join(POSTERIORS)}')
  source = encoders.source_of(config, named.stage, named.workdir, 'autoencoder.stage', latents=True)
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
  decoder = None
  if named.decoder_stage:
    known = reads.is_stage(config, named.decoder_stage, 'light_decoder')
    if not known or config[named.decoder_stage].autoencoder.stage != named.stage:
      raise UserError(
        f'autoencoder.decoder_stage is {named.decoder_stage!r}, which is no light decoder of {named.stage!r}'
      )
    decoder = reads.FromStage(
      stage=named.decoder_stage,
      network='decoder',
      workdir=named.workdir,
      model=encoders.light_decoder_model(config, named.decoder_stage),
    )
  return Latents(
    shape=encoders.latent_shape(taught, config.data),
    source=source,
    decoder=decoder,
    scaling=named.scaling,
    posterior=named.posterior,
  )
