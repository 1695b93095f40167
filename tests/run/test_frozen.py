"""What a stage reads of others: networks that read captions know the same words."""

import pathlib
import types

import pytest
from ml_collections import ConfigDict

from vaediff import reads
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
