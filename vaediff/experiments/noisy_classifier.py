"""A classifier of noisy states y_t, which guides a diffusion of the same space and schedule to a class.

Trained by the cross-entropy of q(y_t | x0) with t uniform (Dhariwal & Nichol 2021, arXiv:2105.05233). It is
given no shift, no image and no code of a VAE: what the diffusion is conditioned on may show the class, and a
classifier that sees it there has no gradient at y_t.

Its accuracy depends on the noise: validation reports it at all times together, and in five bins of logsnr.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from vaediff import checks, reads
from vaediff.conditions.label import LABEL
from vaediff.data import pixels
from vaediff.diffusion import gaussian, guidance, schedules
from vaediff.errors import UserError
from vaediff.experiments import base, bounds
from vaediff.experiments.classifier import cross_entropy
from vaediff.models.functional import Model
from vaediff.models.noisy_classifier import NoisyClassifier as Module
from vaediff.models.unet import UNet
from vaediff.optim import Optimizer, make_optimizer
from vaediff.spaces import Space, make_space
from vaediff.types import Batch, Metrics, Params, Read, Time, Values

NETWORK = 'noisy_classifier'
"""Name of the network."""
CENTRES = (-4, -2, 0, 2, 4)
"""Of the bins of logsnr, which are 2 nats wide; the outer two have no end."""
ACCURACIES = tuple(f'accuracy_logsnr_{centre}' for centre in CENTRES)
BOUNDS = {
  'diffusion.schedule': checks.one_of(schedules.SCHEDULES),
  **bounds.within('model', bounds.CONVOLUTIONAL),
  'model.num_heads': bounds.whole(1, bounds.MAX_LEVELS),
  'model.pool_heads': bounds.whole(1, bounds.MAX_LEVELS),
  **bounds.optimizers('optim'),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoisyClassifier(base.Experiment):
  """The stage of a noisy classifier; trains the network `noisy_classifier`.

  Attributes:
    space: of the states.
    schedule: of their noise.
    classifier: the architecture.
    optimizer: its optimizer.
    flip: random horizontal flips.
    microbatches: parts that a batch is split into for the gradient.
  """

  space: Space
  schedule: schedules.Schedule
  classifier: Model
  optimizer: Optimizer
  flip: bool
  microbatches: int

  draws_images = False
  metrics = {'loss': False, 'accuracy': True, **dict.fromkeys(ACCURACIES, True)}
  bounds = BOUNDS

  @classmethod
  def from_config(cls, config: ConfigDict, stage: str) -> 'NoisyClassifier':
    """Builds the experiment of `config.<stage>`."""
    base.check(cls, config, stage)
    section = config[stage]
    space = make_space(config, stage)
    return cls(
      space=space,
      schedule=schedules.make_schedule(section.diffusion.schedule),
      classifier=classifier_model(config, stage, space),
      optimizer=make_optimizer(section.optim, section.train.num_steps),
      flip=section.train.flip,
      microbatches=section.train.microbatches,
    )

  @property
  def networks(self) -> Mapping[str, Model]:
    """The one network of this stage."""
    return {NETWORK: self.classifier}

  @property
  def frozen(self) -> Mapping[str, reads.Reads]:
    """Networks and measurements that the space reads."""
    return self.space.frozen

  def init(self, key: jax.Array) -> base.TrainState:
    """Returns the state at step 0."""
    network = base.init_network(self.classifier, self.optimizer, key)
    return base.TrainState(step=jnp.int32(0), networks={NETWORK: network}, extra={})

  def logits(self, params: Params, y0: Array, eps: Array, t: Time) -> Float[Array, 'batch classes']:
    """Returns the logits of y_t, made of maps of the space and noise."""
    y = gaussian.q_sample(y0, eps, t, self.schedule)
    return self.classifier.apply(params, y, t)

  def train_step(
    self, state: base.TrainState, frozen: Read, batch: Batch, key: jax.Array, kind: str = ''
  ) -> tuple[base.TrainState, Metrics]:
    """Returns the state after one update of the cross-entropy, and its value and the accuracy."""
    del kind

    def loss_fn(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
      key_flip, key_map, key_t, key_eps = jax.random.split(key, 4)
      batch = pixels.prepare(batch, key_flip if self.flip else None)
      y0 = self.space.encode(frozen, batch['image'], key_map)
      t = schedules.sample_time(self.schedule, key_t, y0.shape[0])
      logits = self.logits(params, y0, jax.random.normal(key_eps, y0.shape), t)
      loss = jnp.mean(cross_entropy(logits, batch[LABEL]))
      return loss, {'loss': loss, 'accuracy': jnp.mean(right(logits, batch[LABEL]))}

    params = state.networks[NETWORK].params
    grads, metrics = base.gradients(loss_fn, params, batch, key, self.microbatches)
    state, norms = base.update_one(state, NETWORK, grads, self.optimizer)
    return state, {**metrics, **norms}

  def eval_step(self, read: Read, batch: Batch, key: jax.Array) -> Metrics:
    """Returns cross-entropy (nats) and accuracy, t uniform, and the accuracy in each bin of logsnr.

    For the bins every image is seen once more in each of them, at a time that is uniform within it.
    """
    key_t, key_eps = jax.random.split(key)
    y0 = self.space.encode(read, pixels.to_unit_range(batch['image']), None)
    count, label = y0.shape[0], batch[LABEL]
    keys_t = jax.random.split(key_t, 1 + len(CENTRES))
    keys_eps = jax.random.split(key_eps, 1 + len(CENTRES))

    def seen(number: int, t: Time) -> Float[Array, 'batch classes']:
      return self.logits(read[NETWORK], y0, jax.random.normal(keys_eps[number], y0.shape), t)

    logits = seen(0, schedules.sample_time(self.schedule, keys_t[0], count))
    values = {'loss': cross_entropy(logits, label), 'accuracy': right(logits, label)}
    for number, (name, (low, high)) in enumerate(zip(ACCURACIES, bins(self.schedule), strict=True), start=1):
      t = jax.random.uniform(keys_t[number], (count,), minval=low, maxval=high)
      values[name] = right(seen(number, t), label)
    return {name: base.masked_mean(value, batch['mask']) for name, value in values.items()}


def right(logits: Float[Array, 'batch classes'], label: Array) -> Float[Array, ' batch']:
  """Returns 1 where the largest logit is that of the label, else 0."""
  return (jnp.argmax(logits, axis=1) == label).astype(jnp.float32)


def bins(schedule: schedules.Schedule) -> list[tuple[float, float]]:
  """Returns the times (least, most) of each bin of logsnr, in the order of `CENTRES`."""
  first = 1 / schedule.train_steps if schedule.train_steps else 0.0
  times = np.linspace(first, 1.0, 10_001)
  edges = np.interp([-(centre + 1) for centre in CENTRES[:-1]], -schedule.logsnr(times), times)
  inner = [float(edge) for edge in edges]  # from noise to data
  return list(zip([*inner, first], [1.0, *inner], strict=True))


def classifier_model(config: ConfigDict, stage: str, space: Space) -> Model:
  """Returns the network of a stage's section, for the classes of the data set.

  Raises:
    UserError: for a data set whose classes are not known, or maps that are not square.
  """
  classes, (height, width, channels) = config.data.num_classes, space.shape
  if classes < 2:
    raise UserError(
      f'a classifier needs a data set with classes: data.num_classes is {classes}, it must be at least 2'
    )
  if height != width:
    raise UserError(f'the U-Net takes square maps, those of this space are {height} x {width}')
  model = config[stage].model.to_dict()
  pool_heads = model.pop('pool_heads')
  encoder = UNet(image_size=height, image_channels=channels, **model)
  state = jax.ShapeDtypeStruct((1, *space.shape), jnp.float32)
  return Model(
    module=Module(encoder=encoder, num_classes=classes, pool_heads=pool_heads),
    inputs=(state, jax.ShapeDtypeStruct((1,), jnp.float32)),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guide:
  """A trained noisy classifier as what guides a denoiser to the label among its values.

  Attributes:
    model: the network.
    scale: s of `guidance.with_classifier`.
    network: its name in `read`.
  """

  model: Model
  scale: int | float
  network: str = NETWORK

  needs = (LABEL,)

  def log_prob(self, read: Read, values: Values) -> guidance.LogProb:
    """Returns (y_t, t) -> log p(label | y_t)."""

    def of(y: Any, t: Time) -> Float[Array, ' batch']:
      return -cross_entropy(self.model.apply(read[self.network], y, t), values[LABEL])

    return of
