"""Captions as numbers: a tokenizer that is trained on the captions of the training split, and stored.

Both kinds are of one library, sentencepiece: 'word' for captions of few words, where an unknown one is a
mistake and is refused; 'subword' (byte-pair encoding with the 256 bytes at its end) for any text. Training
counts whole numbers, in one thread and without sampling: the same captions give the same bytes.

A caption becomes BOS, its pieces, EOS and then PAD up to a fixed length; one that is longer is refused, never
cut. Case does not matter, nor how often a space is written, nor, to words, punctuation.
"""

import base64
import binascii
import dataclasses
import functools
import hashlib
import importlib.util
import io
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from vaediff.data import arrays
from vaediff.errors import UserError
from vaediff.storage import files, identity

TOKENS = 'tokens'
"""Name of the captions in batches, int32 [n, length]; of an input, and of a value."""
PAD, UNKNOWN, BOS, EOS = range(4)
NUM_SPECIAL, NUM_BYTES = 4, 256
WORD, SUBWORD = 'word', 'subword'
KINDS = (WORD, SUBWORD)
LONGEST = 2**16
"""Bytes of a caption that training reads."""
MAX_LISTED = 100  # Words that an error names.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
  """What turns captions into numbers.

  Attributes:
    kind: of `KINDS`.
    model: the bytes of the library's model.
    made_of: the digest of the captions that it was trained on.
  """

  kind: str
  model: bytes
  made_of: str

  @functools.cached_property
  def digest(self) -> str:
    """What it is: tokenizers of one digest give the same numbers."""
    return hashlib.sha256(self.kind.encode() + self.model).hexdigest()

  @functools.cached_property
  def vocab(self) -> tuple[str, ...]:
    """Every piece by its number; those of words begin with a space."""
    processor = self._processor
    pieces = [processor.id_to_piece(number) for number in range(processor.vocab_size())]
    return tuple(piece.replace('\u2581', ' ') for piece in pieces)

  @functools.cached_property
  def words(self) -> tuple[str, ...]:
    """What is known, without numbers that stand for no text, in alphabetical order."""
    skipped = NUM_SPECIAL + (NUM_BYTES if self.kind == SUBWORD else 0)
    return tuple(sorted(piece.strip() for piece in self.vocab[skipped:]))

  @functools.cached_property
  def _processor(self) -> Any:
    return _library().SentencePieceProcessor(model_proto=self.model)

  def encode(
    self, captions: Sequence[str], length: int, field: str = 'captions'
  ) -> Int32[np.ndarray, 'captions length']:
    """Returns captions as numbers: BOS, pieces, EOS, and PAD up to `length`.

    Args:
      captions: any number of them; of '' BOS and EOS are left.
      length: that all have.
      field: where they come from, for the message.

    Raises:
      UserError: for a word that is not known, and lists those that are; for a caption that is longer.
    """
    found = self._processor.encode([normal(caption, self.kind) for caption in captions])
    tokens = np.full((len(captions), length), PAD, np.int32)
    for row, (pieces, caption) in enumerate(zip(found, captions, strict=True)):
      if UNKNOWN in pieces:
        raise UserError(f'{field}: {self._unknown(caption)}')
      if len(pieces) + 2 > length:
        raise UserError(
          f'{field}: {caption!r} has {len(pieces) + 2} tokens, its beginning and end counted, and the'
          f' length of the text is {length}: captions are never cut. Write less, or train with text.length ='
          f' {max(map(len, found)) + 2}'
        )
      tokens[row, : len(pieces) + 2] = [BOS, *pieces, EOS]
    return tokens

  def decode(self, tokens: Int32[np.ndarray, 'captions length']) -> list[str]:
    """Returns the texts of numbers, as they were normalised."""
    return [self._processor.decode([int(i) for i in row if i >= NUM_SPECIAL]) for row in np.asarray(tokens)]

  def _unknown(self, caption: str) -> str:
    words = normal(caption, self.kind).split()
    unknown = [word for word in words if UNKNOWN in self._processor.encode(word)]
    more = f', ... ({len(self.words)} in all)' if len(self.words) > MAX_LISTED else ''
    said = ', '.join(map(repr, unknown)) or 'a word'
    return (
      f'{caption!r} has {said}, which no training caption has; known words are'
      f' {", ".join(self.words[:MAX_LISTED])}{more}. Use those: only a stage trained with text.kind ='
      f' {SUBWORD!r} takes others'
    )


def normal(caption: str, kind: str) -> str:
  """Returns a caption as the library reads it: single spaces; of words without punctuation.

  The library does the rest: compatible forms of signs are one (NFKC), and so are cases.
  """
  text = re.sub(r'[^\w\s]', ' ', caption) if kind == WORD else caption
  return ' '.join(text.split())


def train(captions: Sequence[str], kind: str, vocab_size: int) -> Tokenizer:
  """Returns a tokenizer of at most `vocab_size` numbers, of these captions.

  Raises:
    UserError: when there is no caption with a word, or `vocab_size` is too small for them.
  """
  library, made_of = _library(), arrays.digest_of_texts(captions)
  texts = [text for text in (normal(caption, kind) for caption in captions) if text]
  if not texts:
    raise UserError('a tokenizer is trained on the captions of the training split, and they have no word')
  if max(len(text.encode()) for text in texts) > LONGEST:
    raise UserError(
      f'a caption of the training split is longer than {LONGEST} bytes; leave it out, or shorten it'
    )
  model = io.BytesIO()
  options = {'model_type': 'word'} if kind == WORD else {'model_type': 'bpe', 'byte_fallback': True}
  try:
    library.SentencePieceTrainer.train(
      sentence_iterator=iter(texts),
      model_writer=model,
      vocab_size=vocab_size,
      hard_vocab_limit=False,
      pad_id=PAD,
      unk_id=UNKNOWN,
      bos_id=BOS,
      eos_id=EOS,
      normalization_rule_name='nmt_nfkc_cf',
      character_coverage=1.0,
      input_sentence_size=0,
      shuffle_input_sentence=False,
      max_sentence_length=LONGEST,
      num_threads=1,
      minloglevel=3,
      **options,
    )
  except Exception as error:  # The library has one kind of error for all.
    raise UserError(
      f'no tokenizer of text.vocab_size = {vocab_size} can be made of the training captions'
      f' ({files.reason(error)}); raise it'
    ) from error
  made = Tokenizer(kind=kind, model=model.getvalue(), made_of=made_of)
  if kind == WORD:
    _check_words(made, texts, vocab_size)
  if len(made.vocab) > vocab_size:
    raise UserError(f'text.vocab_size is {vocab_size}, and {len(made.vocab)} numbers are needed; raise it')
  return made


def _check_words(made: Tokenizer, texts: Sequence[str], vocab_size: int) -> None:
  """Raises UserError where some words of the training captions have got no number."""
  if any(UNKNOWN in pieces for pieces in made._processor.encode(list(texts))):
    count = NUM_SPECIAL + len({word for text in texts for word in text.casefold().split()})
    raise UserError(
      f'text.vocab_size is {vocab_size}, and the training captions have about {count} words, special ones'
      f' counted:'
      f' raise it, or set text.kind to {SUBWORD!r}, which knows any text'
    )


def save(tokenizer: Tokenizer, path: pathlib.Path) -> None:
  """Writes a tokenizer; raises as `files.replacing`."""
  content = {
    'kind': tokenizer.kind,
    'made_of': tokenizer.made_of,
    'sha256': tokenizer.digest,
    'vocab': list(tokenizer.vocab),
    'model': base64.b64encode(tokenizer.model).decode(),
  }
  files.write_json(path, identity.sealed(content))


def load(path: pathlib.Path, mend: str = files.REMOVE) -> Tokenizer:
  """Returns a stored tokenizer.

  Raises:
    Damaged: it was changed after it was written.
    UserError: it is not there, or cannot be read.
  """
  with files.reading(path, mend):
    content = identity.unsealed(files.read_json(path, mend))
    try:
      model = base64.b64decode(content['model'], validate=True)
    except binascii.Error as error:
      raise ValueError('its model is no base64') from error
    found = Tokenizer(kind=content['kind'], model=model, made_of=content['made_of'])
    if found.digest != content['sha256'] or found.kind not in KINDS:
      raise ValueError('its model is another than was written there')
    return found


def need_library(why: str) -> None:
  """Raises UserError where sentencepiece is not installed, which says why it is needed."""
  if importlib.util.find_spec('sentencepiece') is None:
    raise UserError(f"{why}, and captions need the package sentencepiece: pip install -e '.[text]'")


def _library() -> Any:
  """Returns sentencepiece; raises UserError where it is not installed."""
  need_library('this stage reads captions')
  import sentencepiece

  return sentencepiece
