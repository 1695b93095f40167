"""A student beside its teacher: the same codes, the same noise, how far apart the images are.

The teacher is the network at the root of the chain of distillations, run with DDIM in many steps. Given one
image x0_vae its samples still differ with the noise; a student whose samples differ much less has learned to
leave the noise out, which no distance between sets of images shows as plainly.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vaediff import draw, log, prior
from vaediff.trained import Trained

SECOND_SEED = 1_000_003
"""Added to the seed for the second noise of each image."""


def teacher_of(config: ConfigDict, stage: str) -> str:
  """Returns the stage of the same run that taught this one; '' where there is none."""
  section = config[stage]
  if 'teacher' not in section or section.teacher.workdir:
    return ''
  return section.teacher.stage


def chain(trained: Trained) -> list[Trained]:
  """Returns the stages that lead to a student, the first teacher first; a stage without one alone."""
  names = [trained.stage]
  while teacher := teacher_of(trained.config, names[0]):
    names.insert(0, teacher)
  opened = [Trained(trained.config, trained.workdir, name, trained.mesh) for name in names[:-1]]
  return [*opened, trained]


class Teacher:
  """Images of a teacher for given codes and noise.

  Args:
    root: the first teacher.
    num_steps: of DDIM.
    count: images.
  """

  def __init__(self, root: Trained, num_steps: int, count: int):
    self._root = root.with_settings(sampler='ddim', num_steps=num_steps, grid='uniform', eta=0.0)
    self._num_steps, self._count = num_steps, count

  @functools.cached_property
  def _images(self) -> tuple[np.ndarray, np.ndarray]:
    log.say(f'drawing {self._count} images of {self._root.stage} in {self._num_steps} steps, to compare with')
    return pairs(self._root, self._count)

  def compare(self, student: Trained) -> dict[str, float]:
    """Returns 'rmse to teacher', per pixel in [0, 1], and 'diversity ratio', student over teacher.

    The diversity is the mean squared difference of two images of one code and two noises.
    """
    first, second = pairs(student, self._count)
    wanted, other = self._images
    spread = float(np.mean((wanted - other) ** 2))
    return {
      'rmse to teacher': float(np.sqrt(np.mean((first - wanted) ** 2))),
      'diversity ratio': float(np.mean((first - second) ** 2)) / spread if spread else float('nan'),
    }


def pairs(trained: Trained, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns two sets of images, pixels in [0, 1]: image i of both is of code i, and of another noise."""
  experiment, seed = trained.experiment, trained.settings.seed
  size = min(trained.settings.batch_size, count)
  sets = ([], [])
  for indices in draw.batches(count, size):
    fresh = min(size, count - int(indices[0]))
    codes = {}
    if experiment.latent_dim:
      keys, _ = draw.image_keys(seed, jnp.asarray(indices))
      codes['z'] = np.asarray(prior.draw(jax.device_get(trained.prior), keys, experiment.latent_dim))
    for k, images in enumerate(sets):
      _, keys = draw.image_keys(seed + k * SECOND_SEED, jnp.asarray(indices))
      noise = jax.vmap(lambda key: jax.random.normal(key, experiment.noise_shape))(keys)
      drawn = trained.draw(indices, {**codes, 'noise': np.asarray(noise)})['x0'][:fresh]
      images.append(drawn.astype(np.float64) / 255)
  return np.concatenate(sets[0]), np.concatenate(sets[1])
