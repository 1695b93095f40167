"""A picture that is changed by a caption, in two small stages: Imagic (Kawar et al. 2022, arXiv:2210.09276).

    edit_embedding   the vectors of the caption are optimised until the frozen denoiser, given them, makes the
                     picture: min over e of E |eps - eps_theta(x_t, t, e)|^2, from e_tgt on (section 3.2)
    edit_finetune    the denoiser is tuned to the picture at those vectors, from its averaged parameters on

Each update sees the picture several times, with other times and noise. Nothing is dropped, and the denoiser's
own dropout is off: the null, and so what guidance compares with, stays what it was. Samples are drawn of both
stages, at any eta between the two vectors (`conditions.embedding`).

The tower of words is among the parameters of the denoiser, but has no gradient: the vectors are given. It
stays as it was, and e_tgt with it.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vaediff import checks, reads
from vaediff.conditions.base import Conditions
from vaediff.conditions.embedding import EMBEDDING, Embedding
from vaediff.conditions.text import TEXT
from vaediff.conditions.vae import VAE
from vaediff.errors import UserError
from vaediff.experiments import base, bounds, extended
from vaediff.experiments.denoiser import DENOISER, Denoiser, State
from vaediff.experiments.diffusion import Diffusion
from vaediff.models import told_words
from vaediff.models.functional import Model
from vaediff.optim import make_optimizer
from vaediff.types import Batch, Drop, Metrics, Read, Time, Values

EDIT_EMBEDDING, EDIT_FINETUNE = 'edit_embedding', 'edit_finetune'
"""The two experiments, and the names of their stages."""
DIFFUSION = 'diffusion'
"""The experiment of stages that can be edited with."""
SECTION = 'edit'
"""Of a stage's section: `stage` and `workdir` of what is edited, `caption`, the digest of the `picture`."""
SHOWN = (TEXT, VAE)
"""The conditions that a picture and a caption tell."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Told(Denoiser):
  """A denoiser that reads the vectors among the values in the place of those of its tower."""

  def outputs(
    self,
    read: Read,
    y: State,
    t: Time,
    values: Values,
    drop: Drop = {},  # noqa: B006
    key_dropout: jax.Array | None = None,
  ) -> tuple[State, State | None]:
    """Returns what a denoiser does; see `Denoiser.outputs`."""
    with told_words.given(values[EMBEDDING]):
      return super().outputs(read, y, t, values, drop, key_dropout)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edit(Diffusion):
  """One of the two stages; trains one network.

  Attributes:
    workdir: the run whose stage is edited.
    known: networks that it reads beside those of its space and its conditions.
  """

  workdir: str
  known: Mapping[str, reads.Reads]

  bounds = bounds.optimizers('optim')
  likelihood = ''

  @classmethod
  def from_config(cls, config: ConfigDict, stage: str) -> 'Edit':
    """Builds the experiment of `config.<stage>`, of the diffusion that its part `edit` names."""
    section = config[stage]
    checks.check(section, cls.bounds, f'config.{stage}: ')
    named = section[SECTION]
    whole = sampled_as(config, named.stage, section.sample)
    check_editable(whole, config, named.stage)
    conditions = told(whole, named.workdir)
    denoiser = as_told(whole.denoiser, conditions)
    return cls(
      space=whole.space,
      denoiser=denoiser,
      optimizer=make_optimizer(section.optim, section.train.num_steps),
      flip=False,
      microbatches=section.train.microbatches,
      settings=section.sample.to_dict(),
      start_image=whole.start_image,
      workdir=named.workdir,
      known=cls.networks_read(
        reads.FromStage(
          stage=named.stage, network=DENOISER, workdir=named.workdir, model=whole.denoiser.model
        ),
        embedding_of(conditions).model,
      ),
    )

  @classmethod
  @abc.abstractmethod
  def networks_read(cls, denoiser: reads.FromStage, vectors: Model) -> dict[str, reads.Reads]:
    """Returns what it reads: of the denoiser that is edited, and of the vectors."""

  @property
  def frozen(self) -> Mapping[str, reads.Reads]:
    """What space and conditions read, of the run that is edited; and the other of the two networks."""
    found = {**self.space.frozen, **self.conditions.frozen}
    return {**{name: located(source, self.workdir) for name, source in found.items()}, **self.known}

  def init(self, key: jax.Array) -> base.TrainState:
    """Returns the state at step 0."""
    networks = {name: base.init_network(model, self.optimizer, key) for name, model in self.networks.items()}
    return base.TrainState(step=jnp.int32(0), networks=networks, extra={})

  def train_step(
    self, state: base.TrainState, frozen: Read, batch: Batch, key: jax.Array, kind: str = ''
  ) -> tuple[base.TrainState, Metrics]:
    """Returns the state after one update of the loss of the picture, nothing dropped."""
    del kind

    def loss_fn(params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
      read = {**frozen, **params}
      key_example, key_loss = jax.random.split(key)
      y0, values = self.examples(read, batch, key_example, training=False)
      terms = self.denoiser.loss_terms(read, y0, values, key_loss, training=False)
      metrics = jax.tree.map(jnp.mean, terms)
      return metrics['loss'], metrics

    (name,) = self.networks
    params = {name: state.networks[name].params}
    grads, metrics = base.gradients(loss_fn, params, batch, key, self.microbatches)
    state, norms = base.update_one(state, name, grads[name], self.optimizer)
    return state, {**metrics, **norms}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EditEmbedding(Edit):
  """Trains the network `embedding`, from the vectors of the caption on; the denoiser is frozen."""

  @classmethod
  def networks_read(cls, denoiser: reads.FromStage, vectors: Model) -> dict[str, reads.Reads]:
    """Returns the denoiser, which is frozen."""
    del vectors
    return {DENOISER: denoiser}

  @property
  def networks(self) -> Mapping[str, Model]:
    """The vectors of the caption."""
    return {EMBEDDING: embedding_of(self.conditions).model}

  def start(self, state: base.TrainState, frozen: Read) -> base.TrainState:
    """Returns the state that begins with the vectors of the caption."""
    params = {told_words.TOKENS: embedding_of(self.conditions).target(frozen)}
    network = state.networks[EMBEDDING]
    average = None if network.ema_params is None else jax.tree.map(jnp.copy, params)
    return state.replace(networks={EMBEDDING: network.replace(params=params, ema_params=average)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class EditFinetune(Edit):
  """Trains the network `denoiser`, from that of the run on; the vectors are frozen."""

  @classmethod
  def networks_read(cls, denoiser: reads.FromStage, vectors: Model) -> dict[str, reads.Reads]:
    """Returns the vectors, and the denoiser that it begins as."""
    optimised = reads.FromStage(stage=EDIT_EMBEDDING, network=EMBEDDING, workdir='', model=vectors)
    return {EMBEDDING: optimised, extended.FIRST: denoiser}

  @property
  def networks(self) -> Mapping[str, Model]:
    """The denoiser that is fine-tuned."""
    return {DENOISER: self.denoiser.model}

  def start(self, state: base.TrainState, frozen: Read) -> base.TrainState:
    """Returns the state that begins with the parameters of the run's denoiser."""
    return extended.start(state, frozen, DENOISER)


def sampled_as(config: ConfigDict, stage: str, sample: ConfigDict) -> Diffusion:
  """Returns the diffusion of a stage, sampled as another section says.

  Raises:
    UserError: for a stage that is no diffusion.
  """
  if config[stage].experiment != DIFFUSION:
    raise UserError(refusal(config, stage))
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config[stage].sample = sample
  return Diffusion.from_config(config, stage)


def refusal(config: ConfigDict, stage: str) -> str:
  """Returns why a stage of another experiment cannot be edited with."""
  section = config[stage]
  why = f'stage {stage!r} is no diffusion that an edit could tune: its experiment is {section.experiment!r}'
  if 'teacher' in section:
    return f'{why}, a student of {section.teacher.stage!r}; edit with its teacher (--stages)'
  return f'{why}. Choose a diffusion that reads captions (--stages), or train one: variant text'


def check_editable(whole: Diffusion, config: ConfigDict, stage: str) -> None:
  """Raises UserError where a picture and a caption do not tell all that a diffusion reads, or more guides."""
  names = [one.name for one in whole.conditions.each]
  if TEXT not in names:
    raise UserError(
      f'stage {stage!r} reads no captions, and an edit is made by one: it reads '
      f'{", ".join(names) or "nothing"}. Train one that does: variant text, of data with captions, as '
      'configs/shapes16.py:text,mini'
    )
  others = [name for name in names if name not in SHOWN]
  if others:
    raise UserError(
      f'stage {stage!r} also reads {", ".join(others)} (conditions.{others[0]}), which a picture and a '
      'caption do not tell; edit with a stage that reads captions alone'
    )
  for field in ('guide', 'classifier'):
    named = config[stage].sample[field].stage
    if named:
      raise UserError(
        f'config.{stage}.sample.{field}.stage is {named!r}: another network knows nothing of the optimised '
        f"vectors. Edit without it, --config.{stage}.sample.{field}.stage=''"
      )


def told(whole: Diffusion, workdir: str) -> Conditions:
  """Returns the conditions of a diffusion with the vectors of one caption in the place of captions."""
  return Conditions(
    tuple(
      Embedding(text=one, workdir=workdir, network=DENOISER, dtype=whole.denoiser.model.module.dtype)
      if one.name == TEXT
      else one
      for one in whole.conditions.each
    )
  )


def embedding_of(conditions: Conditions) -> Embedding:
  """Returns the one of them that has the vectors."""
  return next(one for one in conditions.each if isinstance(one, Embedding))


def as_told(denoiser: Denoiser, conditions: Conditions) -> Told:
  """Returns a denoiser as one that is told its words as vectors; it has the denoising loss alone."""
  fields = {field.name: getattr(denoiser, field.name) for field in dataclasses.fields(denoiser)}
  return Told(**{**fields, 'conditions': conditions, 'perceptual': None})


def located(source: reads.Reads, workdir: str) -> reads.Reads:
  """Returns what is read of a run, where it is named by another run."""
  if isinstance(source, reads.Published) or source.workdir:
    return source
  return dataclasses.replace(source, workdir=workdir)
