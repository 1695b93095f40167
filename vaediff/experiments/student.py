"""What all students share: a diffusion that starts as a copy of its teacher, which it then reads frozen.

A student is a `Diffusion` of its own section of the config: it is sampled, evaluated and benchmarked as one.
The section is the teacher's with what distillation changes (`vaediff.run.students`).
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from vaediff import checks, reads
from vaediff.conditions import pca
from vaediff.conditions.base import Conditions
from vaediff.errors import UserError
from vaediff.experiments import base
from vaediff.experiments.denoiser import DENOISER, Denoiser
from vaediff.experiments.diffusion import Diffusion
from vaediff.models.functional import Model
from vaediff.models.unet import prediction_alone
from vaediff.spaces import Space
from vaediff.types import Batch, Given, LatentMap, Metrics, Params, Read, Values

EXPERIMENTS = ('progressive', 'consistency', 'adversarial_distillation', 'distribution_matching')
"""Of the stages that have a teacher."""
TEACHERS = ('diffusion', *EXPERIMENTS)
SAME = ('schedule', 'condition', 'z_conditioning', 'pca')
"""Fields of `diffusion` in which a student cannot differ from its teacher."""
FIRST_INDEX = 2**20
"""Below it are the indices that samples drawn in training begin at: many times the number of classes."""
TEACHER = 'teacher'
"""The frozen network's name in `read`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Student(base.InSpace):
  """A distillation stage but for its updates; trains the network `denoiser`.

  Attributes:
    student: the diffusion that is trained, and sampled.
    teacher: how the frozen network `teacher` is read: with its own guidance and clipping.
    teacher_source: where its parameters are.
    teacher_guides: networks that guide the teacher, and where their parameters are.
    method: the experiment's name, for tables.
  """

  student: Diffusion
  teacher: Denoiser
  teacher_source: reads.FromStage
  teacher_guides: Mapping[str, reads.Reads]
  method: str

  @property
  def microbatches(self) -> int:
    """Parts that a batch is split into for the gradient."""
    return self.student.microbatches

  @property
  def diffusion(self) -> Diffusion:
    """The student, which draws the samples."""
    return self.student

  @property
  def networks(self) -> Mapping[str, Model]:
    """The one network of this stage."""
    return self.student.networks

  @property
  def frozen(self) -> Mapping[str, reads.Reads]:
    """The teacher, what guides it, and what both read."""
    return {**self.student.frozen, TEACHER: self.teacher_source, **self.teacher_guides}

  @property
  def for_sampling(self) -> Mapping[str, reads.Reads]:
    """Networks of other checkpoints that guide the samples of the student."""
    return self.student.for_sampling

  def alone(self) -> 'Student':
    """Returns the stage whose student is; the teacher keeps what guides it."""
    return dataclasses.replace(self, student=self.student.alone())

  @property
  def space(self) -> Space:
    """Space of the student."""
    return self.student.space

  @property
  def conditions(self) -> Conditions:
    """Conditions of the student."""
    return self.student.conditions

  @property
  def num_function_evaluations(self) -> int:
    """Forward passes of the student per sampled image."""
    return self.student.num_function_evaluations

  @property
  def can_be_guided(self) -> bool:
    """Whether the training of the student drops conditions."""
    return self.student.can_be_guided

  def columns(self) -> base.Columns:
    """Returns the student's, with the name of the distillation."""
    return dataclasses.replace(self.student.columns(), method=self.method)

  def init(self, key: jax.Array) -> base.TrainState:
    """Returns the state at step 0, before `start` copies the teacher."""
    return self.student.init(key)

  def start(self, state: base.TrainState, frozen: Read) -> base.TrainState:
    """Returns the state whose student, and average, have the teacher's parameters.

    What the teacher does not have, the projection of the guidance weight, stays as initialised: zero. Of a
    teacher with a learned variance it is the prediction alone.
    """
    name = self.student.denoiser.network
    network = state.networks[name]
    taught = prediction_alone(frozen[TEACHER], network.params)
    params = {**network.params, **jax.tree.map(jnp.copy, taught)}
    ema_params = None if network.ema_params is None else jax.tree.map(jnp.copy, params)
    started = network.replace(params=params, ema_params=ema_params)
    return state.replace(networks={**state.networks, name: started})

  def maps(self, read: Read, given: Given, keys: base.SampleKeys) -> LatentMap:
    """Returns the student's maps; see `Diffusion.maps`."""
    return self.student.maps(read, given, keys)

  def drawn_values(self, read: Read, key: jax.Array, count: int) -> Values:
    """Returns the values of conditions that are drawn of nothing, as in sampling.

    They are those of samples anywhere in a long row: of conditions that come in turn, as classes do, `count`
    that are not the same at every update.
    """
    conditions, keys = self.conditions.for_training(), jax.random.split(key, count + 1)
    first = jax.random.randint(keys[count], (), 0, FIRST_INDEX)
    given = conditions.draw(read, keys[:count], first + jnp.arange(count))
    return conditions.values(read, conditions.complete(read, given))


class LossStudent(Student, abc.ABC):
  """A student that one update of one loss trains: it has `example_losses`."""

  def marked(self, batch: Batch) -> Batch:
    """Returns a whole batch, before it is split into parts, with what is decided of it as a whole."""
    return batch

  @abc.abstractmethod
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
    """Returns the loss of each example after `step` updates; in training `batch` is part of a marked one."""

  def train_step(
    self, state: base.TrainState, frozen: Read, batch: Batch, key: jax.Array, kind: str = ''
  ) -> tuple[base.TrainState, Metrics]:
    """Returns the state after one update."""
    del kind
    name = self.student.denoiser.network

    def loss_fn(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
      read = {**frozen, name: params}
      key_example, key_loss = jax.random.split(key)
      y0, values = self.student.examples(read, batch, key_example, training=True)
      each = self.example_losses(read, batch, y0, values, key_loss, state.step, training=True)
      loss = jnp.mean(each)
      return loss, {'loss': loss}

    params = state.networks[name].params
    grads, metrics = base.gradients(loss_fn, params, self.marked(batch), key, self.microbatches)
    state, norms = base.update_one(state, name, grads, self.student.optimizer)
    return state, {**metrics, **norms}

  def eval_step(self, read: Read, batch: Batch, key: jax.Array) -> Metrics:
    """Returns the loss of the first update, on images as they are."""
    key_example, key_loss = jax.random.split(key)
    y0, values = self.student.examples(read, batch, key_example, training=False)
    each = self.example_losses(read, batch, y0, values, key_loss, jnp.int32(0), training=False)
    return {'loss': base.masked_mean(each, batch['mask'])}


def parts(config: ConfigDict, stage: str) -> dict[str, Any]:
  """Returns the fields of `Student` for a stage of the config.

  Raises:
    UserError: when the teacher is no stage that can teach, or one of another formulation or schedule.
  """
  section = config[stage]
  if 'teacher' not in section:
    raise UserError(
      f'experiment is {section.experiment!r}, which has a teacher; the section {stage!r} names none'
    )
  if 'model' not in section:
    raise UserError('it lacks what its teacher gives it; call vaediff.run.students.resolve(config) first')
  named = section.teacher
  teacher_section = config[named.stage] if named.stage in config else None
  if not any(reads.is_stage(config, named.stage, name) for name in TEACHERS):
    raise UserError(
      f'teacher.stage is {named.stage!r}, which is no stage of this config with a denoiser that can teach '
      f'(experiments {", ".join(TEACHERS)})'
    )
  checks.check(section, pca.BOUNDS)
  for field in SAME:
    if section.diffusion[field] != teacher_section.diffusion[field]:
      raise UserError(
        f'diffusion.{field} is {section.diffusion[field]!r}, but that of the teacher {named.stage!r} '
        f'is {teacher_section.diffusion[field]!r}; a student cannot change it'
      )
  student, teacher = Diffusion.from_config(config, stage), Diffusion.from_config(config, named.stage)
  source = reads.FromStage(
    stage=named.stage, network=DENOISER, workdir=named.workdir, model=teacher.denoiser.model
  )
  classifier = teacher.denoiser.classifier
  missing = set(classifier.needs) - student.conditions.ports.keys() if classifier else ()
  if missing:
    raise UserError(
      f'the teacher {named.stage!r} is guided by a classifier to what this student does not read, '
      f'{", ".join(sorted(missing))}: train a teacher that reads it too, or set its '
      "sample.classifier.stage = ''"
    )
  guides = {
    f'{TEACHER}_{name}': dataclasses.replace(guide, workdir=guide.workdir or named.workdir)
    for name, guide in teacher.for_sampling.items()
  }
  return {
    'student': student,
    'teacher': teacher.denoiser.renamed(TEACHER),
    'teacher_source': source,
    'teacher_guides': guides,
    'method': section.experiment,
  }
