"""Restoration of one image that a visitor hands over, as `--mode=restore` does those of the data.

No library of pages is imported here.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from vaediff.data import pixels, resize, words
from vaediff.diffusion.restoration import TASKS, Degradation
from vaediff.errors import UserError
from vaediff.modes import restore
from vaediff.run.draw import HostArrays, own_image
from vaediff.run.trained import Trained

PICTURE = 'the picture'
"""Title of the image itself."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Damage:
  """What is done to the image, or was done to it before it came.

  Attributes:
    degradation: task and strength.
    is_there: the image is noisy already; of other tasks what they keep is the same either way.
  """

  degradation: Degradation
  is_there: bool = False


def damage_of(trained: Trained, task: str, strength: int | float, *, is_there: bool = False) -> Damage:
  """Returns the damage of a task: `strength` is its factor, its noise, or the side of its hole.

  Raises:
    UserError: for one that these images cannot have.
  """
  settings, data = trained.config.restore, trained.config.data
  own = restore.own_task(trained)
  if own:
    return Damage(degradation=own, is_there=is_there)
  found = Degradation(
    task=task,
    factor=round(strength) if task == 'super_resolution' else settings.factor,
    noise_std=strength if task == 'denoise' else settings.noise_std,
    hole_fraction=strength if task == 'inpaint' else settings.hole_fraction,
  )
  found.check(data.image_size, data.channels)
  return Damage(degradation=found, is_there=is_there)


def strengths_of(trained: Trained) -> dict[str, tuple[int | float, ...]]:
  """Returns by task the strengths that can be chosen, the configured one first; () = it has none."""
  settings, data = trained.config.restore, trained.config.data
  factors = [f for f in (2, 4, 8, 16) if data.image_size % f == 0 and f < data.image_size]
  every = {
    'super_resolution': (settings.factor, factors),
    'inpaint': (settings.hole_fraction, (0.25, 0.5, 0.75)),
    'denoise': (settings.noise_std, (0.1, 0.2, 0.5, 1.0)),
  }
  return {task: (own, *(one for one in others if one != own)) for task, (own, others) in every.items()}


def tasks_of(trained: Trained) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """Returns the tasks that an image can be restored of by a stage, and why not of others."""
  own = restore.own_task(trained)
  if own:
    return (own.task,), ()
  found, notes = [], []
  for task in TASKS:
    try:
      damage = damage_of(trained, task, strengths_of(trained).get(task, (0.0,))[0])
      reason = restore.left_out(trained, damage.degradation)
      if reason:
        raise UserError(reason)
      check(trained, damage)
      found.append(task)
    except UserError as error:
      notes.append(f'no restoration, {task}: {error}')
  return tuple(found), tuple(notes) if found else tuple(notes[:1])


def check(trained: Trained, damage: Damage) -> None:
  """Raises UserError where a stage cannot restore; nothing is drawn."""
  shape = (1, *resize.image_shape(trained.config.data))
  nothing = (np.zeros(shape, np.float32),) * 2 + (np.ones((*shape[:-1], 1), np.float32),)
  inputs = trained.experiment.inputs
  told = {name: np.zeros((1, *inputs[name].shape), np.int32) for name in (words.TOKENS,) if name in inputs}
  restore.by_method(trained, damage.degradation, nothing, np.zeros(1, np.int32), told)


def restored(
  trained: Trained,
  damage: Damage,
  image: np.ndarray,
  label: int,
  seed: int,
  programs: dict[Any, Any],
  told: HostArrays | None = None,
) -> HostArrays:
  """Returns the image, what is left of it, and the image restored: uint8 [1, height, width, channels] each.

  Args:
    trained: the stage.
    damage: what is done to the image.
    image: uint8 [size, size, channels].
    label: its class, where the stage reads one.
    seed: of what is drawn.
    programs: what was compiled before, by stage and damage; more is put in.
    told: its caption, a row, where the stage reads one; without it that of no words.

  Raises:
    UserError: for what the stage cannot restore.
  """
  degradation = damage.degradation
  x0 = pixels.to_unit_range(jnp.asarray(image[None]))
  observed = restore.observe(degradation, x0, seed)
  if damage.is_there and not degradation.is_linear:
    observed = (np.asarray(x0), np.asarray(x0), observed[2])
  labels = np.full(1, label, np.int32)
  drawn, given = restore.by_method(trained, degradation, observed, labels, told)
  drawn = programs.setdefault(('restored', id(trained), degradation), drawn)
  value = own_image(drawn.draw(np.arange(1), given, seed))
  if degradation.task == 'inpaint':  # to the byte: the sample holds it but for rounding
    value = np.where(observed[2] > 0, restore.as_bytes(observed[1]), value)
  left = restore.as_bytes(observed[0])
  return {PICTURE: image[None], f'with damage: {degradation.task}': left, restore.AFTER: value}
