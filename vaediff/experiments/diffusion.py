"""A diffusion: a space x conditions x a denoiser. DiffuseVAE's second stage is pixels x the VAE's image.

Images are brought into the space, what they are conditioned on is observed, and a U-Net learns the denoising
loss (`experiments.denoiser`). A sample starts from noise and from drawn or given conditions.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from ml_collections import ConfigDict

from vaediff import checks, reads
from vaediff.conditions import SAMPLE_BOUNDS, make_conditions, pca
from vaediff.conditions import vae as vae_conditions
from vaediff.conditions.base import Conditions
from vaediff.data import pixels
from vaediff.diffusion import gaussian, grids, importance, likelihood, losses, samplers, schedules
from vaediff.errors import UserError
from vaediff.experiments import base, bounds, diffusion_checks, extended, guides, jointly, variance
from vaediff.experiments.corrected import NoiseCorrection
from vaediff.experiments.denoiser import LEARNED, Denoiser
from vaediff.experiments.perceptual import Perceptual, perceptual_of
from vaediff.models import ports
from vaediff.models.functional import Model
from vaediff.models.unet import UNet
from vaediff.optim import Optimizer, make_optimizer
from vaediff.spaces import Space, make_space
from vaediff.types import Batch, Given, Keys, LatentMap, Metrics, Read, Values

INDEX, FACTOR, POSITION = 'time_index', 'time_factor', 'position'
"""Names, beside the images, of what is decided for a whole batch before it is split into parts."""
CLIPS = ('static', 'dynamic', 'none')
BOUNDS = {
  'diffusion.schedule': checks.one_of(schedules.SCHEDULES),
  'diffusion.prediction': checks.one_of(gaussian.PREDICTIONS),
  'diffusion.loss_weight': checks.one_of(losses.LOG_WEIGHTS),
  'diffusion.condition': checks.one_of(vae_conditions.FORMULATIONS),
  'diffusion.x0_vae_source': checks.one_of(vae_conditions.SOURCES),
  'diffusion.condition_dropout': checks.below_one(),
  'space_factor': bounds.whole(1, bounds.MAX_WIDTH),
  **vae_conditions.BOUNDS,
  **pca.BOUNDS,
  'sample.sampler': checks.one_of(samplers.SAMPLERS),
  'diffusion.variance': checks.one_of(variance.VARIANCES),
  'sample.grid': checks.one_of(grids.ALL_GRIDS),
  'sample.variance': checks.one_of(samplers.VARIANCES),
  'sample.bound_steps': bounds.whole(0, bounds.MAX_CALLS),
  'sample.clip': checks.one_of(CLIPS),
  'sample.num_steps': bounds.calls(),
  'sample.t_start': checks.inside_or_at(0, 1),
  'sample.threshold_percentile': checks.inside_or_at(0, 100),
  'sample.temperature': bounds.spread(),
  **guides.BOUNDS,
  **SAMPLE_BOUNDS,
  'sample.eta': checks.between(0, 1),
  'sample.aug_level': checks.between(0, 1),
  **bounds.within('model', bounds.CONVOLUTIONAL),
  'model.num_heads': bounds.whole(1, bounds.MAX_LEVELS),
  'model.head_channels': bounds.whole(0, bounds.MAX_WIDTH),
  **bounds.optimizers('optim'),
}
"""Of every stage with the section of a diffusion: students too."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diffusion(base.InSpace):
  """The stage of a diffusion; trains the network `denoiser`.

  Attributes:
    space: where it is diffused.
    denoiser: the network and how it is read.
    optimizer: of the network.
    flip: random horizontal flips of every image of an example.
    microbatches: parts that a batch is split into for the gradient.
    settings: the stage's `sample` section: sampler, step count and so on.
    start_image: what is given of that name a start below t = 1 is made of.
    time_sampler: of the training times, 'uniform' or 'loss_second_moment'.
    for_sampling: networks of other checkpoints that guide its samples, which training does not read.
    first: the network that its own begins as, which may have been trained without one of its conditions.
    noise_correction: of a quantized network, what its sampler does about the error; None = nothing.
  """

  space: Space
  denoiser: Denoiser
  optimizer: Optimizer
  flip: bool
  microbatches: int
  settings: Mapping[str, Any]
  start_image: str
  time_sampler: str = 'uniform'
  for_sampling: Mapping[str, reads.Reads] = dataclasses.field(default_factory=dict)
  first: Mapping[str, reads.FromStage] = dataclasses.field(default_factory=dict)
  noise_correction: NoiseCorrection | None = None

  bounds = {**BOUNDS, **variance.LOSS_BOUNDS}

  @classmethod
  def from_config(cls, config: ConfigDict, stage: str) -> 'Diffusion':
    """Builds the experiment of `config.<stage>`."""
    section = config[stage]
    taught = 'teacher' in section
    checks.check(section, BOUNDS if taught else Diffusion.bounds, f'config.{stage}: ')
    space = make_space(config, stage)
    conditions = guides.with_target(config, stage, make_conditions(config, stage, space))
    diffusion_checks.check(section, space, conditions)
    plain = make_denoiser(section, space, conditions, perceptual_of(config, stage, space))
    variance.check(section, plain.schedule, taught=taught)
    denoiser, for_sampling = guides.guided(config, stage, space, plain, unguided)
    return cls(
      space=space,
      denoiser=denoiser,
      for_sampling=for_sampling,
      first=extended.source(
        section, conditions, stage, lambda known: make_denoiser(section, space, known).model
      ),
      optimizer=make_optimizer(section.optim, section.train.num_steps),
      flip=section.train.flip,
      microbatches=section.train.microbatches,
      settings=section.sample.to_dict(),
      start_image=vae_conditions.IMAGE,
      time_sampler='uniform' if taught else section.loss.time_sampler,
    )

  @property
  def conditions(self) -> Conditions:
    """What it is conditioned on."""
    return self.denoiser.conditions

  @property
  def frozen(self) -> Mapping[str, reads.Reads]:
    """What the space, the conditions and the loss read."""
    perceptual = self.denoiser.perceptual
    return {**super().frozen, **(perceptual.frozen if perceptual else {})}

  @property
  def starts(self) -> Mapping[str, reads.FromStage]:
    """The network that its own begins as."""
    return self.first

  @property
  def diffusion(self) -> 'Diffusion':
    """The stage itself, which draws its own samples."""
    return self

  @property
  def networks(self) -> Mapping[str, Model]:
    """The denoiser, and encoders that are trained with it."""
    return {self.denoiser.network: self.denoiser.model, **jointly.models(self.conditions)}

  @property
  def num_function_evaluations(self) -> int:
    """Forward passes of the network per sampled image."""
    sampler = self.settings['sampler']
    shared = {name: self.settings[name] for name in ('num_steps', 'grid', 't_start')}
    options = {name: self.settings[name] for name in samplers.options(sampler)}
    times = samplers.evaluation_times(sampler, self.denoiser.schedule, **shared, **options)
    return self.denoiser.num_calls(times)

  def alone(self) -> 'Diffusion':
    """Returns the stage sampled without networks of other checkpoints; terms of its own network stay."""
    terms = tuple(term for term in self.denoiser.terms if term.guide is None)
    denoiser = dataclasses.replace(self.denoiser, terms=terms, classifier=None)
    return dataclasses.replace(self, denoiser=denoiser, for_sampling={})

  @property
  def can_be_guided(self) -> bool:
    """Whether training drops conditions, so that there is a weaker branch."""
    return bool(self.conditions.droppable)

  @property
  def likelihood(self) -> str:
    """Of bytes, where the images themselves are diffused, on what has a density or a known prior."""
    return base.BYTES if self.space.is_data and self.conditions.bounds_images else ''

  @property
  def no_likelihood(self) -> str:
    """Why there is no bound, where the maps are none of the data."""
    if self.space.is_data:
      return ''
    return (
      f'a bound is of the density of images, and the maps of {type(self.space).__name__.lower()} that are '
      "diffused here are others; diffuse pixels (space = 'pixel') for one"
    )

  def columns(self) -> base.Columns:
    """Returns condition, sampler and its settings."""
    sampler = self.settings['sampler']
    return base.Columns(
      condition=self.conditions.title,
      sampler=sampler,
      method=sampler,
      steps=self.settings['num_steps'],
      guidance=self.settings['guidance_weight'],
    )

  def init(self, key: jax.Array) -> base.TrainState:
    """Returns the state at step 0."""
    network = base.init_network(self.denoiser.model, self.optimizer, key)
    state = base.TrainState(
      step=jnp.int32(0), networks={self.denoiser.network: network}, extra=self.times_seen()
    )
    return jointly.init(state, self.conditions, self.optimizer, key)

  def times_seen(self) -> dict[str, dict[str, Array]]:
    """Returns what the state holds of the losses at training times, where these are drawn by them."""
    steps = self.denoiser.schedule.train_steps if self.draws_times else 0
    return {variance.HISTORY: importance.start(steps)} if steps else {}

  def start(self, state: base.TrainState, frozen: Read) -> base.TrainState:
    """Returns the state whose networks are those that they begin as."""
    return jointly.start(extended.start(state, frozen, self.denoiser.network), self.conditions, frozen)

  @property
  def draws_times(self) -> bool:
    """Whether training times are drawn by the losses that were seen at them."""
    return self.time_sampler != 'uniform'

  # Training ---------------------------------------------------------------------------------------

  def examples(self, read: Read, batch: Batch, key: jax.Array, *, training: bool) -> tuple[Array, Values]:
    """Returns y0, maps of the space, and the values beside them; in training with flips."""
    key_flip, key_given, key_map = jax.random.split(key, 3)
    batch = pixels.prepare(batch, key_flip if training and self.flip else None)
    x = batch['image']
    given = self.conditions.observe(read, batch, x, key_given, training=True)
    values = self.conditions.values(read, self.conditions.complete(read, given))
    return self.space.encode(read, x, key_map), values

  def train_step(
    self, state: base.TrainState, frozen: Read, batch: Batch, key: jax.Array, kind: str = ''
  ) -> tuple[base.TrainState, Metrics]:
    """Returns the state after one update of the loss."""
    del kind
    count = batch['image'].shape[0]
    state, moved, key = jointly.before_update(state, self.conditions, batch, key, flip=self.flip)
    batch, key = self.marked(state, batch, key)

    def loss_fn(params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
      read = {**frozen, **params}
      key_example, key_loss = jax.random.split(key)
      y0, values = self.examples(read, batch, key_example, training=True)
      if not self.draws_times:
        terms = self.denoiser.loss_terms(read, y0, values, key_loss, training=True)
        metrics = jax.tree.map(jnp.mean, terms)
        return metrics['loss'], metrics
      t = (batch[INDEX] + 1) / jnp.float32(self.denoiser.schedule.train_steps)
      terms = self.denoiser.loss_terms(read, y0, values, key_loss, training=True, t=t)
      metrics = {term: jnp.mean(batch[FACTOR] * each) for term, each in terms.items()}
      # parts of a batch are averaged: this puts each loss in its place in the whole
      each = jnp.zeros(count).at[batch[POSITION]].set(self.microbatches * terms['loss'])
      return metrics['loss'], {**metrics, variance.HISTORY: each}

    params = {name: network.params for name, network in state.networks.items()}
    grads, metrics = base.gradients(loss_fn, params, batch, key, self.microbatches)
    if self.draws_times:
      history = importance.update(state.extra[variance.HISTORY], batch[INDEX], metrics.pop(variance.HISTORY))
      state = state.replace(extra={**state.extra, variance.HISTORY: history})
    state, norms = jointly.update(state, self.conditions, grads, self.optimizer)
    return state, {**metrics, **moved, **norms}

  def marked(self, state: base.TrainState, batch: Batch, key: jax.Array) -> tuple[Batch, jax.Array]:
    """Returns the batch with what is decided of it as a whole, and the key that is left."""
    if not self.draws_times:
      return batch, key
    key_times, key = jax.random.split(key)
    count = batch['image'].shape[0]
    index, factor = importance.draw(state.extra[variance.HISTORY], key_times, count)
    return {**batch, INDEX: index, FACTOR: factor, POSITION: jnp.arange(count)}, key

  def eval_step(self, read: Read, batch: Batch, key: jax.Array) -> Metrics:
    """Returns the denoising loss without drops, dropout or flips."""
    key_example, key_loss = jax.random.split(key)
    y0, values = self.examples(read, batch, key_example, training=False)
    losses_of_each = self.denoiser.losses(read, y0, values, key_loss, training=False)
    return {'loss': base.masked_mean(losses_of_each, batch['mask'])}

  # Sampling ---------------------------------------------------------------------------------------

  def maps(self, read: Read, given: Given, keys: base.SampleKeys) -> LatentMap:
    """Returns maps of the space after the sampler's steps from the given noise."""
    values = self.conditions.values(read, given)
    denoise, y = self.sampler_denoiser(read, values), self.initial(read, given)
    return self.steps(denoise, y, keys.sampler, self.settings['t_start'], change=self.change(read))

  def change(self, read: Read) -> samplers.Change | None:
    """Returns what the sampler's table becomes by the error of the network; None = it stays as it is."""
    return self.noise_correction.change(read, self.denoiser) if self.noise_correction else None

  def sampler_denoiser(self, read: Read, values: Values) -> gaussian.Denoise:
    """Returns the denoiser that the sampler calls, with what it asks for beside x0_hat."""
    denoise = {
      '': self.denoiser.denoise,
      samplers.FRACTION: self.denoiser.with_fraction,
      samplers.UNCLIPPED: self.denoiser.with_unclipped,
    }[samplers.second_output(self.settings['sampler'], self.settings)]
    return denoise(read, values)

  def initial(self, read: Read, given: Given) -> LatentMap:
    """Returns the state at `sample.t_start`: the given noise, or a clean image with that of its time."""
    y = self.settings['temperature'] * given[base.NOISE]
    if self.settings['t_start'] < 1:
      t = jnp.full(y.shape[0], self.settings['t_start'])
      start = self.space.encode(read, given[self.start_image], None)
      y = gaussian.q_sample(start, y, t, self.denoiser.schedule)
    return y

  def steps(self, denoise: gaussian.Denoise, y: LatentMap, keys: Keys, t_start: float, **more: Any) -> Any:
    """Returns what the configured sampler makes of the state y at `t_start`; `more` is of all samplers."""
    settings, sampler = self.settings, self.settings['sampler']
    return samplers.get_sampler(sampler)(
      denoise,
      self.denoiser.schedule,
      y,
      keys,
      num_steps=settings['num_steps'],
      grid=settings['grid'],
      t_start=t_start,
      **{name: settings[name] for name in samplers.options(sampler)},
      **more,
    )

  # Likelihood -------------------------------------------------------------------------------------

  def bound(self, read: Read, batch: Batch, keys: Keys, num_times: int) -> dict[str, jax.Array]:
    """Returns the terms of a bound on -log p(x) of byte images, in nats per example.

    With a VAE the latent variables are z and y: -log p(x) <= E_q(z|x)[bound of p(x | z)] + KL(q(z | x) ||
    N(0, I)), the term 'kl', from one z per image. The other terms are those of `likelihood.bound_terms`.
    Without guidance; x0_hat is clipped to [-1, 1] and the steps have `sample.variance`, as part of the model.
    With `sample.bound_steps` they are those of that many steps of `sample.grid`, else all of the table.
    """
    if not self.likelihood:
      raise UserError(self.no_likelihood)
    x0 = pixels.to_unit_range(batch['image'])
    keys = jax.vmap(lambda key: jax.random.split(key))(keys)
    given = self.conditions.observe(read, batch, x0, keys[:, 0])
    values = self.conditions.values(read, self.conditions.complete(read, given))
    settings, schedule, times = self.settings, self.denoiser.schedule, None
    if settings['bound_steps']:
      times = grids.time_grid(schedule, settings['grid'], settings['bound_steps'], field='sample.bound_steps')
      num_times = min(num_times, len(times) - 2)
    if settings['variance'] == LEARNED:
      denoise = self.denoiser.bounded_with_fraction(read, values)
    else:
      denoise = self.denoiser.clip_to_data(self.denoiser.x0_hat(read, values))
    terms = likelihood.bound_terms(denoise, schedule, x0, keys[:, 1], num_times, settings['variance'], times)
    return {**self.conditions.nats(read, x0), **terms}


def make_denoiser(
  section: ConfigDict, space: Space, conditions: Conditions, perceptual: Perceptual | None = None
) -> Denoiser:
  """Returns the U-Net of a stage's section, and how it is read."""
  height, width, channels = space.shape
  if height != width:
    raise UserError(f'the U-Net takes square maps, those of space = {section.space} are {height} x {width}')
  model = section.model.to_dict()
  del model['guidance_embedding']  # says that there is a condition
  state = jax.ShapeDtypeStruct((1, *space.shape), jnp.float32)
  return Denoiser(
    model=Model(
      module=UNet(
        image_size=height,
        image_channels=channels,
        ports=conditions.named_ports,
        learned_variance=section.diffusion.variance == LEARNED,
        **model,
      ),
      inputs=(state, jax.ShapeDtypeStruct((1,), jnp.float32), ports.structs(conditions.ports)),
    ),
    conditions=conditions,
    schedule=schedules.make_schedule(section.diffusion.schedule),
    prediction=section.diffusion.prediction,
    loss_weight=section.diffusion.loss_weight,
    bound=space.bound,
    clip=section.sample.clip,
    threshold_percentile=section.sample.threshold_percentile,
    shift=vae_conditions.IMAGE if section.diffusion.condition == 'formulation2' else '',
    variance=section.diffusion.variance,
    of_bytes=space.is_data,
    perceptual=perceptual,
    **({} if 'teacher' in section else {name: section.loss[name] for name in ('objective', 'vlb_weight')}),
  )


def unguided(config: ConfigDict, stage: str) -> tuple[Space, Denoiser]:
  """Returns space and denoiser of a stage, guided by nothing."""
  checks.check(config[stage], BOUNDS, f'config.{stage}: ')
  space = make_space(config, stage)
  return space, make_denoiser(config[stage], space, make_conditions(config, stage, space))
