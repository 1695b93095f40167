"""What a stage reads of others: networks that read captions know the same words."""

import pathlib
import types

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from vaediff import reads
from vaediff.experiments import base
from vaediff.machine import digests, sharding
from vaediff.models.functional import Model
from vaediff.models.unet_blocks import Mlp
from vaediff.run import captions, checkpoint, frozen
from vaediff.storage import identity

MODEL = Model(module=Mlp(features=1, dtype='float32'), inputs=())


def source(stage, workdir=''):
  return reads.FromStage(stage=stage, network='denoiser', workdir=workdir, model=MODEL)


@pytest.mark.parametrize(('digest', 'fits'), [('same', True), ('', True), (None, True), ('another', False)])
def test_a_teacher_of_other_words_is_refused(digest, fits, monkeypatch):
  asked = []

  def meta(folder, step=0):
    asked.append(folder)
    return {} if digest is None else {captions.DIGEST: digest}

  monkeypatch.setattr(checkpoint, 'load_meta', meta)
  monkeypatch.setattr(captions, 'tokenizer_of', lambda *args: types.SimpleNamespace(digest='same'))
  known = {
    'captions': reads.Captions(stage='student', workdir='', length=8, vocab_size=9),
    'teacher': source('refiner', 'elsewhere'),
  }
  if fits:
    frozen.check_tokenizers(known, ConfigDict(), pathlib.Path('run'))
  else:
    with pytest.raises(identity.Stale, match="network 'teacher'.*tokenizer"):
      frozen.check_tokenizers(known, ConfigDict(), pathlib.Path('run'))
  assert asked == [pathlib.Path('elsewhere/refiner')]


def test_stages_without_captions_ask_for_no_tokenizer(monkeypatch):
  monkeypatch.setattr(captions, 'tokenizer_of', None)
  frozen.check_tokenizers({'teacher': source('refiner')}, ConfigDict(), pathlib.Path('run'))


@pytest.mark.parametrize(
  ('stage', 'workdir', 'field'),
  [
    ('vae', 'elsewhere', 'refiner.vae.workdir'),
    ('autoencoder', 'elsewhere', 'refiner.autoencoder.workdir'),
    ('classifier', 'elsewhere', 'refiner.autoencoder.workdir'),  # none names it: the first of that run
    ('vae', 'nowhere', '<stage>...workdir'),
  ],
)
def test_of_two_fields_with_one_run_the_one_that_names_the_stage_is_said(stage, workdir, field):
  sections = {name: {'stage': name, 'workdir': 'elsewhere'} for name in ('autoencoder', 'vae')}
  config = ConfigDict({'refiner': {'start': {'stage': 'vae', 'workdir': ''}, **sections}})
  assert frozen.field_of(config, source(stage, workdir)) == field


class Reads(base.Experiment):
  networks, init, train_step, eval_step, sample = {}, None, None, None, None  # it does nothing else


def test_what_is_published_is_loaded_and_has_its_digest_made_once(monkeypatch, one_device):
  """Whatever opens a stage, or trains one, asks for the arrays and their id as often as it likes."""
  loaded, hashed, of_parts = [], [], digests.of_parts
  weights = {'kernel': np.arange(6, dtype=np.float32).reshape(2, 3)}
  monkeypatch.setattr(digests, 'of_parts', lambda tree: hashed.append(1) or of_parts(tree))
  published = reads.Published(load=lambda: loaded.append(1) or weights)
  monkeypatch.setattr(Reads, 'frozen', {'lpips': published})
  experiment = Reads()
  config = ConfigDict({'mesh': {'data': -1, 'fsdp': 1}})
  mesh, workdir, expected = sharding.make_mesh(config.mesh), pathlib.Path('run'), of_parts(weights)
  stored = {checkpoint.ID: 'its id', 'frozen': {'lpips': identity.digest(expected)}}
  monkeypatch.setattr(checkpoint, 'load_meta', lambda folder, step=0: stored)
  frozen.check_ids(experiment, workdir, workdir / 'vae')
  for training in ('', 'vae'):
    read = frozen.load(experiment, config, workdir, mesh, training=training)
    np.testing.assert_array_equal(read['lpips']['kernel'], weights['kernel'])
  assert frozen.ids(experiment, workdir, sampling=True) == {'lpips': identity.digest(expected)}
  assert jax.tree.map(np.shape, frozen.abstract(experiment, mesh)['lpips']) == {'kernel': (2, 3)}
  frozen.fresh(experiment, mesh)
  assert loaded == [1] and hashed == [1]
  stored['frozen'] = {'lpips': 'that of others'}
  with pytest.raises(identity.Stale, match="network 'lpips' that of others"):
    frozen.check_ids(experiment, workdir, workdir / 'vae')
