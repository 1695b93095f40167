"""A student beside its teacher: the same codes, the same noise, how far apart the images are.

The teacher is the network at the root of the chain of distillations, run with DDIM in many steps. Given one
image x0_vae its samples still differ with the noise; a student whose samples differ much less has learned to
leave the noise out, which no distance between sets of images shows as plainly.
"""

import functools
from typing import Any

import numpy as np

from vaediff.errors import UserError
from vaediff.experiments.base import NOISE
from vaediff.run import config as configs
from vaediff.run import draw, log, same_run
from vaediff.run.trained import Trained
from vaediff.storage import places

SECOND_SEED = 1_000_003
"""Added to the seed for the second noise of each image."""


def chain(trained: Trained) -> list[Trained]:
  """Returns the stages that lead to a student, the first teacher first; a stage without one alone."""
  stages = [trained]
  while 'teacher' in stages[0].config[stages[0].stage]:
    student = stages[0]
    named = student.config[student.stage].teacher
    workdir, config = student.workdir, student.config
    if named.workdir:
      workdir = places.anywhere(named.workdir)
      config = same_run.with_own_data_places(configs.read(workdir), student.config)
      with config.unlocked():
        config.evaluate = student.config.evaluate
    stages.insert(0, Trained(config, workdir, named.stage, student.mesh))
  return stages


class Teacher:
  """Images of a teacher for given codes and noise.

  Args:
    root: the first teacher.
    num_steps: of DDIM.
    count: images.
  """

  def __init__(self, root: Trained, num_steps: int, count: int):
    for field, value in (('teacher_steps', num_steps), ('num_compared', count)):
      if value < 1:
        raise UserError(f'config.evaluate.sweep.{field} must be >= 1, got {value}')
    self._root = root.with_settings(sampler='ddim', num_steps=num_steps, grid='uniform', eta=0.0)
    self._count, self._seed = count, root.settings.seed
    self._images = {}

  def images(self, weight: float, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the teacher's two sets of images under a guidance weight, from noise of a temperature."""
    if (weight, temperature) not in self._images:
      root = self._root.with_settings(guidance_weight=weight, temperature=temperature)
      log.say(
        f'drawing {self._count} images of {root.stage} in {root.settings.num_steps} steps to compare with'
      )
      self._images[weight, temperature] = pairs(root, self._count, self._seed)
    return self._images[weight, temperature]

  def compare(self, student: Trained) -> dict[str, float]:
    """Returns 'rmse to teacher', per pixel in [0, 1], and 'diversity ratio', student over teacher.

    The teacher is guided as the student is, or as it was when it taught a student that reads no weight, and
    starts from the same noise, of the student's temperature. The diversity is the mean squared difference of
    two images of one code and two noises.
    """
    first, second = pairs(student, self._count, self._seed)
    wanted, other = self.images(*self._beside(student))
    spread = float(np.mean((wanted - other) ** 2))
    return {
      'rmse to teacher': float(np.sqrt(np.mean((first - wanted) ** 2))),
      'diversity ratio': float(np.mean((first - second) ** 2)) / spread if spread else float('nan'),
    }

  def facts(self, student: Trained) -> dict[str, Any]:
    """Returns what the images depend on that a student is compared with: networks and settings."""
    weight, temperature = self._beside(student)
    settings = {**self._root.settings.to_dict(), 'guidance_weight': weight, 'temperature': temperature}
    for name in ('checkpoint', 'num_images', 'batch_size'):  # the first is said by the id, others change none
      settings.pop(name, None)
    return {'made_of': self._made_of, 'sample': settings}

  @functools.cached_property
  def _made_of(self) -> dict[str, str]:
    return {name: value for name, value in self._root.made_of.items() if name != 'the settings'}

  def _beside(self, student: Trained) -> tuple[float, float]:
    """Returns the guidance weight and the temperature of the images that a student is compared with."""
    section = student.config[student.stage]
    chosen = self._root if 'teacher' in section and not section.model.guidance_embedding else student
    return float(chosen.settings.guidance_weight), float(student.settings.temperature)


def pairs(trained: Trained, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns two sets of images, pixels in [0, 1]: images i have the same conditions, and another noise."""
  size = min(trained.settings.batch_size, count)
  sets = ([], [])
  for indices, num_real in draw.padded_batches(count, size):
    given = trained.draw_inputs(indices, seed)
    for k, images in enumerate(sets):
      of_noise = (seed + k * SECOND_SEED) % 2**31
      noise = trained.draw_inputs(indices, of_noise)[NOISE]
      drawn = trained.draw(indices, {**given, NOISE: noise}, seed=of_noise)
      images.append(draw.own_image(drawn)[:num_real].astype(np.float64) / 255)
  return np.concatenate(sets[0]), np.concatenate(sets[1])
