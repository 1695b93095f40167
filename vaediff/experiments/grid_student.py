"""A student with a few times of its own, that is compared with its teacher at each of them.

x0_vae is a strong condition, and a student that ignores its noise is the likely failure. `val/diversity` is
the mean squared difference of two x0_hats from pure noise with one condition, and `val/diversity_ratio` is
that over the teacher's with the same noise, in as many calls as the target takes: below 0.5 the noise is
being ignored.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from vaediff import checks
from vaediff.diffusion import gaussian, ladd, losses, samplers
from vaediff.errors import UserError
from vaediff.experiments import base, bounds
from vaediff.experiments.diffusion import BOUNDS as BOUNDS_OF_DIFFUSION
from vaediff.experiments.student import Student, parts
from vaediff.types import Batch, Image, Metrics, Read, Rows, Time, Values

BOUNDS = {
  **BOUNDS_OF_DIFFUSION,
  'teacher_calls': bounds.calls(),
  'start_probabilities': bounds.probabilities(),
  **bounds.within('discriminator', bounds.HEADS),
}
"""Of both experiments of this kind."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridStudent(Student):
  """A distillation stage but for its updates; the network `denoiser` starts as a copy of the teacher.

  Attributes:
    start_times: the student's grid without its end, from 1.
    start_probabilities: of each of them.
    teacher_calls: calls of the teacher from y_s to its x0.
    loss_weight: w_s of the squared error to that x0, by name.
  """

  start_times: tuple[float, ...]
  start_probabilities: tuple[float, ...]
  teacher_calls: int
  loss_weight: str

  metrics = {'loss': False, 'diversity': True, 'diversity_ratio': True}

  def rows(self, read: Read, batch: Batch, key: jax.Array) -> Rows:
    """Returns 'x0', maps of the space, and their 'values', flipped together; not differentiated."""
    y0, values = self.student.examples(read, batch, key, training=True)
    return jax.lax.stop_gradient({'x0': y0, 'values': values})

  def states(self, x0: Image, key: jax.Array, probabilities: Array) -> tuple[Image, Time]:
    """Returns y_s, made of x0, and s of each example, one of the student's times."""
    key_s, key_eps = jax.random.split(key)
    drawn = jax.random.choice(key_s, len(self.start_times), (x0.shape[0],), p=probabilities)
    s = jnp.asarray(self.start_times)[drawn]
    eps = jax.random.normal(key_eps, x0.shape)
    return gaussian.q_sample(x0, eps, s, self.student.denoiser.schedule), s

  def target(self, read: Read, y: Image, s: Time, values: Values) -> Image:
    """Returns x0*: where the teacher's DDIM comes to from y_s, with its own guidance and clipping."""
    denoise = self.teacher.denoise(read, values)
    return ladd.finish(denoise, y, s, self.teacher_calls, self.teacher.schedule)

  def distillation_losses(self, x0_hat: Image, target: Image, s: Time) -> Float[Array, ' batch']:
    """Returns w_s |x0_hat - x0*|^2 per example, averaged over pixels."""
    weight = losses.prediction_weight('x0', self.loss_weight, self.student.denoiser.schedule.logsnr(s))
    return weight * ladd.squared_distance(x0_hat, target)

  def eval_step(self, read: Read, batch: Batch, key: jax.Array) -> Metrics:
    """Returns `loss`, the distillation error of x0_hat as it is sampled, and the diversity of the module."""
    key_example, key_state, *key_noise = jax.random.split(key, 4)
    x0, values = self.student.examples(read, batch, key_example, training=False)
    y, s = self.states(x0, key_state, jnp.asarray(self.start_probabilities))
    noises = [jax.random.normal(k, x0.shape) for k in key_noise]
    drawn, wanted = self.compared(read, values, [y, *noises], s)
    of_student, of_teacher = (
      base.masked_mean(ladd.squared_distance(*images[1:]), batch['mask']) for images in (drawn, wanted)
    )
    return {
      'loss': base.masked_mean(self.distillation_losses(drawn[0], wanted[0], s), batch['mask']),
      'diversity': of_student,
      'diversity_ratio': of_student / jnp.maximum(of_teacher, jnp.finfo(jnp.float32).tiny),
    }

  def compared(
    self, read: Read, values: Values, states: list[Image], s: Time
  ) -> tuple[list[Image], list[Image]]:
    """Returns the student's x0_hat and the teacher's x0* at each state: the first is y_s, others y_1."""
    count = len(states)
    values = jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), values)
    y, t = interleave(*states), interleave(s, *[jnp.ones_like(s)] * (count - 1))
    x0_hat = self.student.denoiser.denoise(read, values)(y, t)
    return deinterleave(x0_hat, count), deinterleave(self.target(read, y, t, values), count)


def interleave(*arrays: Array) -> Array:
  """Returns the rows of all arrays, those of one example next to each other: no device is sent any."""
  return jnp.stack(arrays, axis=1).reshape(-1, *arrays[0].shape[1:])


def deinterleave(x: Array, count: int) -> list[Array]:
  """Returns the `count` arrays that `interleave` has joined."""
  x = x.reshape(-1, count, *x.shape[1:])
  return [x[:, k] for k in range(count)]


def grid_parts(config: ConfigDict, stage: str) -> dict[str, Any]:
  """Returns the fields of `GridStudent` for a stage of the config.

  Raises:
    UserError: as `student.parts`, and for the first value that is not allowed.
  """
  section, shared = config[stage], parts(config, stage)
  checks.check(section, BOUNDS, f'config.{stage}: ')
  check(section)
  check_teacher(section, config[section.teacher.stage])
  num_steps = section.sample.num_steps
  grid = samplers.time_grid(shared['student'].denoiser.schedule, section.sample.grid, num_steps)
  return {
    **shared,
    'start_times': tuple(grid[:-1].tolist()),
    'start_probabilities': tuple(section.start_probabilities) or (1 / num_steps,) * num_steps,
    'teacher_calls': section.teacher_calls,
    'loss_weight': section.diffusion.loss_weight,
  }


def check(section: ConfigDict) -> None:
  """Raises UserError for the first value of the stage's section that is not allowed."""
  if section.diffusion.prediction == 'eps':
    raise UserError(
      f'the teacher {section.teacher.stage!r} predicts eps, whose error is divided by alpha at high noise; '
      "name one that predicts v: train it with diffusion.prediction = 'v', or distill it to v first "
      "(teacher.stage = 'distill_v', variant distill)"
    )
  check_probabilities('start_probabilities', section.start_probabilities, section)


def check_probabilities(field: str, given: tuple[float, ...], section: ConfigDict) -> None:
  """Raises UserError unless `given` is empty or one probability for each of the student's times."""
  num_steps = section.sample.num_steps
  if given and (len(given) != num_steps or min(given) < 0 or not np.isclose(sum(given), 1)):
    raise UserError(
      f'{field} must be () or {num_steps} numbers >= 0 (sample.num_steps) that sum to 1, got {tuple(given)}'
    )


def check_teacher(section: ConfigDict, teacher: ConfigDict) -> None:
  """Raises UserError for a student that cannot be a copy, or calls off a distilled teacher's own grid."""
  wanted, given = teacher.diffusion.prediction, section.diffusion.prediction
  if given != wanted:
    raise UserError(
      f'diffusion.prediction is {given!r}, but the student starts as a copy of {section.teacher.stage!r}, '
      f'which predicts {wanted!r}'
    )
  known = teacher.num_steps if teacher.experiment == 'progressive' else 0
  if known and known % (section.sample.num_steps * section.teacher_calls):
    raise UserError(
      f'the teacher {section.teacher.stage!r} knows the times of {known} steps only; sample.num_steps x '
      f'teacher_calls must divide them, got {section.sample.num_steps} x {section.teacher_calls}'
    )
  if known and section.sample.num_steps > 1 and section.sample.grid != 'uniform':  # one step is from t = 1
    raise UserError(
      f'sample.grid is {section.sample.grid!r}, but the teacher {section.teacher.stage!r} knows the times of '
      f'its own {known} steps only, which are uniform; valid: uniform'
    )
