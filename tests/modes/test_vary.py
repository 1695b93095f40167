"""Caption to vector to image, in one run: the chain, variations, text differences, ways between vectors."""

import copy
import importlib
import json
import pathlib
import re
import shutil
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from vaediff.data import pictures, words
from vaediff.errors import UserError
from vaediff.evaluation import embedded
from vaediff.experiments.base import NOISE
from vaediff.machine import sharding
from vaediff.modes import interpolate, sample, text_diff, train, vary
from vaediff.run import clips, log, scoring
from vaediff.run.config import Run
from vaediff.run.trained import Trained
from vaediff.storage import identity

pytest.importorskip('sentencepiece')
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
Z = 'embedding'


def config_of(folder):
  config = importlib.import_module('configs.shapes16').get_config('unclip,debug')
  config.data.data_dir = str(folder / 'data')
  config.refiner.model.attention_resolutions = ()  # the middle has it
  for stage in config.stages:
    config[stage].train.update({'num_steps': 2, 'grid_every_steps': 0})
  return config


@pytest.fixture(scope='module')
def run(once):
  """Config and folder of a run, two updates of each stage."""

  def make(folder):
    with pytest.MonkeyPatch.context() as patch:
      make_mesh = sharding.make_mesh
      patch.setattr(sharding, 'make_mesh', lambda config: make_mesh(config, jax.devices()[:1]))
      patch.setattr(train, 'first_images', lambda *run: {})
      config = config_of(folder)
      train.run_stages(config, folder / 'run', config.stages)

  folder = once('unclip', make)
  return config_of(folder), folder / 'run'


def opened(run, stage='refiner', **changes):
  config, workdir = run
  config = config.copy_and_resolve_references()
  config.update_from_flattened_dict(changes)
  return Trained(config, workdir, stage, sharding.make_mesh(config.mesh, jax.devices()[:1]))


@pytest.fixture(scope='module')
def decoder(run):
  return opened(run)


@pytest.mark.slow
def test_a_sample_is_the_prior_s_vector_of_its_caption_decoded(decoder, tmp_path, monkeypatch):
  indices, prior = np.arange(3), decoder.maker(decoder.experiment.makers[0])
  assert decoder.draws_alone and not prior.draws_alone
  images = decoder.draw(indices)['x0']
  told = {words.TOKENS: decoder.draw_inputs(indices, 0)[words.TOKENS]}
  vectors = prior.draw(indices, told, handed=True)[Z]
  np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
  np.testing.assert_array_equal(decoder.draw(indices, {Z: vectors})['x0'], images)
  rough, rng = copy.copy(decoder), np.random.default_rng(0)  # two updates have hardly moved its last layer
  moved = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), decoder.read['denoiser'])
  rough.read = {**decoder.read, 'denoiser': moved}
  assert (rough.draw(indices, {Z: -vectors})['x0'] != rough.draw(indices, {Z: vectors})['x0']).any()
  np.testing.assert_allclose(decoder.inputs_from_makers(indices, {}, 0)[Z], vectors, atol=1e-6)
  assert "the samples of 'embedding_prior'" in decoder.made_of and "the network 'clip'" in decoder.made_of
  lines = []
  monkeypatch.setattr(log, 'say', lines.append)
  decoder.config.refiner.sample.num_images = 6
  sample.sample(decoder, tmp_path)
  (table,) = (line for line in lines if 'network evaluations per image' in line)
  assert table.index('embedding_prior') < table.index('refiner')
  assert (tmp_path / 'samples.png').exists()


@pytest.mark.slow
def test_variations_and_the_image_again(decoder, tmp_path):
  rows = vary.vary(decoder, tmp_path)
  assert [row['set'] for row in rows] == ['again, eta 0', 'variations, eta 1']
  assert all(0 <= row['rms change'] <= 1 and -1 <= row['cosine of vectors'] <= 1 + 1e-6 for row in rows)
  assert json.loads((tmp_path / 'variations.json').read_text())['num_images'] == 2
  data, labels = decoder.eval_images(2)
  given = clips.given_of(decoder, data, labels)
  assert (given[words.TOKENS][:, :2] == [words.BOS, words.EOS]).all()  # of no words
  noise = clips.noise_of(decoder, data, given, 100)
  assert noise.shape == (2, 16, 16, 3)
  again = clips.drawn_from(decoder, given, noise, 100, 0.0)
  assert np.abs(again.astype(int) - data).mean() < 12
  Image.fromarray(data[0]).save(tmp_path / 'one.png')
  image, _ = vary.chosen(decoder, str(tmp_path / 'one.png'), 9, 'field')
  np.testing.assert_array_equal(image[0], data[0])


@pytest.mark.slow
def test_a_strip_from_one_caption_to_another(decoder, tmp_path):
  settings = decoder.config.text_diff
  with pytest.raises(UserError, match="config.text_diff.target is ''"):
    text_diff.text_diff(decoder, tmp_path)
  captions = decoder.captions
  other = next(text for text in captions if text != captions[0])
  settings.update({'source': captions[0], 'target': captions[0]})
  with pytest.raises(UserError, match='their vectors are the same'):
    text_diff.text_diff(decoder, tmp_path)
  for source in (captions[0], ''):
    settings.update({'source': source, 'target': other})
    rows = text_diff.text_diff(decoder, tmp_path)
    assert [row['theta'] for row in rows] == [0, 0.25, 0.5]
  settings.update({'target': 'a zebra'})
  with pytest.raises(UserError, match="'zebra', which no training caption has"):
    text_diff.text_diff(decoder, tmp_path)
  assert (tmp_path / 'text_diff.png').exists()


@pytest.mark.slow
def test_rows_between_the_vectors_of_two_images(decoder):
  rows = interpolate.rows_of(decoder, 0, np.linspace(0, 1, 3, dtype=np.float32), {})
  assert list(rows) == ['x_T', 'vector', 'vector and x_T']
  data, labels = decoder.eval_images(2)
  seen = decoder.observe(data, labels)[Z]
  fixed, moved = (rows[name].given for name in ('vector', 'vector and x_T'))
  np.testing.assert_allclose(fixed[Z][[0, 2]], seen, atol=1e-5)
  np.testing.assert_allclose(np.linalg.norm(fixed[Z], axis=1), 1, rtol=1e-5)
  np.testing.assert_array_equal(fixed[Z], moved[Z])
  assert (fixed[NOISE] == fixed[NOISE][:1]).all() and (moved[NOISE][0] != moved[NOISE][2]).any()
  assert (fixed[words.TOKENS][:, 2:] == words.PAD).all()


@pytest.mark.slow
def test_the_figures_of_the_prior(run):
  found = embedded.figures(opened(run, 'embedding_prior'))
  assert {'cosine_of_image', 'cosine_of_caption', 'cosine_to_caption'} < set(found)
  assert {'recall_1', 'recall_5', 'recall_1_captions', 'recall_5_captions'} < set(found)
  assert all(-1 <= figure.value <= 1 for figure in found.values())
  assert embedded.figures(opened(run)) == {} == embedded.figures(opened(run, 'clip'))


@pytest.mark.slow
def test_what_is_no_decoder_or_of_another_clip_is_refused(run, tmp_path):
  config, workdir = run
  with pytest.raises(UserError, match="--mode=vary needs a diffusion .* stage 'embedding_prior' is none"):
    vary.vary(opened(run, 'embedding_prior'), tmp_path)
  with pytest.raises(UserError, match="stage 'embedding_prior' draws no images"):
    opened(run, 'embedding_prior').draw(np.arange(2))
  copy = tmp_path / 'run'
  shutil.copytree(workdir, copy)
  shutil.rmtree(copy / 'clip')
  other = config.copy_and_resolve_references()
  other.seed = 1  # trained anew
  with pytest.MonkeyPatch.context() as patch:
    make_mesh = sharding.make_mesh
    patch.setattr(sharding, 'make_mesh', lambda config: make_mesh(config, jax.devices()[:1]))
    patch.setattr(train, 'first_images', lambda *run: {})
    patch.setattr(train, 'check_workdir', lambda *run: None)
    train.run_stages(other, copy, ('clip',))
  for stage in ('embedding_prior', 'refiner'):
    with pytest.raises(identity.Stale, match="the network 'clip'"):
      opened((config, copy), stage)


@pytest.mark.slow
def test_a_decoder_of_captions_vectors_draws_and_is_none_of_images(run, tmp_path):
  """Trained on another run's CLIP stage; its vectors follow from its captions, so that no prior is drawn."""
  config, workdir = run
  config = config.copy_and_resolve_references()
  config.stages = ('refiner',)
  of = {'of': 'caption', 'prior_stage': '', 'workdir': str(workdir)}
  config.refiner.conditions.clip_image.update(of)
  with pytest.MonkeyPatch.context() as patch:
    make_mesh = sharding.make_mesh
    patch.setattr(sharding, 'make_mesh', lambda config: make_mesh(config, jax.devices()[:1]))
    patch.setattr(train, 'first_images', lambda *run: {})
    train.run_stages(config, tmp_path / 'run', config.stages)
  own = opened((config, tmp_path / 'run'))
  indices = np.arange(3)
  images = own.draw(indices)['x0']
  told = {words.TOKENS: own.draw_inputs(indices, 0)[words.TOKENS]}
  vectors = scoring.Scorer(clips.open_clip(own)).texts(told[words.TOKENS])
  np.testing.assert_array_equal(own.draw(indices, {Z: vectors})['x0'], images)
  with pytest.raises(UserError, match=r"--mode=vary needs .*of = 'image'.* stage 'refiner' is none"):
    vary.vary(own, tmp_path)
  assert interpolate.embedding_rows(own, np.arange(2), np.linspace(0, 1, 3), {}, {}) == {}


def test_pictures_that_are_none_are_refused(tmp_path):
  data = importlib.import_module('configs.shapes16').get_config('').data
  Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / 'small.png')
  with pytest.raises(UserError, match='config.vary.image: .*small.png: the image is 8x8'):
    pictures.read(str(tmp_path / 'small.png'), data, 'config.vary.image')
  with pytest.raises(UserError, match='config.vary.image: .*nothing.png'):
    pictures.read(str(tmp_path / 'nothing.png'), data, 'config.vary.image')
  with pytest.raises(UserError, match="config.vary.image is ' , ': it names no file"):
    pictures.read(' , ', data, 'config.vary.image')


@pytest.mark.slow
def test_a_caption_becomes_a_vector_an_image_and_larger_images(tmp_path, one_device, monkeypatch, capsys):
  """DALL-E 2 whole: what enlarges reads the small image alone, and the caption is the first stage's."""
  monkeypatch.setattr(train, 'first_images', lambda *run: {})
  config = importlib.import_module('configs.shapes32').get_config('unclip,cascade,debug')
  config.data.data_dir = str(tmp_path / 'data')
  for stage in config.stages:
    config[stage].train.update({'num_steps': 2, 'grid_every_steps': 0})
  train.run_stages(config, tmp_path / 'run', config.stages)
  config.base.sample.captions = ('a disc of gray', 'a disc of hue two')
  config.sr_32.sample.num_images = 2
  sample.mode(Run(config, tmp_path / 'run', ('sr_32',), tmp_path / 'out'))
  drawn = Trained(config, tmp_path / 'run', 'sr_32', sharding.make_mesh(config.mesh)).draw(np.arange(2))
  assert list(drawn.values())[-1].shape == (2, *(config.data.image_size,) * 2, 3)
  said = capsys.readouterr().out
  for stage in ('embedding_prior', 'base', 'sr_16', 'sr_32'):
    assert re.search(rf'^{stage} +\d+ +2 ', said, re.MULTILINE), said
