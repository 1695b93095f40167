"""Consistency tuning of a trained denoiser: one or two steps without a teacher beside the student.

The student starts as a copy of a network that predicts v and learns to map two states of one image and one
noise to the same x0 (`diffusion.consistency`). Its samples are drawn with the sampler 'renoise'.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from vaediff.diffusion import consistency, gaussian, levels
from vaediff.errors import UserError
from vaediff.experiments import base, bounds
from vaediff.experiments.diffusion import BOUNDS as BOUNDS_OF_DIFFUSION
from vaediff.experiments.student import LossStudent, parts
from vaediff.types import Batch, Read, Values

BOUNDS = {
  **BOUNDS_OF_DIFFUSION,
  'loss.q': bounds.number(1, bounds.MAX_WEIGHT, above=True),
  'loss.level_mean': bounds.level(),
  'loss.level_std': bounds.spread(),
  'loss.huber': bounds.weight(),
  'loss.double_every_steps': bounds.updates(0),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Consistency(LossStudent):
  """The stage; trains the network `denoiser`.

  Attributes:
    level_mean: mean of log(sigma / alpha) of the times that are drawn.
    level_std: its standard deviation.
    q: the two levels' distance, 1 / q of the level where it is large.
    double_every_steps: updates after which the distance is divided by q again; 0 = never.
    huber: c of the pseudo-Huber distance, in units of the norm over all pixels.
  """

  level_mean: float
  level_std: float
  q: float
  double_every_steps: int
  huber: float

  bounds = BOUNDS

  @classmethod
  def from_config(cls, config: ConfigDict, stage: str) -> 'Consistency':
    """Builds the experiment of `config.<stage>`."""
    section, shared = config[stage], parts(config, stage)
    base.check(cls, config, stage)
    check(section)
    if shared['teacher'].prediction != 'v':
      raise UserError(
        f'the teacher {section.teacher.stage!r} predicts {shared["teacher"].prediction}; only a network that '
        "predicts v maps data to itself. Train it with diffusion.prediction = 'v', or name a student that "
        "does (teacher.stage = 'distill_v', variant distill)"
      )
    return cls(
      **shared,
      **section.loss.to_dict(),
    )

  def example_losses(
    self,
    read: Read,
    batch: Batch,
    y0: Array,
    values: Values,
    key: jax.Array,
    step: jax.Array,
    *,
    training: bool,
  ) -> Float[Array, ' batch']:
    """Returns the loss of each example at one pair of levels."""
    del batch, training
    key_level, key_eps = jax.random.split(key)
    schedule = self.student.denoiser.schedule
    tau = levels.sample_level(key_level, y0.shape[0], self.level_mean, self.level_std, schedule)
    doublings = step // self.double_every_steps if self.double_every_steps else jnp.zeros_like(step)
    r = consistency.earlier(tau, self.q, doublings)
    eps = jax.random.normal(key_eps, y0.shape)
    denoise = self.student.denoiser.x0_hat(read, values)

    def at(level: jax.Array) -> jax.Array:
      t = levels.time_of(level, schedule)
      return denoise(gaussian.q_sample(y0, eps, t, schedule), t)

    x0_hat, before = at(tau), jax.lax.stop_gradient(at(r))
    lowest = jnp.exp(jnp.float32(levels.levels(schedule)[1][0]))
    target = jnp.where(gaussian.per_example(r, y0) < lowest, y0, before)
    return consistency.loss(x0_hat, target, tau, self.huber)


def check(section: ConfigDict) -> None:
  """Raises UserError for a student that maps no data to itself."""
  if section.diffusion.prediction != 'v':
    raise UserError(f"diffusion.prediction must be 'v', got {section.diffusion.prediction!r}")
