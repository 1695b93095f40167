"""Text to image by codes on the Noto emoji: the skin tone that a caption names is the one that is drawn."""

import importlib
import os
import pathlib
import sys

import jax
import numpy as np
import pytest

from vaediff.data import sources
from vaediff.data.builders import check_emoji_package
from vaediff.errors import UserError
from vaediff.evaluation import id_counts, networks
from vaediff.machine import sharding
from vaediff.modes import train
from vaediff.run.trained import Trained

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
LIGHT, DARK = ', light skin tone', ', dark skin tone'
SHORT = {
  'vqvae.model.channels': 16,
  'vqvae.train.batch_size': 32,
  'vqvae.train.num_steps': 700,
  'prior.model.width': 128,
  'prior.model.num_layers': 4,
  'prior.model.num_heads': 4,
  'prior.train.num_steps': 1500,
  'prior.train.batch_size': 32,
}
"""Networks small enough for 45 minutes of one core of an Intel Xeon, and nine for the own classifier."""


@pytest.fixture(scope='module')
def package():
  path = os.environ.get('VAEDIFF_EMOJI', '')
  try:
    check_emoji_package(path)
  except UserError:
    pytest.skip('set VAEDIFF_EMOJI to the unpacked npm package emoji-datasource-google')
  return path


def config_of(package, folder):
  config = importlib.import_module('configs.emoji64').get_config('vqvae,prior,text')
  config.data.update({'path': package, 'data_dir': str(folder)})
  config.update_from_flattened_dict(SHORT)
  return config


def one_tone(source):
  """Returns where captions end in the light tone alone, and where the dark one is of the same emoji."""
  where = {caption: row for row, caption in enumerate(source.captions)}
  bases = [caption.removesuffix(LIGHT) for caption in source.captions if caption.endswith(LIGHT)]
  bases = [base for base in bases if 'skin tone' not in base and base + DARK in where]
  return [where[base + LIGHT] for base in bases], [where[base + DARK] for base in bases]


def ink(images):
  """Returns the mean luminance, 0 to 1, of the pixels of each image that are not white; 1 where all are."""
  luminance = images.astype(np.float64) @ [0.299, 0.587, 0.114] / 255
  coloured = images.min(axis=-1) < 240
  total = coloured.sum(axis=(1, 2))
  return np.where(total > 0, (luminance * coloured).sum(axis=(1, 2)) / np.maximum(total, 1), 1.0)


def darker_share(light, dark):
  return float(np.mean(ink(dark) < ink(light)))


def test_ink_is_the_luminance_of_what_is_not_white():
  images = np.full((3, 4, 4, 3), 255, np.uint8)
  images[0, 0, 0], images[0, 0, 1] = (255, 0, 0), (0, 0, 255)
  images[1, 2:] = 51
  np.testing.assert_allclose(ink(images), [(0.299 + 0.114) / 2, 0.2, 1.0])
  assert darker_share(images[:1], images[1:2]) == 1 and darker_share(images[1:2], images[:1]) == 0


def test_the_emoji_themselves_are_darker_where_their_caption_says_so(package, tmp_path):
  config = config_of(package, tmp_path)
  for split in ('train', 'eval'):
    source = sources.open_source(config.data, split)
    light, dark = one_tone(source)
    assert len(light) >= 10
    read = lambda rows, source=source: source.read(np.array(rows))['image']
    assert darker_share(read(light), read(dark)) >= 0.95


@pytest.mark.long
def test_a_prior_of_captions_draws_the_tone_that_it_is_told(package, tmp_path, one_device):
  """Of the same key the same emoji in the light and in the dark tone; and the category that is asked for."""
  config = config_of(package, tmp_path / 'data')
  train.run_stages(config, tmp_path / 'run', config.stages)
  measure(Trained(config, tmp_path / 'run', 'prior', sharding.make_mesh(config.mesh, jax.devices()[:1])))


def measure(prior):
  """Asserts what the captions of a trained prior bring; prints it."""
  found = {name: figure.value for name, figure in id_counts.figures(prior).items()}
  print(found)
  assert found['nats_per_token/rise by captions of others'] >= 0.1
  source = prior.eval_source
  drawn = lambda texts: prior.draw_all(prior.caption_inputs(texts))['x0']
  light, dark = one_tone(source)
  assert len(light) >= 10
  of = lambda rows: [source.captions[row] for row in rows]
  share = darker_share(drawn(of(light)), drawn(of(dark)))
  print(f'{share:.3f} of {len(light)} held-out pairs are darker where their caption says so')
  assert share >= 0.9
  prior.config.evaluate.update({'extractors': ('classifier',), 'lpips': ''})
  opened = networks.open_networks(prior.config, prior.mesh)
  assert not opened.missing, opened.missing
  classifier = opened.features['classifier']
  rows = np.arange(len(source))
  labels = source.read(rows)['label']
  seen = classifier(drawn(of(rows)))['logits'].argmax(axis=1)
  majority = np.bincount(labels).max() / len(labels)
  right = float(np.mean(seen == labels))
  print(f'category of {len(rows)} captions: {right:.3f}; the most frequent {majority:.3f}')
  print(f'category of the images: {classifier.accuracy:.3f}')
  assert right >= majority + 0.2
