"""Whether a denoiser reads its codes: its loss with the codes of other images, beside that with their own.

A network that ignores a code has the same loss with any; one that reads it has a higher loss with that of
another image. Times, noise and all other values are the same, so that the rise is of the code alone.
"""

import jax
import jax.numpy as jnp
import numpy as np

from vaediff.evaluation.measures import Figure, mean_with_error
from vaediff.machine import distributed, sharding
from vaediff.run import draw
from vaediff.run.trained import Trained
from vaediff.types import Batch, Read

LOSS = 'denoising_loss'


def codes_of(trained: Trained) -> tuple[str, ...]:
  """Returns the names of the vectors that a stage's denoiser reads; () for a stage that is no diffusion."""
  diffusion = trained.experiment.diffusion
  if diffusion is not trained.experiment:
    return ()  # students are trained at few times
  return tuple(
    name for name, port in diffusion.conditions.ports.items() if port.enters == 'vector' and port.shape
  )


def figures(trained: Trained) -> dict[str, Figure]:
  """Returns the loss over the evaluation split, with each code of the next image, and how much it rises.

  Each is a mean over the first `evaluate.num_bound` images, at `evaluate.num_bound_times` times of each, with
  its standard error over images; {} where no code is read.
  """
  names, settings = codes_of(trained), trained.config.evaluate
  count = min(settings.num_bound, len(trained.eval_source))
  if not names or not count:
    return {}
  if count < 2:
    missing = 'there is no other image: it needs at least 2'
    return {f'{LOSS}/{name} of others': Figure(missing=missing) for name in names}
  losses = losses_of(trained, names, count, settings.num_bound_times, settings.batch_size)
  found = {LOSS: mean_with_error(losses[''])}
  for name in names:
    found[f'{LOSS}/{name} of others'] = mean_with_error(losses[name])
    found[f'{LOSS}/rise by {name} of others'] = mean_with_error(losses[name] - losses[''])
  return found


def losses_of(
  trained: Trained, names: tuple[str, ...], count: int, num_times: int, batch_size: int
) -> dict[str, np.ndarray]:
  """Returns the loss of each of the first images, float64 [count], by the code of another; '' = its own."""
  mesh, source, diffusion = trained.mesh, trained.eval_source, trained.experiment.diffusion
  where, cases = sharding.batch_sharding(mesh), ('', *names)

  def of_one(read: Read, row: Batch, other: Batch, index: jax.Array) -> jax.Array:
    """Returns the losses of one image, of keys of its own: by case."""
    key = jax.random.fold_in(jax.random.key(trained.settings.seed), index)
    key_own, key_other, key_loss = jax.random.split(key, 3)
    row, other = jax.tree.map(lambda leaf: leaf[None], (row, other))
    y0, values = diffusion.examples(read, row, key_own, training=False)
    _, of_other = diffusion.examples(read, other, key_other, training=False)
    by_case = [{**values, name: of_other[name]} if name else values for name in cases]
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *by_case)

    def once(total: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
      key_once = jax.random.fold_in(key_loss, number)
      loss_of = lambda values: diffusion.denoiser.losses(read, y0, values, key_once, training=False)[0]
      return total + jax.vmap(loss_of)(stacked) / num_times, None

    return jax.lax.scan(once, jnp.zeros(len(cases)), jnp.arange(num_times))[0]

  run = jax.jit(jax.vmap(of_one, in_axes=(None, 0, 0, 0)), out_shardings=sharding.replicated(mesh))
  parts, size = [], sharding.round_up(min(batch_size, count), mesh)
  for rows, num_real in draw.padded_batches(count, size):
    own, other = (jax.device_put(source.read(each), where) for each in (rows, (rows + 1) % count))
    found = jax.device_get(run(trained.read, own, other, jax.device_put(rows, where)))
    parts.append(np.asarray(found[:num_real], np.float64))
    distributed.beat(f'the losses of {int(rows[0]) + num_real} images')
  return dict(zip(cases, np.concatenate(parts).T, strict=True))
