"""Stage 2 of DiffuseVAE: a diffusion U-Net that refines the VAE's reconstruction x0_vae.

With y_t = x_t - shift, where the shift is 0 (no condition, Formulation 1) or x0_vae (Formulation 2), both
formulations are plain DDPM in y: y_t = alpha_t x0 + sigma_t eps. The shift is added only where the network
reads x_t (Pandey et al. 2022, arXiv:2201.00308, section 3.3 and appendix B, with the coefficients
corrected). Losses, samplers and guidance work in y alone.

A dropped condition (classifier-free guidance) has no shift and the network's learned nulls.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from vaediff import reads
from vaediff.data import pixels
from vaediff.diffusion import gaussian, guidance, likelihood, losses, samplers, schedules
from vaediff.errors import UserError
from vaediff.experiments import base
from vaediff.models.functional import Model
from vaediff.models.unet import UNet
from vaediff.optim import Optimizer, make_optimizer
from vaediff.spaces import encoders
from vaediff.types import Batch, Image, ImageBytes, Keys, Latent, Mask, Metrics, Params

CONDITIONS = {'none': 0, 'formulation1': 1, 'formulation2': 2}
X0_VAE_SOURCES = ('sample', 'mean', 'precomputed')
VARIANCES = ('small', 'large')
CLIPS = ('static', 'dynamic', 'none')
SAMPLER_OPTIONS = {
  'ddpm': ('variance',),
  'ddim': ('eta',),
  'heun': (),
  'dpmpp_2m': (),
  'renoise': (),
  'there_and_back': (),
}
"""What a sampler reads of the stage's `sample` section beside what all of them do."""


def reads_precomputed(section: ConfigDict) -> bool:
  """Returns whether a stage's batches hold the VAE's reconstructions, computed once for all images."""
  if 'diffusion' not in section or 'x0_vae_source' not in section.diffusion:
    return False
  return section.diffusion.x0_vae_source == 'precomputed'


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Condition:
  """What one batch is conditioned on; None where the network reads nothing of the kind.

  `guidance` is one weight per example: read by a network that was built for it, and in place of
  `sample.guidance_weight` otherwise.
  """

  x0_vae: Image | None
  z: Latent | None
  guidance: Float[Array, ' batch'] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refiner:
  """The refiner stage; trains the network `denoiser`.

  Attributes:
    denoiser: the U-Net.
    vae: the frozen VAE, or None when neither x0_vae nor z is read.
    optimizer: of the U-Net.
    schedule: alpha and sigma of t.
    prediction: what the U-Net predicts, 'x0', 'eps' or 'v'.
    loss_weight: of the squared error of x0, by name.
    formulation: 0 = no image condition, 1, 2.
    z_conditioning: the U-Net reads z.
    reads_guidance: the U-Net reads the guidance weight, and one pass guides.
    condition_dropout: probability, per example, of the null condition.
    x0_vae_source: 'sample' or 'mean' of q(z | x) at each step, or 'precomputed' (in the batch).
    flip: random horizontal flips of image and condition.
    microbatches: parts that a batch is split into for the gradient.
    latent_dim: size of z; 0 without a VAE.
    noise_shape: shape of x_T and of an image, (height, width, channels).
    settings: the stage's `sample` section: sampler, step count and so on.
  """

  denoiser: Model
  vae: Model | None
  vae_source: reads.FromStage | None
  optimizer: Optimizer
  schedule: schedules.Schedule
  prediction: str
  loss_weight: str
  formulation: int
  z_conditioning: bool
  reads_guidance: bool
  condition_dropout: float
  x0_vae_source: str
  flip: bool
  microbatches: int
  latent_dim: int
  noise_shape: tuple[int, int, int]
  settings: Mapping[str, Any]

  @classmethod
  def from_config(cls, config: ConfigDict, stage: str) -> 'Refiner':
    """Builds the experiment of `config.<stage>`."""
    section, size, channels = config[stage], config.data.image_size, config.data.channels
    diffusion = section.diffusion
    check_diffusion(diffusion, flip=section.train.flip)
    check_sample(section.sample)
    formulation = CONDITIONS[diffusion.condition]
    needs_vae = formulation > 0 or diffusion.z_conditioning
    if section.sample.t_start < 1 and formulation == 0:
      raise UserError(
        "sample.t_start < 1 starts from a noised x0_vae, which diffusion.condition = 'none' does not have"
      )
    if section.sample.guidance_weight > 0 and diffusion.condition_dropout == 0:
      raise UserError(
        'sample.guidance_weight > 0 needs a network trained with diffusion.condition_dropout > 0, got 0'
      )
    source, latent_dim = None, 0
    if needs_vae:
      if not reads.is_stage(config, section.vae.stage, 'vae'):
        raise UserError(f'vae.stage is {section.vae.stage!r}, which is no VAE stage of this config')
      vae_section = config[section.vae.stage]
      latent_dim = vae_section.model.latent_dim
      source = reads.FromStage(
        stage=section.vae.stage,
        network='vae',
        workdir=section.vae.workdir,
        model=encoders.vae_model(vae_section.model, config.data),
      )
    module = UNet(
      image_size=size,
      image_channels=channels,
      condition_on_image=formulation > 0,
      latent_dim=latent_dim if diffusion.z_conditioning else 0,
      learned_null=diffusion.condition_dropout > 0,
      **section.model.to_dict(),
    )
    image = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
    inputs = [image, jax.ShapeDtypeStruct((1,), jnp.float32)]
    inputs.append(image if formulation > 0 else None)
    inputs.append(jax.ShapeDtypeStruct((1, latent_dim), jnp.float32) if diffusion.z_conditioning else None)
    if section.model.guidance_embedding:
      inputs += [None, jax.ShapeDtypeStruct((1,), jnp.float32)]
    return cls(
      denoiser=Model(module=module, inputs=tuple(inputs)),
      vae=source.model if source else None,
      vae_source=source,
      optimizer=make_optimizer(section.optim, section.train.num_steps),
      schedule=schedules.make_schedule(diffusion.schedule),
      prediction=diffusion.prediction,
      loss_weight=diffusion.loss_weight,
      formulation=formulation,
      z_conditioning=diffusion.z_conditioning,
      reads_guidance=section.model.guidance_embedding,
      condition_dropout=diffusion.condition_dropout,
      x0_vae_source=diffusion.x0_vae_source,
      flip=section.train.flip,
      microbatches=section.train.microbatches,
      latent_dim=latent_dim,
      noise_shape=(size, size, channels),
      settings=section.sample.to_dict(),
    )

  @property
  def networks(self) -> Mapping[str, Model]:
    """The one network of this stage."""
    return {'denoiser': self.denoiser}

  @property
  def takes_x0_vae(self) -> bool:
    """Whether the U-Net reads an image: Formulation 1 or 2."""
    return self.formulation > 0

  @property
  def frozen(self) -> Mapping[str, reads.FromStage]:
    """The VAE, where the U-Net reads x0_vae or z."""
    return {'vae': self.vae_source} if self.vae_source else {}

  @property
  def num_function_evaluations(self) -> int:
    """Forward passes of the U-Net per sampled image."""
    calls = samplers.num_function_evaluations(self.settings['sampler'], self.settings['num_steps'])
    return calls * (2 if self.settings['guidance_weight'] > 0 and not self.reads_guidance else 1)

  reads_image = False

  def init(self, key: jax.Array) -> base.TrainState:
    """Returns the state at step 0."""
    network = base.init_network(self.denoiser, self.optimizer, key)
    return base.TrainState(step=jnp.int32(0), networks={'denoiser': network}, extra={})

  # The condition ----------------------------------------------------------------------------------

  def encode(self, params: dict[str, Params], frozen: dict[str, Params], x: Image) -> tuple[Latent, Latent]:
    """Returns mean and log variance of the frozen VAE's q(z | x)."""
    del params
    return self.vae.apply(frozen['vae'], x, method='encode')

  def condition(self, frozen: dict[str, Params], given: dict[str, jax.Array]) -> Condition:
    """Returns the condition from `given`: 'z', and 'x0_vae' where it is not decode(z)."""
    if self.vae is None:
      return Condition(x0_vae=None, z=None)
    x0_vae = (
      given['x0_vae'] if 'x0_vae' in given else self.vae.apply(frozen['vae'], given['z'], method='decode')
    )
    weight = self.settings['guidance_weight']
    return Condition(
      x0_vae=x0_vae if self.formulation > 0 else None,
      z=given['z'] if self.z_conditioning else None,
      guidance=jnp.full(x0_vae.shape[0], weight) if self.reads_guidance else None,
    )

  def examples(
    self, frozen: dict[str, Params], batch: Batch, key: jax.Array, *, flip: bool
  ) -> tuple[Image, Condition]:
    """Returns x0 and its condition, flipped together."""
    key_flip, key_z = jax.random.split(key)
    x0 = pixels.to_unit_range(batch['image'])
    mask = pixels.random_flip(key_flip, x0.shape[0]) if flip else None
    if flip:
      x0 = pixels.flip(x0, mask)
    if self.vae is None:
      return x0, Condition(x0_vae=None, z=None)
    if 'x0_vae' in batch:
      x0_vae = pixels.to_unit_range(batch['x0_vae'])
      given = {'x0_vae': pixels.flip(x0_vae, mask) if flip else x0_vae}
      if self.z_conditioning:
        given['z'] = batch['z']
    else:
      mean, logvar = self.vae.apply(frozen['vae'], x0, method='encode')
      given = {'z': encoders.draw_latent(mean, logvar, key_z) if self.x0_vae_source == 'sample' else mean}
    return x0, self.condition(frozen, given)

  # Training ---------------------------------------------------------------------------------------

  def predict(
    self,
    params: Params,
    y: Image,
    t: jax.Array,
    condition: Condition,
    drop: Mask | None = None,
    key_dropout: jax.Array | None = None,
  ) -> jax.Array:
    """Returns the U-Net's output at y_t."""
    return self.denoiser.apply(params, *self.inputs(y, t, condition, drop), key_dropout=key_dropout)

  def features(self, params: Params, y: Image, t: jax.Array, condition: Condition) -> list[jax.Array]:
    """Returns the maps of the U-Net's way down and middle at y_t (`UNet.features`)."""
    return self.denoiser.apply(params, *self.inputs(y, t, condition, None), method='features')

  def inputs(self, y: Image, t: jax.Array, condition: Condition, drop: Mask | None) -> list[jax.Array | None]:
    """Returns what the U-Net reads at y_t; the only place where Formulation 2 adds its shift."""
    x_t = y
    if self.formulation > 0:
      shift = gaussian.shift(self.formulation, condition.x0_vae)
      x_t = y + (shift if drop is None else jnp.where(drop[:, None, None, None], 0.0, shift))
    inputs = [x_t, t, condition.x0_vae, condition.z, drop]
    return [*inputs, condition.guidance] if self.reads_guidance else inputs

  def example_losses(
    self,
    params: Params,
    x0: Image,
    condition: Condition,
    key: jax.Array,
    *,
    training: bool,
  ) -> jax.Array:
    """Returns the weighted denoising loss of each example at one random time."""
    key_t, key_eps, key_drop, key_dropout = jax.random.split(key, 4)
    t = schedules.sample_time(self.schedule, key_t, x0.shape[0])
    eps = jax.random.normal(key_eps, x0.shape)
    drop = None
    if training and self.condition_dropout > 0:
      drop = jax.random.bernoulli(key_drop, self.condition_dropout, (x0.shape[0],))
    y = gaussian.q_sample(x0, eps, t, self.schedule)
    output = self.predict(params, y, t, condition, drop, key_dropout if training else None)
    return losses.denoising_loss(self.prediction, output, x0, eps, t, self.schedule, self.loss_weight)

  def train_step(
    self, state: base.TrainState, frozen: dict[str, Params], batch: Batch, key: jax.Array
  ) -> tuple[base.TrainState, Metrics]:
    """Returns the state after one update of the denoising loss."""

    def loss_fn(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
      key_example, key_loss = jax.random.split(key)
      x0, condition = self.examples(frozen, batch, key_example, flip=self.flip)
      loss = jnp.mean(self.example_losses(params, x0, condition, key_loss, training=True))
      return loss, {'loss': loss}

    params = state.networks['denoiser'].params
    grads, metrics = base.gradients(loss_fn, params, batch, key, self.microbatches)
    state, norms = base.update_one(state, 'denoiser', grads, self.optimizer)
    return state, {**metrics, **norms}

  def eval_step(
    self, params: dict[str, Params], frozen: dict[str, Params], batch: Batch, key: jax.Array
  ) -> Metrics:
    """Returns the denoising loss without dropout or flips."""
    key_example, key_loss = jax.random.split(key)
    x0, condition = self.examples(frozen, batch, key_example, flip=False)
    values = self.example_losses(params['denoiser'], x0, condition, key_loss, training=False)
    return {'loss': base.masked_mean(values, batch['mask'])}

  # Sampling ---------------------------------------------------------------------------------------

  def x0_hat(
    self, params: Params, condition: Condition, *, dropped: bool = False
  ) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns (y, t) -> x0_hat as the U-Net says it, with the condition or with the learned null."""

    def denoise(y, t):
      drop = jnp.full(t.shape, dropped) if self.condition_dropout > 0 else None
      output = self.predict(params, y, t, condition, drop)
      return gaussian.to_x0(self.prediction, output, y, t, self.schedule)

    return denoise

  def denoise(self, params: Params, condition: Condition) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns (y, t) -> x0_hat with guidance and clipping, for the samplers."""
    denoise = self.x0_hat(params, condition)
    if not self.reads_guidance:
      weight = self.settings['guidance_weight'] if condition.guidance is None else condition.guidance
      denoise = guidance.guided(denoise, self.x0_hat(params, condition, dropped=True), weight)
    if self.settings['clip'] == 'static':
      return guidance.clip(denoise)
    if self.settings['clip'] == 'dynamic':
      return guidance.threshold(denoise, self.settings['threshold_percentile'])
    return denoise

  def sample(
    self,
    params: dict[str, Params],
    frozen: dict[str, Params],
    condition: dict[str, jax.Array],
    keys: Keys,
  ) -> dict[str, Image]:
    """Returns {'x0': refined images} and, where there is one, {'x0_vae': what they were refined from}.

    Args:
      params: `denoiser`.
      frozen: `vae`.
      condition: 'z' where a VAE is read; optionally 'x0_vae' (takes the place of decode(z)) and 'noise'
        (takes the place of the noise at the start, unit variance).
      keys: one per image.
    """
    settings = self.settings
    given = self.condition(frozen, condition)
    keys = jax.vmap(lambda key: jax.random.split(key))(keys)
    if 'noise' in condition:
      noise = condition['noise']
    else:
      noise = jax.vmap(lambda key: jax.random.normal(key, self.noise_shape))(keys[:, 0])
    y = settings['temperature'] * noise
    if settings['t_start'] < 1:
      t = jnp.full(noise.shape[0], settings['t_start'])
      y = gaussian.q_sample(given.x0_vae, y, t, self.schedule)
    sampler = settings['sampler']
    x0 = samplers.get_sampler(sampler)(
      self.denoise(params['denoiser'], given),
      self.schedule,
      y,
      keys[:, 1],
      num_steps=settings['num_steps'],
      grid=settings['grid'],
      t_start=settings['t_start'],
      **{name: settings[name] for name in SAMPLER_OPTIONS[sampler]},
    )
    images = {'x0': jnp.clip(x0, -1.0, 1.0)}
    return images if given.x0_vae is None else {'x0_vae': given.x0_vae, **images}

  # Likelihood -------------------------------------------------------------------------------------

  likelihood = 'mass of bytes'

  def negative_elbo(
    self,
    params: dict[str, Params],
    frozen: dict[str, Params],
    image: ImageBytes,
    keys: Keys,
    num_times: int,
  ) -> dict[str, jax.Array]:
    """Returns the terms of a bound on -log p(x) of byte images, in nats per example.

    With a VAE the latent variables are z and y: -log p(x) <= E_q(z|x)[bound of p(x | z)] + KL(q(z | x) ||
    N(0, I)), the term 'kl', from one z per image. The other terms are those of `likelihood.bound_terms`.
    Without guidance; x0_hat is clipped to [-1, 1] and the steps have `sample.variance`, as part of the model.
    """
    x0, condition, terms = pixels.to_unit_range(image), Condition(x0_vae=None, z=None), {}
    keys = jax.vmap(lambda key: jax.random.split(key))(keys)
    if self.vae is not None:
      mean, logvar = self.vae.apply(frozen['vae'], x0, method='encode')
      noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys[:, 0])
      condition = self.condition(frozen, {'z': mean + jnp.exp(0.5 * logvar) * noise})
      terms['kl'] = losses.kl_to_standard_normal(mean, logvar)
    denoise = guidance.clip(self.x0_hat(params['denoiser'], condition))
    variance = self.settings['variance']
    return terms | likelihood.bound_terms(denoise, self.schedule, x0, keys[:, 1], num_times, variance)


def check_diffusion(config: ConfigDict, *, flip: bool) -> None:
  """Raises UserError where a stage's `diffusion` section holds a value that is not allowed."""
  allowed = {
    'schedule': schedules.SCHEDULES,
    'prediction': gaussian.PREDICTIONS,
    'loss_weight': losses.LOG_WEIGHTS,
    'condition': CONDITIONS,
    'x0_vae_source': X0_VAE_SOURCES,
  }
  check_names(config, 'diffusion', allowed)
  if not 0 <= config.condition_dropout < 1:
    raise UserError(f'diffusion.condition_dropout must be in [0, 1), got {config.condition_dropout}')
  if config.x0_vae_source == 'precomputed' and config.z_conditioning and flip:
    raise UserError(
      "diffusion.x0_vae_source = 'precomputed' with z_conditioning cannot be joined with train.flip: the "
      "stored z belongs to the image as it is; use 'mean', or train.flip = False"
    )


def check_sample(config: ConfigDict) -> None:
  """Raises UserError where a stage's `sample` section holds a value that is not allowed."""
  allowed = {
    'sampler': samplers.SAMPLERS,
    'grid': samplers.GRIDS,
    'variance': VARIANCES,
    'clip': CLIPS,
  }
  check_names(config, 'sample', allowed)
  if config.num_steps < 1:
    raise UserError(f'sample.num_steps must be >= 1, got {config.num_steps}')
  if not 0 < config.t_start <= 1:
    raise UserError(f'sample.t_start must be in (0, 1], got {config.t_start}')
  if not 0 < config.threshold_percentile <= 100:
    raise UserError(f'sample.threshold_percentile must be in (0, 100], got {config.threshold_percentile}')
  for field in ('eta', 'temperature', 'guidance_weight'):
    if config[field] < 0:
      raise UserError(f'sample.{field} must be >= 0, got {config[field]}')
  if config.eta > 1:
    raise UserError(f'sample.eta must be in [0, 1], got {config.eta}')


def check_names(config: ConfigDict, section: str, allowed: Mapping[str, Any]) -> None:
  """Raises UserError where a field's value is not among the allowed names, which it lists."""
  for field, names in allowed.items():
    if config[field] not in names:
      raise UserError(f'{section}.{field} is {config[field]!r}; valid: {", ".join(names)}')
