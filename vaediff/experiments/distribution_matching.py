"""Distribution matching distillation of a refiner, alone or after adversarial distillation.

DMD2 (Yin et al. 2024, arXiv:2405.14867). Beside the frozen teacher, the denoiser of the data, a second copy
of it, the fake denoiser, is trained on the student's own images. At a random time t' the two say where an
image of the student's should go (`diffusion.distribution_matching`), and a head on the fake denoiser's lowest
map tells real images from the student's, both noised to t':

    L_student = |x0_hat - stop(x0_hat - direction)|^2 / 2 + adversarial_weight softplus(-D(x0_hat))
    L_fake = w_t |x0_fake(y_t) - x0_hat|^2
             + fake_adversarial_weight (softplus(-D(x0)) + softplus(D(x0_hat)))

The fake denoiser is updated at every step and the student at every `fake_updates`-th, because the direction
is right only as far as the fake denoiser follows. The student is trained on the states that it reaches
itself: from pure noise through its own x0_hats, as in sampling. Real and fake have x0_vae and z in common.

No pair of noise and image is stored, and no image of the teacher's is drawn.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from vaediff import reads
from vaediff.diffusion import adversarial, distribution_matching, gaussian, ladd, losses, schedules
from vaediff.errors import UserError
from vaediff.experiments import base, bounds
from vaediff.experiments.denoiser import DENOISER, Denoiser
from vaediff.experiments.grid_student import BOUNDS as BOUNDS_OF_GRID_STUDENT
from vaediff.experiments.grid_student import GridStudent, deinterleave, grid_parts, interleave
from vaediff.experiments.student import SAME, TEACHER
from vaediff.models.functional import Model
from vaediff.models.heads import Heads
from vaediff.optim import Optimizer, global_norm, make_optimizer
from vaediff.types import Batch, Image, Metrics, Params, Read, Rows, Time, Values

MAX_STEPS = 64
"""Of the student: every update calls it at all of its times but the last, to reach its own states."""
BOUNDS = {
  **BOUNDS_OF_GRID_STUDENT,
  'sample.num_steps': bounds.whole(1, MAX_STEPS),
  'fake_updates': bounds.updates(1),
  'loss.min_time': bounds.number(0, 1),
  'loss.max_time': bounds.number(0, 1),
  'loss.adversarial_weight': bounds.weight(),
  'loss.fake_adversarial_weight': bounds.weight(),
  **bounds.optimizers('optim_fake'),
}
FAKE = 'fake_denoiser'
"""Name of the network that is trained on the student's images."""
STUDENT = 'student'
"""Kind of the updates that train the student too."""
STUDENT_METRICS = ('loss/distribution', 'loss/adversarial', 'grad_norm/denoiser')
"""Of the last update of the student."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributionMatching(GridStudent):
  """The stage; trains `denoiser`, the student, `fake_denoiser`, and `discriminator`, the head.

  Attributes:
    start_source: the stage of this run whose student it starts from, or None for the teacher.
    discriminator: (t', lowest map of the fake denoiser) -> logits.
    optimizer_fake: of the fake denoiser and the head.
    fake_updates: updates of the fake denoiser for one of the student.
    min_time: least t'.
    max_time: largest t'.
    adversarial_weight: of the head in the student's loss; 0 = DMD2 without images of the data.
    fake_adversarial_weight: of the head's loss in that of the fake denoiser.
  """

  start_source: reads.FromStage | None
  discriminator: Model
  optimizer_fake: Optimizer
  fake_updates: int
  min_time: float
  max_time: float
  adversarial_weight: float
  fake_adversarial_weight: float

  bounds = BOUNDS

  @classmethod
  def from_config(cls, config: ConfigDict, stage: str) -> 'DistributionMatching':
    """Builds the experiment of `config.<stage>`."""
    section, shared = config[stage], grid_parts(config, stage)
    base.check(cls, config, stage)
    check(section)
    student, num_updates = shared['student'], max(1, section.train.num_steps // section.fake_updates)
    shared['student'] = dataclasses.replace(student, optimizer=make_optimizer(section.optim, num_updates))
    lowest = shared['teacher'].feature_shapes()[-1]
    return cls(
      **shared,
      **section.loss.to_dict(),
      start_source=start_source(config, stage, student.denoiser.model),
      discriminator=Model(
        module=Heads(**section.discriminator.to_dict()),
        inputs=(jax.ShapeDtypeStruct((1,), jnp.float32), jax.ShapeDtypeStruct((1, *lowest), jnp.float32)),
      ),
      optimizer_fake=make_optimizer(section.optim_fake, section.train.num_steps, 'optim_fake'),
      fake_updates=section.fake_updates,
    )

  @property
  def networks(self) -> Mapping[str, Model]:
    """The student, the denoiser of its images, and the head."""
    return {
      **super().networks,
      FAKE: self.teacher.model,
      'discriminator': self.discriminator,
    }

  @property
  def frozen(self) -> Mapping[str, reads.Reads]:
    """The teacher, what both read, and the student that this one goes on from."""
    return {**super().frozen, **({'start': self.start_source} if self.start_source else {})}

  def kind_of(self, step: int) -> str:
    """Returns 'student' for every `fake_updates`-th update."""
    return STUDENT if (step + 1) % self.fake_updates == 0 else ''

  @property
  def fake(self) -> Denoiser:
    """How the fake denoiser is read: as the teacher is. It is trained by a denoising loss in any case."""
    return dataclasses.replace(self.teacher, network=FAKE, objective='hybrid')

  def init(self, key: jax.Array) -> base.TrainState:
    """Returns the state at step 0, before `start` copies the teacher."""
    key_student, key_fake, key_head = jax.random.split(key, 3)
    state = super().init(key_student)
    networks = {
      **state.networks,
      FAKE: base.init_network(self.teacher.model, self.optimizer_fake, key_fake),
      'discriminator': base.init_network(self.discriminator, self.optimizer_fake, key_head),
    }
    return state.replace(networks=networks, extra={name: jnp.float32(0) for name in STUDENT_METRICS})

  def start(self, state: base.TrainState, frozen: Read) -> base.TrainState:
    """Returns the state whose fake denoiser is the teacher, and whose student is that of an earlier stage."""
    origin = frozen['start' if self.start_source else TEACHER]
    student = super().start(state, {**frozen, TEACHER: origin})
    fake = state.networks[FAKE].replace(params=jax.tree.map(jnp.copy, frozen[TEACHER]))
    return student.replace(networks={**student.networks, FAKE: fake})

  # What the losses read ---------------------------------------------------------------------------

  def own_states(
    self, read: Read, values: Values, like: Image, key: jax.Array
  ) -> tuple[Image, Time]:
    """Returns y_s and s of each example: states on the way of its own samples, not differentiated."""
    key_s, key_eps = jax.random.split(key)
    count, times, denoiser = like.shape[0], jnp.asarray(self.start_times), self.student.denoiser
    # of constants, so that no tangent goes through the scan and nothing is stored for one
    denoise = denoiser.denoise(*jax.lax.stop_gradient((read, values)))
    keys = jax.random.split(key_eps, len(times))
    noises = jax.vmap(lambda key: jax.random.normal(key, like.shape))(keys)

    def step(y: Image, row: tuple[Array, Array, Image]) -> tuple[Image, Image]:
      t, s, noise = row
      x0_hat = denoise(y, jnp.full(count, t))
      y = gaussian.q_sample(x0_hat, noise, jnp.full(count, s), denoiser.schedule)
      return y, y

    _, reached = jax.lax.scan(step, noises[0], (times[:-1], times[1:], noises[1:]))
    states = jnp.concatenate([noises[:1], reached])
    drawn = jax.random.choice(key_s, len(times), (count,), p=jnp.asarray(self.start_probabilities))
    y = jnp.take_along_axis(states, drawn.reshape(1, count, *[1] * (like.ndim - 1)), axis=0)[0]
    return jax.lax.stop_gradient(y), times[drawn]

  def matching_time(self, key: jax.Array, count: int) -> Time:
    """Returns t', uniform in [min_time, max_time], on the times that the schedule trains on."""
    t = jax.random.uniform(key, (count,), minval=self.min_time, maxval=self.max_time)
    return ladd.on_trained_times(t, self.teacher.schedule)

  def judge(self, read: Read, y: Image, t: Time, values: Values) -> Float[Array, ' batch _']:
    """Returns the head's logits on the fake denoiser's lowest map at y_t'."""
    lowest = self.fake.features(read, y, t, values)[-1]
    return self.discriminator.apply(read['discriminator'], t, lowest.astype(jnp.float32))[0]

  # Training ---------------------------------------------------------------------------------------

  def fake_loss(self, read: Read, rows: Rows, key: jax.Array) -> tuple[jax.Array, Metrics]:
    """Returns L_fake, a mean over the batch, its terms, and the mean logits."""
    key_state, key_t, key_eps, key_judge = jax.random.split(key, 4)
    x0, values = rows['x0'], rows['values']
    y, s = self.own_states(read, values, x0, key_state)
    x0_hat = jax.lax.stop_gradient(self.student.denoiser.x0_hat(read, values)(y, s))
    t, eps = (
      schedules.sample_time(self.teacher.schedule, key_t, x0.shape[0]),
      jax.random.normal(key_eps, x0.shape),
    )
    y = gaussian.q_sample(x0_hat, eps, t, self.teacher.schedule)
    output = self.fake.output(read, y, t, values)
    each = losses.denoising_loss(
      self.teacher.prediction, output, x0_hat, eps, t, self.teacher.schedule, self.loss_weight
    )
    metrics = {'loss/fake': jnp.mean(each)}
    loss = metrics['loss/fake']
    if self.adversarial_weight:
      key_t, key_eps = jax.random.split(key_judge)
      twice = (self.matching_time(key_t, x0.shape[0]), jax.random.normal(key_eps, x0.shape), values)
      t, eps, values = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), twice)
      y = gaussian.q_sample(interleave(x0, x0_hat), eps, t, self.teacher.schedule)
      real, fake = deinterleave(self.judge(read, y, t, values), 2)
      metrics['loss/discriminator'] = jnp.mean(adversarial.discriminator_loss(real, fake))
      metrics |= {'logits/real': jnp.mean(real), 'logits/fake': jnp.mean(fake)}
      loss += self.fake_adversarial_weight * metrics['loss/discriminator']
    return loss, {'loss': loss, **metrics}

  def student_loss(self, read: Read, rows: Rows, key: jax.Array) -> tuple[jax.Array, Metrics]:
    """Returns L_student, a mean over the batch, and its terms."""
    key_state, key_t, key_eps = jax.random.split(key, 3)
    x0, values = rows['x0'], rows['values']
    y, s = self.own_states(read, values, x0, key_state)
    x0_hat = self.student.denoiser.x0_hat(read, values)(y, s)
    t, eps = self.matching_time(key_t, x0.shape[0]), jax.random.normal(key_eps, x0.shape)
    noised = gaussian.q_sample(x0_hat, eps, t, self.teacher.schedule)
    of_data, of_student = (
      self.teacher.clip_to_data(denoise)(jax.lax.stop_gradient(noised), t)
      for denoise in (self.teacher.denoise(read, values), self.fake.x0_hat(read, values))
    )
    direction = distribution_matching.direction(jax.lax.stop_gradient(x0_hat), of_data, of_student)
    matching = jnp.mean(distribution_matching.loss(x0_hat, direction))
    deception = jnp.float32(0)
    if self.adversarial_weight:
      logits = self.judge(read, noised, t, values)
      deception = jnp.mean(adversarial.generator_loss(logits))
    loss = matching + self.adversarial_weight * deception
    return loss, {'loss/distribution': matching, 'loss/adversarial': deception}

  def train_step(
    self, state: base.TrainState, frozen: Read, batch: Batch, key: jax.Array, kind: str = ''
  ) -> tuple[base.TrainState, Metrics]:
    """Returns the state after one update of fake denoiser and head and, where it is due, of the student.

    `loss` is that of the fake denoiser.
    """
    key_rows, key_fake, key_student = jax.random.split(key, 3)
    networks, last, own = dict(state.networks), dict(state.extra), self.student.denoiser.network
    student, names = networks[own], (FAKE, 'discriminator')
    read = {**frozen, own: student.params}
    rows = self.rows(read, batch, key_rows)

    def loss_fake(params: dict[str, Params], rows: Rows, key: jax.Array) -> tuple[jax.Array, Metrics]:
      return self.fake_loss({**read, **params}, rows, key)

    others = {name: networks[name].params for name in names}
    grads, metrics = base.gradients(loss_fake, others, rows, key_fake, self.microbatches)
    for name in names:
      networks[name] = base.apply_gradients(networks[name], grads[name], self.optimizer_fake, state.step)
      metrics[f'grad_norm/{name}'] = global_norm(grads[name])

    if kind == STUDENT:
      others = {name: networks[name].params for name in names}

      def loss_student(params: Params, rows: Rows, key: jax.Array) -> tuple[jax.Array, Metrics]:
        return self.student_loss({**frozen, **others, own: params}, rows, key)

      grads, terms = base.gradients(loss_student, student.params, rows, key_student, self.microbatches)
      networks[own] = base.apply_gradients(student, grads, self.student.optimizer, state.step)
      last |= {**terms, f'grad_norm/{own}': global_norm(grads)}
    shown = {name: last[name] for name in STUDENT_METRICS}
    return base.TrainState(step=state.step + 1, networks=networks, extra=last), {**metrics, **shown}


def start_source(config: ConfigDict, stage: str, model: Model) -> reads.FromStage | None:
  """Returns the student of the stage `start_stage`, None where that is ''.

  Raises:
    UserError: when it is no student, or one of another network.
  """
  section = config[stage]
  name = section.start_stage
  if not name:
    return None
  stages = tuple(config.stages)
  before = stages[: stages.index(stage)] if stage in stages else stages
  known = name in before and 'teacher' in config[name] and 'model' in config[name]
  if not known or config[name].model != section.model:
    raise UserError(
      f'start_stage is {name!r}, which is no stage of this run with a student of the same '
      f"network that is trained before; name one of config.stages, or '' for the teacher"
    )
  for field in (*SAME, 'prediction'):
    if config[name].diffusion[field] != section.diffusion[field]:
      raise UserError(
        f'start_stage is {name!r}, whose diffusion.{field} is {config[name].diffusion[field]!r}; here it is '
        f'{section.diffusion[field]!r}'
      )
  return reads.FromStage(stage=name, network=DENOISER, workdir='', model=model)


def check(section: ConfigDict) -> None:
  """Raises UserError for fields of the stage's section that contradict each other."""
  if section.sample.sampler != 'renoise':
    raise UserError(
      f"sample.sampler must be 'renoise', on whose states the student is trained, got "
      f'{section.sample.sampler!r}'
    )
  loss = section.loss
  if not 0 < loss.min_time < loss.max_time <= 1:
    raise UserError(
      f'loss.min_time and loss.max_time must be 0 < min_time < max_time <= 1, got {loss.min_time} and '
      f'{loss.max_time}'
    )
  if section.optim_fake.ema_decay:
    raise UserError(
      f'optim_fake.ema_decay must be 0: only the student is averaged, got {section.optim_fake.ema_decay}'
    )
