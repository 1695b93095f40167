"""Figures of vectors: what a decoder shows of those that it is given; at length, whether a chain learns."""

import importlib
import pathlib
import sys
import types

import jax
import numpy as np
import pytest

from vaediff.data import oracle, shapes, words
from vaediff.evaluation import embedded
from vaediff.machine import sharding
from vaediff.modes import text_diff, train, vary
from vaediff.run import clips
from vaediff.run.trained import Trained

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))


def config_of(variant='unclip,mini'):
  return importlib.import_module('configs.shapes16').get_config(variant)


def test_samples_are_read_row_by_row_of_the_vectors_that_they_are_given():
  """A decoder that knows scenes by their number: right of the right ones, and of no others."""
  count = 12
  stub = object.__new__(Trained)
  stub.config = config_of()
  scenes = embedded.scenes_of(stub, count)
  images = np.stack([shapes.render(scene, 16) for scene in scenes])
  asked = np.array([scene.attributes for scene in scenes], np.int32)
  stub.experiment = types.SimpleNamespace(conditions=types.SimpleNamespace(each=()))
  stub.draw_all = lambda given: {'x0': images[np.argmax(given['embedding'], axis=1)]}
  right = embedded.decoded(stub, 'right', asked, np.eye(count, dtype=np.float32))
  wrong = embedded.decoded(stub, 'wrong', asked, np.roll(np.eye(count, dtype=np.float32), 1, axis=0))
  assert right['set'] == 'right' and right['N'] == count
  assert right['accuracy_joint'].value == 1 and right['valid'].value == 1
  same = np.roll(asked, 1, axis=0) == asked
  assert wrong['accuracy_joint'].value == same.all(axis=1).mean() < 0.5
  assert wrong['accuracy_shape'].value == pytest.approx(same[:, 0].mean())


@pytest.mark.long
def test_shapes_mini_learns_vectors_and_what_they_mean(tmp_path):
  """Two hours of a core of an Intel Xeon, 86 minutes the decoder's: the thresholds of a chain that works."""
  config = config_of()
  config.data.data_dir = str(tmp_path / 'data')
  train.run_stages(config, tmp_path / 'run', config.stages)
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  prior, decoder = (Trained(config, tmp_path / 'run', stage, mesh) for stage in config.stages[1:])
  found = embedded.figures(prior)
  assert found['cosine_of_image'].value - found['cosine_of_caption'].value >= 0.1
  rows = {row['set']: row for row in embedded.decoder_rows(decoder)}
  for name in ('shape', 'colour'):
    assert rows[embedded.OF_IMAGES][f'accuracy_{name}'].value >= 0.9
    assert rows[embedded.OF_PRIOR][f'accuracy_{name}'].value >= 0.8
  assert rows[embedded.OF_PRIOR]['accuracy_joint'].value > rows[embedded.OF_CAPTIONS]['accuracy_joint'].value
  caption = prior.caption_inputs(['a large red square on a black background'])
  told = np.repeat(caption[words.TOKENS], 8, axis=0)
  vectors = embedded.vectors(prior, told)
  drawn = decoder.draw_all({clips.EMBEDDING: vectors, **clips.no_words(decoder, 8)})['x0']
  assert len(set(oracle.Oracle(16, mini=True).read(drawn).attributes[:, 3])) >= 3  # of the four corners
  config.vary.num_images = config.text_diff.num_images = 32
  _, varied = vary.vary(decoder, tmp_path)
  assert varied['keeps shape'] >= 0.8 and varied['keeps colour'] >= 0.8 and varied['rms change'] > 0.05
  config.text_diff.update({'source': 'a red square', 'target': 'a green square'})
  strip = text_diff.text_diff(decoder, tmp_path)
  assert any(row['shows the caption'] >= 0.7 and row['keeps shape'] >= 0.8 for row in strip)
