import json

import numpy as np
import pytest
from PIL import Image

from vaediff.data import sidecar
from vaediff.data.sources import open_source
from vaediff.errors import UserError

NAMES = [f'{kind}/{i}.png' for kind in ('cat', 'dog') for i in range(6)]


@pytest.fixture
def root(tmp_path):
  for value, name in enumerate(NAMES):
    path = tmp_path / 'images' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), 10 * value, np.uint8)).save(path)
  return tmp_path / 'images'


def write_lines(root, file='captions.jsonl', names=NAMES, **more):
  lines = [
    json.dumps({'file_name': name, 'text': f'the picture {name}, "{i}"', **more})
    for i, name in enumerate(names)
  ]
  (root / file).write_text('\n'.join(lines) + '\n')


def write_table(root, names=NAMES):
  lines = [f'./{name},"the picture {name}, ""{i}"""' for i, name in enumerate(names)]
  (root / 'metadata.csv').write_text('\n'.join(['file_name,text', *lines]) + '\n')


@pytest.fixture
def data(make_slices, root):
  return make_slices(source='image_folder', path=str(root), caption_feature='text')


@pytest.mark.parametrize('write', [write_lines, write_table])
@pytest.mark.parametrize('materialize', [True, False])
def test_every_image_has_its_caption(data, root, write, materialize):
  write(root)
  data.materialize = materialize
  count = 0
  for split in ('train', 'eval'):
    source = open_source(data, split)
    image = source.read(np.arange(len(source)))['image']
    for one, caption in zip(image, source.captions, strict=True):
      number = int(one[0, 0, 0]) // 10
      assert caption == f'the picture {NAMES[number]}, "{number}"'
      count += 1
  assert count == len(NAMES)


def test_lines_of_other_files_and_columns_are_left_out(data, root):
  write_lines(root, names=[*NAMES, 'horse/1.png'], author='someone')
  assert len(open_source(data, 'train').captions) == 9
  data.caption_feature = 'author'
  assert set(open_source(data, 'train').captions) == {'someone'}


def test_other_captions_are_another_folder_and_the_same_images(data, root):
  write_lines(root)
  first = open_source(data, 'train')
  write_lines(root, text='a cat')
  second = open_source(data, 'train')
  assert set(second.captions) == {'a cat'} and second.captions_digest != first.captions_digest
  assert second.fingerprint == first.fingerprint
  data.caption_feature = ''
  third = open_source(data, 'train')
  assert third.captions == () and third.captions_digest == '' and third.fingerprint == first.fingerprint


def test_a_folder_without_the_file_or_with_two(data, root):
  with pytest.raises(UserError, match=r'has none of them: .*captions.jsonl, metadata.jsonl, metadata.csv'):
    open_source(data, 'train')
  write_lines(root)
  write_table(root)
  with pytest.raises(UserError, match='both captions.jsonl and metadata.csv'):
    open_source(data, 'train')


def test_images_without_a_caption_are_named(data, root):
  write_lines(root, names=NAMES[2:])
  with pytest.raises(UserError, match='2 of the 12 images have no caption: cat/0.png, cat/1.png; add them'):
    open_source(data, 'train')


@pytest.mark.parametrize(
  ('file', 'content', 'message'),
  [
    ('captions.jsonl', '{"file_name": "cat/0.png"}\n', "line 1: has no 'text' but 'file_name'"),
    ('captions.jsonl', '\n{"text": "x"}\n', "line 2: has no 'file_name'"),
    ('captions.jsonl', '{"file_name": "cat/0.png", "text": ["a", "b"]}\n', 'line 1: .* one caption each'),
    (
      'captions.jsonl',
      '{"file_name": "cat/0.png", "text": "a"}\n' * 2,
      'line 2: cat/0.png has a caption already',
    ),
    ('captions.jsonl', '[1]\n', 'captions.jsonl is damaged .line 1 is no object'),
    ('captions.jsonl', '{"file_name"\n', 'captions.jsonl is damaged'),
    ('captions.jsonl', b'\xff\xfe', 'captions.jsonl is damaged'),
    (
      'metadata.csv',
      'file_name,text\ncat/0.png\n',
      'metadata.csv is damaged .line 2 has another number of fields',
    ),
    ('metadata.csv', 'file_name,text\ncat/0.png,a,b\n', 'line 2 has another number of fields'),
    ('metadata.csv', 'name,text\ncat/0.png,a\n', "line 2: has no 'file_name' but 'name', 'text'"),
  ],
)
def test_what_is_no_list_of_captions(data, root, file, content, message):
  (root / file).write_bytes(content if isinstance(content, bytes) else content.encode())
  with pytest.raises(UserError, match=message):
    open_source(data, 'train')


def test_the_names_are_those_of_hugging_face():
  assert set(sidecar.FILES) > {'metadata.csv', 'metadata.jsonl'} and sidecar.FILE_NAME == 'file_name'
