"""The PCA of a VAE's code: what its numbers say of the image, in a basis and units of their own.

Over the training images q(z | x) = N(mu(x), diag sigma^2(x)) has, by the law of total covariance,

  Sigma = Cov(mu) + diag E[sigma^2],

what a network sees of sampled z; of a VAE that fits its prior that is about I, so that its own directions say
nothing. Directions are those of the signal, Cov(mu) = V diag(Lambda) V^T, and scales those of what is seen:

  s_j^2 = v_j^T Sigma v_j,   c = clip(V^T (z - m) / sqrt(s^2 + floor max s^2), -4, 4).

A direction of which the posterior knows nothing has Lambda_j = 0 and s_j of about 1: it is never divided by
zero, which is what whitening by Lambda does with z that is sampled. A direction is kept where its signal
fraction Lambda_j / s_j^2 is large enough, or by a number that is asked for. All is measured once, before the
first step, and never again; no gradient passes it.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from vaediff import checks, reads
from vaediff.errors import UserError
from vaediff.models.ports import Port
from vaediff.types import Latent, Read

PCA = 'pca'
"""Name of the value and of the measurement; where the network reads it, `diffusion.z_conditioning`."""
LIMIT = 4.0
"""Of the numbers of a code, in deviations."""
SPECTRUM = ('mean', 'directions', 'signal', 'spread', 'count')
"""What is measured of a VAE, float64: m [d], V [d, d] by falling Lambda, Lambda [d], s^2 [d], images."""
SETTINGS = ('num_directions', 'min_signal', 'floor')
"""Fields of the section `diffusion.pca`, of the stage that reads the code."""
BOUNDS = {
  'diffusion.z_conditioning': checks.Bound(
    lambda value: isinstance(value, bool) or value == PCA,
    lambda field, value: f'{field} is {value!r}; valid: False, True, {PCA}',
  ),
  'diffusion.pca.num_directions': checks.count(0),
  'diffusion.pca.min_signal': checks.below_one(),
  'diffusion.pca.floor': checks.inside(0, 1),
}
Arrays = dict[str, np.ndarray]


class NoSignal(UserError):
  """The code says nothing of the image."""


# What is measured -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moments:
  """Of posteriors of images, float64.

  Attributes:
    count: of images.
    mean: of mu [d].
    scatter: sum of (mu - mean) (mu - mean)^T [d, d].
    noise: mean of sigma^2 [d].
  """

  count: int
  mean: np.ndarray
  scatter: np.ndarray
  noise: np.ndarray


def moments_of(mean: np.ndarray, logvar: np.ndarray) -> Moments:
  """Returns the moments of posteriors [n, d], given by mean and log variance."""
  mean = np.asarray(mean, np.float64)
  middle = mean.mean(axis=0)
  centred = mean - middle
  noise = np.exp(np.asarray(logvar, np.float64)).mean(axis=0)
  return Moments(count=len(mean), mean=middle, scatter=centred.T @ centred, noise=noise)


def joined(a: Moments, b: Moments) -> Moments:
  """Returns the moments of both together (Chan et al. 1979), whichever comes first."""
  count = a.count + b.count
  between = b.mean - a.mean
  return Moments(
    count=count,
    mean=a.mean + between * (b.count / count),
    scatter=a.scatter + b.scatter + np.outer(between, between) * (a.count * b.count / count),
    noise=a.noise + (b.noise - a.noise) * (b.count / count),
  )


def spectrum_of(parts: Iterable[tuple[np.ndarray, np.ndarray]], stage: str) -> Arrays:
  """Returns `SPECTRUM` of posteriors that come in parts of (mean, log variance) [n, d].

  Of each direction the loading of the largest size is positive.

  Raises:
    UserError: when the VAE's posteriors are not finite.
  """
  moments = functools.reduce(joined, (moments_of(*part) for part in parts))
  if not all(np.isfinite(part).all() for part in (moments.mean, moments.scatter, moments.noise)):
    raise UserError(f'stage {stage!r} encodes training images to codes that are not finite: train it anew')
  covariance = moments.scatter / moments.count
  signal, directions = np.linalg.eigh(covariance)
  signal, directions = np.maximum(signal[::-1], 0.0), directions[:, ::-1]
  largest = np.argmax(np.abs(directions), axis=0)
  directions = directions * np.sign(directions[largest, np.arange(len(largest))])
  spread = signal + np.square(directions).T @ moments.noise
  found = (moments.mean, directions, signal, spread, np.int64(moments.count))
  return dict(zip(SPECTRUM, found, strict=True))


# What is made of it -----------------------------------------------------------------------------------


def kept(spectrum: Arrays, settings: Mapping[str, Any], stage: str) -> np.ndarray:
  """Returns the numbers of the directions that are kept, by falling Lambda.

  Args:
    spectrum: measured.
    settings: `SETTINGS`: how many, or with 0 those whose signal fraction is above `min_signal`.
    stage: that was measured, for messages.

  Raises:
    NoSignal: when no direction says anything.
    UserError: when more are asked for than the images span.
  """
  fraction, count = signal_fraction(spectrum), int(spectrum['count'])
  known = np.flatnonzero(fraction > settings['min_signal'])
  if not len(known):
    raise NoSignal(
      f'the code of stage {stage!r} says nothing of the image: its largest signal fraction is '
      f'{fraction.max():.2g}, and diffusion.pca.min_signal is {settings["min_signal"]}. The VAE has '
      f'collapsed onto its prior: train it with a smaller {stage}.loss.beta, or longer; or lower min_signal'
    )
  number = settings['num_directions']
  if number >= count:
    raise UserError(
      f'diffusion.pca.num_directions is {number}, but {count} training images span at most {count - 1} '
      'directions; ask for fewer, or 0 for those with a signal'
    )
  return np.arange(number) if number else known


def signal_fraction(spectrum: Arrays) -> np.ndarray:
  """Returns Lambda / s^2 [d] in [0, 1]: how much of what is seen along a direction is of the image."""
  return spectrum['signal'] / np.maximum(spectrum['spread'], np.finfo(np.float64).tiny)


def arrays_of(spectrum: Arrays, settings: Mapping[str, Any], stage: str) -> Arrays:
  """Returns what a code is made with, float32; directions that are not kept are zeros.

  `mean` [d], `directions` [d, k], `scale` [k], what is divided by, and `deviation` [k], s. Where the number
  is left to the signal there is room for all d, so that shapes are known before anything is measured.

  Raises:
    UserError: see `kept`.
  """
  chosen, latent_dim = kept(spectrum, settings, stage), len(spectrum['mean'])
  arrays = neutral(latent_dim, settings['num_directions'] or latent_dim)
  spread = spectrum['spread']
  number = len(chosen)
  arrays['mean'] = spectrum['mean'].astype(np.float32)
  arrays['directions'] = np.zeros_like(arrays['directions'])
  arrays['directions'][:, :number] = spectrum['directions'][:, chosen]
  arrays['scale'][:number] = np.sqrt(spread[chosen] + settings['floor'] * spread.max())
  arrays['deviation'][:number] = np.sqrt(spread[chosen])
  return arrays


def neutral(latent_dim: int, width: int) -> Arrays:
  """Returns arrays of the same shapes without a meaning."""
  return {
    'mean': np.zeros(latent_dim, np.float32),
    'directions': np.eye(latent_dim, width, dtype=np.float32),
    'scale': np.ones(width, np.float32),
    'deviation': np.ones(width, np.float32),
  }


def code_of(arrays: Mapping[str, Any], z: Latent) -> Float[Array, 'batch directions']:
  """Returns c of z, float32, in [-4, 4]."""
  mean, directions, scale = (
    jax.lax.stop_gradient(jnp.asarray(arrays[name], jnp.float32)) for name in ('mean', 'directions', 'scale')
  )
  scores = jnp.dot(z - mean[None], directions, precision=jax.lax.Precision.HIGHEST)
  return jnp.clip(scores / scale[None], -LIMIT, LIMIT)


def along(arrays: Arrays, z: np.ndarray, number: int, deviations: np.ndarray) -> np.ndarray:
  """Returns z [d] moved along one direction to so many deviations from the mean [n, d]; the rest stays.

  Args:
    arrays: what `arrays_of` returns.
    z: a code.
    number: of the direction, 0 the one with most signal.
    deviations: where to go, in units of s [n].
  """
  direction = arrays['directions'][:, number]
  now = (z - arrays['mean']) @ direction
  steps = np.asarray(deviations, np.float32) * arrays['deviation'][number] - now
  return (z + steps[:, None] * direction).astype(np.float32)


# What a condition reads -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Projection:
  """The code as a value of the condition whose z it is made of.

  Attributes:
    source: its measurement.
    width: numbers of the code.
  """

  source: reads.Measured
  width: int

  def port(self, *, droppable: bool) -> Port:
    """Returns a vector whose embedding is zero at first: the network begins as the one without it."""
    return Port(enters='vector', shape=(self.width,), droppable=droppable, zero=True)

  def of(self, read: Read, z: Latent) -> Float[Array, 'batch directions']:
    """Returns the code of z."""
    return code_of(read[PCA], z)


def measured(stage: str, workdir: str, latent_dim: int, settings: Mapping[str, Any]) -> reads.Measured:
  """Returns the declaration of a VAE stage's PCA, with `SETTINGS`."""
  width = settings['num_directions'] or latent_dim
  return reads.Measured(
    stage=stage,
    workdir=workdir,
    measurement=PCA,
    neutral=functools.partial(neutral, latent_dim, width),
    settings={name: settings[name] for name in SETTINGS},
  )


def projection(section: ConfigDict, latent_dim: int) -> Projection:
  """Returns the projection that `diffusion.pca` of a stage's section describes.

  Raises:
    UserError: when more directions are asked for than the code has.
  """
  settings, named = section.diffusion.pca, section.vae
  if settings.num_directions > latent_dim:
    raise UserError(
      f'diffusion.pca.num_directions is {settings.num_directions}, but the code of {named.stage!r} has '
      f'{latent_dim} numbers ({named.stage}.model.latent_dim); ask for at most that, or 0 for those with a '
      'signal'
    )
  source = measured(named.stage, named.workdir, latent_dim, settings.to_dict())
  return Projection(source=source, width=settings.num_directions or latent_dim)
