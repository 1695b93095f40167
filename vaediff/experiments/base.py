"""What an experiment is: hyperparameters and modules that turn into pure functions of arrays."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp

from vaediff import reads
from vaediff.models.functional import Model
from vaediff.optim import Optimizer, global_norm
from vaediff.types import Batch, Image, ImageBytes, Keys, LatentMap, Metrics, Params


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


@runtime_checkable
class Experiment(Protocol):
  """One idea as pure functions of arrays. `params` are by network name, images in `batch` are uint8.

  Attributes:
    networks: the networks that this stage trains.
    frozen: the networks of earlier stages, and the published ones, that it reads.
    latent_dim: size of the latent code its samples start from; 0 = none.
    noise_shape: shape of the noise one sample starts from; () = none.
    takes_x0_vae: samples can be conditioned on a given image in place of the VAE's.
    reads_image: a sample is made of a given image, `condition['image']` (uint8), as reconstructions are.
    num_function_evaluations: forward passes of the denoiser per sampled image; 0 without one.
  """

  networks: Mapping[str, Model]
  frozen: Mapping[str, reads.FromStage | reads.Published]
  latent_dim: int
  noise_shape: tuple[int, ...]
  takes_x0_vae: bool
  reads_image: bool
  num_function_evaluations: int

  def init(self, key: jax.Array) -> TrainState:
    """Returns the state at step 0."""
    ...

  def train_step(
    self, state: TrainState, frozen: dict[str, Params], batch: Batch, key: jax.Array
  ) -> tuple[TrainState, Metrics]:
    """Returns the state after one update, and scalars; one of them is `loss`."""
    ...

  def eval_step(
    self, params: dict[str, Params], frozen: dict[str, Params], batch: Batch, key: jax.Array
  ) -> Metrics:
    """Returns scalars averaged over the examples with `batch['mask'] == 1`."""
    ...

  def sample(
    self,
    params: dict[str, Params],
    frozen: dict[str, Params],
    condition: dict[str, jax.Array],
    keys: Keys,
  ) -> dict[str, Image]:
    """Returns images in [-1, 1]; image i depends on `keys[i]` and the condition of i alone."""
    ...


@runtime_checkable
class HasLikelihood(Protocol):
  """An experiment with a variational bound.

  Attributes:
    likelihood: of what: 'mass of bytes', or 'density of pixels in [0, 1]'.
  """

  likelihood: str

  def negative_elbo(
    self,
    params: dict[str, Params],
    frozen: dict[str, Params],
    image: ImageBytes,
    keys: Keys,
    num_times: int,
  ) -> dict[str, jax.Array]:
    """Returns terms whose sum bounds -log p(x) from above, in nats per example.

    `num_times` is how many times of a diffusion are drawn per image; others do not read it.
    """
    ...


@runtime_checkable
class HasStepKinds(Protocol):
  """An experiment whose updates are of several kinds, each compiled once; the host chooses by the step."""

  def kind_of(self, step: int) -> str:
    """Returns the kind of the update that follows `step` updates."""
    ...

  def of_kind(self, kind: str) -> Experiment:
    """Returns the experiment whose `train_step` is an update of this kind; the state is the same."""
    ...


@runtime_checkable
class HasLatents(Protocol):
  """An experiment whose latents a later stage models; their statistics are measured when it is trained."""

  def latents(self, params: dict[str, Params], image: ImageBytes, keys: Keys) -> LatentMap:
    """Returns the latents of images as a later stage would draw them."""
    ...


@runtime_checkable
class HasStart(Protocol):
  """An experiment whose networks start from those it reads."""

  def start(self, state: TrainState, frozen: dict[str, Params]) -> TrainState:
    """Returns the state at step 0, made of what `init` returned."""
    ...


@runtime_checkable
class HasPrior(Protocol):
  """An experiment that draws latent codes while it trains: `frozen['prior']` holds the prior's arrays.

  Attributes:
    draws_codes: whether it does.
    teacher_source: the stage whose codes they are.
  """

  draws_codes: bool
  teacher_source: reads.FromStage


def offers(experiment: Experiment, protocol: type) -> bool:
  """Returns whether an experiment, seen through what is wrapped around it, has a protocol's methods."""
  return isinstance(unwrapped(experiment), protocol)


def unwrapped(experiment: Experiment) -> Any:
  """Returns an experiment without what is wrapped around it: with the protocols that it `offers`."""
  return getattr(experiment, 'inner', experiment)


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
  return Network(
    params=params,
    opt_state=opt_state,
    ema_params=optimizer.update_ema(network.ema_params, params, step),
  )


def gradients(
  loss_fn: Callable[[Params, Batch, jax.Array], tuple[jax.Array, Metrics]],
  params: Params,
  batch: Batch,
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
  return (
    TrainState(step=state.step + 1, networks=networks, extra=state.extra),
    {f'grad_norm/{name}': global_norm(grads)},
  )


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
  """Returns the mean of per-example values over the examples with mask 1."""
  return jnp.sum(values * mask) / jnp.sum(mask)
