"""The order of channels of generators in wavelets and in patches; relatives that have no place."""

import numpy as np
import pytest

from vaediff.errors import UserError
from vaediff.weights import families
from vaediff.weights.families import ncsnpp
from vaediff.weights.families.base import Entry, Reorder


def folded(image, size):
  """Returns patches of [rows, columns, channels] as pixels, whose channels are (row, column, channel)."""
  rows, columns, channels = image.shape
  parts = image.reshape(rows // size, size, columns // size, size, channels).transpose(0, 2, 1, 3, 4)
  return parts.reshape(rows // size, columns // size, -1)


def unfolded(maps, size, *, official):
  """Returns the image of patches; the official code takes their channels for (channel, row, column)."""
  rows, columns, channels = maps.shape
  if official:
    parts = maps.reshape(rows, columns, channels // size**2, size, size).transpose(0, 3, 1, 4, 2)
  else:
    parts = maps.reshape(rows, columns, size, size, channels // size**2).transpose(0, 2, 1, 3, 4)
  return parts.reshape(rows * size, columns * size, -1)


@pytest.mark.parametrize('swapped', [False, True])
@pytest.mark.parametrize('patch', [1, 2])
def test_a_generator_of_patches_and_bands_makes_the_same_image(patch, swapped):
  rng, channels = np.random.default_rng(0), 12
  wide = channels * patch**2
  into, out = rng.normal(size=(wide, 5)), rng.normal(size=(5, wide))  # [in, out], as 1x1 convolutions
  image = rng.normal(size=(2 * patch, 2 * patch, channels))
  bands = np.r_[0:3, 6:9, 3:6, 9:12] if swapped else np.arange(channels)
  wanted = unfolded(folded(image, patch) @ into @ out, patch, official=True)
  order = {'channels': channels, 'patch': patch, 'swapped': swapped}
  entries = [Entry('conv_in/kernel', 'a', 'conv'), Entry('conv_out/kernel', 'b', 'conv')]
  first, last = ncsnpp.reordered(entries, order)
  own_in = first.to_own(into.T[:, :, None, None])[0, 0]
  own_out = last.to_own(out.T[:, :, None, None])[0, 0]
  found = unfolded(folded(image[..., bands], patch) @ own_in @ own_out, patch, official=False)
  np.testing.assert_allclose(found, wanted[..., bands])
  np.testing.assert_array_equal(last.to_official(own_out[None, None]), out.T[:, :, None, None])


def test_the_pyramid_of_a_wavelet_generator_reads_the_bands_of_each_band():
  order = {'channels': 12, 'patch': 1, 'swapped': True}
  (entry,) = ncsnpp.reordered([Entry('down_0_pyramid/kernel', 'a', 'conv')], order)
  assert entry.reorders == (Reorder(2, tuple(int(12 * band + place) for band in range(4)
                                             for place in np.r_[0:3, 6:9, 3:6, 9:12])),)  # fmt: skip
  (deeper,) = ncsnpp.reordered([Entry('down_1_pyramid/kernel', 'a', 'conv')], order)
  assert deeper.reorders == ()


@pytest.mark.parametrize(
  ('name', 'shape', 'message'),
  [
    ('all_modules.0.W', (8,), 'a generator with a Fourier embedding'),
    ('all_modules.3.GroupNorm_1.weight', (8,), "blocks 'biggan_oneadagn', which has no place here"),
    ('all_modules.3.NIN_0.W', (8, 8), "skips of its blocks are of the kind 'NIN'"),
  ],
)
def test_relatives_that_were_never_published_are_refused(name, shape, message):
  shapes = {'z_transform.1.weight': (16, 10), 'all_modules.2.weight': (8, 3, 3, 3)}
  shapes |= {'all_modules.3.Conv_0.weight': (8, 8, 3, 3), name: shape}
  (part,) = families.parts(shapes)
  with pytest.raises(UserError, match=message):
    part.fields()
