"""A control for a trained diffusion: ControlNet (Zhang et al. 2023, arXiv:2302.05543).

The network of an earlier stage, the base, is locked. A copy of its way down and middle reads a control image
too, and learns what to add to the base's maps (`experiments.controlled`), by the base's own loss. At step 0
it adds nothing. The gradient then reaches in the first update the zero convolutions alone, in the second the
copy and the last convolution of the hint's encoder, in the third the inside of that.

The section of such a stage is its base's with what the control changes (`vaediff.run.controls`): it is
sampled, measured and guided as the base is. The base's dropout is off; that of the copy is on.

The loss shows little of it. Each validation therefore draws samples for the control images of its batch, in a
few steps of DDIM, and reports how far they follow them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from ml_collections import ConfigDict

from vaediff import checks, reads
from vaediff.conditions import control
from vaediff.conditions.base import Conditions
from vaediff.conditions.control import CONTROL, Control
from vaediff.data import pixels
from vaediff.errors import UserError
from vaediff.experiments import base, bounds, guides
from vaediff.experiments.controlled import (
  BASE,
  BRANCHES,
  DEPTHS,
  TUNED,
  WAYS,
  Branch,
  Controlled,
  strengths_of,
)
from vaediff.experiments.denoiser import DENOISER, Denoiser
from vaediff.experiments.diffusion import Diffusion, unguided
from vaediff.models import controlnet, ports
from vaediff.models.functional import Model
from vaediff.types import Batch, Image, Metrics, Params, Read

EXPERIMENT = 'controlnet'
NETWORK = 'control'
"""Name of the network that is trained."""
RANGE = 'control_range'
"""The largest less the smallest number of a control image, mean over images: 0 of one that says nothing."""
STRONGEST = 100
HANDED = ('control', 'controls', 'transfer')
"""Fields of `sample` that training does not read: what samples alone are given."""
BOUNDS = {
  **control.BOUNDS,
  'caption_dropout': checks.below_one(),
  'score_steps': bounds.whole(0, bounds.MAX_CALLS),
  'hint.channels': bounds.sizes(bounds.MAX_WIDTH),
  'hint.strides': bounds.several(bounds.whole(1, 2), 'numbers, 1 or 2', empty=True),
  'sample.strength': bounds.number(0, STRONGEST),
  'sample.strengths': bounds.several(bounds.number(0, STRONGEST), f'numbers up to {STRONGEST}', empty=True),
  'sample.depth': checks.one_of(DEPTHS),
  'sample.branches': checks.one_of(BRANCHES),
  'sample.transfer.how': checks.one_of(WAYS),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlNet(Diffusion):
  """The stage; trains the network `control` and, unlocked, `denoiser`: the base with another way up.

  Attributes:
    trained: the denoiser in training; `denoiser` is that of samples, which others may control too.
    base_source: where the base's parameters are.
    score_steps: of DDIM, of the samples that a validation draws; 0 = it draws none.
  """

  trained: Controlled
  base_source: reads.FromStage
  score_steps: int

  bounds = {**Diffusion.bounds, **BOUNDS}
  metrics = {'loss': False, **control.METRICS, RANGE: True}

  @classmethod
  def from_config(cls, config: ConfigDict, stage: str) -> 'ControlNet':
    """Builds the experiment of `config.<stage>`."""
    section = config[stage]
    check_base(config, stage)
    base.check(cls, config, stage)
    plain = Diffusion.from_config(config, stage)
    network = BASE if section.base_locked else DENOISER
    own = control.control_of(config, stage, plain.space)
    trained = controlled(plain.denoiser, network, own, branch_of(config, stage, plain, own))
    sampled, sources = for_samples(config, stage, plain, trained)
    fields = {field.name: getattr(plain, field.name) for field in dataclasses.fields(Diffusion)}
    fields |= {'denoiser': sampled, 'first': {}, 'for_sampling': {**plain.for_sampling, **sources}}
    return cls(
      **fields,
      trained=trained,
      base_source=reads.FromStage(
        stage=section.base.stage,
        network=DENOISER,
        workdir=section.base.workdir,
        model=plain.denoiser.model,
        section=stage,
      ),
      score_steps=section.score_steps,
    )

  @property
  def unlocked(self) -> bool:
    """Whether the base's way up is trained too."""
    return self.trained.network == DENOISER

  @property
  def networks(self) -> Mapping[str, Model]:
    """The control, and the unlocked base."""
    found = {NETWORK: self.trained.branches[0].model}
    return found | ({DENOISER: self.trained.model} if self.unlocked else {})

  @property
  def frozen(self) -> Mapping[str, reads.Reads]:
    """The base, and what it reads."""
    return {**super().frozen, BASE: self.base_source}

  @property
  def control(self) -> Control:
    """What it was trained to follow."""
    return self.trained.conditions.each[-1]

  def alone(self) -> 'ControlNet':
    """Returns the stage sampled as it was trained: one control, its own base, evaluation images."""
    terms = tuple(term for term in self.trained.terms if term.guide is None)
    denoiser = dataclasses.replace(self.trained, terms=terms, classifier=None)
    return dataclasses.replace(self, denoiser=denoiser, for_sampling={})

  # Training ---------------------------------------------------------------------------------------

  def init(self, key: jax.Array) -> base.TrainState:
    """Returns the state at step 0, before `start` copies the base."""
    networks = {
      name: base.init_network(model, self.optimizer, jax.random.fold_in(key, number))
      for number, (name, model) in enumerate(self.networks.items())
    }
    return base.TrainState(step=jnp.int32(0), networks=networks, extra=self.times_seen())

  def start(self, state: base.TrainState, frozen: Read) -> base.TrainState:
    """Returns the state whose copy, and average, have the base's parameters."""
    networks = dict(state.networks)
    networks[NETWORK] = begun(networks[NETWORK], controlnet.copied(networks[NETWORK].params, frozen[BASE]))
    if self.unlocked:
      networks[DENOISER] = begun(networks[DENOISER], frozen[BASE])
    return state.replace(networks=networks)

  def train_step(
    self, state: base.TrainState, frozen: Read, batch: Batch, key: jax.Array, kind: str = ''
  ) -> tuple[base.TrainState, Metrics]:
    """Returns the state after one update; of an unlocked base what is locked stays, to the last bit."""
    after, metrics = super().train_step(state, frozen, batch, key, kind)
    if self.unlocked:
      before, network = state.networks[DENOISER], after.networks[DENOISER]
      average = network.ema_params and with_way_up(before.ema_params, network.ema_params)
      kept = network.replace(params=with_way_up(before.params, network.params), ema_params=average)
      after = after.replace(networks={**after.networks, DENOISER: kept})
    return after, metrics

  def eval_step(self, read: Read, batch: Batch, key: jax.Array) -> Metrics:
    """Returns the denoising loss, and how far samples follow their control."""
    key_loss, key_score = jax.random.split(key)
    metrics = super().eval_step(read, batch, key_loss)
    return {**metrics, **self.score(read, batch, key_score)} if self.score_steps else metrics

  def score(self, read: Read, batch: Batch, key: jax.Array) -> Metrics:
    """Returns how far samples of a few steps follow the control images of a batch, read with its captions."""
    key_given, key_noise, key_steps = jax.random.split(key, 3)
    prepared = pixels.prepare(batch, None)
    given = self.conditions.observe(read, prepared, prepared['image'], key_given)
    values = self.conditions.values(read, self.conditions.complete(read, given))
    count = batch['image'].shape[0]
    quick = {'sampler': 'ddim', 'num_steps': self.score_steps, 'grid': 'uniform', 'eta': 0.0}
    few = dataclasses.replace(self, settings={**self.settings, **quick})
    noise = jax.random.normal(key_noise, (count, *self.space.shape))
    y = few.steps(few.sampler_denoiser(read, values), noise, jax.random.split(key_steps, count), 1.0)
    image, hint = self.space.decode(read, y)['x0'], given[CONTROL]
    figures = self.followed(image, hint)
    figures[RANGE] = jnp.max(hint, axis=(1, 2, 3)) - jnp.min(hint, axis=(1, 2, 3))
    return {name: base.masked_mean(each, batch['mask']) for name, each in figures.items()}

  def followed(self, image: Image, hint: Array) -> dict[str, Array]:
    """Returns how far images in [-1, 1] follow control images, per image, by figure."""
    return self.control.followed(image, hint)

  def warnings(self, metrics: Mapping[str, float]) -> tuple[str, ...]:
    """Returns that the control says nothing, where no image has any."""
    if RANGE in metrics and metrics[RANGE] == 0:
      return (
        'the control images are all the same everywhere, so that nothing can be learned of them: look at '
        'control.kind and control.least, or at the images',
      )
    return ()


def begun(network: base.Network, params: Params) -> base.Network:
  """Returns a network at step 0 with these parameters, and an average of the same."""
  params = jax.tree.map(jnp.copy, params)
  average = None if network.ema_params is None else jax.tree.map(jnp.copy, params)
  return network.replace(params=params, ema_params=average)


def with_way_up(params: Params, other: Params) -> Params:
  """Returns the parameters of a U-Net with the way up of another."""
  return {name: other[name] if controlnet.is_up(name) else part for name, part in params.items()}


def check_base(config: ConfigDict, stage: str) -> None:
  """Raises UserError unless a stage of a control is whole and its base is a diffusion."""
  section = config[stage]
  if 'model' not in section:
    raise UserError('it lacks what its base gives it; call vaediff.run.students.resolve(config) first')
  if 'base' not in section:
    raise UserError(
      f'experiment is {section.experiment!r}, which has a base, and the section names none: it is that of '
      'another experiment. Leave the experiment as it is, and choose stages by variants'
    )
  named = section.base.stage
  if not reads.is_stage(config, named, 'diffusion'):
    raise UserError(
      f'base.stage is {named!r}, which is no stage of this config whose experiment is diffusion. A student '
      'is no base, but a control of its teacher can be transferred to it: sample.transfer.stage'
    )


def controlled(denoiser: Denoiser, network: str, own: Control, branch: Branch) -> Controlled:
  """Returns a denoiser with one control, as it is trained."""
  fields = {field.name: getattr(denoiser, field.name) for field in dataclasses.fields(Denoiser)}
  conditions = Conditions((*denoiser.conditions.each, own))
  return Controlled(**{**fields, 'conditions': conditions, 'network': network}, branches=(branch,))


def branch_of(
  config: ConfigDict, stage: str, plain: Diffusion, own: Control, network: str = NETWORK, weight: float = 1.0
) -> Branch:
  """Returns the control that a stage trains, of a base's architecture.

  Raises:
    UserError: its hint cannot be made as small as the maps that are diffused.
  """
  section, unet = config[stage], plain.denoiser.model
  (state, t, values), side = unet.inputs, plain.space.shape[0]
  channels = tuple(section.hint.channels)
  if own.image_shape[0] % side:
    raise UserError(
      f'a control image of {own.image_shape[0]} pixels a side cannot be made one of {side}, the side of the '
      'maps that are diffused: it must be a multiple'
    )
  strides = controlnet.strides_of(own.image_shape[0] // side, len(channels), tuple(section.hint.strides))
  module = controlnet.ControlNet(unet=unet.module, hint_channels=channels, hint_strides=strides)
  hint = jax.ShapeDtypeStruct((1, *own.hint_shape), jnp.float32)
  words = ports.word_structs(unet.module.ports, unet.module.dtype)
  return Branch(
    model=Model(module=module, inputs=(state, t, values, hint, {}, words)),
    network=network,
    value=own.name,
    strengths=strengths_of(section, unet.module, weight),
  )


def for_samples(
  config: ConfigDict, stage: str, plain: Diffusion, trained: Controlled
) -> tuple[Controlled, dict[str, reads.Reads]]:
  """Returns the denoiser of samples, with other controls and another base, and what is read for them.

  Raises:
    UserError: for what does not fit the stage: names both values.
  """
  sample = config[stage].sample
  denoiser = dataclasses.replace(trained, in_both=sample.branches == 'both')
  sources: dict[str, Any] = dict(control.files_of(config, stage, trained.conditions.each[-1].shape))
  for pair in sample.controls:
    denoiser, sources = with_other(config, stage, plain, denoiser, pair, sources)
  if sample.transfer.stage:
    denoiser, sources[TUNED] = transferred(config, stage, plain, denoiser)
  return denoiser, sources


def with_other(
  config: ConfigDict, stage: str, plain: Diffusion, denoiser: Controlled, pair: Any, sources: dict[str, Any]
) -> tuple[Controlled, dict[str, Any]]:
  """Returns the denoiser with the control of another stage added, and what is read, with its network."""
  field, own = 'sample.controls', config[stage]
  if not guides.is_guidance(pair):
    raise UserError(f'{field} must be pairs (stage of a control, weight), got {pair!r}')
  name, weight = pair[0], float(pair[1])
  other = reads.need_stage(config, name, EXPERIMENT, field, 'stage of a control')
  network = f'{NETWORK}_{name}'
  if name == stage or network in sources:
    raise UserError(f'{field} names {name!r}, which is there already: raise its weight, or sample.strength')
  wanted, got = (section.base.to_dict() for section in (own, other))
  if wanted != got or not (own.base_locked and other.base_locked):
    raise UserError(
      f'{field} names {name!r}, whose base is {got}{"" if other.base_locked else ", unlocked"}; that of this '
      f'stage is {wanted}{"" if own.base_locked else ", unlocked"}: controls are added of one locked base'
    )
  its = control.control_of(config, name, plain.space, network)
  branch = branch_of(config, name, plain, its, network, weight)
  source = reads.FromStage(
    stage=name, network=NETWORK, workdir='', model=branch.model, section=name, same=(BASE,)
  )
  conditions = Conditions((*denoiser.conditions.each, its))
  added = dataclasses.replace(denoiser, branches=(*denoiser.branches, branch), conditions=conditions)
  return added, {**sources, network: source}


def transferred(
  config: ConfigDict, stage: str, plain: Diffusion, denoiser: Controlled
) -> tuple[Controlled, reads.FromStage]:
  """Returns the denoiser with the network of `sample.transfer` in the base's place, and where that is."""
  named, field = config[stage].sample.transfer, 'sample.transfer.stage'
  if not config[stage].base_locked:
    raise UserError(
      f'{field} is {named.stage!r}, but this control was trained with a way up of its own (base_locked = '
      'False), which a transfer would leave out'
    )
  section = guides.described(config, stage, guides.TRANSFER, named)
  own = config[section] if section in config else None
  is_known = own is not None and 'model' in own and 'diffusion' in own and 'prediction' in own.diffusion
  if not is_known or own.experiment == EXPERIMENT:
    raise UserError(f'{field} is {named.stage!r}, which is no stage of this config with a denoiser')
  space, tuned = unguided(config, section)
  guides.check_space(config, stage, section, plain.space, space, field)
  guides.check_schedule(config, stage, section, plain.denoiser.schedule, tuned.schedule, field)
  if tuned.shift != plain.denoiser.shift:
    wanted, got = (config[name].diffusion.condition for name in (stage, section))
    raise UserError(
      f'{field} names a stage whose diffusion.condition is {got!r}, but that of this one is {wanted!r}: '
      'formulation2 shifts the state by x0_vae, and the copy knows states as its own base has them'
    )
  shapes = [jax.eval_shape(one.model.init, jax.random.key(0)) for one in (plain.denoiser, tuned)]
  wanted, got = (jax.tree.map(lambda leaf: leaf.shape, each) for each in shapes)
  different = [name for name in {**wanted, **got} if wanted.get(name) != got.get(name) and name != 'conv_out']
  if different:
    raise UserError(
      f'{field} is {named.stage!r}, whose network has another {sorted(different)[0]} than the base '
      f'{config[stage].base.stage!r}: a control fits networks of the same architecture and conditions alone'
    )
  source = reads.FromStage(
    stage=named.stage,
    network=DENOISER,
    workdir=named.workdir,
    model=tuned.model,
    section=section,
    same=guides.networks_in(plain.space.frozen, plain.conditions.frozen),
  )
  fields = {name: getattr(tuned, name) for name in ('model', 'prediction', 'variance', 'shift')}
  return dataclasses.replace(denoiser, transfer=named.how, **fields), source
