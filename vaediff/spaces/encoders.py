"""Encoders of earlier stages: how a VAE, an autoencoder and a light decoder are built, named and read."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vaediff import reads
from vaediff.errors import UserError
from vaediff.models import autoencoder as autoencoder_module
from vaediff.models import codebook
from vaediff.models import vae as vae_module
from vaediff.models.functional import Model
from vaediff.types import Image, Latent, LatentMap, Params

CODES = 'codes'
"""Name of a codebook among an autoencoder's parameters."""


def vae_model(config: ConfigDict, data: ConfigDict) -> Model:
  """Returns the VAE that a stage's `model` section describes, for the images of `data`."""
  size, channels = data.image_size, data.channels
  return Model(
    module=vae_module.Vae(image_channels=channels, **config.to_dict()),
    inputs=(jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32),),
  )


def draw_latent(mean: Latent, logvar: Latent, key: jax.Array) -> Latent:
  """Returns z ~ N(mean, exp(logvar)), reparameterised."""
  return mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)


def vae_of(config: ConfigDict, section: ConfigDict) -> reads.FromStage:
  """Returns the frozen VAE that `vae.stage` names."""
  named = section.vae
  if not reads.is_stage(config, named.stage, 'vae'):
    raise UserError(f'vae.stage is {named.stage!r}, which is no VAE stage of this config')
  return reads.FromStage(
    stage=named.stage,
    network='vae',
    workdir=named.workdir,
    model=vae_model(config[named.stage].model, config.data),
  )


def autoencoder_model(config: ConfigDict, data: ConfigDict) -> Model:
  """Returns the autoencoder that a stage's `model` section describes, for the images of `data`."""
  size, channels = data.image_size, data.channels
  return Model(
    module=autoencoder_module.Autoencoder(image_channels=channels, **config.to_dict()),
    inputs=(jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32),),
  )


def latent_shape(config: ConfigDict, data: ConfigDict) -> tuple[int, int, int]:
  """Returns (height, width, channels) of the latents of the images of `data`."""
  side = data.image_size // 2 ** (len(config.channel_multipliers) - 1)
  return side, side, config.latent_channels


def source_of(config: ConfigDict, stage: str, workdir: str, field: str, *, latents: bool) -> reads.FromStage:
  """Returns the frozen autoencoder of a stage, with the statistics of its latents if wanted.

  Raises:
    UserError: when the stage is no autoencoder; names the field that named it.
  """
  if not reads.is_stage(config, stage, 'autoencoder'):
    raise UserError(f'{field} is {stage!r}, which is no autoencoder stage of this config')
  section = config[stage]
  return reads.FromStage(
    stage=stage,
    network='autoencoder',
    workdir=workdir,
    model=autoencoder_model(section.model, config.data),
    latent_channels=section.model.latent_channels if latents else 0,
  )


def encode(model: Model, params: Params, x: Image, noise: LatentMap | None) -> LatentMap:
  """Returns the latents of images in [-1, 1]; with a KL bottleneck and `noise`, drawn from the posterior."""
  mean, logvar = model.apply(params, x, method='encode')
  return mean if logvar is None or noise is None else mean + jnp.exp(0.5 * logvar) * noise


def decode(model: Model, params: Params, z: LatentMap) -> Image:
  """Returns the images of latents; a codebook moves them to its codes first."""
  return model.apply(params, quantized(params, z), method='decode')


def quantized(params: Params, z: LatentMap) -> LatentMap:
  """Returns the latents as the decoder takes them: at their codes, where there is a codebook."""
  return codebook.quantize(z, params[CODES])[0] if CODES in params else z


def light_decoder_model(config: ConfigDict, stage: str) -> Model:
  """Returns the light decoder of a stage, for the latents of the autoencoder that the stage names."""
  section = config[stage]
  taught = config[section.autoencoder.stage].model
  return Model(
    module=autoencoder_module.LightDecoder(
      latent_channels=taught.latent_channels,
      image_channels=config.data.channels,
      num_upsamplings=len(taught.channel_multipliers) - 1,
      **section.model.to_dict(),
    ),
    inputs=(jax.ShapeDtypeStruct((1, *latent_shape(taught, config.data)), jnp.float32),),
  )
