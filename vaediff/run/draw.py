"""Images by index: image i depends on the seed and i alone, whatever the batch size or device count."""

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vaediff.conditions.base import LAST
from vaediff.data import pixels, sources
from vaediff.errors import UserError
from vaediff.experiments.base import Experiment, SampleKeys, sampling_keys
from vaediff.machine import distributed, sharding
from vaediff.run import images
from vaediff.types import Given, Read

HostArrays = dict[str, np.ndarray]
T = TypeVar('T')


class NotFinite(UserError):
  """Drawn images that hold nan or infinity: as bytes they would pass for black or white ones."""


def image_keys(
  seed: int | jax.Array, indices: jax.Array, depth: int = 0, candidate: int | jax.Array | None = None
) -> SampleKeys:
  """Returns the keys of each image, those of a stage that is sampled after `depth` others.

  The depth is folded into the key of the seed, before the index: the key of an image is split, and a
  number folded into it would repeat one of the parts. Indices are below 2^31, depths from `LAST` down.
  That of an image of which several candidates are drawn is never split: the number of the candidate is
  folded into it, and what that gives is split.
  """
  root = jax.random.key(seed)
  if depth:
    root = jax.random.fold_in(root, LAST - depth)
  keys = jax.vmap(lambda i: jax.random.fold_in(root, i))(indices)
  if candidate is not None:
    keys = jax.vmap(lambda key: jax.random.fold_in(key, candidate))(keys)
  return sampling_keys(keys)


def sampler(experiment: Experiment) -> Callable[..., tuple[dict[str, jax.Array], jax.Array]]:
  """Returns (read, indices, given, seed, candidate=None) -> (images by name, finite): what draws, anywhere.

  The images are bytes; `finite` [n] says of which every one was finite before it was made bytes of. What is
  handed to other stages is among them, as it is. What is not given is drawn.
  """
  begin, finish = starter(experiment), finisher(experiment)
  return lambda read, *asked: finish(read, *begin(read, *asked))


def starter(experiment: Experiment) -> Callable[..., tuple[dict[str, jax.Array], SampleKeys]]:
  """Returns the first half of `sampler`: what samples start from, and their keys, a row of each per index."""

  def begin(
    read: Read, indices: jax.Array, given: Given, seed: jax.Array, candidate: jax.Array | None = None
  ) -> tuple[dict[str, jax.Array], SampleKeys]:
    keys = image_keys(seed, indices, experiment.depth, candidate)
    return {**experiment.draw(read, keys, indices), **given}, keys

  return begin


def finisher(experiment: Experiment) -> Callable[..., tuple[dict[str, jax.Array], jax.Array]]:
  """Returns the second half of `sampler`: (read, start, keys) -> (images by name, finite)."""

  def stored(name: str, value: jax.Array) -> jax.Array:
    return value if name in experiment.handed else pixels.to_bytes(value)

  def finish(read: Read, start: Given, keys: SampleKeys) -> tuple[dict[str, jax.Array], jax.Array]:
    drawn, finite = experiment.sample(read, start, keys), jnp.ones(len(keys.noise), bool)
    for image in drawn.values():
      finite &= jnp.isfinite(image).all(axis=tuple(range(1, image.ndim)))
    return {name: stored(name, value) for name, value in drawn.items()}, finite

  return finish


def make_observe(experiment: Experiment, mesh: Mesh) -> Callable[..., HostArrays]:
  """Returns observe(read, image, label, key=None) -> what a sample would be given to be like each image.

  `image` is uint8, or float in [-1, 1]; without a key it is the mean of what could be seen in it. The images
  are one batch.
  """
  where, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  compiled = jax.jit(
    lambda read, batch, x, key: experiment.observe(read, batch, x, key), out_shardings=everywhere
  )

  def observe(read: Read, image: np.ndarray, label: np.ndarray, key: jax.Array | None = None) -> HostArrays:
    padded = sharding.round_up(len(image), mesh)
    rows = np.minimum(np.arange(padded), len(image) - 1)
    x = image[rows]
    if x.dtype == np.uint8:
      x = pixels.to_unit_range(jnp.asarray(x))
    batch = {sources.LABEL: jax.device_put(np.asarray(label, np.int32)[rows], where)}
    key = None if key is None else jax.device_put(key, everywhere)
    seen = jax.device_get(compiled(read, batch, jax.device_put(x, where), key))
    return {name: value[: len(image)] for name, value in seen.items()}

  return observe


class Drawer:
  """Draws the images of an experiment by index, or what they start from; uint8, on the host.

  Where what a sample starts from comes from: what is `given`, with one row per index, by the caller or by the
  stages that feed this one (`run.trained`); else what the stage draws; else what it observes of the images of
  `source`, in order. One compiled program of the networks serves every call of the same size, whatever the
  seed, and whatever of it is given and what is drawn: a small one before it draws.

  Args:
    experiment: that draws.
    mesh: the devices.
    seed: of the images, where a call names none.
    image_shape: of the data, (height, width, channels).
    source: opens the images to observe; not called where all can be drawn.
    about: the stage and how it draws, for messages.
  """

  def __init__(
    self,
    experiment: Experiment,
    mesh: Mesh,
    seed: int,
    image_shape: tuple[int, int, int],
    source: Callable[[], sources.Source],
    about: str = '',
  ):
    self._experiment, self._mesh, self._seed = experiment, mesh, seed
    self._image_shape, self._source, self._about = image_shape, source, about
    self._begin = jax.jit(starter(experiment), out_shardings=sharding.batch_sharding(mesh))
    # every process gets all images: they are small beside what made them
    self._finish = jax.jit(finisher(experiment), out_shardings=sharding.replicated(mesh))
    self._gather = jax.jit(lambda tree: tree, out_shardings=sharding.replicated(mesh))
    self._observe = make_observe(experiment, mesh)
    self._needed: set[str] | None = None

  def __call__(
    self,
    read: Read,
    indices: np.ndarray,
    given: HostArrays | None = None,
    seed: int | None = None,
    *,
    handed: bool = False,
    candidate: int | None = None,
  ) -> HostArrays:
    """Returns the images with these indices by name; what an image was made from comes before it.

    Args:
      read: the networks, and all that the experiment reads.
      indices: of the images.
      given: of what they start from, a row per index.
      seed: of the images; None = that of the object.
      handed: with what the stage hands to others, before its images.
      candidate: the images of that number for each index, which differ from those without.

    Raises:
      NotFinite: where an image is not.
    """
    seed, count = self._seed if seed is None else seed, len(indices)
    given = self._with_observed(read, indices, given or {})
    result, finite = jax.device_get(self._finish(read, *self._begun(read, indices, given, seed, candidate)))
    distributed.beat('a batch of images')
    check_finite(finite[:count], indices, seed, self._about)
    # jit sorts the names; what an image was made from comes before it
    others = self._experiment.handed
    names = sorted(result, key=lambda name: (name not in others, name == 'x0', name))
    names = names if handed else [name for name in names if name not in others]
    return {name: result[name][:count] for name in names}

  def start(self, read: Read, indices: np.ndarray, seed: int, candidate: int | None = None) -> HostArrays:
    """Returns what the images with these indices start from as far as it is drawn: a row of each per index.

    It is made by the program that a call runs first, so it has the very bits that the images are made of.
    """
    begun, _ = self._begun(read, indices, {}, seed, candidate)
    found = jax.device_get(self._gather(begun))
    return {name: value[: len(indices)] for name, value in found.items()}

  def _begun(
    self, read: Read, indices: np.ndarray, given: HostArrays, seed: int, candidate: int | None
  ) -> tuple[dict[str, jax.Array], SampleKeys]:
    """Returns what samples start from and their keys, on the devices; the last row pads them."""
    where, count = sharding.batch_sharding(self._mesh), len(indices)
    rows = np.minimum(np.arange(sharding.round_up(count, self._mesh)), count - 1)
    given = {name: jax.device_put(np.asarray(value)[rows], where) for name, value in given.items()}
    chosen = jax.device_put(np.asarray(indices, np.int32)[rows], where)
    numbers = [np.int32(number) for number in (seed, candidate) if number is not None]
    numbers = jax.device_put(numbers, sharding.replicated(self._mesh))
    return self._begin(read, chosen, given, *numbers)

  def _with_observed(self, read: Read, indices: np.ndarray, given: HostArrays) -> HostArrays:
    """Returns what is given with what only an image can give, observed of the images of the source."""
    if self._needed is None:
      self._needed = observed_alone(self._experiment, read, self._image_shape)
    missing = self._needed - given.keys()
    if not missing:
      return given
    images_seen = self._source()
    batch = images_seen.read(indices % len(images_seen))
    seen = self._observe(read, batch[sources.IMAGE], batch[sources.LABEL])
    return {**given, **{name: seen[name] for name in missing}}


def check_limits(given: HostArrays, limits: Mapping[str, tuple[float, float]]) -> None:
  """Raises UserError for numbers that are given and lie outside of their limits, or are none."""
  for name in given.keys() & limits.keys():
    (low, high), found = limits[name], np.asarray(given[name])
    if not ((found >= low) & (found <= high)).all():
      raise UserError(
        f'{name} must be numbers in [{low:g}, {high:g}], got {found.min():g} to {found.max():g}: scale what '
        'is given, as pixels by 1 / 255'
      )


def check_finite(finite: np.ndarray, indices: np.ndarray, seed: int, about: str) -> None:
  """Raises NotFinite when images that were drawn hold nan or infinity.

  Args:
    finite: of each image, whether all its numbers are finite.
    indices: the images.
    seed: that they were drawn with.
    about: the stage and how it draws.

  Raises:
    NotFinite: names the stage, how many are not, the first of them, and what to do.
  """
  bad = np.flatnonzero(~np.asarray(finite))
  if not len(bad):
    return
  raise NotFinite(
    f'{about or "the stage"}: {len(bad)} of the {len(finite)} images drawn at once are not finite, the first '
    f'is image {indices[bad[0]]} of seed {seed}. They are not written: nan would be black. Either the '
    "training has diverged (take a checkpoint from before: sample.checkpoint = 'best', or a step that is "
    'kept, as 8000; or train anew with a lower optim.learning_rate or optim.clip_norm), or these settings of '
    'the sampler do not suit it (another sample.sampler, more sample.num_steps, a lower '
    'sample.guidance_weight)'
  )


def observed_alone(experiment: Experiment, read: Read, image_shape: tuple[int, int, int]) -> set[str]:
  """Returns the names of what a sample needs and only an image can give: observed, but not drawn."""
  x = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  numbers = jax.ShapeDtypeStruct((1,), jnp.int32)
  keys = jax.eval_shape(lambda: image_keys(0, jnp.arange(1)))
  drawn = jax.eval_shape(experiment.draw, read, keys, numbers)
  observed = jax.eval_shape(lambda *args: experiment.observe(*args), read, {sources.LABEL: numbers}, x)
  return set(observed) - set(drawn)


def batches(count: int, batch_size: int) -> Iterator[np.ndarray]:
  """Yields the indices 0 .. count - 1 in batches of one size; the last is padded by its own last index."""
  for start in range(0, count, batch_size):
    yield np.minimum(np.arange(start, start + batch_size), count - 1)


def padded_batches(count: int, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
  """Yields the indices of every batch of `batches`, and how many of them, from the first, are no padding."""
  for indices in batches(count, batch_size):
    yield indices, min(batch_size, count - int(indices[0]))


def own_image(drawn: Mapping[str, T]) -> T:
  """Returns the stage's own image of what it draws: the last, after those that it is made from, as `x0_vae`.

  Args:
    drawn: by name, in the order in which a stage draws them; there is at least one.
  """
  return drawn[list(drawn)[-1]]


def as_grid(value: np.ndarray) -> np.ndarray:
  """Returns a roughly square grid of uint8 images."""
  return images.grid(value, int(np.ceil(np.sqrt(len(value)))))
