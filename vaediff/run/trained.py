"""A trained stage, opened: its experiment, and all that it reads; draws and observes images."""

import copy
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vaediff import checks, experiments, reads
from vaediff.data import resize, sources, words
from vaediff.errors import UserError
from vaediff.experiments.base import NOISE, Experiment, InSpace
from vaediff.machine import sharding
from vaediff.models import quantized
from vaediff.run import captions, chain, checkpoint, draw, guides, log, opened, same_run, scoring
from vaediff.run import frozen as frozen_networks
from vaediff.run.config import Run
from vaediff.run.draw import HostArrays
from vaediff.storage import identity


class Trained:
  """A stage loaded from the checkpoint that `sample.checkpoint` names: the latest, the best, or of a step.

  Args:
    config: of the run.
    workdir: the run's folder.
    stage: name of the stage.
    mesh: the devices.
    as_stored: quantized networks are read as they are stored, also where floats are made of them here.

  Raises:
    UserError: when a checkpoint is missing, damaged, of another architecture or config, or when what it reads
      was trained anew.
  """

  def __init__(
    self, config: ConfigDict, workdir: pathlib.Path, stage: str, mesh: Mesh, *, as_stored: bool = False
  ):
    self.config, self.workdir, self.stage, self.mesh = config, workdir, stage, mesh
    self._as_stored = as_stored
    self.opened = opened.choose(workdir / stage, stage, self.settings.checkpoint)
    same_run.check_stage(config, self.folder, stage, step=self.step)
    self.experiment = experiments.build(config, stage)
    frozen_networks.check_ids(self.experiment, workdir, self.folder, self.step)
    check = config.checkpoints.check_arrays
    stored = {
      name: checkpoint.load_frozen(
        self.folder, name, checkpoint.abstract_params(model, mesh), check_arrays=check, step=self.step
      )
      for name, model in self.experiment.networks.items()
    }
    models = self.experiment.networks
    ready = (lambda _, params: params) if as_stored else quantized.ready
    self.params = {name: ready(models[name], params) for name, params in stored.items()}
    where = (self.experiment, config, workdir, mesh)
    frozen = frozen_networks.load(*where, own=self.opened, as_stored=as_stored)
    self.read = {**frozen, **self.params}
    self._ids = frozen_networks.ids(self.experiment, workdir, sampling=True)
    self._sources, self._makers, self._scorers = {}, {}, {}
    self._prepare()

  def _prepare(self) -> None:
    seed, shape = self.settings.seed, resize.image_shape(self.config.data)
    source = lambda: self.eval_source
    self._draw = draw.Drawer(self.experiment, self.mesh, seed, shape, source, self._about())
    self._observe = draw.make_observe(self.experiment, self.mesh)
    self.spent, self._made_of = chain.Spent(), None

  def _about(self) -> str:
    """Returns the stage and how it draws, for messages."""
    shown = ('sampler', 'num_steps', 'guidance_weight', 'checkpoint')
    settings = ', '.join(f'{name} {self.settings[name]}' for name in shown if name in self.settings)
    return f'stage {self.stage!r} of {self.workdir} ({settings})'

  def with_settings(self, **changes: Any) -> 'Trained':
    """Returns the same networks with other values in the stage's `sample` section.

    What guides them is loaded where it is another.
    """
    other = copy.copy(self)
    other.config = self.config.copy_and_resolve_references()
    other.config[self.stage].sample.update(changes)
    guides.resolve(other.config)
    other.experiment = experiments.build(other.config, self.stage)
    if other.experiment.for_sampling != self.experiment.for_sampling or 'captions' in changes:
      where = (other.experiment, other.config, self.workdir, self.mesh)
      frozen = frozen_networks.load(*where, own=self.opened, as_stored=self._as_stored)
      other.read = {**frozen, **self.params}
      other._ids = frozen_networks.ids(other.experiment, self.workdir, sampling=True)
    other._prepare()
    return other

  def with_experiment(self, experiment: Experiment) -> 'Trained':
    """Returns the same networks, drawn from by another experiment that reads them."""
    other = copy.copy(self)
    other.experiment = experiment
    other._prepare()
    return other

  @property
  def folder(self) -> pathlib.Path:
    """Folder whose `checkpoints` hold the one that is opened: `<workdir>/<stage>`, or that of its best."""
    return self.opened.folder

  @property
  def step(self) -> int:
    """Updates that the opened checkpoint has."""
    return self.opened.step

  @property
  def settings(self) -> ConfigDict:
    """The stage's `sample` section."""
    return self.config[self.stage].sample

  @property
  def eval_source(self) -> sources.Source:
    """Images of the evaluation split."""
    return self.images('eval')

  def images(self, split: str) -> sources.Source:
    """Returns the images of a split, which are those that the stage was trained with.

    Raises:
      Stale: when they are others.
    """
    if split not in self._sources:
      step = checks.step_of(self.settings.checkpoint)  # 0 = the latest, also where it is another by now
      source = same_run.open_images(self.config, split, self.folder, step)
      self._sources[split] = captions.with_tokens(self.config, self.stage, self.workdir / self.stage, source)
    return self._sources[split]

  @property
  def caption_stage(self) -> 'Trained | None':
    """The stage that reads the captions of its samples: it, or one that feeds it; None = they have none."""
    if captions.length_of(self.config, self.stage):
      return self
    makers = (self.maker(source) for source in filter(self.has_maker, self.experiment.makers))
    return next((maker.caption_stage for maker in makers if maker.caption_stage), None)

  @property
  def captions(self) -> tuple[str, ...]:
    """Those of its samples, in turn; () where they have none."""
    reader = self.caption_stage
    return captions.asked(reader.config, reader.stage) if reader else ()

  def caption_inputs(self, texts: Sequence[str]) -> HostArrays:
    """Returns what its samples are given, to have these captions; of a stage that has `caption_stage`.

    Raises:
      UserError: for a word that it does not know, or a caption that is too long.
    """
    reader = self.caption_stage
    tokenizer = captions.tokenizer_of(reader.config, reader.stage, reader.workdir / reader.stage)
    return {words.TOKENS: tokenizer.encode(texts, captions.length_of(reader.config, reader.stage))}

  @property
  def made_of(self) -> dict[str, str]:
    """What its images are made of: ids of networks and of what was measured, the digest of settings.

    Also those of the stages that feed it, where they are trained: without them it repeats images alone. It is
    made once, at the first access.
    """
    if self._made_of is None:
      self._made_of = self._all_made_of()
    return dict(self._made_of)

  def _all_made_of(self) -> dict[str, str]:
    """Returns what `made_of` says; it reads the id of each stage, and makes digests of measurements."""
    measured = {
      f'the measurement {name!r}': _digest(self.read[name])
      for name, source in frozen_networks.of(self.experiment).items()
      if isinstance(source, reads.Measured | reads.Captions)
    }
    makers = {
      f'the samples of {source.stage!r}': identity.digest(self.maker(source).made_of)
      for source in self.experiment.makers
      if self.has_maker(source)
    }
    return {
      f'the stage {self.stage!r}': self.opened.id,
      **{f'the network {name!r}': value for name, value in self._ids.items()},
      **measured,
      **makers,
      **scoring.made_of(self),
      'the settings': identity.digest(self.settings.to_dict()),
    }

  def eval_images(self, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first `count` images (uint8) and labels of the evaluation split."""
    batch = self.eval_source.read(np.arange(min(count, len(self.eval_source))))
    return batch[sources.IMAGE], batch[sources.LABEL]

  def as_drawn(self, image: np.ndarray) -> np.ndarray:
    """Returns images of the data, uint8, as large as those that the stage draws: means of pixels."""
    factor = self.experiment.image_factor
    if factor == 1:
      return image
    count, height, width, channels = image.shape
    parts = image.reshape(count, height // factor, factor, width // factor, factor, channels)
    return np.rint(parts.mean(axis=(2, 4))).astype(np.uint8)

  @property
  def draws_alone(self) -> bool:
    """Whether it draws samples, and they need no image but one to follow, which they can borrow."""
    if not self.experiment.draws_images:
      return False
    makers = [source for source in self.experiment.makers if self.has_maker(source)]
    made = {name for source in makers for name in (source.feeds, *self.handed(source))}
    made |= set(self.experiment.borrowed)
    shape = resize.image_shape(self.config.data)
    return draw.observed_alone(self.experiment, self.read, shape) <= made

  def draw(
    self,
    indices: np.ndarray,
    given: HostArrays | None = None,
    seed: int | None = None,
    *,
    handed: bool = False,
    candidate: int | None = None,
  ) -> HostArrays:
    """Returns uint8 images by name, with `handed` what the stage hands to others too.

    Without a seed it is `sample.seed`. Where `sample.rerank` names a CLIP stage, the image of an index is the
    best of several, unless one `candidate` is asked for, or the noise is given, or `handed`.

    Where what they start from comes from: what is `given`; else the samples of the stages that feed this one,
    of the same indices and seed; else see `draw.Drawer`.

    Raises:
      UserError: for a stage that draws none, when a stage that feeds it is not trained, or for numbers that
        are given and cannot be.
    """
    if not (self.experiment.draws_images or handed):
      raise UserError(f'stage {self.stage!r} draws no images; name one that does, as --stages=refiner')
    seed, given = self.settings.seed if seed is None else seed, given or {}
    if isinstance(self.experiment, InSpace):
      draw.check_limits(given, self.experiment.limits)
    count = scoring.candidates_of(self.settings)
    if count > 1 and candidate is None and not handed and NOISE not in given:
      scorer = self.scorer(self.settings.rerank, f'config.{self.stage}.sample.rerank')
      texts = scorer.texts(scoring.tokens_of(self, indices, given))
      one = lambda number: self.draw(indices, given, seed, candidate=number)
      return scoring.best_of(one, lambda image: scorer.cosines(image, texts), count)
    whole = {**self.inputs_from_makers(indices, given, seed, candidate), **given}
    with self.spent.on(len(indices)):
      return self._draw(self.read, indices, whole, seed, handed=handed, candidate=candidate)

  def scorer(self, named: ConfigDict, field: str) -> scoring.Scorer:
    """Returns what compares its samples with their captions, opened once; see `scoring.open_scorer`."""
    key = (named.stage, named.workdir)
    if key not in self._scorers:
      self._scorers[key] = scoring.open_scorer(self, named, field)
    return self._scorers[key]

  def inputs_from_makers(
    self, indices: np.ndarray, given: HostArrays, seed: int, candidate: int | None = None
  ) -> HostArrays:
    """Returns what the stages that feed this one draw, of its inputs that are not given.

    That is what such a stage hands over as it is, where the input that it feeds is among that, as ids are;
    else its image, in [-1, 1].
    A stage before it reads what this one reads, where both have an input of the same name, shape and type, be
    it given or drawn: a cascade has one label and one level throughout. Each starts from noise of its own.
    What is given and this one does not read, such as a caption, is for the stages before it, however far.
    """
    missing = [source for source in self.experiment.makers if source.feeds not in given]
    if not missing:
      return {}
    shared, found = {**self.draw_inputs(indices, seed, candidate), **given}, {}
    for source in missing:
      maker = self.maker(source)
      inputs, own = chain.inputs_of(maker), self.experiment.inputs
      names = [name for name in own if name in inputs and name in shared and inputs[name] == own[name]]
      names += [name for name in given if name not in own and name in inputs]
      same = {name: shared[name] for name in names if name != NOISE}
      if handed := self.handed(source):
        drawn = maker.draw(indices, same, seed, handed=True, candidate=candidate)
        found |= {name: drawn[name] for name in handed if name not in given}
      else:
        images = maker.draw(indices, same, seed, candidate=candidate)
        found[source.feeds] = draw.own_image(images).astype(np.float32) / 127.5 - 1
    return found

  def handed(self, source: reads.Sampled) -> tuple[str, ...]:
    """Returns the names of the inputs that a stage hands to this one as they are; () = it feeds an image.

    Raises:
      UserError: when they have another shape or type than this stage reads.
    """
    theirs, own = self.maker(source).experiment.handed, self.experiment.inputs
    if source.feeds not in theirs:
      return ()
    names = tuple(name for name in theirs if name in own)
    for name in names:
      if (theirs[name].shape, theirs[name].dtype) != (own[name].shape, own[name].dtype):
        raise UserError(
          f'stage {self.stage!r} reads {name} of shape {own[name].shape} and type {own[name].dtype}, but '
          f'stage {source.stage!r}, whose samples they are, draws {theirs[name].shape} of type '
          f'{theirs[name].dtype}: they are not of the same tokenizer'
        )
    return names

  def maker(self, source: reads.Sampled) -> 'Trained':
    """Returns a stage that feeds this one, opened once."""
    if source not in self._makers:
      config, folder = self._config_of(source), reads.workdir_of(source, self.workdir)
      self._makers[source] = Trained(config, folder, source.stage, self.mesh)
    return self._makers[source]

  def has_maker(self, source: reads.Sampled) -> bool:
    """Returns whether a stage that feeds this one is trained, and those that feed that."""
    if checkpoint.latest_step(reads.workdir_of(source, self.workdir) / source.stage) is None:
      return False
    maker = self.maker(source)
    return all(maker.has_maker(before) for before in maker.experiment.makers)

  @property
  def class_source(self) -> Any:
    """The experiment whose classes its samples are of: its own, or that of a stage that feeds it."""
    if not self.experiment.classes:
      for source in filter(self.has_maker, self.experiment.makers):
        if (found := self.maker(source).class_source).classes:
          return found
    return self.experiment

  def _config_of(self, source: reads.Sampled) -> ConfigDict:
    """Returns the config of a stage that feeds this one.

    Of another run it is that inside the checkpoint. Images, and how stages are sampled, are said by this run.
    """
    folder = reads.workdir_of(source, self.workdir) / source.stage
    if not source.workdir or checkpoint.latest_step(folder) is None:
      return self.config
    config = same_run.stored_config(folder)
    with config.unlocked():
      config.data = self.config.data
      for stage in config.stages:
        if stage in self.config and 'sample' in self.config[stage]:
          config[stage].sample = self.config[stage].sample
    return guides.resolve(config)

  def draw_all(self, given: HostArrays, first: int = 0, *, handed: bool = False) -> HostArrays:
    """Returns the images `first`, `first` + 1, ... drawn from one row of `given` each; see `draw`.

    In batches of the stage's sampling batch size.

    Args:
      given: what they start from, by name; at least one, with a row for each image.
      first: the index of the first image.
      handed: what the stage hands to others is returned too.
    """
    count = len(next(iter(given.values())))
    size, parts = min(self.settings.batch_size, count), {}
    for indices, num_real in draw.padded_batches(count, size):
      chunk = {name: value[indices] for name, value in given.items()}
      for name, value in self.draw(first + indices, chunk, handed=handed).items():
        parts.setdefault(name, []).append(value[:num_real])
    return {name: np.concatenate(part) for name, part in parts.items()}

  def draw_inputs(self, indices: np.ndarray, seed: int, candidate: int | None = None) -> HostArrays:
    """Returns what the images with these indices start from, where a seed draws it; see `Drawer.start`."""
    return self._draw.start(self.read, np.asarray(indices), seed, candidate)

  def observe(self, image: np.ndarray, label: np.ndarray, key: jax.Array | None = None) -> HostArrays:
    """Returns what samples would be given to be like images, uint8 or float in [-1, 1]; a row per image.

    Without a key it is the mean of what could be seen in them. Batches have the stage's sampling batch size.
    """
    size, parts = min(self.settings.batch_size, len(image)), {}
    for number, (indices, num_real) in enumerate(draw.padded_batches(len(image), size)):
      own = None if key is None else jax.random.fold_in(key, number)
      for name, value in self._observe(self.read, image[indices], label[indices], own).items():
        parts.setdefault(name, []).append(value[:num_real])
    return {name: np.concatenate(part) for name, part in parts.items()}


def _digest(arrays: Any) -> str:
  """Returns the digest of arrays that every process has; one alone may call it."""
  leaves = jax.tree.leaves(jax.device_get(arrays))
  return identity.digest([identity.sum_of(np.asarray(leaf)) for leaf in leaves])


def open_last(run: Run, *, as_stored: bool = False) -> Trained:
  """Returns the last of the stages that a mode was called for; see `Trained`."""
  mesh = sharding.make_mesh(run.config.mesh)
  return Trained(run.config, run.workdir, run.stages[-1], mesh, as_stored=as_stored)


def say_figures(figures: dict[str, float]) -> None:
  """Prints what a mode has measured, a line each."""
  for name, value in figures.items():
    log.say(f'{name} {value:.5g}')
