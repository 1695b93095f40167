"""The denoising diffusion GAN: one to a few large steps, each drawn by a generator G(x_{t+1}, t, z).

Per example t is uniform in 0 ... T - 1 and (x_t, x_{t+1}) a pair drawn jointly from q. The generator's x0'
makes x_t' ~ q(x_t | x_{t+1}, x0'), and a discriminator D(x_t, t, x_{t+1}) tells the two apart:

  L_D = softplus(-D(x_t, t, x_{t+1})) + softplus(D(x_t', t, x_{t+1})) + gamma / 2 |grad_{x_t} D|^2
  L_G = softplus(-D(x_t', t, x_{t+1})) + lambda |x0 - x0'|

(Xiao et al. 2022, arXiv:2112.07804; the second term of L_G is WaveDiff's, arXiv:2211.16152, and its weight
over training LDDGAN's). R1 is taken every few updates only, and is not multiplied by their number. The maps
are pixels, wavelets or latents (`spaces`).

With `diffusion.condition` = formulation1 both networks also read a VAE's image, as a map of the same space:
the adversarial refiner, which draws what a diffusion refiner does in T steps.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from vaediff import checks
from vaediff.conditions.base import Conditions
from vaediff.conditions.vae import vae_condition
from vaediff.data import pixels
from vaediff.diffusion import adversarial, few_steps
from vaediff.errors import UserError
from vaediff.experiments import base, bounds
from vaediff.models import ports
from vaediff.models.discriminator import TimeDiscriminator
from vaediff.models.functional import Model
from vaediff.models.ncsnpp import NcsnPlusPlus
from vaediff.models.uvit import UVit
from vaediff.models.wavelet_ncsnpp import WaveletNcsnPlusPlus
from vaediff.optim import Optimizer, global_norm, make_optimizer
from vaediff.spaces import make_space
from vaediff.spaces.base import Space
from vaediff.types import Batch, Given, Latent, LatentMap, Metrics, Params, Read, Time

GENERATORS = ('ncsnpp', 'wavelet_ncsnpp', 'uvit')
REGULARISED = 'r1'
"""Kind of the updates whose discriminator loss has the term R1."""
BOUNDS = {
  'model.network': checks.one_of(GENERATORS),
  'diffusion.condition': checks.one_of(('none', 'formulation1')),
  'diffusion.x0_vae_source': checks.one_of(('sample', 'mean')),
  'diffusion.num_steps': bounds.calls(),
  'diffusion.beta_min': bounds.number(0, 1000, above=True),
  'diffusion.beta_max': bounds.number(0, 1000, above=True),
  'loss.r1_gamma': bounds.weight(),
  'loss.r1_every_steps': bounds.updates(1),
  **bounds.within('model', bounds.CONVOLUTIONAL),
  'model.latent_dim': bounds.whole(1, bounds.MAX_WIDTH),
  'model.num_mapping_layers': bounds.whole(0, bounds.MAX_LEVELS),
  'model.mapping_dim': bounds.whole(1, bounds.MAX_WIDTH),
  'model.patch_size': bounds.whole(1, bounds.MAX_LEVELS),
  'model.uvit.patch_size': bounds.whole(1, bounds.MAX_LEVELS),
  'model.uvit.dim': bounds.whole(1, bounds.MAX_WIDTH),
  'model.uvit.depth': bounds.whole(1, bounds.MAX_LEVELS),
  'model.uvit.num_heads': bounds.whole(1, bounds.MAX_LEVELS),
  'model.uvit.mlp_ratio': bounds.number(0, 100, above=True),
  'discriminator.num_layers': bounds.whole(1, bounds.MAX_LEVELS),
  'discriminator.channels': bounds.whole(1, bounds.MAX_WIDTH),
  'discriminator.time_dim': bounds.whole(1, bounds.MAX_WIDTH),
  'discriminator.group_size': bounds.whole(1, bounds.MAX_WIDTH),
  'discriminator.init_scale': bounds.number(0, 100),
  **bounds.optimizers('optim', 'optim_discriminator'),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ddgan(base.InSpace):
  """The denoising GAN stage; trains the networks `generator` and `discriminator`.

  Attributes:
    generator: (x_{t+1}, t, z, condition) -> x0'.
    discriminator: (x_t, t, x_{t+1}, condition) -> logit.
    discriminator_float32: the same in float32, for R1.
    optimizer: of the generator; keeps its average.
    optimizer_discriminator: of the discriminator.
    space: what is diffused.
    conditions: what both networks read beside it: maps alone.
    steps: the diffusion.
    noise_dim: size of the generator's z.
    loss: the stage's `loss` section.
    num_updates: of the whole training, over which the weight lambda changes.
    flip: random horizontal flips.
    microbatches: parts that a batch is split into for the gradients.
    title: the space, for tables.
  """

  generator: Model
  discriminator: Model
  discriminator_float32: Model
  optimizer: Optimizer
  optimizer_discriminator: Optimizer
  space: Space
  conditions: Conditions
  steps: few_steps.Steps
  noise_dim: int
  loss: Mapping[str, Any]
  num_updates: int
  flip: bool
  microbatches: int
  title: str

  bounds = BOUNDS

  @classmethod
  def from_config(cls, config: ConfigDict, stage: str) -> 'Ddgan':
    """Builds the experiment of `config.<stage>`."""
    section = config[stage]
    base.check(cls, config, stage)
    check_section(section)
    space = make_space(config, stage, bounded=section.model.bounded)
    vae = vae_condition(config, stage, space)
    conditions = Conditions((vae,) if vae else ())
    given = jax.ShapeDtypeStruct((1, *space.shape), jnp.float32)
    joined = ports.channels(conditions.named_ports)
    beside = jax.ShapeDtypeStruct((1, *space.shape[:2], joined), jnp.float32) if joined else None
    time = jax.ShapeDtypeStruct((1,), jnp.float32)
    noise = jax.ShapeDtypeStruct((1, section.model.latent_dim), jnp.float32)
    settings = section.discriminator.to_dict()
    modules = [TimeDiscriminator(**{**settings, 'dtype': name}) for name in (settings['dtype'], 'float32')]
    discriminator, exact = (Model(module=m, inputs=(given, time, given, beside)) for m in modules)
    check_groups(section.train, modules[0].group_size)
    return cls(
      generator=Model(
        module=build_generator(section, space.shape[-1]),
        inputs=(given, time, noise, beside),
      ),
      discriminator=discriminator,
      discriminator_float32=exact,
      optimizer=make_optimizer(section.optim, section.train.num_steps),
      optimizer_discriminator=make_optimizer(
        section.optim_discriminator, section.train.num_steps, 'optim_discriminator'
      ),
      space=space,
      conditions=conditions,
      steps=few_steps.make_steps(
        section.diffusion.num_steps, section.diffusion.beta_min, section.diffusion.beta_max
      ),
      noise_dim=section.model.latent_dim,
      loss=section.loss.to_dict(),
      num_updates=section.train.num_steps,
      flip=section.train.flip,
      microbatches=section.train.microbatches,
      title=f'{section.space} {section.experiment}',
    )

  @property
  def networks(self) -> Mapping[str, Model]:
    """The generator and the discriminator."""
    return {'generator': self.generator, 'discriminator': self.discriminator}

  @property
  def num_function_evaluations(self) -> int:
    """Calls of the generator per sampled image, T of them."""
    return self.steps.num_steps

  def kind_of(self, step: int) -> str:
    """Returns 'r1' every `loss.r1_every_steps` updates."""
    due = self.loss['r1_gamma'] > 0 and step % self.loss['r1_every_steps'] == 0
    return REGULARISED if due else ''

  def columns(self) -> base.Columns:
    """Returns condition, space and number of steps."""
    return base.Columns(
      condition=self.conditions.title,
      sampler=self.title,
      method=self.title,
      steps=self.steps.num_steps,
      guidance=0.0,
    )

  def init(self, key: jax.Array) -> base.TrainState:
    """Returns the state at step 0; `extra['r1']` is the last |grad D|^2 that was taken."""
    key_generator, key_discriminator = jax.random.split(key)
    return base.TrainState(
      step=jnp.int32(0),
      networks={
        'generator': base.init_network(self.generator, self.optimizer, key_generator),
        'discriminator': base.init_network(
          self.discriminator, self.optimizer_discriminator, key_discriminator
        ),
      },
      extra={'r1': jnp.float32(0)},
    )

  # The condition ----------------------------------------------------------------------------------

  def concat_conditions(self, read: Read, given: Given) -> Array | None:
    """Returns the maps that the networks read beside the state, joined; None without conditions."""
    maps = list(self.conditions.values(read, given).values())
    return jnp.concatenate(maps, axis=-1) if len(maps) > 1 else maps[0] if maps else None

  def examples(self, read: Read, batch: Batch, key: jax.Array) -> Batch:
    """Returns 'x0', maps of the space, and 'condition' where there is one, of a prepared batch."""
    key_map, key_given = jax.random.split(key)
    x = batch['image']
    rows = {'x0': self.space.encode(read, x, key_map)}
    given = self.conditions.observe(read, batch, x, key_given, training=True)
    beside = self.concat_conditions(read, self.conditions.complete(read, given))
    return rows if beside is None else {**rows, 'condition': beside}

  # Training ---------------------------------------------------------------------------------------

  def generate(
    self, params: Params, x_next: Array, t: Time, z: Latent, condition: Array | None, key: jax.Array | None
  ) -> Array:
    """Returns x0'; with a key dropout is on."""
    return self.generator.apply(params, x_next, t, z, condition, key_dropout=key)

  def fake(self, params: Params, rows: Batch, key: jax.Array, *, training: bool = True) -> dict[str, Array]:
    """Returns 't', the real pair 'x_t' and 'x_next', and the generator's 'x0_hat' and 'x_t_hat'."""
    key_t, key_pair, key_z, key_noise, key_dropout = jax.random.split(key, 5)
    x0, condition = rows['x0'], rows.get('condition')
    t = few_steps.sample_time(key_t, x0.shape[0], self.steps)
    x_t, x_next = few_steps.q_sample_pair(x0, t, key_pair, self.steps)
    z = jax.random.normal(key_z, (x0.shape[0], self.noise_dim))
    x0_hat = self.generate(params, x_next, t, z, condition, key_dropout if training else None)
    noise = jax.random.normal(key_noise, x0.shape)
    x_t_hat = few_steps.posterior_sample(x0_hat, x_next, t, noise, self.steps)
    return {'t': t, 'x_t': x_t, 'x_next': x_next, 'x0_hat': x0_hat, 'x_t_hat': x_t_hat}

  def discriminator_loss(
    self, params: Params, generator: Params, rows: Batch, key: jax.Array, *, regularised: bool
  ) -> tuple[jax.Array, Metrics]:
    """Returns L_D, a mean over the batch, its terms, and the mean logits; R1 only where it is due."""
    drawn, condition = self.fake(generator, rows, key), rows.get('condition')
    drawn = jax.lax.stop_gradient(drawn)

    def judge(model: Model, x_t: Array) -> Float[Array, ' batch']:
      return model.apply(params, x_t, drawn['t'], drawn['x_next'], condition)

    real, fake = (judge(self.discriminator, drawn[name]) for name in ('x_t', 'x_t_hat'))
    loss = jnp.mean(adversarial.discriminator_loss(real, fake))
    metrics = {
      'loss/discriminator': loss,
      'logits/real': jnp.mean(real),
      'logits/fake': jnp.mean(fake),
    }
    if regularised:
      slope = adversarial.r1(lambda x_t: judge(self.discriminator_float32, x_t), drawn['x_t'])
      metrics['r1'] = jnp.mean(slope)
      loss += 0.5 * self.loss['r1_gamma'] * metrics['r1']
    return loss, metrics

  def generator_loss(
    self, params: Params, discriminator: Params, weight: jax.Array, rows: Batch, key: jax.Array
  ) -> tuple[jax.Array, Metrics]:
    """Returns L_G, a mean over the batch, and its terms; `weight` is lambda."""
    drawn = self.fake(params, rows, key)
    logits = self.discriminator.apply(
      discriminator, drawn['x_t_hat'], drawn['t'], drawn['x_next'], rows.get('condition')
    )
    deception = jnp.mean(adversarial.generator_loss(logits))
    reconstruction = jnp.mean(jnp.abs(rows['x0'] - drawn['x0_hat']))
    loss = deception + weight * reconstruction
    return loss, {'loss': loss, 'loss/adversarial': deception, 'loss/reconstruction': reconstruction}

  def train_step(
    self, state: base.TrainState, frozen: Read, batch: Batch, key: jax.Array, kind: str = ''
  ) -> tuple[base.TrainState, Metrics]:
    """Returns the state after one update of the discriminator and then one of the generator.

    Both see the same images, with times and noise of their own.
    """
    key_flip, key_rows, key_d, key_g = jax.random.split(key, 4)
    batch = pixels.prepare(batch, key_flip if self.flip else None)
    rows = jax.lax.stop_gradient(self.examples(frozen, batch, key_rows))
    generator, discriminator = state.networks['generator'], state.networks['discriminator']
    fraction = state.step.astype(jnp.float32) / self.num_updates
    weight = adversarial.reconstruction_weight(self.loss['reconstruction'], fraction)

    def loss_d(params: Params, rows: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
      return self.discriminator_loss(
        params, generator.params, rows, key, regularised=kind == REGULARISED
      )

    grads_d, metrics_d = base.gradients(loss_d, discriminator.params, rows, key_d, self.microbatches)
    discriminator = base.apply_gradients(discriminator, grads_d, self.optimizer_discriminator, state.step)

    def loss_g(params: Params, rows: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
      return self.generator_loss(params, discriminator.params, weight, rows, key)

    grads_g, metrics_g = base.gradients(loss_g, generator.params, rows, key_g, self.microbatches)
    generator = base.apply_gradients(generator, grads_g, self.optimizer, state.step)

    last_r1 = metrics_d.pop('r1', state.extra['r1'])
    state = base.TrainState(
      step=state.step + 1,
      networks={'generator': generator, 'discriminator': discriminator},
      extra={**state.extra, 'r1': last_r1},
    )
    return state, {
      **metrics_g,
      **metrics_d,
      'r1': last_r1,
      'reconstruction_weight': weight,
      'grad_norm/generator': global_norm(grads_g),
      'grad_norm/discriminator': global_norm(grads_d),
    }

  def eval_step(self, read: Read, batch: Batch, key: jax.Array) -> Metrics:
    """Returns the mean |x0 - x0'| at random times. A discriminator's loss says nothing on its own."""
    key_rows, key_fake = jax.random.split(key)
    rows = self.examples(read, pixels.prepare(batch, None), key_rows)
    drawn = self.fake(read['generator'], rows, key_fake, training=False)
    error = jnp.mean(jnp.abs(rows['x0'] - drawn['x0_hat']), axis=(1, 2, 3))
    return {'loss': base.masked_mean(error, batch['mask'])}

  # Sampling ---------------------------------------------------------------------------------------

  def maps(self, read: Read, given: Given, keys: base.SampleKeys) -> LatentMap:
    """Returns maps of the space after T steps from the given x_T."""
    beside = self.concat_conditions(read, given)

    def generate(x_next: Array, t: Time, z: Latent) -> Array:
      return self.generate(read['generator'], x_next, t, z, beside, None)

    return few_steps.sample(generate, self.steps, given[base.NOISE], keys.sampler, self.noise_dim)


def build_generator(section: ConfigDict, channels: int) -> Any:
  """Returns the Flax module that `model.network` names, for maps of `channels`."""
  model = section.model.to_dict()
  name, transformer, wavelet = model.pop('network'), model.pop('uvit'), model.pop('wavelet')
  builders: dict[str, Callable[[], Any]] = {
    'ncsnpp': lambda: NcsnPlusPlus(out_channels=channels, **model),
    'wavelet_ncsnpp': lambda: WaveletNcsnPlusPlus(out_channels=channels, **model, **wavelet),
    'uvit': lambda: UVit(
      out_channels=channels,
      **{field: model[field] for field in ('latent_dim', 'num_mapping_layers', 'bounded', 'remat', 'dtype')},
      **transformer,
    ),
  }
  return builders[name]()


def check_groups(train: ConfigDict, group_size: int) -> None:
  """Raises UserError where the discriminator's groups do not fit into the parts that a batch is split into.

  A part that is smaller than a group has smaller groups than the batch has, and another discriminator.
  """
  rows = train.batch_size // train.microbatches
  smaller = rows < group_size and train.microbatches > 1
  if smaller or rows % min(rows, group_size):
    raise UserError(
      f'train.batch_size / train.microbatches is {rows}: it must be a multiple of discriminator.group_size, '
      f'{group_size}, or without microbatches smaller'
    )


def check_section(section: ConfigDict) -> None:
  """Raises UserError for the first value of the stage's section that is not allowed."""
  adversarial.check_reconstruction_weight(section.loss.reconstruction)
  if section.conditions:
    raise UserError(
      f'conditions names {", ".join(sorted(section.conditions))}; the networks of a denoising GAN read no '
      "condition but diffusion.condition = 'formulation1'"
    )
  if section.optim_discriminator.ema_decay:
    raise UserError(
      'optim_discriminator.ema_decay must be 0: only the generator is averaged, got '
      f'{section.optim_discriminator.ema_decay}'
    )
