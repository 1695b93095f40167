"""Real weights on real images: what makes images worse raises the distance, step by step."""

import io
import os
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image, ImageFilter

from vaediff.data.builders import check_emoji_package
from vaediff.data.resize import on_white
from vaediff.errors import UserError
from vaediff.evaluation import frechet, kernel, networks
from vaediff.features import mobilenet
from vaediff.machine import sharding
from vaediff.weights import tensors

COUNT = 400
BLUR = (0.5, 1.0, 2.0)  # standard deviation in pixels
NOISE = (10, 20, 40)  # standard deviation in bytes
JPEG = (50, 20, 5)  # quality


@pytest.fixture(scope='module')
def emoji():
  """Two disjoint sets of emoji, chosen at random."""
  path = os.environ.get('VAEDIFF_EMOJI', '')
  try:
    folder = check_emoji_package(path) / 'img' / 'google' / '64'
  except UserError:
    pytest.skip('set VAEDIFF_EMOJI to the unpacked npm package emoji-datasource-google')
  files = sorted(pathlib.Path(folder).glob('*.png'))
  chosen = np.random.default_rng(0).choice(len(files), 2 * COUNT, replace=False)
  return np.stack([np.asarray(on_white(Image.open(files[i])), np.uint8) for i in chosen])


@pytest.fixture(scope='module')
def network():
  try:
    extractor = mobilenet.load(tensors.folder())
  except UserError as error:
    pytest.skip(str(error))
  mesh = jax.make_mesh((1, 1), ('data', 'fsdp'), devices=jax.devices()[:1])
  return networks.FeatureNetwork(extractor, sharding.Mesh(mesh.devices, mesh.axis_names), 50)


def blurred(image, std):
  return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(std)))


def noisy(image, std):
  noise = np.random.default_rng(image.sum()).normal(0, std, image.shape)
  return np.clip(np.round(image + noise), 0, 255).astype(np.uint8)


def compressed(image, quality):
  file = io.BytesIO()
  Image.fromarray(image).save(file, 'JPEG', quality=quality)
  return np.asarray(Image.open(file))


@pytest.mark.parametrize(('degrade', 'levels'), [(blurred, BLUR), (noisy, NOISE), (compressed, JPEG)])
def test_worse_images_are_further_away(emoji, network, degrade, levels):
  real = network(emoji[:COUNT])['features']
  kept = {}
  for level in (None, *levels):
    images = emoji[COUNT:]
    if level is not None:
      images = np.stack([degrade(image, level) for image in images])
    features = network(images)['features']
    kept[level] = (
      frechet.frechet_distance_of(features, real),
      kernel.kernel_distance(features, real, num_subsets=20, subset_size=COUNT)[0],
    )
  for which in (0, 1):
    values = [pair[which] for pair in kept.values()]
    assert values == sorted(values) and values[-1] > 1.5 * values[0], kept
