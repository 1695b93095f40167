"""Captions through readers, cache, sources and loader."""

import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from vaediff.data import cache, loader, sources, words
from vaediff.data.sources import open_source
from vaediff.errors import UserError

pytest.importorskip('sentencepiece')


class Told(tfds.core.GeneratorBasedBuilder):
  """Images of one value each, told by its name."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    texts = {'told': tfds.features.Text(), 'all': tfds.features.Sequence(tfds.features.Text())}
    features = {'image': tfds.features.Image(shape=(8, 8, 3)), 'number': np.int64, **texts}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples(0, 20), 'test': self._generate_examples(100, 106)}

  def _generate_examples(self, first, last):
    for i in range(first, last):
      image = Image.fromarray(np.full((8, 8, 3), i, np.uint8))
      yield i, {'image': image, 'told': f'number {i}', 'all': [f'number {i}'], 'number': i}


@pytest.fixture
def captioned(make_data):
  """A TFDS set with captions, which is no set of our own."""
  data = make_data(source='tfds', name='told', caption_feature='told')
  Told(data_dir=data.data_dir, file_format='array_record').download_and_prepare()
  return data


@pytest.mark.parametrize('materialize', [True, False])
def test_any_tfds_set_with_a_text(captioned, materialize):
  captioned.materialize = materialize
  source = open_source(captioned, 'train')
  values = source.read(np.arange(20))['image'][:, 0, 0, 0].tolist()
  assert source.captions == tuple(f'number {value}' for value in values) and sorted(values) == list(range(20))
  assert open_source(captioned, 'train').captions_digest == source.captions_digest != ''


@pytest.mark.parametrize(
  ('name', 'message'),
  [('caption', 'is no feature'), ('all', 'is not one text'), ('number', 'is not one text')],
)
def test_what_is_no_caption_is_refused_with_those_that_are(captioned, name, message):
  captioned.caption_feature = name
  with pytest.raises(UserError, match=f"data.caption_feature='{name}' {message}.*; texts are told"):
    open_source(captioned, 'train')


def test_sets_without_captions_are_refused(make_slices, tmp_path):
  np.savez(tmp_path / 'a.npz', images=np.zeros((8, 8, 8, 3), np.uint8))
  data = make_slices(path=str(tmp_path / 'a.npz'), caption_feature='text')
  with pytest.raises(
    UserError, match="data.source='npz' have no captions here: .*'parquet' and 'image_folder'"
  ):
    open_source(data, 'train')


def test_they_are_stored_with_their_digest(captioned):
  source = open_source(captioned, 'train')
  (folder,) = (cache.data_root(captioned) / 'vaediff').iterdir()
  stored = json.loads((folder / 'train-captions.json').read_text())
  assert tuple(stored) == source.captions
  assert json.loads((folder / 'meta.json').read_text())['format'] == 3
  stored[3] = 'another'
  (folder / 'train-captions.json').write_text(json.dumps(stored))
  with pytest.raises(UserError, match='train-captions.json is damaged.*delete its folder'):
    open_source(captioned, 'train')
  (folder / 'train-captions.json').unlink()
  with pytest.raises(UserError, match='train-captions.json is missing; delete its folder'):
    open_source(captioned, 'train')


def test_batches_hold_them_as_tokens(captioned):
  plain = open_source(captioned, 'train')
  tokenizer = words.train(plain.captions, 'word', 64)
  source = sources.with_tokens(plain, tokenizer, 5)
  assert isinstance(source, sources.Source) and source.fingerprint == plain.fingerprint and len(source) == 20
  options = {'batch_size': 6, 'seed': 3, 'start_step': 0, 'num_threads': 0, 'prefetch': 0}
  batches = loader.train_batches(source, **options)
  for _ in range(4):
    batch = next(batches)
    texts = tokenizer.decode(batch[words.TOKENS])
    assert texts == [f'number {value}' for value in batch['image'][:, 0, 0, 0]]
    shape, dtype = sources.batch_structs(captioned, 6, 5)[words.TOKENS]
    assert batch[words.TOKENS].shape == shape and batch[words.TOKENS].dtype == dtype
  half = loader.train_batches(source, process_index=1, process_count=2, **options)
  again = loader.train_batches(source, **options)
  np.testing.assert_array_equal(next(half)[words.TOKENS], next(again)[words.TOKENS][3:])
  assert words.TOKENS not in sources.batch_structs(captioned, 6)


def test_captions_that_were_never_trained_on_are_refused(captioned):
  tokenizer = words.train(open_source(captioned, 'train').captions, 'word', 64)
  with pytest.raises(UserError, match="the captions of the images: 'number 10.' has '10.'"):
    sources.with_tokens(open_source(captioned, 'eval'), tokenizer, 5)
  captioned.caption_feature = ''
  with pytest.raises(UserError, match='these images have none: set data.caption_feature'):
    sources.with_tokens(open_source(captioned, 'train'), tokenizer, 5)


def test_synthetic_images_have_captions_of_their_class(make_data):
  source = open_source(make_data(caption_feature='any'), 'train')
  names = 'zero one two three four five six seven eight nine'.split()
  assert source.captions == tuple(f'a disc of hue {names[label]} on gray' for label in source.labels)
  assert len(set(source.captions)) == 10 and open_source(make_data(), 'train').captions == ()
