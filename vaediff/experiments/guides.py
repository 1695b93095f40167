"""What guides the samples of a diffusion: terms of its own network, a weaker one, a noisy classifier.

The last two are networks of other checkpoints that are read for sampling alone: training knows nothing of
them, so they can be chosen, or changed, once it is done.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from vaediff import reads
from vaediff.conditions.base import Conditions
from vaediff.conditions.label import LABEL
from vaediff.conditions.target import target
from vaediff.diffusion import guidance, schedules
from vaediff.errors import UserError
from vaediff.experiments import bounds, noisy_classifier
from vaediff.experiments.denoiser import DENOISER, Denoiser, Term
from vaediff.spaces import Space, make_space

GUIDE = 'guide'
"""Name of the weaker network: in `sample.guidance`, in `sample`, and in `read`."""
CLASSIFIER = 'classifier'
"""Name of the classifier in `sample`."""
TRANSFER = 'transfer'
"""Name, in `sample`, of the network that a control is transferred to."""
FIELDS = (GUIDE, CLASSIFIER, TRANSFER)
"""Of `sample`: sections that name a stage; the last is of stages with a control alone."""
MAX_GUIDANCE = 1000
"""Weights that are used are below 20."""
Build = Callable[[ConfigDict, str], tuple[Space, Denoiser]]
"""(config, section) -> space and denoiser of a stage, guided by nothing."""
BOUNDS = {
  'sample.guidance_weight': bounds.number(0, MAX_GUIDANCE),
  'sample.guidance_interval': bounds.several(
    bounds.number(0, bounds.MAX_WEIGHT), 'numbers >= 0, (low, high) of sigma / alpha', empty=True, count=2
  ),
  'sample.guide.step': bounds.updates(0),
  'sample.classifier.scale': bounds.number(0, MAX_GUIDANCE),
}


def is_guidance(pair: Any) -> bool:
  """Returns whether it is (name, number above -1)."""
  if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[0], str):
    return False
  return bounds.number(-1, MAX_GUIDANCE, above=True).holds(pair[1])


def section_of(stage: str, field: str, named: ConfigDict) -> str:
  """Returns the section of the config that describes what `sample.<field>` of a stage names.

  A stage of another run has a section of its own, which `vaediff.run.guides` takes from there.
  """
  return f'{stage}_{field}' if named.workdir else named.stage


def with_target(config: ConfigDict, stage: str, conditions: Conditions) -> Conditions:
  """Returns the conditions with the class to guide to, where a classifier guides and none of them has it."""
  if not config[stage].sample.classifier.stage or LABEL in conditions.inputs:
    return conditions
  return Conditions((*conditions.each, target(config)))


def guided(
  config: ConfigDict, stage: str, space: Space, denoiser: Denoiser, build: Build
) -> tuple[Denoiser, dict[str, reads.FromStage]]:
  """Returns the denoiser with all that guides it, and what is read for that, by name.

  Raises:
    UserError: for what cannot guide it: names both values.
  """
  sample, sources = config[stage].sample, {}
  guidance.check_interval(tuple(sample.guidance_interval), denoiser.schedule)
  weaker, classifier = None, None
  if sample.guide.stage:
    weaker, sources[GUIDE] = weaker_of(config, stage, space, denoiser, build)
  if sample.classifier.stage:
    classifier, sources[noisy_classifier.NETWORK] = classifier_of(config, stage, space, denoiser)
  terms = make_terms(sample, denoiser, weaker)
  interval = tuple(sample.guidance_interval)
  return dataclasses.replace(denoiser, terms=terms, classifier=classifier, interval=interval), sources


def make_terms(sample: ConfigDict, denoiser: Denoiser, weaker: Denoiser | None = None) -> tuple[Term, ...]:
  """Returns the guidance that `guidance_weight` (all conditions dropped) and `guidance` (one each) ask for.

  Raises:
    UserError: when a condition is not there, or was never dropped in training; when there is no weaker
      network, or one that no term is of.
  """
  droppable = denoiser.conditions.droppable
  terms = [Term(weight=sample.guidance_weight, without=droppable)] if sample.guidance_weight else []
  names = (*droppable, *([GUIDE] if weaker else []))
  for pair in sample.guidance:
    if not is_guidance(pair) or pair[0] not in names:
      no_guide = '; sample.guide.stage names no weaker network' if GUIDE in str(pair) and not weaker else ''
      raise UserError(
        f'sample.guidance must be pairs (condition, weight > -1) of conditions that are dropped in training, '
        f'{", ".join(names) or "of which there are none"}; got {pair!r}{no_guide}'
      )
    name, weight = pair[0], float(pair[1])
    terms.append(Term(weight=weight, guide=weaker) if name == GUIDE else Term(weight=weight, without=(name,)))
  if sample.guidance and denoiser.reads_weight:
    raise UserError(
      f'sample.guidance is {sample.guidance!r}, but the network reads the guidance weight and is guided by '
      'that alone: set sample.guidance = () and sample.guidance_weight'
    )
  if weaker and not any(term.guide for term in terms):
    raise UserError(
      f'sample.guide.stage is {sample.guide.stage!r}, but no term of sample.guidance is of it: add '
      f"('{GUIDE}', weight), or set sample.guide.stage = ''"
    )
  return tuple(terms)


def weaker_of(
  config: ConfigDict, stage: str, space: Space, denoiser: Denoiser, build: Build
) -> tuple[Denoiser, reads.FromStage]:
  """Returns the weaker network that `sample.guide` names, and where its parameters are."""
  sample = config[stage].sample
  named, field = sample.guide, 'sample.guide.stage'
  if named.stage == stage and not named.workdir and not named.step and sample.checkpoint == 'latest':
    raise UserError(
      f'{field} is {named.stage!r} at its latest checkpoint, which is the stage itself: its difference to '
      'itself is 0. Set sample.guide.step to an earlier one (train.keep_checkpoints says how many are kept), '
      'or name another stage'
    )
  section = described(config, stage, GUIDE, named)
  own = config[section] if section in config else None
  if own is None or 'model' not in own or 'diffusion' not in own or 'prediction' not in own.diffusion:
    raise UserError(f'{field} is {named.stage!r}, which is no stage of this config with a denoiser')
  other, weaker = build(config, section)
  check_space(config, stage, section, space, other, field)
  check_schedule(config, stage, section, denoiser.schedule, weaker.schedule, field)
  wanted, got = (shown_ports(one) for one in (denoiser, weaker))
  if wanted != got:
    raise UserError(f'{field} is {named.stage!r}, whose network reads {got}, but that of this stage {wanted}')
  source = reads.FromStage(
    stage=named.stage,
    network=DENOISER,
    workdir=named.workdir,
    model=weaker.model,
    step=named.step,
    section=section,
    same=networks_in(space.frozen, denoiser.conditions.frozen),
  )
  return dataclasses.replace(weaker, network=GUIDE), source


def classifier_of(
  config: ConfigDict, stage: str, space: Space, denoiser: Denoiser
) -> tuple[noisy_classifier.Guide, reads.FromStage]:
  """Returns the classifier that `sample.classifier` names, and where its parameters are."""
  named, field = config[stage].sample.classifier, 'sample.classifier.stage'
  section = described(config, stage, CLASSIFIER, named)
  if not reads.is_stage(config, section, 'noisy_classifier'):
    known = config[section].experiment if section in config and 'experiment' in config[section] else 'missing'
    clean = ': a classifier of clean images has no gradient at noise' if known == 'classifier' else ''
    raise UserError(
      f'{field} is {named.stage!r}, whose experiment is {known!r}; only one that was trained on noisy '
      f"states, of the experiment 'noisy_classifier' (variant classifier_guided), can guide{clean}"
    )
  other = make_space(config, section)
  check_space(config, stage, section, space, other, field)
  schedule = schedules.make_schedule(config[section].diffusion.schedule)
  check_schedule(config, stage, section, denoiser.schedule, schedule, field)
  model = noisy_classifier.classifier_model(config, section, other)
  source = reads.FromStage(
    stage=named.stage,
    network=noisy_classifier.NETWORK,
    workdir=named.workdir,
    model=model,
    section=section,
    same=networks_in(space.frozen),
  )
  return noisy_classifier.Guide(model=model, scale=named.scale), source


def described(config: ConfigDict, stage: str, field: str, named: ConfigDict) -> str:
  """Returns the name of the section that describes what is named; see `section_of`."""
  section = section_of(stage, field, named)
  if named.workdir and section not in config:
    raise UserError(
      f'sample.{field}.workdir is {named.workdir!r}, whose stage {named.stage!r} has no section here yet; '
      'call vaediff.run.guides.resolve(config) first'
    )
  return section


def check_space(config: ConfigDict, stage: str, section: str, space: Space, other: Space, field: str) -> None:
  """Raises UserError unless both stages diffuse the same maps."""

  def shown(section: ConfigDict, space: Space) -> str:
    scaling = f' of {section.autoencoder.stage!r}, {section.autoencoder.scaling}'
    return f'{section.space}{scaling if section.space == "latent" else ""} {space.shape}'

  wanted, got = shown(config[stage], space), shown(config[section], other)
  if wanted != got:
    raise UserError(f'{field} names a stage of the space {got}, but this one is of {wanted}')


def check_schedule(
  config: ConfigDict, stage: str, section: str, schedule: Any, other: Any, field: str
) -> None:
  """Raises UserError unless both stages have the same noise at the same time."""
  if other != schedule:
    wanted, got = (config[name].diffusion.schedule for name in (stage, section))
    raise UserError(
      f'{field} names a stage whose diffusion.schedule is {got!r}, but that of this one is {wanted!r}'
    )


def shown_ports(denoiser: Denoiser) -> str:
  """Returns what a network reads, and where, in words; what can be dropped does not count."""
  ports = sorted(denoiser.conditions.ports.items())
  shown = (f'{name} ({port.enters}, {port.classes or port.shape})' for name, port in ports)
  return ', '.join(shown) or 'nothing'


def networks_in(*frozen: Any) -> tuple[str, ...]:
  """Returns the names of networks among what is read."""
  return tuple(
    sorted({name for each in frozen for name, one in each.items() if isinstance(one, reads.FromStage)})
  )
