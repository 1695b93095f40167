import json

import numpy as np
import pytest
from PIL import Image
from sklearn import datasets

from vaediff.data import builders
from vaediff.data.sources import describe, open_source
from vaediff.errors import UserError


@pytest.fixture(scope='module')
def digits_dir(tmp_path_factory):
  return tmp_path_factory.mktemp('digits')


@pytest.fixture
def digits(make_data, digits_dir):
  return make_data(source='tfds', name='digits', channels=1, data_dir=str(digits_dir))


def pictures(source):
  return [image.tobytes() for image in source.images]


def test_digits_are_the_real_ones(digits):
  train, test = open_source(digits, 'train'), open_source(digits, 'eval')
  assert (len(train), len(test)) == (1500, 297)
  assert train.image_shape == (8, 8, 1) and train.label_names == tuple('0123456789')
  # Class counts of the test part of the UCI set: https://archive.ics.uci.edu/dataset/80.
  labels = np.concatenate([train.labels, test.labels])
  assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
  assert np.bincount(test.labels, minlength=10).min() > 10
  raw = datasets.load_digits()
  images = [np.rint(image * 255 / 16).astype(np.uint8).tobytes() for image in raw.images]
  expected = dict(zip(images, raw.target.tolist(), strict=True))
  stored = dict(zip(pictures(train) + pictures(test), labels.tolist(), strict=True))
  assert stored == expected


def test_digits_are_told_by_their_names(digits):
  digits.caption_feature = 'caption'
  train = open_source(digits, 'train')
  labels = train.read(np.arange(200))['label']
  known = {label: caption for label, caption in zip(labels.tolist(), train.captions, strict=False)}
  assert known[3] == 'the digit three' and len(set(train.captions)) == 10
  assert [train.captions[i] for i in range(200)] == [known[label] for label in labels.tolist()]


def test_digits_are_built_alike_again(digits, tmp_path):
  first = open_source(digits, 'train').read(np.arange(20))
  digits.data_dir = str(tmp_path / 'again')
  assert 'not there' in describe(digits)
  again = open_source(digits, 'train').read(np.arange(20))
  np.testing.assert_array_equal(again['image'], first['image'])
  np.testing.assert_array_equal(again['label'], first['label'])
  assert 'not' not in describe(digits)


def test_digits_on_the_fly_and_sliced(digits):
  stored = open_source(digits, 'train').read(np.arange(30))
  digits.materialize = False
  decoded = open_source(digits, 'train').read(np.arange(30))
  np.testing.assert_array_equal(decoded['image'], stored['image'])
  np.testing.assert_array_equal(decoded['label'], stored['label'])
  digits.train_split = 'train[:10%]'
  assert len(open_source(digits, 'train')) == 150
  for split in ('validation', 'train[:'):
    digits.eval_split = split
    with pytest.raises(UserError, match='data.eval_split'):
      open_source(digits, 'train')


@pytest.fixture
def package(tmp_path):
  """A package of 40 base emoji, every fourth with skin tones, in the modes of the real one."""
  folder = tmp_path / 'package'
  images = folder / 'img' / 'google' / '64'
  images.mkdir(parents=True)
  records = []

  def record(code, picture):
    name = f'{code.lower()}.png'
    picture.save(images / name)
    return {'unified': code, 'image': name, 'has_img_google': True}

  for i in range(40):
    code = f'1F{i:03X}'
    mode = ('RGBA', 'LA', 'P')[i % 3]
    picture = Image.new('RGBA', (64, 64), (0, 0, 0, 0))
    picture.paste((i, 0, 0, 255), (0, 0, 32, 64))
    category = builders.EMOJI_CATEGORIES[i % 10]
    base = record(code, picture.convert(mode)) | {'name': f'Thing {i}', 'category': category}
    if i % 4 == 0:
      base['skin_variations'] = {}
      for k, tone in enumerate(builders.EMOJI_SKIN_TONES):
        picture.paste((i, 50 * (k + 1), 0, 255), (0, 0, 32, 64))
        base['skin_variations'][tone] = record(f'{code}-{tone}', picture)
    records.append(base)
  records.append({'unified': '1F999', 'image': 'none.png', 'has_img_google': False})
  twin = Image.open(images / '1f002.png')  # Another name for the same picture.
  records += [record('1F002-200D', twin) | {'name': 'Twin', 'category': 'Flags'}]
  (images / '1f002-200d.png').write_bytes((images / '1f002.png').read_bytes())
  (folder / 'emoji.json').write_text(json.dumps(records))
  return folder


@pytest.fixture
def emoji(make_data, package):
  return make_data(source='tfds', name='noto_emoji', path=str(package), image_size=64)


def test_emoji_variants_never_cross_the_splits(emoji):
  train, test = open_source(emoji, 'train'), open_source(emoji, 'eval')
  assert len(train) + len(test) == 40 + 10 * 5 + 1 and len(test) > 0
  assert train.label_names == builders.EMOJI_CATEGORIES
  # Green marks a skin tone; red is the number of the base.
  families = []
  for source, split in ((train, 'train'), (test, 'test')):
    left, right = source.images[:, 0, 0], source.images[:, 0, 63]
    assert (right == 255).all()  # Transparent, so white.
    toned = left[left[:, 1] >= 50]
    families.append(set(toned[:, 0].tolist()))
    assert families[-1] == {n for n in range(0, 40, 4) if builders.emoji_split(f'1F{n:03X}') == split}
    assert len(toned) == 5 * len(families[-1])
  assert families[0].isdisjoint(families[1])
  assert set(pictures(train)).isdisjoint(pictures(test))


def test_emoji_captions(emoji):
  open_source(emoji, 'train')
  builder = builders.NotoEmoji(data_dir=emoji.data_dir)
  captions = [
    example['caption'].decode()
    for split in ('train', 'test')
    for example in builder.as_data_source(split=split)
  ]
  assert captions.count('thing 8') == 1 and captions.count('thing 8, medium-dark skin tone') == 1
  assert builders.emoji_caption('Hands', '1F3FB-1F3FF') == 'hands, light skin tone, dark skin tone'
  assert builders.emoji_caption('Hands', '1F3FB-1F3FB') == 'hands, light skin tone'


def test_emoji_split_is_about_one_in_ten():
  share = np.mean([builders.emoji_split(f'1F{i:03X}') == 'test' for i in range(2000)])
  assert 0.07 < share < 0.13  # Four standard deviations.


def test_emoji_stay_when_the_package_is_gone(emoji, package):
  count = len(open_source(emoji, 'train'))
  emoji.path = ''
  assert len(open_source(emoji, 'train')) == count


@pytest.mark.parametrize('missing', ['', 'emoji.json', 'img/google/64', 'img/google/64/1f003.png'])
def test_emoji_package_missing(emoji, package, missing, tmp_path):
  if missing:
    (package / missing).rename(tmp_path / 'away')
  else:
    emoji.path = ''
  with pytest.raises(UserError, match='npm pack emoji-datasource-google(?s:.*)tar -xzf'):
    open_source(emoji, 'train')


DAMAGES = {
  'emoji.json': [b'', b'{', b'[3]', b'[{}]', b'\xff', b'{"a": 1}', b'[{"has_img_google": true, "image": 3}]'],
  'img/google/64/1f003.png': [b'', b'hello', b'\x89PNG\r\n\x1a\n'],
}


@pytest.mark.parametrize(('name', 'content'), [(n, content) for n, all in DAMAGES.items() for content in all])
def test_damaged_emoji_package(emoji, package, name, content):
  (package / name).write_bytes(content)
  with pytest.raises(UserError, match=f'(?s){package / name} is damaged.*npm pack emoji-datasource-google'):
    open_source(emoji, 'train')


def test_emoji_of_another_size_or_category(emoji, package):
  Image.new('RGB', (32, 32)).save(package / 'img' / 'google' / '64' / '1f003.png')
  with pytest.raises(UserError, match='1f003.png is damaged .it is 32x32 and not 64x64'):
    open_source(emoji, 'train')
  text = (package / 'emoji.json').read_text()
  (package / 'emoji.json').write_text(text.replace('Flags', 'Flogs'))
  with pytest.raises(UserError, match="emoji.json is damaged .the category 'Flogs' is none of"):
    open_source(emoji, 'train')


def test_emoji_captions_are_read_beside_the_images(emoji):
  emoji.caption_feature = 'caption'
  source = open_source(emoji, 'train')
  tones = [f'{tone} skin tone' for tone in builders.EMOJI_SKIN_TONES.values()]
  toned = [
    (int(image[0, 0, 1]), caption.split(', ')[1])
    for image, caption in zip(source.images, source.captions, strict=True)
    if ', ' in caption
  ]
  assert set(toned) == {(50 * (k + 1), tone) for k, tone in enumerate(tones)}  # green marks a tone
