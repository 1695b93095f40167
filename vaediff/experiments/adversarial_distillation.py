"""Adversarial distillation of a refiner whose discriminator reads the teacher's own features.

LADD (Sauer et al. 2024, arXiv:2403.12015): no foreign feature network. Real x0 and the student's x0_hat are
noised to a random level, that of time t', the frozen teacher's encoder makes features of both, and small
heads on its maps tell them apart. The same level hides more of a smaller map: `renoise_side`
(`levels.at_resolution`). At a time s of the student's own grid and y_s = alpha_s x0 + sigma_s eps,

    L_D = hinge loss of the heads + r1_gamma R1 on the heads' inputs,
    L_G = -adversarial_weight mean D(x0_hat) + distillation_weight w_s |x0_hat - x0*|^2,

with x0* where the teacher's DDIM comes to from y_s in a few calls. Real and fake have everything but the
image in common: x0_vae and z, t', and the noise of y_t'. Either could be told by an x0_vae of its own.

Both losses read the student's x0_hat as the network says it, not clipped to [-1, 1] as in sampling: a clipped
pixel would have no gradient to bring it back. Real images and x0* are in the range, and hold x0_hat there.

Where `val/diversity_ratio` falls below 0.5 (`grid_student`), remedies are a larger `loss.distillation_weight`
and a smaller `loss.adversarial_weight`.

A teacher that was itself distilled gives targets on its own grid only, and features that were trained last at
those times.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from vaediff import checks
from vaediff.diffusion import gaussian, ladd, levels
from vaediff.errors import UserError
from vaediff.experiments import base, bounds
from vaediff.experiments.grid_student import BOUNDS as BOUNDS_OF_GRID_STUDENT
from vaediff.experiments.grid_student import (
  GridStudent,
  check_probabilities,
  deinterleave,
  grid_parts,
  interleave,
)
from vaediff.models.functional import Model
from vaediff.models.heads import Heads
from vaediff.optim import Optimizer, global_norm, make_optimizer
from vaediff.types import Batch, Image, Metrics, Params, Read, Rows, Time, Values

SAMPLERS = ('renoise', 'ddim')
BOUNDS = {
  **BOUNDS_OF_GRID_STUDENT,
  'sample.sampler': checks.one_of(SAMPLERS),
  'warmup.num_steps': bounds.updates(0),
  'warmup.start_probabilities': bounds.probabilities(),
  'loss.adversarial_weight': bounds.weight(above=True),
  'loss.distillation_weight': bounds.weight(),
  'loss.r1_gamma': bounds.weight(),
  'loss.renoise_mean': bounds.level(),
  'loss.renoise_side': bounds.side(),
  'loss.renoise_std': bounds.spread(),
  **bounds.optimizers('optim_discriminator'),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdversarialDistillation(GridStudent):
  """The stage; trains the networks `denoiser`, the student, and `discriminator`, the heads.

  Attributes:
    discriminator: (t', maps of the teacher's features) -> logits of each head.
    optimizer_discriminator: of the heads.
    warmup_probabilities: of the student's times in the first `warmup_steps` updates.
    warmup_steps: how many these are.
    renoise_mean: mean of log(sigma / alpha) at t', of maps of `renoise_side` x `renoise_side`.
    renoise_side: that side; 0 = the mean is that of all maps.
    renoise_std: its standard deviation.
    adversarial_weight: of the heads in the student's loss.
    distillation_weight: of the squared error to x0*; 0 = no x0* is made in training.
    r1_gamma: weight of R1; 0 = none.
  """

  discriminator: Model
  optimizer_discriminator: Optimizer
  warmup_probabilities: tuple[float, ...]
  warmup_steps: int
  renoise_mean: float
  renoise_side: int
  renoise_std: float
  adversarial_weight: float
  distillation_weight: float
  r1_gamma: float

  bounds = BOUNDS

  @classmethod
  def from_config(cls, config: ConfigDict, stage: str) -> 'AdversarialDistillation':
    """Builds the experiment of `config.<stage>`."""
    section = config[stage]
    shared = grid_parts(config, stage)
    base.check(cls, config, stage)
    check(section)
    maps = [
      jax.ShapeDtypeStruct((1, *shape), jnp.float32)
      for shape in shared['teacher'].feature_shapes()
    ]
    return cls(
      **shared,
      **section.loss.to_dict(),
      discriminator=Model(
        module=Heads(**section.discriminator.to_dict()),
        inputs=(jax.ShapeDtypeStruct((1,), jnp.float32), *maps),
      ),
      optimizer_discriminator=make_optimizer(
        section.optim_discriminator, section.train.num_steps, 'optim_discriminator'
      ),
      warmup_probabilities=tuple(section.warmup.start_probabilities) or shared['start_probabilities'],
      warmup_steps=section.warmup.num_steps,
    )

  @property
  def networks(self) -> Mapping[str, Model]:
    """The student and the heads."""
    return {**super().networks, 'discriminator': self.discriminator}

  def init(self, key: jax.Array) -> base.TrainState:
    """Returns the state at step 0, before `start` copies the teacher."""
    key_student, key_heads = jax.random.split(key)
    state = super().init(key_student)
    heads = base.init_network(self.discriminator, self.optimizer_discriminator, key_heads)
    return state.replace(networks={**state.networks, 'discriminator': heads})

  # The players ------------------------------------------------------------------------------------

  def probabilities(self, step: jax.Array) -> Float[Array, ' times']:
    """Returns the probabilities of the student's times after `step` updates."""
    first, then = jnp.asarray(self.warmup_probabilities), jnp.asarray(self.start_probabilities)
    return jnp.where(step < self.warmup_steps, first, then)

  def renoising(self, key: jax.Array, like: Image) -> tuple[Time, Image]:
    """Returns t' of each example and the noise of y_t'."""
    key_t, key_eps = jax.random.split(key)
    mean = self.renoise_mean
    if self.renoise_side:
      mean = levels.at_resolution(mean, math.prod(like.shape[1:-1]), self.renoise_side**2)
    schedule = self.student.denoiser.schedule
    t = ladd.sample_renoising_time(key_t, like.shape[0], mean, self.renoise_std, schedule)
    return t, jax.random.normal(key_eps, like.shape)

  def feature_maps(
    self, read: Read, x0: Image, values: Values, t: Time, eps: Image
  ) -> list[Float[Array, 'batch _ _ _']]:
    """Returns the frozen teacher's features of x0 at y_t', float32."""
    y = gaussian.q_sample(x0, eps, t, self.teacher.schedule)
    return [x.astype(jnp.float32) for x in self.teacher.features(read, y, t, values)]

  def judge(self, params: Params, t: Time, maps: list[Array]) -> list[Array]:
    """Returns the logits of each head."""
    return self.discriminator.apply(params, t, *maps)

  # Training ---------------------------------------------------------------------------------------

  def discriminator_loss(
    self,
    params: Params,
    read: Read,
    rows: Rows,
    key: jax.Array,
    probabilities: Array,
  ) -> tuple[jax.Array, Metrics]:
    """Returns L_D, a mean over the batch, its terms, and the mean logits."""
    key_state, key_noise = jax.random.split(key)
    x0, values = rows['x0'], rows['values']
    y, s = self.states(x0, key_state, probabilities)
    x0_hat = self.student.denoiser.x0_hat(read, values)(y, s)
    t, eps = self.renoising(key_noise, x0)
    t_twice, eps_twice, values = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), (t, eps, values))
    maps = self.feature_maps(read, interleave(x0, x0_hat), values, t_twice, eps_twice)
    maps = jax.lax.stop_gradient(maps)
    real, fake = zip(*(deinterleave(logits, 2) for logits in self.judge(params, t_twice, maps)), strict=True)
    loss = jnp.mean(ladd.discriminator_loss(real, fake))
    metrics = {
      'loss/discriminator': loss,
      'logits/real': jnp.mean(ladd.over_heads(real)),
      'logits/fake': jnp.mean(ladd.over_heads(fake)),
    }
    if self.r1_gamma:
      of_real = [deinterleave(x, 2)[0] for x in maps]
      metrics['r1'] = jnp.mean(ladd.r1_of_heads(lambda maps: self.judge(params, t, maps), of_real))
      loss += self.r1_gamma * metrics['r1']
    return loss, metrics

  def student_loss(
    self,
    read: Read,
    heads: Params,
    rows: Rows,
    key: jax.Array,
    probabilities: Array,
  ) -> tuple[jax.Array, Metrics]:
    """Returns L_G, a mean over the batch, and its terms."""
    key_state, key_noise = jax.random.split(key)
    x0, values = rows['x0'], rows['values']
    y, s = self.states(x0, key_state, probabilities)
    x0_hat = self.student.denoiser.x0_hat(read, values)(y, s)
    t, eps = self.renoising(key_noise, x0)
    fake = self.judge(heads, t, self.feature_maps(read, x0_hat, values, t, eps))
    metrics = {'loss/adversarial': jnp.mean(ladd.generator_loss(fake))}
    loss = self.adversarial_weight * metrics['loss/adversarial']
    if self.distillation_weight:
      target = jax.lax.stop_gradient(self.target(read, y, s, values))
      metrics['loss/distillation'] = jnp.mean(self.distillation_losses(x0_hat, target, s))
      loss += self.distillation_weight * metrics['loss/distillation']
    return loss, {'loss': loss, **metrics}

  def train_step(
    self, state: base.TrainState, frozen: Read, batch: Batch, key: jax.Array, kind: str = ''
  ) -> tuple[base.TrainState, Metrics]:
    """Returns the state after one update of the heads and then one of the student.

    Both see the same images and conditions, with times and noise of their own.
    """
    del kind
    key_rows, key_d, key_g = jax.random.split(key, 3)
    name = self.student.denoiser.network
    student, heads = state.networks[name], state.networks['discriminator']
    read = {**frozen, name: student.params}
    rows = self.rows(read, batch, key_rows)
    probabilities = self.probabilities(state.step)

    def loss_d(params: Params, rows: Rows, key: jax.Array) -> tuple[jax.Array, Metrics]:
      return self.discriminator_loss(params, read, rows, key, probabilities)

    grads_d, metrics_d = base.gradients(loss_d, heads.params, rows, key_d, self.microbatches)
    heads = base.apply_gradients(heads, grads_d, self.optimizer_discriminator, state.step)

    def loss_g(params: Params, rows: Rows, key: jax.Array) -> tuple[jax.Array, Metrics]:
      return self.student_loss({**frozen, name: params}, heads.params, rows, key, probabilities)

    grads_g, metrics_g = base.gradients(loss_g, student.params, rows, key_g, self.microbatches)
    student = base.apply_gradients(student, grads_g, self.student.optimizer, state.step)
    networks = {name: student, 'discriminator': heads}
    return state.replace(step=state.step + 1, networks=networks), {
      **metrics_g,
      **metrics_d,
      f'grad_norm/{name}': global_norm(grads_g),
      'grad_norm/discriminator': global_norm(grads_d),
    }


def check(section: ConfigDict) -> None:
  """Raises UserError for fields of the stage's section that contradict each other."""
  check_probabilities('warmup.start_probabilities', section.warmup.start_probabilities, section)
  if section.optim_discriminator.ema_decay:
    raise UserError(
      'optim_discriminator.ema_decay must be 0: only the student is averaged, got '
      f'{section.optim_discriminator.ema_decay}'
    )
