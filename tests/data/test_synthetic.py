import numpy as np
import pytest

from vaediff.data.sources import describe, open_source, prepare
from vaediff.errors import UserError


@pytest.mark.parametrize(('size', 'channels'), [(8, 1), (16, 3)])
def test_counts_and_repetition_without_files(make_data, tmp_path, size, channels):
  data = make_data(image_size=size, channels=channels)
  train, held_out = open_source(data, 'train'), open_source(data, 'eval')
  assert (len(train), len(held_out)) == (256, 64)
  assert train.image_shape == (size, size, channels) and train.images.dtype == np.uint8
  np.testing.assert_array_equal(open_source(data, 'train').images, train.images)
  prepare(data, lambda line: None)
  assert not list(tmp_path.iterdir())


def test_images_differ_and_splits_are_disjoint(make_data):
  data = make_data(image_size=16)
  images = [image.tobytes() for s in ('train', 'eval') for image in open_source(data, s).images]
  assert len(set(images)) == 320


def test_classes_can_be_told_by_colour(make_data):
  """A grey gradient has no hue, so the most colourful pixel is the disc's."""
  source = open_source(make_data(image_size=16), 'train')
  pixels = source.images.reshape(256, -1, 3).astype(int)
  most = (pixels.max(-1) - pixels.min(-1)).argmax(1)
  colours = pixels[np.arange(256), most]
  for label in range(source.num_classes):
    assert len(np.unique(colours[source.labels == label], axis=0)) == 1
  assert len(np.unique(colours, axis=0)) == source.num_classes == 10


@pytest.mark.parametrize(
  ('field', 'value'),
  [('source', 'web'), ('channels', 4), ('crop', 'random'), ('resize', 'area'), ('image_size', 0)],
)
def test_unknown_values_name_the_field(make_data, field, value):
  data = make_data(**{field: value})
  for function in (lambda: open_source(data, 'train'), lambda: describe(data)):
    with pytest.raises(UserError, match=rf'data\.{field} .*{value!r}'):
      function()
