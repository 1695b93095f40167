"""A cascade (arXiv:2106.15282): a diffusion of small images, and stages that make them larger.

All are the refiner's diffusion, without a VAE: a stage has the refiner's sizes and what the variants say of
it, such as labels. None reads another while it trains, so that they train in any order, or at once on several
machines (`--stages=base`, `--stages=sr_32`). A stage is named by the side of its images.
"""

from ml_collections import ConfigDict

from configs.run import Run
from configs.stages import diffusion

BASE = 'base'
"""The first stage."""
SIDES = (8, 16, 32, 64, 128, 256, 512, 1024)
"""Of the images of the others."""
STAGES = (BASE, *(f'sr_{side}' for side in SIDES))
FACTOR = 2
"""Of one stage's sides to those of the one before."""
SMALLEST = 8
"""Pixels a side: where the base of two stages would have fewer, there is one."""

section = diffusion.section
reads = diffusion.reads


def debug(stage: ConfigDict, image_size: int) -> None:
  diffusion.debug(stage, image_size // stage.space_factor)


def sides_of(image_size: int) -> tuple[int, ...]:
  """Returns the sides of the images of all stages."""
  count = 2 if image_size // FACTOR**2 >= SMALLEST else 1
  return tuple(image_size // FACTOR**level for level in reversed(range(count + 1)))


def low_resolution(maker: str) -> ConfigDict:
  """What a stage reads of smaller images."""
  return ConfigDict(
    {
      'stage': maker,  # whose samples they are in sampling: this stage ...; '' = none, they are seen in data
      'workdir': '',  # ... of this other run; '' = this run
      'factor': FACTOR,  # the stage's sides over theirs
      'augmentation': 'noise',  # in training: 'none' | 'noise' | 'blur' | 'bsr'
      'max_level': 0.5,  # of 'noise': a time of the schedule; each example has a level in [0, max_level]
      'dropout': 0.0,  # probability, per example, of the learned null image and level
    }
  )


def cascade(run: Run) -> None:
  """A base and one or two stages of super-resolution, each of which doubles the sides.

  Raises:
    ValueError: the images are too small, or their side is no power of 2.
  """
  size = run.config.data.image_size
  if size not in SIDES:
    raise ValueError(
      f'variant cascade: the images of config {run.config.name!r} have {size} pixels a side; it takes '
      f'{", ".join(map(str, SIDES))}'
    )
  run.only(BASE, *(f'sr_{side}' for side in sides_of(size)[1:]))
  run.at_end(fill)


def fill(run: Run) -> None:
  """Makes the stages what the refiner is by now, each at its side.

  Raises:
    ValueError: for variants that a cascade is not joined with.
  """
  stages = run.config.stages
  if BASE not in stages:
    return  # a later variant has made the run another's
  refiner = run.section('refiner')
  if refiner.space != 'pixel' or set(stages) - set(STAGES):
    raise ValueError(
      f'variant cascade works in pixels and is not joined with students: space is {refiner.space!r}, the '
      f'stages are {", ".join(stages)}'
    )
  size = run.config.data.image_size
  sides = sides_of(size)
  for number, (stage, side) in enumerate(zip(stages, sides, strict=True)):
    section = run.like(stage, 'refiner')
    section.space_factor = size // side
    section.start.stage = stage
    section.diffusion.update({'condition': 'none', 'z_conditioning': False, 'condition_dropout': 0.0})
    dropout, others = refiner.diffusion.condition_dropout, set(section.conditions) - {'vae'}
    if number:
      with section.conditions.unlocked():
        section.conditions.low_resolution = low_resolution(stages[number - 1])
      section.conditions.low_resolution.dropout = dropout
    elif not others:  # it reads nothing that could guide it
      section.sample.guidance_weight = 0.0
    diffusion.fit_levels(section.model, side)
    run.apply(stage)


VARIANTS = {'cascade': cascade}
