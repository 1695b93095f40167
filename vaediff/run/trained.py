"""A trained stage, opened: its experiment, and all that it reads; draws and observes images."""

import copy
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vaediff import experiments, identity, reads
from vaediff.data import sources
from vaediff.errors import UserError
from vaediff.machine import sharding
from vaediff.run import best, checkpoint, digests, draw, guides, log, same_run
from vaediff.run import frozen as frozen_networks
from vaediff.run.config import Run
from vaediff.run.draw import HostArrays


class Trained:
  """A stage loaded from its latest checkpoint.

  Args:
    config: of the run.
    workdir: the run's folder.
    stage: name of the stage.
    mesh: the devices.

  Raises:
    UserError: when a checkpoint is missing, damaged, of another architecture or config, or when what it reads
      was trained anew.
  """

  def __init__(self, config: ConfigDict, workdir: pathlib.Path, stage: str, mesh: Mesh):
    self.config, self.workdir, self.stage, self.mesh = config, workdir, stage, mesh
    self.folder = checkpoint_folder(workdir / stage, self.settings.checkpoint)
    same_run.check_stage(config, self.folder, stage)
    self.experiment = experiments.build(config, stage)
    frozen_networks.check_ids(self.experiment, workdir, self.folder)
    check = config.checkpoints.check_arrays
    self.params = {
      name: checkpoint.load_frozen(
        self.folder, name, checkpoint.abstract_params(model, mesh), check_arrays=check
      )
      for name, model in self.experiment.networks.items()
    }
    own = (stage, self.folder)
    frozen = frozen_networks.load(self.experiment, config, workdir, mesh, own=own)
    self.read = {**frozen, **self.params}
    self._ids = frozen_networks.ids(self.experiment, workdir, sampling=True)
    self._sources = {}
    self._prepare()

  def _prepare(self) -> None:
    data = self.config.data
    shape = (data.image_size, data.image_size, data.channels)
    self._draw = draw.make_draw(
      self.experiment, self.mesh, self.settings.seed, shape, lambda: self.eval_source, self._about()
    )
    self._observe = draw.make_observe(self.experiment, self.mesh)

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
    if other.experiment.for_sampling != self.experiment.for_sampling:
      own = (self.stage, self.folder)
      frozen = frozen_networks.load(other.experiment, other.config, self.workdir, self.mesh, own=own)
      other.read = {**frozen, **self.params}
      other._ids = frozen_networks.ids(other.experiment, self.workdir, sampling=True)
    other._prepare()
    return other

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
      self._sources[split] = same_run.open_images(self.config, split, self.folder)
    return self._sources[split]

  @property
  def made_of(self) -> dict[str, str]:
    """What its images are made of: ids of networks and of what was measured, the digest of settings."""
    measured = {
      f'the measurement {name!r}': identity.digest(digests.of_parts(self.read[name]))
      for name, source in self.experiment.frozen.items()
      if isinstance(source, reads.Measured)
    }
    return {
      f'the stage {self.stage!r}': checkpoint.identity_of(self.folder),
      **{f'the network {name!r}': value for name, value in self._ids.items()},
      **measured,
      'the settings': identity.digest(self.settings.to_dict()),
    }

  def eval_images(self, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first `count` images (uint8) and labels of the evaluation split."""
    batch = self.eval_source.read(np.arange(min(count, len(self.eval_source))))
    return batch[sources.IMAGE], batch[sources.LABEL]

  @property
  def draws_alone(self) -> bool:
    """Whether it draws samples, and they need no image."""
    data = self.config.data
    shape = (data.image_size, data.image_size, data.channels)
    return self.experiment.draws_images and not draw.observed_alone(self.experiment, self.read, shape)

  def draw(
    self, indices: np.ndarray, given: HostArrays | None = None, seed: int | None = None
  ) -> HostArrays:
    """Returns uint8 images by name; see `draw.make_draw`. Without a seed it is `sample.seed`.

    Raises:
      UserError: for a stage that draws none.
    """
    if not self.experiment.draws_images:
      raise UserError(f'stage {self.stage!r} draws no images; name one that does, as --stages=refiner')
    return self._draw(self.read, indices, given, self.settings.seed if seed is None else seed)

  def draw_all(self, given: HostArrays, first: int = 0) -> HostArrays:
    """Returns the images `first`, `first` + 1, ... drawn from one row of `given` each.

    In batches of the stage's sampling batch size.
    """
    count = len(next(iter(given.values())))
    size, parts = min(self.settings.batch_size, count), {}
    for indices in draw.batches(count, size):
      fresh = min(size, count - int(indices[0]))
      chunk = {name: value[indices] for name, value in given.items()}
      for name, value in self.draw(first + indices, chunk).items():
        parts.setdefault(name, []).append(value[:fresh])
    return {name: np.concatenate(part) for name, part in parts.items()}

  def drawn(self, indices: np.ndarray, seed: int) -> HostArrays:
    """Returns what the images with these indices start from, where a seed draws it."""
    rows = jnp.asarray(indices, jnp.int32)
    keys = draw.image_keys(seed, rows)
    return jax.device_get(self.experiment.draw(self.read, keys, rows))

  def observe(self, image: np.ndarray, label: np.ndarray, key: jax.Array | None = None) -> HostArrays:
    """Returns what samples would be given to be like images, uint8 or float in [-1, 1]; a row per image.

    Without a key it is the mean of what could be seen in them. Batches have the stage's sampling batch size.
    """
    size, parts = min(self.settings.batch_size, len(image)), {}
    for number, indices in enumerate(draw.batches(len(image), size)):
      own = None if key is None else jax.random.fold_in(key, number)
      fresh = min(size, len(image) - int(indices[0]))
      for name, value in self._observe(self.read, image[indices], label[indices], own).items():
        parts.setdefault(name, []).append(value[:fresh])
    return {name: np.concatenate(part) for name, part in parts.items()}


def open_last(run: Run) -> Trained:
  """Returns the last of the stages that a mode was called for."""
  return Trained(run.config, run.workdir, run.stages[-1], sharding.make_mesh(run.config.mesh))


def say_figures(figures: dict[str, float]) -> None:
  """Prints what a mode has measured, a line each."""
  for name, value in figures.items():
    log.say(f'{name} {value:.5g}')


def checkpoint_folder(stage_folder: pathlib.Path, choice: str) -> pathlib.Path:
  """Returns the folder of a stage's latest checkpoints, or of its best one."""
  if choice not in ('latest', 'best'):
    raise UserError(f"sample.checkpoint must be 'latest' or 'best', got {choice!r}")
  folder = stage_folder / best.FOLDER if choice == 'best' else stage_folder
  if choice == 'best' and checkpoint.latest_step(folder) is None:
    raise UserError(
      f'{folder} holds no checkpoint: none is kept unless train.best_measure is set while the stage trains'
    )
  return folder
