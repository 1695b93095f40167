"""What the JAX worker runs: this project's networks, train steps and samplers, as `vaediff` runs them.

- forward: `jit(model.apply)`, without dropout.
- train: the step of `vaediff.run.steps.make_step`, that is the whole update of the experiment as its config
  describes it, on a batch that is on the device: for the U-Net bytes to floats, flips, time and noise, loss,
  gradient, clipping to norm 1, Adam, parameter average, and the guard against bad steps; for the VAE the same
  with its own loss and without flips, clipping and average.
- sample: `jit(experiment.sample)`: DDIM as one `lax.scan`, with clipping of x0_hat.

The state is donated from step to step. The VAE of the refiner's condition is not part of its step: its images
are in the batch, as with `refiner.diffusion.x0_vae_source = 'precomputed'`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.cases import CASES, Case
from vaediff import experiments
from vaediff.experiments.base import Experiment, sampling_keys
from vaediff.machine import cost, sharding
from vaediff.models.functional import Model
from vaediff.run import guard, steps
from vaediff.run import loop as training


@dataclasses.dataclass(frozen=True)
class Built:
  """A measurement that is ready to run.

  Attributes:
    run: starts it once, and returns what it will have made.
    wait: waits for what `run` returned.
    parameters: of the network; 0 for a single operation.
  """

  run: Callable[[], Any]
  wait: Callable[[Any], Any]
  parameters: int


def describe_device() -> str:
  """Returns the name of the device that JAX runs on; 'cpu' for any CPU."""
  return jax.devices()[0].device_kind


def experiment_of(case: Case, dtype: str = 'float32', tiny: bool = False) -> Experiment:
  """Returns the experiment that trains the network of a case."""
  return experiments.build(case.config(dtype, tiny), case.stage)


def model_of(case: Case, experiment: Experiment) -> Model:
  """Returns the network of a case."""
  name = {'unet': 'denoiser', 'vae': 'vae', 'ncsnpp': 'generator', 'decoder': 'autoencoder'}[case.network]
  return experiment.networks[name]


def init(case: Case, model: Model, key: jax.Array) -> Any:
  """Returns initial parameters of the network of a case; for the decoder, the decoder's alone."""
  params = model.init(key)
  return {'decoder': params['decoder']} if case.network == 'decoder' else params


def forward(case: Case, model: Model) -> Callable[..., Any]:
  """Returns (params, *inputs) -> the output of a forward pass."""
  return functools.partial(model.apply, method='decode') if case.network == 'decoder' else model.apply


def inputs_of(case: Case, experiment: Experiment, model: Model, count: int) -> list[Any]:
  """Returns random inputs of a forward pass, one row per image; times are those that training draws.

  They are arrays, and for the U-Net a dict of its values.
  """
  rng = np.random.default_rng(0)
  draw = lambda shape: rng.normal(size=(count, *shape)).astype(np.float32)
  if case.network == 'decoder':
    return [draw(experiment.latent_shape)]
  inputs = list(jax.tree.map(lambda struct: draw(struct.shape[1:]), model.inputs))
  if case.network == 'unet':
    inputs[1] = (rng.integers(1, 1001, count) / 1000).astype(np.float32)
  if case.network == 'ncsnpp':
    inputs[1] = rng.integers(0, 4, count).astype(np.float32)
  while inputs[-1] is None:
    inputs.pop()
  return inputs


def build(
  name: str, task: str, *, count: int, dtype: str, compiled: bool = False, tiny: bool = False
) -> Built:
  """Returns a measurement of `count` images; `compiled` is PyTorch's matter: here everything is."""
  del compiled
  case = CASES[name]
  experiment = experiment_of(case, dtype, tiny)
  model = model_of(case, experiment)
  make = {'forward': _forward, 'train': _train, 'sample': _sample}[task]
  abstract = jax.eval_shape(functools.partial(init, case, model), jax.random.key(0))
  run = make(case, experiment, model, count, case.config(dtype, tiny))
  return Built(run, jax.block_until_ready, cost.num_parameters(abstract))


def _init(case: Case, model: Model) -> Any:
  return jax.jit(functools.partial(init, case, model))(jax.random.key(0))


def _forward(case: Case, experiment: Experiment, model: Model, count: int, config: Any) -> Callable[[], Any]:
  del config
  params = _init(case, model)
  inputs = jax.device_put(inputs_of(case, experiment, model, count))
  compiled = jax.jit(forward(case, model))
  return lambda: compiled(params, *inputs)


def _train(case: Case, experiment: Experiment, model: Model, count: int, config: Any) -> Callable[[], Any]:
  del model
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  where = jax.tree.map(lambda leaf: leaf.sharding, training.abstract_state(experiment, mesh))
  replicated = sharding.replicated(mesh)
  state = jax.jit(guard.with_counts(experiment.init), out_shardings=where)(jax.random.key(0))
  size, channels = config.data.image_size, config.data.channels
  image = np.random.default_rng(0).integers(0, 256, (count, size, size, channels), dtype=np.uint8)
  stored = {name: np.zeros((count, *one.shape), one.dtype) for name, one in experiment.stored.items()}
  batch = {'image': image, **stored, **({'x0_vae': image[::-1].copy()} if 'x0_vae' in stored else {})}
  batch = sharding.put_batch(batch, sharding.batch_sharding(mesh))
  key = jax.device_put(jax.random.key(1), replicated)
  step = steps.make_step(experiment, config[case.stage].train, where, replicated)

  def run():
    nonlocal state
    state, metrics, _ = step(state, {}, batch, key)
    return state, metrics

  return run


def _sample(case: Case, experiment: Experiment, model: Model, count: int, config: Any) -> Callable[[], Any]:
  read = {'denoiser': _init(case, model)}
  shape = (count, *experiment.inputs['noise'].shape)
  given = {
    'x0_vae': jax.random.uniform(jax.random.key(1), shape, minval=-1.0, maxval=1.0),
    'noise': jax.random.normal(jax.random.key(2), shape),
  }
  del config

  @jax.jit
  def sample(read, given, seed):
    keys = sampling_keys(jax.random.split(jax.random.key(seed), count))
    return experiment.sample(read, given, keys)['x0']

  return lambda: sample(read, given, 3)
