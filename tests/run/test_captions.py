"""The captions of a stage: where its tokenizer is, which captions samples have, what is refused."""

import importlib
import json
import pathlib
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from vaediff import reads
from vaediff.data import sources, words
from vaediff.errors import UserError
from vaediff.modes import train
from vaediff.run import captions, checkpoint, draw, students
from vaediff.run.trained import Trained
from vaediff.storage import identity

pytest.importorskip('sentencepiece')
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
DISC = 'a disc of hue three on gray'


@pytest.fixture
def config(tmp_path):
  config = importlib.import_module('configs.shapes16').get_config('text,debug')
  config.data.data_dir = str(tmp_path / 'data')
  return config


@pytest.fixture
def folder(tmp_path):
  return tmp_path / 'run' / 'refiner'


def source_of(config, length=32):
  return reads.Captions(stage='refiner', workdir='', length=length, vocab_size=64)


def test_the_tokenizer_is_made_of_the_training_captions_and_kept(config, folder):
  source = sources.open_source(config.data, 'train')
  made = captions.tokenizer_of(config, 'refiner', folder)
  assert made == words.train(source.captions, 'word', 64) and made.made_of == source.captions_digest
  assert words.load(folder / captions.FILE) == made
  config.data.caption_feature = ''  # what is stored needs no captions
  assert captions.tokenizer_of(config, 'refiner', folder) == made


def test_before_the_first_checkpoint_it_is_that_of_the_settings_and_captions_of_now(
  config, folder, monkeypatch
):
  """What was refused may have been these: the next start must not go on with them."""
  of_captions = sources.open_source(config.data, 'train').captions
  sizes = {'word': (64, 48), 'subword': (300, 290)}
  for kind in ('word', 'subword', 'word'):
    for size in sizes[kind]:
      config.refiner.text.update({'kind': kind, 'vocab_size': size})
      made = captions.tokenizer_of(config, 'refiner', folder)
      assert made == words.train(of_captions, kind, size)
      assert words.load(folder / captions.FILE) == made
  other = words.train(('a square', 'on gray, a disc of hue three'), 'word', 48)
  words.save(other, folder / captions.FILE)
  assert captions.tokenizer_of(config, 'refiner', folder) == made
  words.save(other, folder / captions.FILE)  # beside a checkpoint that does not say which it was trained with
  monkeypatch.setattr(checkpoint, 'latest_step', lambda folder: 4)
  monkeypatch.setattr(checkpoint, 'load_meta', lambda folder: {})
  assert captions.tokenizer_of(config, 'refiner', folder) == other


def test_the_library_is_looked_for_before_anything_is_trained(config, monkeypatch):
  captions.check_installed(config, config.stages)
  monkeypatch.setitem(sys.modules, 'sentencepiece', None)
  with pytest.raises(UserError, match=r"stage 'refiner' reads captions, .*pip install -e '\.\[text\]'"):
    captions.check_installed(config, config.stages)
  captions.check_installed(config, ())


@pytest.mark.parametrize('variant', ['text', 'text,consistency', 'text,control', 'unclip'])
def test_a_stage_knows_words_by_the_ids_of_the_one_that_it_follows(variant, tmp_path):
  """Of another run, or of this one trained elsewhere: another sentencepiece may number them anew."""
  config = importlib.import_module('configs.shapes16').get_config(f'{variant},debug')
  config.data.data_dir = str(tmp_path / 'data')
  students.resolve(config)
  stage = config.stages[-1]
  first = 'clip' if variant == 'unclip' else 'refiner'
  text = config[stage].text
  other = words.train(('a square', 'on gray, a disc of hue three'), text.kind, text.vocab_size)
  words.save(other, tmp_path / 'first' / first / captions.FILE)
  named = config[stage]
  named = (
    named.conditions.clip_image
    if first == 'clip'
    else next(named[name] for name in ('teacher', 'base', 'start') if name in named)
  )
  with config.unlocked():
    named.workdir = str(tmp_path / 'first')
  assert captions.tokenizer_of(config, stage, tmp_path / 'run' / stage) == other
  if stage != first:
    with config.unlocked():
      named.workdir = ''
    words.save(other, tmp_path / 'second' / first / captions.FILE)
    assert captions.tokenizer_of(config, stage, tmp_path / 'second' / stage) == other
  with config.unlocked():
    config[stage].text.vocab_size = len(other.vocab) - 1
    named.workdir = str(tmp_path / 'first')
  with pytest.raises(UserError, match=rf'config.{stage}.text has kind .* are to be read by .*first'):
    captions.tokenizer_of(config, stage, tmp_path / 'third' / stage)


def test_a_stage_without_captions_is_left_alone(folder):
  config = importlib.import_module('configs.shapes16').get_config('debug')
  source = sources.open_source(config.data, 'train')
  assert captions.tokenizer_of(config, 'refiner', folder) is None and not folder.exists()
  assert captions.with_tokens(config, 'refiner', folder, source) is source
  assert captions.asked(config, 'refiner') == () and captions.length_of(config, 'refiner') == 0


def test_samples_have_the_captions_that_are_asked_for_or_those_of_the_evaluation_split(config, folder):
  of_split = sources.open_source(config.data, 'eval').captions
  table = lambda **options: captions.table(source_of(config), config, folder.parent, **options)[words.TOKENS]
  tokenizer = captions.tokenizer_of(config, 'refiner', folder)
  assert captions.asked(config, 'refiner') == of_split and len(of_split) == 64
  np.testing.assert_array_equal(table(), tokenizer.encode(of_split, 32))
  config.refiner.sample.captions = (DISC, 'gray')
  assert tokenizer.decode(table()) == [DISC, 'gray'] and captions.asked(config, 'refiner') == (DISC, 'gray')
  np.testing.assert_array_equal(table(training=True), tokenizer.encode(of_split, 32))


def test_an_unknown_word_names_the_field_and_the_words(config, folder):
  config.refiner.sample.captions = ('a ring of hue three',)
  with pytest.raises(
    UserError, match=r"config.refiner.sample.captions: .* has 'ring', .*known words are a, disc, eight"
  ):
    captions.table(source_of(config), config, folder.parent)
  config.refiner.sample.captions = (DISC,)
  with pytest.raises(UserError, match=f"config.refiner.sample.captions: '{DISC}' has 9 tokens"):
    captions.table(source_of(config, length=8), config, folder.parent)


def test_data_without_captions_are_refused(config, folder):
  config.data.caption_feature = ''
  with pytest.raises(UserError, match="stage 'refiner' reads captions.*set data.caption_feature"):
    captions.tokenizer_of(config, 'refiner', folder)


def test_left_and_right_are_not_mirrored(config):
  source = sources.open_source(config.data, 'train')
  config.refiner.train.flip = True
  captions.check_training(config, 'refiner', source)  # discs have no side
  told = sources.ArraySource(
    images=source.images[:1],
    labels=source.labels[:1],
    label_names=(),
    num_classes=10,
    captions=('a ring, Left',),
  )
  with pytest.raises(UserError, match="config.refiner.train.flip is on, .* 'a ring, Left'.*Set it to False"):
    captions.check_training(config, 'refiner', told)
  config.refiner.train.flip = False
  captions.check_training(config, 'refiner', told)


def keys_of(indices):
  return draw.image_keys(0, jnp.asarray(indices)), jnp.asarray(indices)


@pytest.mark.slow
def test_a_trained_stage_keeps_its_tokenizer(config, folder, one_device):
  """Its checkpoint knows the digest; pictures have captions in turn; another tokenizer is refused."""
  config.refiner.train.update({'num_steps': 2, 'grid_every_steps': 0})
  workdir = folder.parent
  train.run_stages(config, workdir, config.stages)
  digest = words.load(folder / captions.FILE).digest
  assert checkpoint.load_meta(folder)[captions.DIGEST] == digest
  mesh = train.sharding.make_mesh(config.mesh)
  opened = Trained(config, workdir, 'refiner', mesh)
  assert opened.captions == sources.open_source(config.data, 'eval').captions
  assert words.TOKENS in opened.eval_source.read(np.arange(2))

  asked = opened.with_settings(captions=('gray', DISC))
  indices = np.arange(4)
  found = asked.draw(indices)['x0']
  told = opened.draw(indices, opened.caption_inputs(['gray', DISC] * 2))['x0']
  assert np.abs(found.astype(int) - told).max() <= 1  # two programs; of two updates captions change little
  drawn = [
    np.asarray(one.experiment.draw(one.read, *keys_of(indices))[words.TOKENS]) for one in (opened, asked)
  ]
  tokenizer = words.load(folder / captions.FILE)
  assert tokenizer.decode(drawn[1]) == ['gray', DISC] * 2
  assert tokenizer.decode(drawn[0]) == list(opened.captions[:4]) and asked.made_of != opened.made_of
  with pytest.raises(UserError, match=r'config.refiner.sample.captions: .*known words are'):
    opened.with_settings(captions=('a ring',))

  (folder / captions.FILE).unlink()  # it is made again of the same captions
  assert captions.tokenizer_of(config, 'refiner', folder).digest == digest
  words.save(words.train(['gray disc'], 'word', 64), folder / captions.FILE)
  with pytest.raises(identity.Stale, match='the checkpoint of .* was made of the tokenizer .*Put back'):
    Trained(config, workdir, 'refiner', mesh)
  stored = json.loads((folder / captions.FILE).read_text()) | {'kind': 'subword'}
  (folder / captions.FILE).write_text(json.dumps(stored))
  with pytest.raises(UserError, match='tokenizer.json is damaged.*remove it'):
    Trained(config, workdir, 'refiner', mesh)
