"""Progressive distillation: a student whose one DDIM step goes where two steps of its teacher go.

Each halving starts as a copy of its teacher and learns x0* of `diffusion.distillation`, at the times of its
own grid (Salimans & Ho 2022, arXiv:2202.00512). Two other stages are the same loss with the teacher's one
x0_hat at the same time for a target, at any time of the schedule (`num_steps` = 0):

- a student that predicts v where its teacher predicts eps, whose error is divided by alpha at high noise;
- a student that reads the guidance weight, of a teacher with classifier-free guidance: one pass in place of
  two (Meng et al. 2023, arXiv:2210.03142). Its weights are uniform in `guidance_weights`. The halvings that
  follow read the weight as well, teacher and student the same.

In training x0_vae decodes q(z | x), in sampling the prior of z. A share of the examples can therefore be
free of data: z from the prior, and y from where the student itself comes to from noise.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from vaediff import checks, reads
from vaediff.conditions.base import Conditions
from vaediff.conditions.weight import WEIGHT
from vaediff.diffusion import distillation, gaussian, losses, schedules
from vaediff.errors import UserError
from vaediff.experiments import base, bounds
from vaediff.experiments.diffusion import BOUNDS as BOUNDS_OF_DIFFUSION
from vaediff.experiments.guides import MAX_GUIDANCE
from vaediff.experiments.student import LossStudent, parts
from vaediff.types import Batch, Mask, Read, Values

FREE = 'data_free'
"""Name of the mark, beside the images, of examples that are free of data."""


OWN_BOUNDS = {
  'data_free_fraction': checks.below_one(),
  'data_free_calls': bounds.calls(),
  'guidance_weights': bounds.several(
    bounds.number(0, MAX_GUIDANCE), f'numbers in 0 ... {MAX_GUIDANCE}, (least, most)', count=2
  ),
}
BOUNDS = {**BOUNDS_OF_DIFFUSION, **OWN_BOUNDS, 'num_steps': bounds.whole(0, bounds.MAX_CALLS)}
TEMPLATE_BOUNDS = {
  **OWN_BOUNDS,
  'from_steps': bounds.calls(),
  'to_steps': bounds.calls(),
  'last_train_steps': bounds.updates(0),
}
"""Of the section that halvings are made of (`vaediff.run.students`)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progressive(LossStudent):
  """A halving, or with 0 steps a student of the teacher's single predictions.

  Attributes:
    num_steps: the student's; 0 = it learns the teacher's single predictions.
    loss_weight: of the squared error of x0, by name.
    data_free_fraction: share of examples without data.
    data_free_calls: most calls of the student that bring such an example to its time.
    guidance_weights: (least, most) of the weights that are drawn in training; () where none is read.
  """

  num_steps: int
  loss_weight: str
  data_free_fraction: float
  data_free_calls: int
  guidance_weights: tuple[float, float] | tuple[()]

  bounds = BOUNDS

  @classmethod
  def from_config(cls, config: ConfigDict, stage: str) -> 'Progressive':
    """Builds the experiment of `config.<stage>`."""
    section, shared = config[stage], parts(config, stage)
    base.check(cls, config, stage)
    check(section, shared['teacher'].conditions)
    if section.num_steps:
      distillation.halving(shared['student'].denoiser.schedule, section.num_steps)  # checks them
    if section.num_steps and shared['teacher'].prediction == 'eps':
      raise UserError(
        f'the teacher {section.teacher.stage!r} predicts eps, whose error is divided by alpha at high noise; '
        'distill it to v first (num_steps = 0)'
      )
    return cls(
      **shared,
      num_steps=section.num_steps,
      loss_weight=section.diffusion.loss_weight,
      data_free_fraction=section.data_free_fraction,
      data_free_calls=section.data_free_calls,
      guidance_weights=tuple(section.guidance_weights) if section.model.guidance_embedding else (),
    )

  @property
  def frozen(self) -> Mapping[str, reads.Reads]:
    """The teacher, what both read, and the table of steps."""
    if not self.num_steps:
      return super().frozen
    steps = reads.Published(load=lambda: distillation.halving(self.student.denoiser.schedule, self.num_steps))
    return {**super().frozen, 'steps': steps}

  # The examples -----------------------------------------------------------------------------------

  def times(
    self, read: Read, key: jax.Array, count: int
  ) -> tuple[jax.Array | None, jax.Array]:
    """Returns the student's step of each example (None without steps) and its time."""
    if not self.num_steps:
      return None, schedules.sample_time(self.student.denoiser.schedule, key, count)
    index = jax.random.randint(key, (count,), 0, read['steps']['num_steps'])
    return index, read['steps']['time'][index]

  def states(
    self, read: Read, y0: Array, values: Values, key: jax.Array, free: Mask | None
  ) -> tuple[jax.Array, Values, jax.Array | None, jax.Array]:
    """Returns y, values, step and time of each example; those that are `free`, at the front, without data."""
    key_t, key_eps, key_w, key_given, key_noise = jax.random.split(key, 5)
    count = y0.shape[0]
    index, t = self.times(read, key_t, count)
    y = gaussian.q_sample(y0, jax.random.normal(key_eps, y0.shape), t, self.student.denoiser.schedule)
    # as many as the part of a batch with most of them has: others make one that is not read
    most = 0 if free is None else -(-self.num_free(count * self.microbatches) // self.microbatches)

    def in_front(new: Array, old: Array) -> Array:
      chosen = jnp.where(gaussian.per_example(free[:most], new), new, old[:most])
      return jnp.concatenate([chosen, old[most:]])

    if most:
      values = jax.tree.map(in_front, self.drawn_values(read, key_given, most), values)
    if self.guidance_weights:
      low, high = self.guidance_weights
      values = {**values, WEIGHT: jax.random.uniform(key_w, (count,), minval=low, maxval=high)}
    if most:
      y = in_front(self.arrive(read, values, index[:most], key_noise, y[:most].shape), y)
    return y, values, index, t

  def num_free(self, batch_size: int) -> int:
    """Returns how many examples of a whole batch are free of data: at least one, where any are."""
    return max(1, round(self.data_free_fraction * batch_size)) if self.data_free_fraction else 0

  def marked(self, batch: Batch) -> Batch:
    """Returns the batch with a mark on its first examples, which are the first of its parts too."""
    count = batch['image'].shape[0]
    free = self.num_free(count)
    return {**batch, FREE: jnp.arange(count) < free} if free else batch

  def arrive(
    self, read: Read, values: Values, index: jax.Array, key: jax.Array, shape: tuple[int, ...]
  ) -> jax.Array:
    """Returns where the student comes to from noise, at its step `index` of the first examples."""
    first = jax.tree.map(lambda rows: rows[: len(index)], values)
    return distillation.simulate(
      self.student.denoiser.denoise(read, first),
      jax.random.normal(key, shape),
      index,
      read['steps']['grid'],
      self.data_free_calls,
      self.student.denoiser.schedule,
    )

  # Training ---------------------------------------------------------------------------------------

  def target(
    self, read: Read, y: jax.Array, values: Values, index: jax.Array | None, t: jax.Array
  ) -> jax.Array:
    """Returns x0*, what the student's x0_hat should be at y."""
    teacher = self.teacher.denoise(read, values)
    return teacher(y, t) if index is None else distillation.target(teacher, y, index, read['steps'])

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
    """Returns the weighted squared error of each example; in training a share of them is free of data."""
    del step
    free = batch[FREE] if training and FREE in batch else None
    y, values, index, t = jax.lax.stop_gradient(self.states(read, y0, values, key, free))
    wanted = jax.lax.stop_gradient(self.target(read, y, values, index, t))
    denoiser = self.student.denoiser
    output = denoiser.output(read, y, t, values)
    eps = gaussian.to_eps('x0', wanted, y, t, denoiser.schedule)
    return losses.denoising_loss(
      denoiser.prediction, output, wanted, eps, t, denoiser.schedule, self.loss_weight
    )


def check(section: ConfigDict, conditions: Conditions) -> None:
  """Raises UserError for fields of the stage's section that contradict each other.

  Args:
    section: of the stage.
    conditions: of the teacher.
  """
  if section.diffusion.prediction == 'eps':
    raise UserError("prediction is 'eps'; a student of few steps must predict 'v' or 'x0'")
  if section.data_free_fraction and not section.num_steps:
    raise UserError('data_free_fraction needs a halving (num_steps > 0): it starts from the grid')
  if section.data_free_fraction and conditions.seen:
    raise UserError(
      f'data_free_fraction is {section.data_free_fraction}, which needs conditions that can be drawn of '
      f'nothing; {conditions.seen[0]} is seen in an image, or comes of the samples of another stage. Set it '
      'to 0'
    )
  if section.model.guidance_embedding:
    weights = section.guidance_weights
    if not weights[0] <= weights[1]:
      raise UserError(f'guidance_weights must be (least, most) with 0 <= least <= most, got {weights}')
    if not conditions.droppable:
      raise UserError(
        'a guided student needs a teacher trained with diffusion.condition_dropout > 0, or the dropout of '
        'another condition; here none is dropped'
      )
