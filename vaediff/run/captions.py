"""Captions of a stage as numbers: its tokenizer, the captions of the data, those that samples are asked for.

A stage reads captions where its section has a part `text`: `kind`, `vocab_size` and `length`. Its tokenizer
is trained on the captions of the training split before its first step, and kept beside its checkpoints, which
know its digest. The same captions and settings give the same tokenizer in every stage and run, by one version
of sentencepiece. A stage that begins as a network, is taught by one, controls one, or reads the vectors of a
CLIP stage, takes over the tokenizer of that one.
"""

import pathlib
import re
from collections.abc import Iterable

import jax
import numpy as np
from ml_collections import ConfigDict

from vaediff import reads
from vaediff.data import sources, words
from vaediff.errors import UserError
from vaediff.machine import distributed
from vaediff.run import checkpoint, log
from vaediff.storage import identity

FILE = 'tokenizer.json'
TEXT = 'text'
"""The part of a stage's section that makes it one that reads captions."""
DIGEST = 'tokenizer'
"""In the `meta` of a checkpoint: the digest of the tokenizer that it was trained with."""
LEADERS = ('start', 'teacher', 'base', 'clip')
"""Parts of a section that name another stage, whose words this one must know by its ids."""
MOST_DRAWN = 4096
"""Captions of the evaluation split that samples have in turn."""


def settings_of(config: ConfigDict, stage: str) -> ConfigDict | None:
  """Returns the part of a stage's section that is about its captions; None where it reads none."""
  return config[stage][TEXT] if TEXT in config[stage] else None


def check_installed(config: ConfigDict, stages: Iterable[str]) -> None:
  """Raises UserError where one of the stages reads captions and there is no library of tokenizers."""
  for stage in stages:
    if settings_of(config, stage) is not None:
      words.need_library(f'stage {stage!r} reads captions')


def length_of(config: ConfigDict, stage: str) -> int:
  """Returns how many tokens a caption of a stage has; 0 where it reads none."""
  settings = settings_of(config, stage)
  return 0 if settings is None else settings.length


def tokenizer_of(config: ConfigDict, stage: str, folder: pathlib.Path) -> words.Tokenizer | None:
  """Returns the tokenizer of a stage, made first where it is not there; None where it reads no captions.

  Before the first checkpoint it is made anew where it is of other settings or captions than the config's.

  Args:
    config: of the run.
    stage: its name.
    folder: `<workdir>/<stage>`.

  Raises:
    UserError: when the images have no captions, or the file cannot be read.
    Stale: when it is not the one that the stage's checkpoint was trained with.
  """
  settings = settings_of(config, stage)
  if settings is None:
    return None
  path, trained_with = folder / FILE, _digest_of(folder)
  found = words.load(path, 'remove it: it is made again') if distributed.agree(path.exists()) else None
  taken = None if trained_with else _taken_over(config, stage, path)
  kept = found
  if taken is not None and (found is None or found.digest != taken.digest):
    found = taken  # also over one of a training that ended before its first checkpoint
    log.say(f'{stage}: the {len(found.vocab)} numbers of captions are those of the stage it follows: {path}')
  elif found is None or (checkpoint.latest_step(folder) is None and not _is_of(found, config, stage)):
    found = _made(config, stage, path)
  if found is not kept:
    if jax.process_index() == 0:
      words.save(found, path)
    distributed.wait_for_all(f'wrote {path}')
  identity.compare(
    f'the checkpoint of {folder}',
    {'the tokenizer': trained_with or found.digest},
    {'the tokenizer': found.digest},
    f'Put back {path}, or train anew in another --workdir',
  )
  return found


def _taken_over(config: ConfigDict, stage: str, path: pathlib.Path) -> words.Tokenizer | None:
  """Returns the tokenizer of the stage that one follows, to be kept at `path`; None where it follows none.

  Raises:
    UserError: when it is of another kind, has more ids than the stage's table has rows, or is lost.
  """
  settings = settings_of(config, stage)
  for leader in _leaders(config[stage]):
    workdir = reads.workdir_of(leader, path.parents[1])
    taken = workdir / leader.stage / FILE
    if taken == path or not distributed.agree(taken.exists() or bool(_digest_of(taken.parent))):
      continue
    found = words.load(taken, 'put it back: the stage there was trained with it')
    if found.kind != settings.kind or len(found.vocab) > settings.vocab_size:
      raise UserError(
        f'config.{stage}.text has kind {settings.kind!r} and vocab_size {settings.vocab_size}, but its '
        f'captions are to be read by {taken}, of kind {found.kind!r} with {len(found.vocab)} ids: set '
        f'text.kind to {found.kind!r}, and text.vocab_size to that of the stage there'
      )
    return found
  return None


def _is_of(found: words.Tokenizer, config: ConfigDict, stage: str) -> bool:
  """Returns whether a tokenizer is the one that `_made` makes, of a training that left no checkpoint behind.

  Another would be of other settings or captions, which may have been what ended that training. One of pieces
  that has fewer numbers than it may have is made again, to see; where there are no captions any is right.
  """
  settings, count = settings_of(config, stage), len(found.vocab)
  made_of = sources.open_source(config.data, 'train').captions_digest
  sizes = (settings.vocab_size,) if found.kind == words.SUBWORD else range(settings.vocab_size + 1)
  return found.kind == settings.kind and count in sizes and made_of in ('', found.made_of)


def _made(config: ConfigDict, stage: str, path: pathlib.Path) -> words.Tokenizer:
  """Returns a tokenizer of the training captions, which is to be kept at `path`."""
  settings, source = settings_of(config, stage), sources.open_source(config.data, 'train')
  need_captions(source, stage)
  found = words.train(source.captions, settings.kind, settings.vocab_size)
  log.say(f'{stage}: {len(found.vocab)} numbers for the captions of {len(source)} training images: {path}')
  return found


def _leaders(section: ConfigDict) -> list[ConfigDict]:
  """Returns the parts of a section that name a stage whose tokenizer it takes over, where it has one."""
  named = [section[name] for name in LEADERS if name in section]
  named += section.conditions.values() if 'conditions' in section else ()
  named = [leader for leader in named if {'stage', 'workdir'} <= set(leader)]
  fresh = [section.start] if 'start' in section and not section.start.workdir else []
  return [leader for leader in named if leader not in fresh]


def _digest_of(folder: pathlib.Path) -> str:
  """Returns the digest of the tokenizer that a stage was trained with; '' where it is not trained."""
  if checkpoint.latest_step(folder) is None:
    return ''
  meta = checkpoint.load_meta(folder)
  return meta[DIGEST] if DIGEST in meta else ''


def with_tokens(
  config: ConfigDict, stage: str, folder: pathlib.Path, source: sources.Source
) -> sources.Source:
  """Returns images whose batches have their captions as the stage reads them; as they are for other stages.

  Raises:
    UserError: when there are none, or one cannot be told in its tokens.
  """
  tokenizer = tokenizer_of(config, stage, folder)
  if tokenizer is None:
    return source
  need_captions(source, stage)
  return sources.with_tokens(source, tokenizer, length_of(config, stage))


def need_captions(source: sources.Source, stage: str) -> None:
  """Raises UserError where images have no captions."""
  if not source.captions:
    raise UserError(
      f'stage {stage!r} reads captions, and of these images none are read: set data.caption_feature to the'
      ' field that holds them, such as caption'
    )


def check_training(config: ConfigDict, stage: str, source: sources.Source) -> None:
  """Raises UserError when training mirrors images whose captions say left or right, and so would be wrong.

  Args:
    config: of the run.
    stage: its name; one that reads no captions, or does not mirror images, passes.
    source: the training images.

  Raises:
    UserError: names the field to change, and the first such caption.
  """
  if settings_of(config, stage) is None or not config[stage].train.flip:
    return
  wrong = next((text for text in source.captions if re.search(r'\b(left|right)\b', text, re.I)), None)
  if wrong is not None:
    raise UserError(
      f'config.{stage}.train.flip is on, and captions say left and right, as {wrong!r}: what is mirrored'
      ' would be told wrongly. Set it to False'
    )


def asked(config: ConfigDict, stage: str, *, training: bool = False) -> tuple[str, ...]:
  """Returns the captions that samples of a stage have, in turn; () where it reads none.

  Those of `sample.captions`, or else those of the evaluation split; while it trains the latter.
  """
  if settings_of(config, stage) is None:
    return ()
  chosen = () if training else tuple(config[stage].sample.captions)
  if chosen:
    return chosen
  source = sources.open_source(config.data, 'eval')
  need_captions(source, stage)
  return source.captions[:MOST_DRAWN]


def table(
  source: reads.Captions, config: ConfigDict, workdir: pathlib.Path, *, training: bool = False
) -> dict[str, np.ndarray]:
  """Returns `words.TOKENS`, int32 [captions, length], of those that samples of a stage have.

  Raises:
    UserError: for a caption with an unknown word, or one that is too long; names the field.
  """
  folder = reads.workdir_of(source, workdir) / source.stage
  tokenizer = tokenizer_of(config, source.stage, folder)
  chosen = not training and config[source.stage].sample.captions
  field = f'config.{source.stage}.sample.captions' if chosen else 'the captions of the evaluation split'
  captions = asked(config, source.stage, training=training)
  return {words.TOKENS: tokenizer.encode(captions, source.length, field)}
