"""What all students share: a refiner that starts as a copy of its teacher, which it then reads frozen.

A student is a `Refiner` of its own section of the config: it is sampled, evaluated and benchmarked as one.
The sections `model`, `diffusion`, `vae` and `sample` are the teacher's with what distillation changes
(`vaediff.students`).
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from vaediff import reads
from vaediff.conditions import prior
from vaediff.errors import UserError
from vaediff.experiments import base
from vaediff.experiments.diffusion import Condition, Refiner
from vaediff.models.functional import Model
from vaediff.types import Batch, Image, Keys, Latent, Metrics, Params

EXPERIMENTS = ('progressive', 'consistency', 'adversarial_distillation', 'distribution_matching')
"""Of the stages that have a teacher."""
TEACHERS = ('refiner', *EXPERIMENTS)
SAME = ('schedule', 'condition', 'z_conditioning')
"""Fields of `diffusion` in which a student cannot differ from its teacher."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Student:
  """A distillation stage but for its updates; trains the network `denoiser`.

  Attributes:
    student: how the trained network is read and sampled.
    teacher: how the frozen network `teacher` is read: with its own guidance and clipping.
    teacher_source: where its parameters are.
    microbatches: parts that a batch is split into for the gradient.
    flip: random horizontal flips.
  """

  student: Refiner
  teacher: Refiner
  teacher_source: reads.FromStage
  microbatches: int
  flip: bool

  @property
  def networks(self) -> Mapping[str, Model]:
    """The one network of this stage."""
    return self.student.networks

  @property
  def frozen(self) -> Mapping[str, reads.FromStage | reads.Published]:
    """The teacher, and what both read."""
    return {**self.student.frozen, 'teacher': self.teacher_source}

  @property
  def latent_dim(self) -> int:
    """Size of the VAE's latent code."""
    return self.student.latent_dim

  @property
  def noise_shape(self) -> tuple[int, ...]:
    """Shape of x_T and of an image."""
    return self.student.noise_shape

  @property
  def takes_x0_vae(self) -> bool:
    """Whether the U-Net reads an image."""
    return self.student.takes_x0_vae

  @property
  def num_function_evaluations(self) -> int:
    """Forward passes of the student per sampled image."""
    return self.student.num_function_evaluations

  reads_image = False

  def init(self, key: jax.Array) -> base.TrainState:
    """Returns the state at step 0, before `start` copies the teacher."""
    return self.student.init(key)

  def start(self, state: base.TrainState, frozen: dict[str, Params]) -> base.TrainState:
    """Returns the state whose student, and average, have the teacher's parameters.

    What the teacher does not have, the projection of the guidance weight, stays as initialised: zero.
    """
    network = state.networks['denoiser']
    params = {**network.params, **jax.tree.map(jnp.copy, frozen['teacher'])}
    ema_params = None if network.ema_params is None else jax.tree.map(jnp.copy, params)
    started = network.replace(params=params, ema_params=ema_params)
    return state.replace(networks={**state.networks, 'denoiser': started})

  def encode(self, params: dict[str, Params], frozen: dict[str, Params], x: Image) -> tuple[Latent, Latent]:
    """Returns mean and log variance of the frozen VAE's q(z | x)."""
    return self.student.encode(params, frozen, x)

  def sample(
    self,
    params: dict[str, Params],
    frozen: dict[str, Params],
    condition: dict[str, jax.Array],
    keys: Keys,
  ) -> dict[str, Image]:
    """Returns the student's images; see `Refiner.sample`."""
    return self.student.sample(params, frozen, condition, keys)

  def drawn_condition(self, frozen: dict[str, Params], key: jax.Array, count: int) -> Condition:
    """Returns the condition of codes that are drawn from `frozen['prior']`, as in sampling."""
    if self.student.vae is None:
      return Condition(x0_vae=None, z=None)
    keys = jax.random.split(key, count)
    return self.student.condition(frozen, {'z': prior.draw(frozen['prior'], keys, self.latent_dim)})


class LossStudent(Student, abc.ABC):
  """A student that one update of one loss trains: it has `example_losses`."""

  @abc.abstractmethod
  def example_losses(
    self,
    params: Params,
    frozen: dict[str, Params],
    x0: Image,
    condition: Condition,
    key: jax.Array,
    step: jax.Array,
    *,
    training: bool,
  ) -> Float[Array, ' batch']:
    """Returns the loss of each example after `step` updates."""

  def train_step(
    self, state: base.TrainState, frozen: dict[str, Params], batch: Batch, key: jax.Array
  ) -> tuple[base.TrainState, Metrics]:
    """Returns the state after one update."""

    def loss_fn(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
      key_example, key_loss = jax.random.split(key)
      x0, condition = self.student.examples(frozen, batch, key_example, flip=self.flip)
      values = self.example_losses(params, frozen, x0, condition, key_loss, state.step, training=True)
      loss = jnp.mean(values)
      return loss, {'loss': loss}

    params = state.networks['denoiser'].params
    grads, metrics = base.gradients(loss_fn, params, batch, key, self.microbatches)
    state, norms = base.update_one(state, 'denoiser', grads, self.student.optimizer)
    return state, {**metrics, **norms}

  def eval_step(
    self, params: dict[str, Params], frozen: dict[str, Params], batch: Batch, key: jax.Array
  ) -> Metrics:
    """Returns the loss of the first update, on images as they are."""
    key_example, key_loss = jax.random.split(key)
    x0, condition = self.student.examples(frozen, batch, key_example, flip=False)
    values = self.example_losses(
      params['denoiser'], frozen, x0, condition, key_loss, jnp.int32(0), training=False
    )
    return {'loss': base.masked_mean(values, batch['mask'])}


def parts(config: ConfigDict, stage: str) -> dict[str, Any]:
  """Returns the fields of `Student` for a stage of the config.

  Raises:
    UserError: when the teacher is no stage that can teach, or one of another formulation or schedule.
  """
  section = config[stage]
  if 'model' not in section:
    raise UserError('it lacks what its teacher gives it; call vaediff.students.resolve(config) first')
  named = section.teacher
  teacher_section = config[named.stage] if named.stage in config else None
  if not any(reads.is_stage(config, named.stage, name) for name in TEACHERS):
    raise UserError(
      f'teacher.stage is {named.stage!r}, which is no stage of this config with a denoiser that can teach '
      f'(experiments {", ".join(TEACHERS)})'
    )
  for field in SAME:
    if section.diffusion[field] != teacher_section.diffusion[field]:
      raise UserError(
        f'diffusion.{field} is {section.diffusion[field]!r}, but that of the teacher {named.stage!r} '
        f'is {teacher_section.diffusion[field]!r}; a student cannot change it'
      )
  student, teacher = Refiner.from_config(config, stage), Refiner.from_config(config, named.stage)
  source = reads.FromStage(
    stage=named.stage, network='denoiser', workdir=named.workdir, model=teacher.denoiser
  )
  return {
    'student': student,
    'teacher': teacher,
    'teacher_source': source,
    'microbatches': section.train.microbatches,
    'flip': section.train.flip,
  }
