import numpy as np
import pytest
from PIL import Image

from vaediff.data import cache
from vaediff.data.sources import open_source
from vaediff.errors import UserError


@pytest.fixture
def root(tmp_path):
  """Eight red cats (png), eight blue dogs (jpg), one size."""
  folder = tmp_path / 'pictures'
  for name, colour, suffix in [('dog', (0, 0, 250), 'jpg'), ('cat', (250, 0, 0), 'png')]:
    (folder / name / 'deep').mkdir(parents=True)
    for i in range(8):
      Image.new('RGB', (8, 8), colour).save(folder / name / ('deep' if i % 2 else '') / f'{i}.{suffix}')
  return folder


@pytest.fixture
def data(make_data, root):
  return make_data(
    source='image_folder',
    name='pets',
    path=str(root),
    train_split='train[:75%]',
    eval_split='train[75%:]',
  )


@pytest.mark.parametrize('materialize', [True, False])
def test_labels_are_the_subfolders(data, materialize):
  data.materialize = materialize
  train, held_out = open_source(data, 'train'), open_source(data, 'eval')
  assert train.label_names == ('cat', 'dog') and train.num_classes == 2
  assert (len(train), len(held_out)) == (12, 4)
  labels = []
  for source in (train, held_out):
    batch = source.read(np.arange(len(source)))
    bluer = batch['image'][:, 0, 0, 2] > batch['image'][:, 0, 0, 0]
    np.testing.assert_array_equal(batch['label'], bluer)
    labels += batch['label'].tolist()
  assert sum(labels) == 8
  assert len(set(labels[:12])) == 2  # Shuffled: the files are sorted by class.


def test_modes_become_rgb_or_grey(data, root):
  for file in root.rglob('*.*'):
    file.unlink()
  half = Image.new('RGBA', (8, 8), (0, 0, 0, 0))
  half.paste((40, 80, 120, 255), (0, 0, 4, 8))
  Image.new('L', (8, 8), 77).save(root / 'grey.png')
  half.save(root / 'alpha.webp', lossless=True)
  half.convert('LA').save(root / 'grey_alpha.png')
  half.convert('P').save(root / 'palette.png', transparency=half.convert('P').getpixel((7, 0)))
  Image.fromarray(np.full((8, 8), 77 * 256, np.uint16)).save(root / 'deep.png')
  Image.new('1', (8, 8), 1).save(root / 'bits.bmp')
  found = {}
  for channels in (3, 1):
    data.channels, data.materialize = channels, False
    for split in ('train', 'eval'):
      source = open_source(data, split)
      for i in range(len(source)):
        found[source.reader.locate(i).split('/')[-1], channels] = source.read(np.array([i]))['image'][0]
  assert source.num_classes == 0 and len(found) == 12
  luma = round(0.299 * 40 + 0.587 * 80 + 0.114 * 120)
  for name, left, right in [
    ('grey.png', 77, 77),
    ('deep.png', 77, 77),
    ('bits.bmp', 255, 255),
    ('alpha.webp', (40, 80, 120), 255),
    ('grey_alpha.png', luma, 255),
  ]:
    assert (found[name, 3][:, :4] == left).all() and (found[name, 3][:, 4:] == right).all(), name
    grey = luma if isinstance(left, tuple) else left
    assert np.abs(found[name, 1][:, :4].astype(int) - grey).max() <= 1, name
  assert (found['palette.png', 3][:, 4:] == 255).all()


@pytest.mark.parametrize('materialize', [True, False])
def test_bad_files_are_all_named_before_training(data, root, materialize):
  data.materialize = materialize
  (root / 'cat' / 'empty.png').touch()
  whole = (root / 'dog' / '0.jpg').read_bytes()
  (root / 'dog' / 'cut.jpg').write_bytes(whole[: len(whole) // 2])
  Image.new('RGB', (9, 8)).save(root / 'dog' / 'wide.png')
  with pytest.raises(UserError) as info:
    open_source(data, 'train')
  message = str(info.value)
  assert message.startswith('3 images')
  assert 'empty.png cannot be read: it is empty' in message
  assert 'cut.jpg cannot be read' in message and 'wide.png: the image is 9x8' in message
  assert not any((root.parent / 'data_dir').rglob('meta.json'))
  for name in ('cat/empty.png', 'dog/cut.jpg', 'dog/wide.png'):
    (root / name).unlink()
  assert len(open_source(data, 'train')) == 12


def test_a_long_list_is_cut_to_ten(data, root):
  for i in range(13):
    (root / 'cat' / f'empty{i}.png').touch()
  with pytest.raises(UserError, match='13 images') as info:
    open_source(data, 'train')
  assert str(info.value).count('it is empty') == 10 and 'and 3 more' in str(info.value)


def test_unchanged_files_are_checked_once(data, monkeypatch):
  data.materialize = False
  open_source(data, 'train')

  def fail(*args):
    raise AssertionError('checked again')

  monkeypatch.setattr(cache, '_build', fail)
  assert len(open_source(data, 'eval')) == 4


def test_orientation_is_upright(data, root):
  tall = Image.new('RGB', (8, 8), 'white')
  tall.paste((0, 0, 0), (0, 0, 8, 4))
  exif = Image.Exif()
  exif[0x0112] = 6  # Rotate by 90 degrees clockwise to show.
  for file in root.rglob('*.*'):
    file.unlink()
  for name in ('photo', 'again'):
    tall.save(root / f'{name}.png', exif=exif)
  data.train_split, data.eval_split = 'train[:1]', 'train[1:]'
  image = open_source(data, 'train').images[0]
  assert (image[:, 4:] == 0).all() and (image[:, :4] == 255).all()


def test_folder_mistakes(data, root, tmp_path):
  Image.new('RGB', (8, 8)).save(root / 'stray.png')
  with pytest.raises(UserError, match="1 images lie in the folder itself and 16 in subfolders.*'cat'"):
    open_source(data, 'train')
  (tmp_path / 'nothing' / '.hidden').mkdir(parents=True)
  Image.new('RGB', (8, 8)).save(tmp_path / 'nothing' / '.hidden' / 'a.png')
  for path, message in [('nothing', 'holds no image'), ('absent', 'is no folder')]:
    data.path = str(tmp_path / path)
    with pytest.raises(UserError, match=message):
      open_source(data, 'train')
