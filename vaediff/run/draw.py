"""Images by index: image i depends on the seed and i alone, whatever the batch size or device count."""

from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from vaediff.conditions import prior
from vaediff.experiments.base import Experiment
from vaediff.machine import sharding
from vaediff.run import images
from vaediff.types import Params


def image_keys(seed: int | jax.Array, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns, per image index, the key of its latent code and the key of its sampler."""
  keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(jax.random.key(seed), i)))(indices)
  return keys[:, 0], keys[:, 1]


def make_draw(experiment: Experiment, mesh: Mesh, seed: int) -> Callable[..., dict[str, np.ndarray]]:
  """Returns draw(params, frozen, prior, indices, given=None, seed=seed) -> uint8 images on the host, by name.

  `given` holds arrays with one row per index that take the place of what would be drawn: `z`, `x0_vae`,
  `noise`. One compiled program serves every call of the same size, whatever the seed.
  """

  def run(params, frozen, prior_arrays, indices, given, number):
    key_z, key_x = image_keys(number, indices)
    condition = dict(given)
    if experiment.latent_dim and 'z' not in condition:
      condition['z'] = prior.draw(prior_arrays, key_z, experiment.latent_dim)
    return experiment.sample(params, frozen, condition, key_x)

  where = sharding.batch_sharding(mesh)
  # every process gets all images: they are small beside what made them
  compiled = jax.jit(run, out_shardings=sharding.replicated(mesh))

  def draw(
    params: dict[str, Params],
    frozen: dict[str, Params],
    prior_arrays: prior.Prior,
    indices: np.ndarray,
    given: dict[str, np.ndarray] | None = None,
    seed: int = seed,
  ) -> dict[str, np.ndarray]:
    count = len(indices)
    padded = sharding.round_up(count, mesh)
    rows = np.minimum(np.arange(padded), count - 1)
    given = {name: jax.device_put(np.asarray(value)[rows], where) for name, value in (given or {}).items()}
    chosen = jax.device_put(np.asarray(indices, np.int32)[rows], where)
    number = jax.device_put(np.int32(seed), sharding.replicated(mesh))
    result = jax.device_get(compiled(params, frozen, prior_arrays, chosen, given, number))
    # jit sorts the names; what an image was made from comes before it
    names = sorted(result, key=lambda name: (name == 'x0', name))
    return {name: images.to_uint8(result[name][:count]) for name in names}

  return draw


def batches(count: int, batch_size: int) -> Iterator[np.ndarray]:
  """Yields the indices 0 .. count - 1 in batches of one size; the last is padded by its own last index."""
  for start in range(0, count, batch_size):
    yield np.minimum(np.arange(start, start + batch_size), count - 1)


def as_grid(value: np.ndarray) -> np.ndarray:
  """Returns a roughly square grid of uint8 images."""
  return images.grid(value, int(np.ceil(np.sqrt(len(value)))))
