"""On what a diffusion is conditioned: one file per condition."""

from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from vaediff.conditions import augmentation, label
from vaediff.conditions import clip_image as clip_image_file
from vaediff.conditions import codes as codes_file
from vaediff.conditions import text as text_file
from vaediff.conditions.base import Condition, Conditions
from vaediff.conditions.clip_image import CLIP_IMAGE, clip_image_condition
from vaediff.conditions.codes import CODES, codes_condition
from vaediff.conditions.degraded import DEGRADED, degraded_condition
from vaediff.conditions.label import LABEL, label_condition
from vaediff.conditions.low_resolution import LOW_RESOLUTION, low_resolution_condition
from vaediff.conditions.text import TEXT, text_condition
from vaediff.conditions.vae import VAE, of_classes, vae_condition
from vaediff.conditions.weight import Weight
from vaediff.errors import UserError
from vaediff.spaces import Space

__all__ = ['BY_NAME', 'SAMPLE_BOUNDS', 'Condition', 'Conditions', 'make_conditions']
BY_NAME: dict[str, Callable[[ConfigDict, str, Space], Condition]] = {
  LABEL: label_condition,
  TEXT: text_condition,
  CODES: codes_condition,
  DEGRADED: degraded_condition,
  LOW_RESOLUTION: low_resolution_condition,
  CLIP_IMAGE: clip_image_condition,
}
"""By section of `config.<stage>.conditions`: (config, stage, space) -> the condition."""
SAMPLE_BOUNDS = {**label.SAMPLE_BOUNDS, **text_file.SAMPLE_BOUNDS}
"""Of what samples are asked to be, in a stage that may read nothing of it."""


FOR_STUDENTS: dict[str, Callable[[Mapping[str, Any], str, str], dict[str, Any]]] = {
  CODES: codes_file.for_student,
  CLIP_IMAGE: clip_image_file.for_student,
  TEXT: text_file.for_student,
}
"""By section, of those that say what a stage trains: (section, teacher, workdir) -> that of a student."""


def for_student(sections: Mapping[str, Any], teacher: str, workdir: str) -> dict[str, Any]:
  """Returns the sections of the conditions of a student, which reads what its teacher was trained with."""
  return {
    name: FOR_STUDENTS[name](section, teacher, workdir) if name in FOR_STUDENTS else section
    for name, section in sections.items()
  }


def make_conditions(config: ConfigDict, stage: str, space: Space) -> Conditions:
  """Returns what the diffusion of a stage is conditioned on: the VAE, its `conditions`, the guidance weight.

  Raises:
    UserError: for a condition that is not known, or one that cannot be built.
  """
  section = config[stage]
  label.check_unread(config, stage)
  text_file.check_unread(config, stage)
  diffusion, found = section.diffusion, []
  known = vae_condition(
    config,
    stage,
    space,
    reads_code=diffusion.z_conditioning,
    dropout=diffusion.condition_dropout,
  )
  if known:
    found.append(known)
  for name in sorted(set(section.conditions) - {VAE}):
    if name not in BY_NAME:
      raise UserError(f'conditions has a section {name!r}; valid: {", ".join(BY_NAME)}')
    found.append(BY_NAME[name](config, stage, space))
  classes = Conditions(tuple(found)).classes
  if known and classes:  # a code of another class than the label is what no training image has
    found[0] = of_classes(known, classes)
  augmentation.check_level(section, augmented=any(one.max_level for one in found))
  if section.model.guidance_embedding:
    found.append(Weight(weight=section.sample.guidance_weight))
  return Conditions(tuple(found))
