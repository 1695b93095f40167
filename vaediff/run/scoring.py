"""How well captions fit images by a CLIP stage of our own, `clip_own`; the best of several samples.

`clip_own` is the cosine of two vectors of that stage. It is no CLIP score: that is of published weights.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8
from ml_collections import ConfigDict

from vaediff import reads
from vaediff.data import pixels, words
from vaediff.errors import UserError
from vaediff.machine import sharding
from vaediff.run import captions, checkpoint, draw, opened, same_run
from vaediff.run.draw import HostArrays
from vaediff.storage import identity

CLIP_OWN = 'clip_own'
"""What the cosine is called, everywhere."""


class Scorer:
  """Makes vectors of images and captions by a CLIP stage.

  Args:
    trained: the stage, `run.trained.Trained`, which imports this module.
  """

  def __init__(self, trained: Any):
    self._read, self._mesh = trained.read, trained.mesh
    self._batch_size = sharding.round_up(trained.settings.batch_size, trained.mesh)
    self._length = captions.length_of(trained.config, trained.stage)
    everywhere = sharding.replicated(trained.mesh)
    experiment = trained.experiment
    self._images = jax.jit(
      lambda read, image: experiment.images(read, pixels.to_unit_range(image)), out_shardings=everywhere
    )
    self._texts = jax.jit(experiment.texts, out_shardings=everywhere)

  def images(self, image: UInt8[np.ndarray, 'n h w c']) -> Float[np.ndarray, 'n d']:
    """Returns vectors of length 1, one per image."""
    return self._of(self._images, image)

  def texts(self, tokens: Int[np.ndarray, 'n words']) -> Float[np.ndarray, 'n d']:
    """Returns vectors of length 1, one per caption; raises UserError for one that is too long."""
    return self._of(self._texts, fitted(tokens, self._length))

  def cosines(
    self, image: UInt8[np.ndarray, 'n h w c'], texts: Float[np.ndarray, 'n d']
  ) -> Float[np.ndarray, ' n']:
    """Returns `clip_own` of each image and the caption of the same row, as a vector, in [-1, 1]."""
    return np.sum(self.images(image) * texts, axis=1)

  def _of(self, compiled: Callable[..., jax.Array], rows: np.ndarray) -> np.ndarray:
    where, parts = sharding.batch_sharding(self._mesh), []
    for indices, num_real in draw.padded_batches(len(rows), self._batch_size):
      found = jax.device_get(compiled(self._read, jax.device_put(jnp.asarray(rows[indices]), where)))
      parts.append(np.asarray(found)[:num_real])
    return np.concatenate(parts)


def fitted(tokens: Int[np.ndarray, 'n words'], length: int) -> Int[np.ndarray, 'n length']:
  """Returns captions with as much padding as makes them so long; raises UserError where one is longer."""
  if (np.asarray(tokens)[:, length:] != words.PAD).any():
    longest = int((np.asarray(tokens) != words.PAD).sum(axis=1).max())
    raise UserError(
      f'a caption has {longest} tokens, its beginning and end counted, and the CLIP stage reads {length} '
      '(its text.length): train one that reads longer ones'
    )
  more = max(0, length - tokens.shape[1])
  return np.pad(np.asarray(tokens)[:, :length], ((0, 0), (0, more)), constant_values=words.PAD)


def candidates_of(settings: ConfigDict) -> int:
  """Returns how many samples are drawn of each that is kept, by a section `sample`; 1 = none is ranked."""
  return settings.rerank.candidates if 'rerank' in settings and settings.rerank.stage else 1


def unranked(asker: Any) -> Any:
  """Returns a stage, `run.trained.Trained`, each of whose samples is the only one that is drawn."""
  return asker.with_settings(rerank={'stage': ''}) if candidates_of(asker.settings) > 1 else asker


def open_scorer(asker: Any, named: ConfigDict, field: str) -> Scorer:
  """Returns what scores the samples of a stage.

  Args:
    asker: the stage whose samples are scored, `run.trained.Trained`.
    named: `stage` and `workdir` of the CLIP stage.
    field: what names it, for messages.

  Raises:
    UserError: where it is no trained CLIP stage, or is one of images of another size, or the samples have no
      captions.
    Stale: where it knows words by other numbers.
  """
  folder = reads.workdir_of(named, asker.workdir)
  if asker.caption_stage is None:
    raise UserError(
      f'{field}.stage is {named.stage!r}, and samples of the stage {asker.stage!r} have no captions to be '
      'compared with. Set it to an empty text, or sample a stage that reads captions'
    )
  if checkpoint.latest_step(folder / named.stage) is None:
    raise UserError(
      f'{field} names the stage {named.stage!r} of {folder}, where no such stage is trained: train it first '
      f'(variant clip), or name the run that has it as {field}.workdir'
    )
  config = same_run.stored_config(folder / named.stage) if named.workdir else asker.config
  reads.need_stage(config, named.stage, 'clip', f'{field}.stage', 'CLIP stage')
  size = asker.config.data.image_size // asker.experiment.image_factor
  own, drawn = ((config.data.image_size, config.data.channels), (size, asker.config.data.channels))
  if own != drawn:
    raise UserError(
      f'{field} names a CLIP stage of images with {own[0]} pixels a side and {own[1]} channels, but samples '
      f'of the stage {asker.stage!r} have {drawn[0]} and {drawn[1]}'
    )
  clip = type(asker)(config, folder, named.stage, asker.mesh)
  check_tokenizer(asker.caption_stage, clip)
  return Scorer(clip)


def check_tokenizer(reader: Any, clip: Any) -> None:
  """Raises Stale where a stage that reads captions and a CLIP stage know words by other numbers."""
  ours, theirs = (
    captions.tokenizer_of(one.config, one.stage, one.workdir / one.stage).digest for one in (reader, clip)
  )
  identity.compare(
    f'the CLIP stage {clip.stage!r} of {clip.workdir}',
    {'the tokenizer': theirs},
    {'the tokenizer': ours},
    f'Train it on the captions of the stage {reader.stage!r}, with the same section `text`',
  )


def made_of(asker: Any) -> dict[str, str]:
  """Returns the id of the CLIP stage that ranks the samples of a stage; {} where none does."""
  if candidates_of(asker.settings) == 1:
    return {}
  named = asker.settings.rerank
  folder = reads.workdir_of(named, asker.workdir)
  config = same_run.stored_config(folder / named.stage) if named.workdir else asker.config
  choice = config[named.stage].sample.checkpoint
  return {f'the CLIP stage {named.stage!r}': opened.id_of(folder / named.stage, choice)}


def tokens_of(asker: Any, indices: np.ndarray, given: HostArrays) -> Int[np.ndarray, 'n words']:
  """Returns the captions, as ids, that samples with these indices have: those given, or those in turn."""
  if words.TOKENS in given:
    return np.asarray(given[words.TOKENS])
  known = np.asarray(asker.caption_stage.read[reads.CAPTIONS][words.TOKENS])
  return known[indices % len(known)]


def best_of(
  candidate: Callable[[int], HostArrays], score: Callable[[np.ndarray], np.ndarray], count: int
) -> HostArrays:
  """Returns, of each row, the candidate with the largest score; of equal ones the first.

  Args:
    candidate: number -> images by name; the last of them is scored, and the others go with it.
    score: images -> a number per row.
    count: of candidates.
  """
  kept = candidate(0)
  best = score(draw.own_image(kept))
  for number in range(1, count):
    drawn = candidate(number)
    found = score(draw.own_image(drawn))
    better = found > best
    best = np.where(better, found, best)
    for name, value in drawn.items():
      kept[name] = np.where(better.reshape(-1, *[1] * (value.ndim - 1)), value, kept[name])
  return kept
