"""A trained stage, opened: its experiment, its parameters, the frozen networks and the latent prior."""

import copy
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vaediff import experiments
from vaediff.conditions import prior
from vaediff.data import pixels, sources
from vaediff.errors import UserError
from vaediff.machine import distributed, sharding
from vaediff.run import best, checkpoint, draw, log
from vaediff.run import config as configs
from vaediff.run import frozen as frozen_networks
from vaediff.run.config import Run


class Trained:
  """A stage loaded from its latest checkpoint; draws and encodes images.

  Args:
    config: of the run.
    workdir: the run's folder.
    stage: name of the stage.
    mesh: the devices.

  Raises:
    UserError: when a checkpoint is missing, damaged or of another architecture.
  """

  def __init__(self, config: ConfigDict, workdir: pathlib.Path, stage: str, mesh: Mesh):
    self.config, self.workdir, self.stage, self.mesh = config, workdir, stage, mesh
    stored = configs.read(workdir)
    configs.check_same_run(config, stored, tuple(stored.stages), workdir)
    self.experiment = experiments.build(config, stage)
    self.folder = checkpoint_folder(workdir / stage, self.settings.checkpoint)
    self.params = {
      name: checkpoint.load_frozen(self.folder, name, frozen_networks.abstract_params(model, mesh))
      for name, model in self.experiment.networks.items()
    }
    self.frozen = frozen_networks.load(self.experiment, config, workdir, mesh)
    self._draw = draw.make_draw(self.experiment, mesh, self.settings.seed)

  def with_settings(self, **changes: Any) -> 'Trained':
    """Returns the same networks with other values in the stage's `sample` section."""
    other = copy.copy(self)
    other.config = self.config.copy_and_resolve_references()
    other.config[self.stage].sample.update(changes)
    other.experiment = experiments.build(other.config, self.stage)
    other._draw = draw.make_draw(other.experiment, self.mesh, other.settings.seed)
    return other

  @property
  def settings(self) -> ConfigDict:
    """The stage's `sample` section."""
    return self.config[self.stage].sample

  @functools.cached_property
  def _encode(self):
    return jax.jit(self.experiment.encode, out_shardings=sharding.replicated(self.mesh))

  @functools.cached_property
  def prior(self) -> prior.Prior:
    """The arrays of the latent prior; {} = N(0, I)."""
    return jax.device_put(load_prior(self), sharding.replicated(self.mesh))

  @functools.cached_property
  def eval_source(self) -> sources.Source:
    """Images of the evaluation split."""
    return sources.open_source(self.config.data, 'eval')

  def draw(
    self, indices: np.ndarray, given: dict[str, np.ndarray] | None = None, seed: int | None = None
  ) -> dict[str, np.ndarray]:
    """Returns uint8 images by name; see `draw.make_draw`. Without a seed it is `sample.seed`.

    A stage that reads images is given those of the evaluation split, in order.
    """
    if self.experiment.reads_image and 'image' not in (given or {}):
      rows = indices % len(self.eval_source)
      given = {**(given or {}), 'image': self.eval_source.read(rows)['image']}
    seed = self.settings.seed if seed is None else seed
    return self._draw(self.params, self.frozen, self.prior, indices, given, seed)

  def encode(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and log variance [n, d] of q(z | x) of images, uint8 or float in [-1, 1]."""
    where, parts = sharding.batch_sharding(self.mesh), []
    size = sharding.round_up(min(self.settings.batch_size, len(image)), self.mesh)
    for indices in draw.batches(len(image), size):
      chunk = image[indices]
      if chunk.dtype == np.uint8:
        chunk = pixels.to_unit_range(jnp.asarray(chunk))
      moments = self._encode(self.params, self.frozen, jax.device_put(chunk, where))
      fresh = min(size, len(image) - int(indices[0]))
      parts.append([part[:fresh] for part in jax.device_get(moments)])
    mean, logvar = (np.concatenate(part) for part in zip(*parts, strict=True))
    return mean, logvar

  def encode_sampled(self, image: np.ndarray, seed: int) -> np.ndarray:
    """Returns z ~ q(z | x) [n, d]."""
    mean, logvar = self.encode(image)
    noise = np.random.default_rng(seed).standard_normal(mean.shape, np.float32)
    return mean + np.exp(0.5 * logvar) * noise

  def eval_images(self, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first `count` images (uint8) and labels of the evaluation split."""
    batch = self.eval_source.read(np.arange(min(count, len(self.eval_source))))
    return batch['image'], batch['label']

  def draw_all(self, given: dict[str, np.ndarray], first: int = 0) -> dict[str, np.ndarray]:
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

  def need_latents(self, mode: str) -> None:
    """Raises UserError when the stage has no VAE to encode with."""
    if not self.experiment.latent_dim:
      raise UserError(
        f'--mode={mode} needs a latent code; stage {self.stage!r} was trained without a VAE '
        "(diffusion.condition = 'none'). Use --mode=sample, or another stage with --stages"
      )


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


def load_prior(trained: Trained) -> dict[str, np.ndarray]:
  """Returns the arrays of the latent prior; a mixture is fitted once and stored beside the VAE."""
  config, experiment = trained.config, trained.experiment
  source = experiment.frozen.get('vae')
  vae_stage = source.stage if source else trained.stage
  if not experiment.latent_dim or config[vae_stage].prior.kind == 'normal':
    return {}
  section = config[vae_stage].prior
  folder = (pathlib.Path(source.workdir) if source and source.workdir else trained.workdir) / vae_stage
  counts = '-'.join(map(str, section.num_components))
  step = checkpoint.latest_step(folder)
  settings = f'{section.covariance}-{counts}-of-{section.num_encoded}-holdout-{section.holdout_fraction}'
  path = folder / f'prior-{settings}-seed-{config.seed}-step-{step}.npz'
  if not distributed.agree(path.exists()):
    images = sources.open_source(config.data, 'train')
    count = min(section.num_encoded, len(images))
    log.say(f'fitting a Gaussian mixture ({section.covariance}, {counts} components) to {count} latents')
    chunks = np.array_split(np.arange(count), max(1, count // 1024))
    z = [
      trained.encode_sampled(images.read(chunk)['image'], config.seed + k) for k, chunk in enumerate(chunks)
    ]
    arrays, scores = prior.fit(np.concatenate(z), section, config.seed)
    shown = ', '.join(f'{k}: {score:.2f}' for k, score in scores.items())
    log.say(f'held-out nats per latent by components: {shown}; {len(arrays["weights"])} used')
    if jax.process_index() == 0:
      prior.save(path, arrays)
    distributed.wait_for_all(f'wrote {path}')
  return prior.load(path)
