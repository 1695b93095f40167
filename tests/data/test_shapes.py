import hashlib
import itertools
import re

import numpy as np
import pytest

from vaediff.data import builders, oracle, shapes
from vaediff.data.sources import open_source
from vaediff.errors import UserError

WORDS = {word for names in shapes.NAMES for name in names for word in name.split()}


def scenes(split, count, **changes):
  return [shapes.scene(split, index, **changes) for index in range(count)]


@pytest.mark.parametrize(
  ('size', 'mini', 'digest'),
  [
    (16, True, '3a8d78c64ae694e2'),
    (16, False, '06cfed384c6a8146'),
    (32, False, '58b81e4525bdd22a'),
    (64, False, '0386a858c1dda98d'),
  ],
)
def test_the_same_bytes_on_every_run_and_machine(size, mini, digest):
  """Of 40 images and captions of each split; equal under Pillow 10.3 and 13.0."""
  found = hashlib.sha256()
  for split in shapes.COUNTS:
    found.update(shapes.images(split, range(40), size, mini=mini).tobytes())
    found.update('\n'.join(scene.caption for scene in scenes(split, 40, mini=mini)).encode())
  assert found.hexdigest()[:16] == digest


@pytest.mark.slow
def test_the_splits_share_no_composition_that_is_held_out_and_no_image():
  for mini in (False, True):
    found = {split: {scene.attributes for scene in scenes(split, 2000, mini=mini)} for split in shapes.COUNTS}
    assert found['held_out'].isdisjoint(found['train'] | found['test'])
    assert {attributes[:2] for attributes in found['held_out']} == {(k, k) for k in range(3 if mini else 6)}
    assert len(found['held_out'] | found['train']) == 96 if mini else 1500  # 1,500 is far from all 5,184
  images = {
    split: {image.tobytes() for image in shapes.images(split, range(1000), 16, mini=True)}
    for split in shapes.COUNTS
  }
  assert [len(each) for each in images.values()] == [1000] * 3
  assert not any(one & other for one, other in itertools.combinations(images.values(), 2))


def test_attributes_are_drawn_alike_but_for_what_is_held_out():
  found = np.array([scene.attributes for scene in scenes('train', 5000)])
  for column, names in zip(found.T, shapes.NAMES, strict=True):
    share = np.bincount(column, minlength=len(names)) / len(found)
    assert np.abs(share - 1 / len(names)).max() < 0.03  # five deviations of the rarest


def test_nuisances_stay_in_their_range_and_are_not_told():
  found = scenes('train', 500)
  offset = np.array([scene.offset for scene in found])
  assert 0.9 * 1.5 / 32 < np.abs(offset).max() <= 1.5 / 32
  for name, low, high in (('growth', 0.93, 1.07), ('shade', 0.9, 1.0)):
    values = np.array([getattr(scene, name) for scene in found])
    assert low <= values.min() < low + 0.01 and high - 0.01 < values.max() <= high
  assert np.abs([scene.glow for scene in found]).max() <= 8
  same = [scene for scene in scenes('train', 4000, mini=True) if scene.attributes == (0, 1, 2, 0, 0)]
  assert (
    len({scene.caption_full for scene in same}) == 1 < len({shapes.render(s, 16).tobytes() for s in same})
  )


def test_a_mask_covers_what_its_shape_covers():
  """Shares of the image by the area of each shape, without nuisances; and left is left, top is top."""
  r = 0.25
  areas = {
    'circle': np.pi * r**2, 'square': 2 * r**2, 'triangle': 0.75 * 3**0.5 * (1.15 * r) ** 2,
    'diamond': 2 * 0.7 * 1.15 * r**2, 'cross': (2 * 2 * 0.72 - 0.72**2) * r**2,
    'ring': np.pi * r**2 * (1 - 0.55**2),
  }  # fmt: skip
  for number, name in enumerate(shapes.SHAPES):
    share = shapes.mask(shapes.Scene(attributes=(number, 0, 2, 4, 0)), 64).mean() / 255
    assert share == pytest.approx(areas[name], rel=0.02), name
  for position, name in enumerate(shapes.POSITIONS):
    covered = shapes.mask(shapes.Scene(attributes=(1, 0, 0, position, 0)), 32).astype(float)
    y, x = (covered.sum(axis) @ np.arange(32) / covered.sum() for axis in (1, 0))
    rows = [word for word in ('top', 'bottom') if word in name]
    columns = [word for word in ('left', 'right') if word in name]
    assert ('top' if y < 12 else 'bottom' if y > 19 else '') == ''.join(rows)
    assert ('left' if x < 12 else 'right' if x > 19 else '') == ''.join(columns)


def test_pixels_are_the_two_colours_and_their_mixtures():
  image = shapes.render(shapes.Scene(attributes=(1, 3, 2, 4, 3)), 32)
  assert tuple(image[0, 0]) == (10, 20, 80) and tuple(image[16, 16]) == (40, 150, 60)


def test_captions_tell_what_they_say_in_every_order():
  for attributes in itertools.product(*(range(len(names)) for names in shapes.NAMES)):
    if sum(attributes) % 7:  # a seventh of all
      continue
    for order in range(3):
      text = shapes.in_words(attributes, order)
      assert tuple(shapes.told(text)) == attributes and tuple(shapes.told(text.upper())) == attributes
  for left_out in itertools.chain.from_iterable(
    itertools.combinations(shapes.OMITTED, count) for count in range(5)
  ):
    for order in range(3):
      told = dict(
        zip(
          shapes.ATTRIBUTES, shapes.told(shapes.in_words((5, 1, 0, 4, 3), order, set(left_out))), strict=True
        )
      )
      assert {name for name, value in told.items() if value < 0} == set(left_out)
      assert told['shape'] == 5


def test_an_order_that_no_caption_has_tells_the_same():
  for index in range(60):
    scene = shapes.scene('test', index)
    left_out = [set(names) for count in range(5) for names in itertools.combinations(shapes.OMITTED, count)]
    written = {shapes.in_words(scene.attributes, order, out) for order in range(3) for out in left_out}
    assert scene.caption in written and scene.caption_full in written
    for feature in ('caption', shapes.LOOK):
      other = scene.reordered(feature)
      assert other not in ({scene.caption_look} if feature == shapes.LOOK else written)
      np.testing.assert_array_equal(shapes.told(other), shapes.told(scene.telling(feature)))


def test_captions_of_the_look_leave_size_and_place_to_an_image():
  one = shapes.scene('test', 5)
  told = shapes.told(one.caption_look)
  assert [int(told[i]) for i in (0, 1, 4)] == [one.attributes[i] for i in (0, 1, 4)]
  assert (told[2], told[3]) == (-1, -1) and one.telling('caption_look') == one.caption_look
  assert one.telling('caption') == one.telling('caption_full') == one.caption_full


def test_captions_are_english():
  assert shapes.in_words((5, 0, 0, 0, 0)) == 'a small red ring at the top left on a black background'
  assert shapes.in_words((5, 0, 0, 0, 0), 1) == 'at the top left, a small red ring on a black background'
  assert shapes.in_words((5, 0, 0, 0, 0), 2) == 'on a black background, a small red ring at the top left'
  assert shapes.in_words((5, 1, 0, 4, 0), 0, {'size', 'background'}) == 'an orange ring at the center'
  assert shapes.in_words((5, 1, 0, 4, 0), 2, set(shapes.OMITTED)) == 'a ring'


def test_captions_leave_out_as_often_as_they_should():
  found = scenes('train', 4000)
  for scene in found[:200]:
    told = shapes.told(scene.caption)
    assert all(one in (-1, other) for one, other in zip(told, scene.attributes, strict=True))
  silent = np.mean([shapes.told(scene.caption) < 0 for scene in found], axis=0)
  np.testing.assert_allclose(silent, [0, 0.1, 0.25, 0.25, 0.25], atol=0.03)  # four deviations
  firsts = np.mean([[scene.caption.startswith(word) for word in ('at', 'on')] for scene in found], axis=0)
  np.testing.assert_allclose(firsts, [0.25, 0.25], atol=0.03)  # a third each, less where it is left out


@pytest.mark.parametrize('text', ['', 'a puce ring', 'ring', 'a red ring at the top', 'a ring a ring', 'red'])
def test_other_texts_are_refused_with_the_words(text):
  with pytest.raises(UserError, match=f'(?s){re.escape(repr(text))} is no caption.*at the top left.*navy'):
    shapes.told(text)


def test_edges_are_of_the_image_alone():
  image = shapes.images('test', range(50), 32)
  found = shapes.control(image)
  assert found.shape == (50, 32, 32, 1) and found.dtype == np.uint8 and set(np.unique(found)) == {0, 255}
  np.testing.assert_array_equal(shapes.control(image[7:9]), found[7:9])
  assert 80 < (found > 0).sum(axis=(1, 2, 3)).mean() < 130 and (found > 0).any(axis=(1, 2, 3)).all()
  blank = np.full((1, 8, 8, 3), 77, np.uint8)
  assert not shapes.control(blank).any()
  step = blank.copy()
  step[:, :, 4:] += 60  # a step of 0.235, half of it at each of the two pixels beside it
  assert (shapes.control(step)[0, :, :, 0] > 0).sum(axis=0).tolist() == [0, 0, 0, 8, 8, 0, 0, 0]


def test_green_on_grey_has_edges():
  """Their luma is nearly the same: an edge of grey alone would miss them."""
  image = shapes.render(shapes.Scene(attributes=(0, 3, 2, 4, 1)), 32)[None]
  assert (shapes.control(image) > 0).sum() > 60


# As a data set ------------------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch):
  for split in shapes.COUNTS:
    monkeypatch.setitem(shapes.COUNTS, split, 70)


@pytest.fixture
def data(make_data, few):
  return make_data(source='tfds', name='shapes/32', image_size=32, num_classes=6, caption_feature='caption')


def told_of(source):
  """Returns caption and label by the bytes of an image."""
  rows = zip(source.images, source.captions, source.labels.tolist(), strict=True)
  return {image.tobytes(): (caption, label) for image, caption, label in rows}


def test_it_is_built_and_read(data):
  train, test = open_source(data, 'train'), open_source(data, 'eval')
  assert len(train) == len(test) == 70 and train.label_names == shapes.SHAPES
  expected = {shapes.render(s, 32).tobytes(): (s.caption, s.attributes[0]) for s in scenes('train', 70)}
  assert told_of(train) == expected
  data.caption_feature, data.eval_split = 'caption_full', 'held_out'
  held_out = open_source(data, 'eval')
  expected = {
    shapes.render(s, 32).tobytes(): (s.caption_full, s.attributes[0]) for s in scenes('held_out', 70)
  }
  assert told_of(held_out) == expected
  told = np.stack([shapes.told(caption) for caption in held_out.captions])
  assert (told[:, 0] == told[:, 1]).all() and held_out.fingerprint != test.fingerprint


@pytest.mark.slow
def test_what_is_held_out_shows_what_its_captions_say(data):
  data.caption_feature, data.eval_split = 'caption_full', 'held_out'
  held_out = open_source(data, 'eval')
  told = np.stack([shapes.told(caption) for caption in held_out.captions])
  np.testing.assert_array_equal(oracle.Oracle(32).read(held_out.images).attributes, told)


def test_features_say_what_attributes_are(data):
  open_source(data, 'train')
  builder = builders.Shapes(data_dir=data.data_dir, config='32')
  example = next(iter(builder.as_data_source(split='test')))
  attributes = [int(example['attributes'][name]) for name in shapes.ATTRIBUTES]
  assert attributes == shapes.told(example['caption_full'].decode()).tolist()
  numbers = shapes.told(example['caption_look'].decode()).tolist()
  assert numbers == [attributes[0], attributes[1], -1, -1, attributes[4]]
  assert builder.info.features['attributes']['colour'].names == list(shapes.COLOURS)


def test_another_size_is_another_name(data):
  data.name = 'shapes'
  with pytest.raises(UserError, match='shapes/mini, shapes/16, shapes/32, shapes/64'):
    open_source(data, 'train')
  data.name = 'shapes/33'
  with pytest.raises(UserError, match="data.name='shapes/33'.*shapes/32"):
    open_source(data, 'train')
