"""The two stages of an edit: which network learns, where it begins, what stays; what is refused."""

import functools
import importlib
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from vaediff import experiments, reads
from vaediff.conditions.embedding import EMBEDDING, ETA
from vaediff.data import words
from vaediff.errors import UserError
from vaediff.experiments.denoiser import DENOISER
from vaediff.experiments.edit import EDIT_EMBEDDING, EDIT_FINETUNE, embedding_of
from vaediff.experiments.extended import FIRST
from vaediff.models import told_words
from vaediff.modes import edit_training
from vaediff.run import students

TESTS = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / 'experiments'), str(TESTS.parent)]
from random_parameters import made  # noqa: E402

from configs.stages import text as configs_text  # noqa: E402

CAPTION = jnp.array([[2, 5, 6, 3, 0, 0]])
IMAGE = np.arange(64, dtype=np.uint8).reshape(8, 8, 1) * 3


def config_of(variant='unconditional', **changes):
  """The quickstart's, with captions; the data set has none, but nothing here opens it."""
  config = importlib.import_module('configs.digits').get_config(f'{variant},debug')
  with config.unlocked():
    config.data.caption_feature = 'caption'
    config.refiner.text = configs_text.tokenizer('word', 12, 6)
    config.refiner.conditions.text = configs_text.tower()
    config.refiner.conditions.text.update({'width': 8, 'num_layers': 1, 'num_heads': 2})
    config.update_from_flattened_dict(changes)
  return students.resolve(config)


def build(stage, variant='unconditional', of='refiner', **changes):
  config = config_of(variant, **changes)
  made_of_it = edit_training.config_of(config, of, pathlib.Path('run'), IMAGE, 'five six')
  return experiments.build(made_of_it, stage)


@functools.cache
def read_by(stage):
  """An experiment, and what it reads: the network of the run is one of random parameters."""
  experiment = build(stage)
  read = {reads.CAPTIONS: {words.TOKENS: CAPTION}}
  for name, source in experiment.frozen.items():
    if isinstance(source, reads.FromStage):
      read[name] = made(source.model, 0 if name == FIRST else 1)
  return experiment, read


def updated(stage, count=2):
  """The state at step 0 and after updates."""
  experiment, read = read_by(stage)
  first = experiment.start(experiment.init(jax.random.key(0)), read)
  batch = {'image': jnp.repeat(jnp.asarray(IMAGE)[None], 8, axis=0), 'label': jnp.zeros(8, jnp.int32)}
  step, state = jax.jit(experiment.train_step), first
  for number in range(count):
    state, metrics = step(state, read, batch, jax.random.key(number))
  assert int(state.step) == count and np.isfinite(float(metrics['loss']))
  return first, state


@pytest.mark.slow
def test_the_first_stage_moves_the_vectors_that_are_read_and_nothing_else():
  experiment, read = read_by(EDIT_EMBEDDING)
  first, after = updated(EDIT_EMBEDDING)
  assert set(after.networks) == {EMBEDDING} == set(experiment.networks)
  before = np.asarray(first.networks[EMBEDDING].params[told_words.TOKENS])
  np.testing.assert_array_equal(before, embedding_of(experiment.conditions).target(read))
  moved = np.abs(after.networks[EMBEDDING].params[told_words.TOKENS] - before).max(axis=1)
  assert (moved[:5] > 0).all()  # the null's vector and four ids
  np.testing.assert_array_equal(moved[5:], 0)  # padding is read nowhere
  rate = config_of().edit.embedding.learning_rate
  np.testing.assert_allclose(moved[:5], 2 * rate, rtol=0.2)  # two of Adam's first steps


@pytest.mark.slow
def test_the_second_stage_moves_the_denoiser_but_for_its_tower():
  experiment, read = read_by(EDIT_FINETUNE)
  first, after = updated(EDIT_FINETUNE)
  assert set(after.networks) == {DENOISER} == set(experiment.networks)
  before, now = first.networks[DENOISER].params, after.networks[DENOISER].params
  jax.tree.map(np.testing.assert_array_equal, before, read[FIRST])
  tower = f'{words.TOKENS}_tower'
  jax.tree.map(np.testing.assert_array_equal, before[tower], now[tower])
  moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before, now)
  assert all(jax.tree.leaves({name: part for name, part in moved.items() if name != tower}))


def test_what_they_read_is_of_the_run_that_is_edited():
  for stage, own in ((EDIT_EMBEDDING, DENOISER), (EDIT_FINETUNE, FIRST)):
    experiment = build(stage)
    source = experiment.frozen[own]
    assert (source.stage, source.network) == ('refiner', DENOISER)
    assert pathlib.Path(source.workdir).name == 'run' and pathlib.Path(source.workdir).is_absolute()
    assert experiment.frozen[reads.CAPTIONS].workdir == source.workdir
    assert not experiment.networks.keys() & experiment.frozen.keys()
    assert set(experiment.inputs) == {ETA, 'noise'} and experiment.settings['sampler'] == 'ddim'
  assert build(EDIT_FINETUNE).frozen[EMBEDDING].workdir == ''
  latent = build(EDIT_FINETUNE, 'latent_diffusion,unconditional')
  assert all(pathlib.Path(latent.frozen[name].workdir).name == 'run' for name in ('autoencoder', 'latents'))


def test_guidance_is_that_of_the_captions():
  experiment = build(EDIT_FINETUNE, **{'refiner.sample.guidance_weight': 2.0})
  (term,) = experiment.denoiser.terms
  assert term.without == ('text',) and experiment.denoiser.calls_per_step == 2
  assert set(experiment.conditions.without(('text',), 2)) == {words.TOKENS}


@pytest.mark.parametrize(
  ('variant', 'of', 'changes', 'message'),
  [
    ('label', 'refiner', {'refiner.conditions.vae.aug_level': 0.0}, r'also reads label \(conditions.label\)'),
    ('distill', 'distill_2', {}, "'progressive', a student of .*; edit with its teacher"),
    ('ddgan', 'ddgan', {}, "'ddgan' is no diffusion that an edit could tune: its experiment is 'ddgan'"),
    (
      'unconditional',
      'refiner',
      {
        'refiner.sample.guide.stage': 'refiner',
        'refiner.sample.guide.step': 2,
        'refiner.sample.guidance': (('guide', 1.0),),
      },
      "refiner.sample.guide.stage is 'refiner': another network knows nothing of the optimised vectors",
    ),
  ],
)
def test_what_cannot_be_edited_with_is_refused_by_name(variant, of, changes, message):
  if 'ddgan' in variant:
    config = importlib.import_module('configs.digits').get_config('ddgan,debug')
    named = ConfigDict({'edit': {'stage': of, 'workdir': '', 'caption': '', 'picture': ''}})
    with config.unlocked():
      config[EDIT_EMBEDDING] = ConfigDict(
        {**named, 'experiment': EDIT_EMBEDDING, 'optim': config[of].optim, 'train': config[of].train,
         'sample': config[of].sample}
      )  # fmt: skip
    with pytest.raises(UserError, match=message):
      experiments.build(config, EDIT_EMBEDDING)
    return
  with pytest.raises(UserError, match=message):
    build(EDIT_EMBEDDING, variant, of, **changes)


def test_a_stage_without_captions_says_which_has_some():
  config = importlib.import_module('configs.digits').get_config('unconditional,debug')
  made_of_it = edit_training.config_of(config, 'refiner', pathlib.Path('run'), IMAGE, 'five six')
  made_of_it[EDIT_EMBEDDING].sample.captions = made_of_it.refiner.sample.captions = ()
  with pytest.raises(UserError, match='reads no captions.*reads nothing. Train one.*shapes16.py:text,mini'):
    experiments.build(made_of_it, EDIT_EMBEDDING)
