"""Where a denoising GAN works: on pixels, on Haar wavelets, or on an autoencoder's latents.

A space turns images in [-1, 1] into the maps that are diffused, and back. Its scale comes from the data:
wavelets of an image in [-1, 1] are in [-2, 2] and are halved; latents are scaled by measured statistics.
"""

import dataclasses
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array
from ml_collections import ConfigDict

from vaediff.errors import UserError
from vaediff.experiments import autoencoder, base, light_decoder
from vaediff.models import wavelets
from vaediff.types import Image, LatentMap, Params

SPACES = ('pixel', 'wavelet', 'latent')
SCALINGS = ('std', 'max', 'tanh')
POSTERIORS = ('sample', 'mean')


@runtime_checkable
class Space(Protocol):
  """Maps of `shape` (height, width, channels) in place of images; `frozen` is what it reads."""

  shape: tuple[int, int, int]
  frozen: Mapping[str, base.Frozen]

  def from_image(self, frozen: dict[str, Params], x: Image, key: jax.Array | None) -> LatentMap:
    """Returns the maps of images; drawn from a posterior, if there is one, when a key is given."""
    ...

  def to_image(self, frozen: dict[str, Params], y: LatentMap) -> Image:
    """Returns the images of maps, not clipped."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pixels:
  """The images themselves (DDGAN)."""

  shape: tuple[int, int, int]

  @property
  def frozen(self) -> Mapping[str, base.Frozen]:
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wavelets:
  """Half of the four bands of one orthonormal Haar transform, in [-1, 1] (WaveDiff, arXiv:2211.16152)."""

  shape: tuple[int, int, int]

  @property
  def frozen(self) -> Mapping[str, base.Frozen]:
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
  source: base.Frozen
  decoder: base.Frozen | None
  scaling: str
  posterior: str

  @property
  def frozen(self) -> Mapping[str, base.Frozen]:
    """The autoencoder, and the light decoder if there is one."""
    return {'autoencoder': self.source} | ({'decoder': self.decoder} if self.decoder else {})

  def scale(self, frozen: dict[str, Params]) -> tuple[Array, Array]:
    """Returns mean and scale [1, 1, 1, channels or 1]: y = (z - mean) / scale."""
    found = frozen['autoencoder' + base.STATISTICS]
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
    return (autoencoder.encode(self.source.model, frozen['autoencoder'], x, noise) - mean) / scale

  def to_image(self, frozen: dict[str, Params], y: LatentMap) -> Image:
    """Returns the decoded latents."""
    mean, scale = self.scale(frozen)
    z = y * scale + mean
    if self.decoder is None:
      return autoencoder.decode(self.source.model, frozen['autoencoder'], z)
    return self.decoder.model.apply(frozen['decoder'], autoencoder.quantized(frozen['autoencoder'], z))


def make_space(config: ConfigDict, stage: str) -> Space:
  """Returns the space of `config.<stage>.space`.

  Raises:
    UserError: for a value that is not allowed, or values that contradict each other.
  """
  section, size, channels = config[stage], config.data.image_size, config.data.channels
  if section.space not in SPACES:
    raise UserError(f'space is {section.space!r}; valid: {", ".join(SPACES)}')
  if section.space == 'pixel':
    return Pixels(shape=(size, size, channels))
  if section.space == 'wavelet':
    if size % 2:
      raise UserError(f'space = wavelet halves the image: data.image_size must be even, got {size}')
    return Wavelets(shape=(size // 2, size // 2, 4 * channels))
  return latent_space(config, stage)


def latent_space(config: ConfigDict, stage: str) -> Latents:
  """Returns the space of the latents of the autoencoder that `config.<stage>.autoencoder` names."""
  named, bounded = config[stage].autoencoder, config[stage].model.bounded
  if named.scaling not in SCALINGS:
    raise UserError(f'autoencoder.scaling is {named.scaling!r}; valid: {", ".join(SCALINGS)}')
  if named.posterior not in POSTERIORS:
    raise UserError(f'autoencoder.posterior is {named.posterior!r}; valid: {", ".join(POSTERIORS)}')
  source = autoencoder.source_of(config, named.stage, named.workdir, 'autoencoder.stage', latents=True)
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
    known = base.is_stage(config, named.decoder_stage, 'light_decoder')
    if not known or config[named.decoder_stage].autoencoder.stage != named.stage:
      raise UserError(
        f'autoencoder.decoder_stage is {named.decoder_stage!r}, which is no light decoder of {named.stage!r}'
      )
    decoder = base.Frozen(
      stage=named.decoder_stage,
      network='decoder',
      workdir=named.workdir,
      model=light_decoder.build_model(config, named.decoder_stage),
    )
  return Latents(
    shape=autoencoder.latent_shape(taught, config.data),
    source=source,
    decoder=decoder,
    scaling=named.scaling,
    posterior=named.posterior,
  )
