import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest

from vaediff.data import shapes, words
from vaediff.errors import UserError
from vaediff.storage.files import Damaged

pytest.importorskip('sentencepiece')
NAMES = [
  'grinning face', 'hugging face', 'waving hand, dark skin tone', 'waving hand, light skin tone',
  'flag: São Tomé', 'keycap: *', 'oncoming fist, medium skin tone', 'red heart', 'dark sky', 'light bulb',
] * 3  # fmt: skip


def captions(split='train', count=2000):
  return [shapes.scene(split, index).caption for index in range(count)]


@pytest.fixture(scope='module')
def word():
  return words.train(captions(), 'word', 64)


@pytest.fixture(scope='module')
def subword():
  return words.train(NAMES, 'subword', 400)


def test_the_words_of_shapes_are_all_that_there_are(word):
  expected = {'a', 'an', 'at', 'the', 'on', 'background'}
  expected |= {each for names in shapes.NAMES for name in names for each in name.split()}
  assert set(word.words) == expected and len(word.vocab) == 4 + 32
  assert [word.vocab[i] for i in (words.PAD, words.UNKNOWN, words.BOS, words.EOS)] == [
    '<pad>',
    '<unk>',
    '<s>',
    '</s>',
  ]


def test_every_caption_of_every_split_is_known(word):
  for split in shapes.COUNTS:
    tokens = word.encode(captions(split, 300), 16)
    assert tokens.dtype == np.int32 and not (tokens == words.UNKNOWN).any()
  attributes = (5, 0, 0, 0, 0)
  whole = [sorted(row) for row in word.encode([shapes.in_words(attributes, k) for k in range(3)], 14)]
  assert whole[0] == whole[1] == whole[2]  # the same words in another order


def test_a_caption_is_begin_words_end_and_padding(word):
  tokens = word.encode(['a red ring', '', 'A  RED, ring!'], 7)
  numbers = [word.vocab.index(f' {each}') for each in ('a', 'red', 'ring')]
  row = [words.BOS, *numbers, words.EOS, words.PAD, words.PAD]
  np.testing.assert_array_equal(tokens, [row, [words.BOS, words.EOS, *[words.PAD] * 5], row])
  assert word.decode(tokens) == ['a red ring', '', 'a red ring']
  assert word.encode([], 7).shape == (0, 7)


def test_unknown_words_are_refused_with_the_vocabulary(word):
  with pytest.raises(UserError) as error:
    word.encode(['a red ring', 'a puce ringlet'], 9, 'config.refiner.sample.captions')
  text = str(error.value)
  assert "config.refiner.sample.captions: 'a puce ringlet' has 'puce', 'ringlet'" in text
  assert all(known in text for known in word.words)


def test_longer_captions_are_refused_and_never_cut(word):
  assert word.encode(['a small red ring'], 6)[0, -1] == words.EOS
  with pytest.raises(
    UserError, match="'a small red ring' has 6 tokens.*length of the text is 5.*text.length = 6"
  ):
    word.encode(['a small red ring'], 5)


def test_pieces_of_words_tell_any_text(subword):
  texts = ['dark skin tone', 'São Tomé', 'é 猫 🙂', 'zebra']
  tokens = subword.encode(texts, 40)
  assert not (tokens == words.UNKNOWN).any()
  assert subword.decode(tokens) == [text.casefold() for text in texts]
  assert (tokens[0] >= words.NUM_SPECIAL).sum() < (tokens[3] >= words.NUM_SPECIAL).sum() + 3
  assert 'face' in subword.words and len(subword.vocab) <= 400


CODE = """
import sys
sys.path.insert(0, {tests!r})
from vaediff.data import shapes, words
names = {names!r}
found = [words.train([shapes.scene('train', i).caption for i in range(2000)], 'word', 64)]
found.append(words.train(names, 'subword', 400))
print(*(each.digest for each in found))
"""


def test_another_process_makes_the_same_bytes(word, subword):
  code = CODE.format(tests='.', names=NAMES)
  made = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True, timeout=60)
  assert made.stdout.split() == [word.digest, subword.digest]
  assert word.digest == hashlib.sha256(b'word' + word.model).hexdigest()
  assert words.train(captions(), 'word', 1000).digest == word.digest  # no room makes no other words
  assert words.train(captions()[:100], 'word', 64).made_of != word.made_of


@pytest.mark.parametrize(
  ('texts', 'kind', 'size', 'message'),
  [
    ([], 'word', 64, 'they have no word'),
    (['', ' ,'], 'word', 64, 'they have no word'),
    (['a red ring', 'a blue ring'], 'word', 7, 'text.vocab_size is 7, .* about 8 words.*subword'),
    (['a red ring'], 'subword', 100, 'text.vocab_size = 100 .*raise it'),
    (['a' * 70_000], 'word', 64, 'longer than 65536 bytes'),
  ],
)
def test_what_no_tokenizer_is_made_of(texts, kind, size, message):
  with pytest.raises(UserError, match=message):
    words.train(texts, kind, size)


def test_it_is_stored_with_its_hash(word, tmp_path):
  path = tmp_path / 'tokenizer.json'
  words.save(word, path)
  assert words.load(path) == word and json.loads(path.read_text())['sha256'] == word.digest
  with pytest.raises(UserError, match='does not exist'):
    words.load(tmp_path / 'none.json')


@pytest.mark.parametrize(
  'change', [{'kind': 'subword'}, {'model': 'AAAA'}, {'model': '?'}, {'sha256': 'x'}, {'vocab': []}]
)
def test_a_changed_file_is_noticed(word, tmp_path, change):
  path = tmp_path / 'tokenizer.json'
  words.save(word, path)
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(Damaged, match='tokenizer.json is damaged'):
    words.load(path)


def test_without_the_library_it_says_what_to_install(word, monkeypatch):
  monkeypatch.setitem(sys.modules, 'sentencepiece', None)
  with pytest.raises(UserError, match=r"pip install -e '\.\[text\]'"):
    words.train(captions(), 'word', 64)
