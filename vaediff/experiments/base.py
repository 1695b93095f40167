"""What an experiment is: hyperparameters and modules that turn into pure functions of arrays.

Keys: one key is drawn from once, or split, or folded with numbers, and never two of these, for what is made
of it in one way is not independent of what is made in another. The keys of samples are made by
`sampling_keys` alone; whoever changes what a sample starts from hands it over as `given`, and makes no key.
"""

import abc
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from vaediff import checks, reads
from vaediff.conditions.augmentation import UNIT_NOISE
from vaediff.conditions.base import Conditions
from vaediff.errors import UserError
from vaediff.experiments.columns import Columns
from vaediff.models.functional import Model
from vaediff.optim import Optimizer, global_norm
from vaediff.spaces import Space
from vaediff.types import Batch, Given, Image, Keys, LatentMap, Metrics, Params, Read, Rows


@flax.struct.dataclass
class Network:
  """One trainable network: parameters, optimizer state and, where one is kept, the parameter average."""

  params: Any
  opt_state: Any
  ema_params: Any

  @property
  def eval_params(self) -> Params:
    """The averaged parameters if there are any, else the parameters."""
    return self.params if self.ema_params is None else self.ema_params


@flax.struct.dataclass
class TrainState:
  """All that a stage changes while it trains.

  Attributes:
    step: number of updates done, int32.
    networks: by name, such as `denoiser`, or `generator` and `discriminator`.
    extra: arrays that are neither parameters nor optimizer state, such as codebook statistics.
  """

  step: Any  # Any: as a pytree it also holds shapes, shardings or specs in place of arrays
  networks: Any
  extra: Any

  @property
  def eval_params(self) -> dict[str, Params]:
    """The parameters to evaluate and sample with, by network."""
    return {name: network.eval_params for name, network in self.networks.items()}


def check(experiment: type['Experiment'], config: ConfigDict, stage: str) -> None:
  """Raises UserError for the first field of a stage's section that is outside the experiment's bounds."""
  checks.check(config[stage], experiment.bounds, f'config.{stage}: ')


BYTES, IDS = 'mass of bytes', 'mass of ids'
"""What the bound of a diffusion of the images themselves is of, and what that of a prior of ids is of."""
NOISE = 'noise'
"""Name of what a diffusion starts from, among what its samples can be given: unit variance."""


class SampleKeys(NamedTuple):
  """The keys of samples, each used once, one per image.

  Attributes:
    conditions: of what they are made on.
    noise: of what they start from.
    sampler: of the steps.
  """

  conditions: Keys
  noise: Keys
  sampler: Keys


def sampling_keys(keys: Keys) -> SampleKeys:
  """Returns the keys of samples, made of one key per image."""
  pairs = jax.vmap(lambda key: jax.random.split(key))(keys)
  own = jax.vmap(lambda key: jax.random.split(key))(pairs[:, 1])
  return SampleKeys(pairs[:, 0], own[:, 0], own[:, 1])


class Experiment(abc.ABC):
  """One idea as pure functions of arrays: a frozen dataclass.

  `read` holds parameters by the names of `networks`, and what `frozen` declares. Images in `batch` are uint8.

  Attributes:
    frozen: what it reads of earlier stages, measurements and published arrays.
    starts: networks of other runs that its own begin as: read before the first update, and never again.
    for_sampling: what it reads beside that when it is sampled, and training does not know of.
    made_of: by name, stage and checkpoint ('latest', 'best' or a step) of networks that a mode, not the loop,
      made its own of: it is not `trainable`.
    draws_images: it can be sampled.
    handed: of what `sample` returns, what is no image, such as ids: stages that it feeds get it as it is.
    inputs: what its samples can be given, for one image; of these, `draw` and `observe` make what is needed.
    limits: of these, the least and the largest number of those that have them.
    ranges: of these, what the numbers of those are that have no limits and are no image in [-1, 1].
    stored: of these, what is observed once for every training image and then read beside the batch.
    titles: of the images that it draws beside, or before, its own, for tables.
    reads_codes: its samples are made of the codes of a tokenizer.
    num_groups: its samples come in so many kinds, in turn; 0 = in none.
    classes: the classes of the data set that its samples are asked to be of, in turn; () = of none.
    reconstructs: what it observes of an image is enough to draw that image again.
    diffusion: the `experiments.diffusion.Diffusion` that draws its samples step by step; None = none does.
    num_function_evaluations: forward passes of the denoiser per sampled image; 0 without one.
    makers: the stages whose samples feed it when it is sampled.
    borrowed: of its inputs, those that its samples have of the images of the evaluation split, in turn.
    image_factor: the sides of the data over those of the images that it draws.
    max_level: of the noise on what it reads of an image, in training; 0 = there is none.
    can_be_guided: conditions are dropped in training, so that a guidance weight above 0 is possible.
    likelihood: what its bound is of: `BYTES`, `IDS`, 'density of pixels in [0, 1]', or '' without one.
    no_likelihood: why it has no bound, where one could be asked for.
    measures: measurements of it that later stages read, of `vaediff.run.measurements`.
    metrics: all that `eval_step` may report, and `run.usage` of `counts`; whether the largest is the best.
    notes: what is said when its training starts, and by `describe`, a line each.
    bounds: of every number and name in its section but those that every stage has (`run.config`).
  """

  frozen: Mapping[str, reads.Reads] = {}
  starts: Mapping[str, reads.FromStage] = {}
  for_sampling: Mapping[str, reads.Reads] = {}
  made_of: Mapping[str, tuple[str, str]] = {}
  trainable = draws_images = True
  handed: Mapping[str, jax.ShapeDtypeStruct] = {}
  inputs: Mapping[str, jax.ShapeDtypeStruct] = {}
  limits: Mapping[str, tuple[float, float]] = {}
  ranges: Mapping[str, str] = {}
  stored: Mapping[str, jax.ShapeDtypeStruct] = {}
  titles: Mapping[str, str] = {}
  reads_codes = reconstructs = can_be_guided = False
  num_groups = num_function_evaluations = 0
  classes: tuple[int, ...] = ()
  diffusion: Any = None
  makers: tuple[reads.Sampled, ...] = ()
  borrowed: tuple[str, ...] = ()
  image_factor = 1
  max_level = 0.0
  likelihood = no_likelihood = ''
  measures: tuple[str, ...] = ()
  metrics: Mapping[str, bool] = {'loss': False}
  notes: tuple[str, ...] = ()
  bounds: checks.Bounds = {}

  @property
  def depth(self) -> int:
    """How many stages are sampled before it, one after the other."""
    return max((maker.depth for maker in self.makers), default=0)

  @property
  @abc.abstractmethod
  def networks(self) -> Mapping[str, Model]:
    """The networks that this stage trains."""

  @abc.abstractmethod
  def init(self, key: jax.Array) -> TrainState:
    """Returns the state at step 0."""

  def alone(self) -> 'Experiment':
    """Returns the same stage sampled without what is read `for_sampling`: while it trains."""
    return self

  def start(self, state: TrainState, frozen: Read) -> TrainState:
    """Returns the state at step 0, made of what `init` returned and of the networks that it reads."""
    del frozen
    return state

  def kind_of(self, step: int) -> str:
    """Returns the kind of the update that follows `step` updates; each kind is compiled once."""
    del step
    return ''

  @abc.abstractmethod
  def train_step(
    self, state: TrainState, frozen: Read, batch: Batch, key: jax.Array, kind: str = ''
  ) -> tuple[TrainState, Metrics]:
    """Returns the state after one update of a kind, and scalars; one of them is `loss`."""

  @abc.abstractmethod
  def eval_step(self, read: Read, batch: Batch, key: jax.Array) -> Metrics:
    """Returns scalars averaged over the examples with `batch['mask'] == 1`."""

  def warnings(self, metrics: Mapping[str, float]) -> tuple[str, ...]:
    """Returns what the metrics of a validation say is wrong, a line each."""
    del metrics
    return ()

  def counts(self, read: Read, batch: Batch) -> dict[str, jax.Array]:
    """Returns how often each code of a codebook occurs in the images with mask 1, by codebook; float."""
    del read, batch
    return {}

  def observe(self, read: Read, batch: Batch, x: Image, key: jax.Array | None = None) -> Given:
    """Returns what a sample would be given to be like each image; see `Condition.observe`."""
    del read, batch, x, key
    return {}

  def store(self, read: Read, batch: Batch, x: Image) -> Given:
    """Returns what is `stored` of each image, images in [-1, 1]; without a posterior's noise."""
    del read, batch, x
    return {}

  def check_stored(self, stored: Mapping[str, np.ndarray]) -> None:
    """Raises UserError where nothing can be learned of what is stored of the training images."""
    del stored

  def draw(self, read: Read, keys: SampleKeys, indices: Int[Array, ' batch']) -> Given:
    """Returns what a sample starts from, drawn of nothing for the images with these indices."""
    del read, keys, indices
    return {}

  def sample(self, read: Read, given: Given, keys: SampleKeys) -> dict[str, Image]:
    """Returns images in [-1, 1] by name, the stage's own last, and what is `handed`; row i is of row i alone.

    Args:
      read: what the stage reads.
      given: what `draw` or `observe` return, or what takes its place.
      keys: of the same images as those of `draw`.
    """
    del read, given, keys
    return {}

  def bound(self, read: Read, batch: Batch, keys: Keys, num_times: int) -> dict[str, jax.Array]:
    """Returns terms whose sum bounds -log p(x) from above, in nats per example; {} without a `likelihood`.

    `num_times` is how many times of a diffusion are drawn per image; others do not read it.
    """
    del read, batch, keys, num_times
    return {}

  def classes_of(self, indices: np.ndarray) -> np.ndarray | None:
    """Returns the class, int32, that each of these samples is asked to be of; None where of none."""
    classes = np.asarray(self.classes, np.int32)
    return classes[np.asarray(indices) % len(classes)] if len(classes) else None

  def columns(self) -> Columns:
    """Returns what tells its rows in a table of several runs apart."""
    raise UserError('this stage draws in no steps')


def of_conditions(name: str) -> property:
  """Returns the attribute of an experiment that is the same one of its `conditions`."""
  return property(lambda self: getattr(self.conditions, name))


class InSpace(Experiment):
  """An experiment whose samples are made as maps of a space, and then decoded.

  Attributes:
    space: of the maps.
    conditions: what they are made on; `complete` fills in what follows from what is given.
  """

  space: Space
  conditions: Conditions

  reads_codes = of_conditions('reads_codes')
  num_groups = of_conditions('num_groups')
  classes = of_conditions('classes')
  reconstructs = of_conditions('reconstructs')
  makers = of_conditions('makers')
  borrowed = of_conditions('borrowed')
  max_level = of_conditions('max_level')
  limits = of_conditions('limits')

  @property
  def inputs(self) -> Mapping[str, jax.ShapeDtypeStruct]:
    """What the conditions can be given, and the noise at the start."""
    return {**self.conditions.inputs, NOISE: jax.ShapeDtypeStruct(self.space.shape, jnp.float32)}

  @property
  def ranges(self) -> Mapping[str, str]:
    """What the numbers of the conditions' inputs, and of the noise, are."""
    return {**self.conditions.ranges, NOISE: UNIT_NOISE}

  @property
  def frozen(self) -> Mapping[str, reads.Reads]:
    """What the space and the conditions read."""
    return {**self.space.frozen, **self.conditions.frozen}

  @property
  def stored(self) -> Mapping[str, jax.ShapeDtypeStruct]:
    """What the conditions observe once."""
    return self.conditions.stored

  @property
  def titles(self) -> Mapping[str, str]:
    """Titles of what is shown before a sample; the sample then is 'refined'."""
    before = self.conditions.titles
    return {**before, 'x0': 'refined'} if before else {}

  @property
  def image_factor(self) -> int:
    """The sides of the data over those of the images of the space."""
    return self.space.factor

  def observe(self, read: Read, batch: Batch, x: Image, key: jax.Array | None = None) -> Given:
    """Returns what the conditions see of each image."""
    return self.conditions.observe(read, batch, x, key)

  def store(self, read: Read, batch: Batch, x: Image) -> Given:
    """Returns what the conditions have stored of each image."""
    seen = self.conditions.complete(read, self.conditions.observe(read, batch, x, None))
    return {name: seen[name] for name in self.stored}

  def draw(self, read: Read, keys: SampleKeys, indices: Int[Array, ' batch']) -> Given:
    """Returns what the conditions draw, and the noise at the start, of unit variance."""
    noise = jax.vmap(lambda key: jax.random.normal(key, self.space.shape))(keys.noise)
    return {**self.conditions.draw(read, keys.conditions, indices), NOISE: noise}

  @abc.abstractmethod
  def maps(self, read: Read, given: Given, keys: SampleKeys) -> LatentMap:
    """Returns maps of the space, made of a complete `given`; map i depends on row i alone."""

  def sample(self, read: Read, given: Given, keys: SampleKeys) -> dict[str, Image]:
    """Returns what the conditions show, and {'x0': images in [-1, 1]}; see `Experiment.sample`."""
    given = self.conditions.complete(read, given)
    return {**self.conditions.shown(given), **self.space.decode(read, self.maps(read, given, keys))}


def init_network(model: Model, optimizer: Optimizer, key: jax.Array) -> Network:
  """Returns a network at step 0."""
  params = model.init(key)
  return Network(
    params=params, opt_state=optimizer.transform.init(params), ema_params=optimizer.init_ema(params)
  )


def apply_gradients(network: Network, grads: Params, optimizer: Optimizer, step: jax.Array) -> Network:
  """Returns the network after one optimizer update and one update of its average."""
  updates, opt_state = optimizer.transform.update(grads, network.opt_state, network.params)
  params = jax.tree.map(lambda p, u: p + u, network.params, updates)
  ema_params = optimizer.update_ema(network.ema_params, params, step)
  return Network(params=params, opt_state=opt_state, ema_params=ema_params)


def gradients(
  loss_fn: Callable[[Params, Rows, jax.Array], tuple[jax.Array, Metrics]],
  params: Params,
  batch: Rows,
  key: jax.Array,
  microbatches: int,
) -> tuple[Params, Metrics]:
  """Returns gradient and metrics of a mean over the batch, accumulated over equal parts of it.

  Only one part's activations are held at a time. A part takes every `microbatches`-th example, so that each
  device keeps the examples it has.

  Args:
    loss_fn: (params, batch, key) -> (loss, metrics), means over the examples of its batch.
    params: to differentiate with respect to.
    batch: arrays with one row per example.
    key: of the noise; part k gets fold_in(key, k), a single part the key itself.
    microbatches: number of parts; it divides the batch.
  """
  grad_fn = jax.grad(loss_fn, has_aux=True)
  if microbatches == 1:
    return grad_fn(params, batch, key)

  def part(k: jax.Array) -> tuple[Params, Metrics]:
    rows = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:])[:, k], batch)
    return grad_fn(params, rows, jax.random.fold_in(key, k))

  def add(total, k):
    return jax.tree.map(jnp.add, total, part(k)), None

  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(part, jnp.int32(0)))
  total, _ = jax.lax.scan(add, zeros, jnp.arange(microbatches))
  return jax.tree.map(lambda leaf: leaf / microbatches, total)


def update_one(
  state: TrainState, name: str, grads: Params, optimizer: Optimizer
) -> tuple[TrainState, Metrics]:
  """Returns the state after an update of the one network that the stage trains, and its gradient norm."""
  network = apply_gradients(state.networks[name], grads, optimizer, state.step)
  networks = {**state.networks, name: network}
  after = TrainState(step=state.step + 1, networks=networks, extra=state.extra)
  return after, {f'grad_norm/{name}': global_norm(grads)}


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
  """Returns the mean of per-example values over the examples with mask 1."""
  return jnp.sum(values * mask) / jnp.sum(mask)
