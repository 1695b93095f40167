"""Encoders of earlier stages: how a VAE, an autoencoder and a light decoder are built, named and read."""

import jax
import jax.numpy as jnp
from jaxtyping import Array
from ml_collections import ConfigDict

from vaediff import reads
from vaediff.errors import UserError
from vaediff.models import autoencoder as autoencoder_module
from vaediff.models import codebook
from vaediff.models import vae as vae_module
from vaediff.models.functional import Model
from vaediff.types import Image, LatentMap, Params

CODES = 'codes'
"""Name of a codebook among an autoencoder's parameters."""


def vae_model(config: ConfigDict, data: ConfigDict) -> Model:
  """Returns the VAE that a stage's `model` section describes, for the images of `data`."""
  size, channels = data.image_size, data.channels
  return Model(
    module=vae_module.Vae(image_channels=channels, **config.to_dict()),
    inputs=(jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32),),
  )


def draw_latent(mean: Array, logvar: Array, key: jax.Array) -> Array:
  """Returns z ~ N(mean, exp(logvar)), reparameterised, with one key for the batch or one per example."""
  return mean + jnp.exp(0.5 * logvar) * normal(key, mean.shape)


def normal(key: jax.Array, shape: tuple[int, ...]) -> Array:
  """Returns standard normal numbers of a batch's shape, with one key for the batch or one per example."""
  if key.ndim:
    return jax.vmap(lambda one: jax.random.normal(one, shape[1:]))(key)
  return jax.random.normal(key, shape)


def vae_of(config: ConfigDict, stage: str, workdir: str, field: str) -> reads.FromStage:
  """Returns the frozen VAE of a stage.

  Raises:
    UserError: when the stage is no VAE; names the field that named it.
  """
  section = reads.need_stage(config, stage, 'vae', field, 'VAE stage')
  model = vae_model(section.model, config.data)
  return reads.FromStage(stage=stage, network='vae', workdir=workdir, model=model)


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


def autoencoder_of(config: ConfigDict, stage: str, workdir: str, field: str) -> reads.FromStage:
  """Returns the frozen autoencoder of a stage.

  Raises:
    UserError: when the stage is no autoencoder; names the field that named it.
  """
  section = reads.need_stage(config, stage, 'autoencoder', field, 'autoencoder stage')
  model = autoencoder_model(section.model, config.data)
  return reads.FromStage(stage=stage, network='autoencoder', workdir=workdir, model=model)


def encode(model: Model, params: Params, x: Image, noise: LatentMap | None) -> LatentMap:
  """Returns the latents of images in [-1, 1]; with a KL bottleneck and `noise`, drawn from the posterior."""
  mean, logvar = model.apply(params, x, method='encode')
  return mean if logvar is None or noise is None else mean + jnp.exp(0.5 * logvar) * noise


def decode(model: Model, params: Params, z: LatentMap) -> Image:
  """Returns the images of latents; a codebook moves them to its codes first."""
  return model.apply(params, quantized(model, params, z), method='decode')


def quantized(model: Model, params: Params, z: LatentMap) -> LatentMap:
  """Returns the latents as the decoder takes them: at their codes, exactly, where there is a codebook."""
  if CODES not in params:
    return z
  codes = codes_of(model, params)
  return codebook.lookup(codes, codebook.nearest(z, codes))


def codes_of(model: Model, params: Params) -> codebook.Codes:
  """Returns the codes of an autoencoder as they are compared and decoded: at length 1 where it says so."""
  codes = params[CODES]
  return codebook.unit(codes) if model.module.normalized_codes else codes


def light_decoder_of(config: ConfigDict, named: ConfigDict) -> reads.FromStage:
  """Returns the frozen light decoder that `decoder_stage` of a section `autoencoder` names.

  Raises:
    UserError: when it is no light decoder, or one of another autoencoder.
  """
  stage = named.decoder_stage
  known = reads.is_stage(config, stage, 'light_decoder')
  if not known or config[stage].autoencoder.stage != named.stage:
    raise UserError(
      f'autoencoder.decoder_stage is {stage!r}, which is no light decoder of {named.stage!r}'
    )
  return reads.FromStage(
    stage=stage, network='decoder', workdir=named.workdir, model=light_decoder_model(config, stage)
  )


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
