"""Captions as a condition: which are drawn, what a network makes of them, a trained network with them."""

import dataclasses
import functools
import importlib
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff import experiments, reads
from vaediff.conditions.text import Text
from vaediff.data import words
from vaediff.errors import UserError
from vaediff.experiments import extended
from vaediff.models import text_tower
from vaediff.models.text_tower import Tower
from vaediff.run import draw, students

TESTS = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / 'experiments'), str(TESTS.parent)]
from random_parameters import frozen_of, made  # noqa: E402

from configs.stages import text as configs_text  # noqa: E402

LENGTH = 6
CAPTIONS = jnp.array([[2, 5, 6, 3, 0, 0], [2, 7, 3, 0, 0, 0], [2, 8, 5, 9, 3, 0], [2, 6, 5, 3, 0, 0]])
NULL = jnp.array([[2, 3, 0, 0, 0, 0]] * 4)
"""Captions of no words, as the tokenizer writes them."""


def config_of(variant='unconditional', **changes):
  """The quickstart's, with captions; the data set has none, but nothing here opens it."""
  config = importlib.import_module('configs.digits').get_config(f'{variant},debug')
  with config.unlocked():
    config.data.caption_feature = 'caption'
    config.refiner.text = configs_text.tokenizer('word', 12, LENGTH)
    config.refiner.conditions.text = configs_text.tower()
    config.refiner.conditions.text.update({'width': 8, 'num_layers': 1, 'num_heads': 2})
    config.update_from_flattened_dict(changes)
  return students.resolve(config)


def build(variant='unconditional', stage='refiner', **changes):
  return experiments.build(config_of(variant, **changes), stage)


@functools.cache
def network():
  """The network with random parameters, and (tokens, dropped) -> its output."""
  experiment = build()
  denoiser, read = experiment.denoiser, {'denoiser': made(experiment.denoiser.model, 0)}
  y, t = jax.random.normal(jax.random.key(1), (4, 8, 8, 1)), jnp.full(4, 0.5)

  @jax.jit
  def run(tokens, dropped):
    values = experiment.conditions.values({}, {words.TOKENS: tokens})
    return denoiser.output(read, y, t, values, {words.TOKENS: dropped})

  return lambda tokens, dropped=(0, 0, 0, 0): run(tokens, jnp.bool_(dropped))


# Which captions -----------------------------------------------------------------------------------


def test_captions_are_drawn_in_turn():
  one = Text(length=LENGTH, vocab_size=12, tower=Tower(), how='attention', dropout=0.1, stage='refiner')
  read = {reads.CAPTIONS: {words.TOKENS: CAPTIONS[:3]}}
  drawn = one.draw(read, jax.random.split(jax.random.key(0), 5), jnp.array([0, 1, 2, 3, 7]))
  np.testing.assert_array_equal(drawn[words.TOKENS], CAPTIONS[np.array([0, 1, 2, 0, 1])])
  assert drawn[words.TOKENS].dtype == jnp.int32
  assert one.num_groups == 0 and dataclasses.replace(one, chosen=('a', 'b')).num_groups == 2
  assert dataclasses.replace(one, chosen=('a',)).for_training() == one


def test_captions_of_the_data_come_with_the_batch():
  one = build().conditions.each[0]
  x = jnp.zeros((4, 8, 8, 1))
  seen = one.observe({}, {'label': jnp.zeros(4), words.TOKENS: CAPTIONS}, x, None)
  np.testing.assert_array_equal(seen[words.TOKENS], CAPTIONS)
  assert one.observe({}, {'label': jnp.zeros(4)}, x, None) == {}


def test_padding_is_the_same_number_in_both_rooms():
  assert text_tower.PAD == words.PAD


# What the network makes of them -------------------------------------------------------------------


@pytest.mark.slow
def test_dropped_is_the_caption_of_no_words_bit_for_bit():
  run = network()
  dropped = run(CAPTIONS, (1, 1, 0, 1))
  np.testing.assert_array_equal(dropped, run(NULL.at[2].set(CAPTIONS[2])))
  assert np.abs(dropped - run(CAPTIONS)).max(axis=(1, 2, 3))[np.array([0, 1, 3])].min() > 1e-3


@pytest.mark.slow
def test_an_image_depends_on_its_own_caption_and_on_the_order_of_its_words():
  run = network()
  known, other = run(CAPTIONS), run(CAPTIONS.at[1].set(CAPTIONS[2]))
  np.testing.assert_array_equal(np.delete(known, 1, 0), np.delete(other, 1, 0))
  assert np.abs(known[1] - other[1]).max() > 1e-3
  turned = run(CAPTIONS.at[0].set(CAPTIONS[3]))  # the same two words
  assert np.abs(known[0] - turned[0]).max() > 1e-4


@pytest.mark.slow
def test_guidance_is_against_no_words():
  """(1 + w) of the caption less w of none: by the terms that every condition has."""
  experiment = build(**{'refiner.sample.guidance_weight': 2.0, 'refiner.sample.clip': 'none'})
  denoiser, read = experiment.denoiser, {'denoiser': made(experiment.denoiser.model, 0)}
  y, t = jax.random.normal(jax.random.key(1), (4, 8, 8, 1)), jnp.full(4, 0.5)
  assert denoiser.calls_per_step == 2

  @jax.jit
  def run(tokens):
    values = experiment.conditions.values({}, {words.TOKENS: tokens})
    return denoiser.denoise(read, values)(y, t), denoiser.x0_hat(read, values)(y, t)

  guided, conditional = run(CAPTIONS)
  _, without = run(NULL)
  np.testing.assert_allclose(guided, 3 * conditional - 2 * without, atol=1e-4)
  assert np.abs(guided - conditional).max() > 1e-3


@pytest.mark.slow
def test_an_image_is_the_same_on_one_device_and_on_eight():
  from vaediff.machine import sharding

  experiment = build()
  read = {**frozen_of(experiment), 'denoiser': made(experiment.denoiser.model, 0)}
  found = []
  for count in (1, 8):
    mesh = jax.make_mesh((count, 1), ('data', 'fsdp'), devices=jax.devices()[:count],
                         axis_types=(jax.sharding.AxisType.Auto,) * 2)  # fmt: skip
    drawing = draw.Drawer(experiment, mesh, 0, (8, 8, 1), lambda: None)
    found.append(drawing(sharding.replicate(read, mesh), np.arange(8))['x0'].astype(int))
  assert np.abs(found[0] - found[1]).max() <= 1 and found[0].max() > found[0].min()


# Beside the other conditions, and in students ------------------------------------------------------


def test_it_stands_beside_a_label_and_a_noised_image_and_each_is_dropped_alone():
  changes = {'refiner.diffusion.condition_dropout': 0.2, 'refiner.conditions.vae.aug_level': 0.3}
  experiment = build('formulation2,z,label', **changes)
  assert [one.name for one in experiment.conditions.each] == ['vae', 'label', 'text']
  drop = experiment.conditions.drop(jax.random.key(0), 4000)
  assert float(jnp.mean(drop[words.TOKENS])) == pytest.approx(0.1, abs=0.02)
  assert float(jnp.mean(drop[words.TOKENS] & drop['label'])) == pytest.approx(0.01, abs=0.006)
  assert set(experiment.conditions.without(('text',), 2)) == {words.TOKENS}


def test_a_student_reads_the_same_words_and_begins_as_its_teacher():
  changes = {
    'refiner.diffusion.prediction': 'v',
    'refiner.conditions.text.extends.workdir': 'elsewhere',
    'refiner.sample.captions': ('a', 'b'),
  }
  config = config_of('unconditional,consistency', **changes)
  assert config.consistency.text == config.refiner.text
  student, teacher = (experiments.build(config, stage) for stage in ('consistency', 'refiner'))
  assert student.conditions.ports == teacher.conditions.ports
  assert extended.FIRST in teacher.starts and not student.starts
  assert student.num_groups == 2


# A trained network that is given captions -----------------------------------------------------------


@pytest.mark.slow
def test_a_diffusion_begins_as_one_without_captions_and_draws_the_same():
  experiment = build(**{'refiner.conditions.text.extends.workdir': 'elsewhere'})
  source = experiment.starts[extended.FIRST]
  assert (source.stage, source.workdir, source.section) == ('refiner', 'elsewhere', 'refiner')
  plain = experiments.build(
    students.resolve(importlib.import_module('configs.digits').get_config('unconditional,debug')), 'refiner'
  )
  assert source.model == plain.denoiser.model
  trained = made(source.model, 3)
  state = jax.jit(experiment.start)(jax.jit(experiment.init)(jax.random.key(0)), {extended.FIRST: trained})
  y, t = jax.random.normal(jax.random.key(1), (4, 8, 8, 1)), jnp.full(4, 0.5)
  wanted = jax.jit(plain.denoiser.output)({'denoiser': trained}, y, t, {})
  for params in (state.networks['denoiser'].params, state.eval_params['denoiser']):
    got = jax.jit(experiment.denoiser.output)({'denoiser': params}, y, t, {words.TOKENS: CAPTIONS})
    np.testing.assert_array_equal(got, wanted)


# Refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'data.caption_feature': ''}, r"reads captions .*data.caption_feature is ''"),
    ({'refiner.conditions.text.num_heads': 3}, r'num_heads is 3, which does not divide .*width 8'),
    ({'refiner.conditions.text.how': 'concat'}, r"how is 'concat'; valid: attention, transformer"),
    ({'refiner.text.length': 2}, r'text.length must be .* got 2'),
    ({'refiner.sample.captions': ('a', 3)}, r'sample.captions must be captions, .*got \(.a., 3\)'),
    (
      {'refiner.sample.captions': ('a', ' '), 'refiner.conditions.text.dropout': 0.0},
      r'sample.captions has no words at place 1, and the stage has no null',
    ),
    (
      {'refiner.conditions.text.extends.workdir': 'x', 'refiner.conditions.text.how': 'transformer'},
      r"extends names 'x', .*how = 'transformer' takes the place of; use how = 'attention'",
    ),
    (
      {'refiner.sample.guidance_weight': 1.0, 'refiner.conditions.text.dropout': 0.0},
      'guidance_weight > 0 needs a network trained',
    ),
  ],
)
def test_what_cannot_be_is_refused(changes, message):
  with pytest.raises(UserError, match=message):
    build(**changes)


def test_captions_of_a_stage_that_reads_none_are_refused():
  config = importlib.import_module('configs.digits').get_config('unconditional,debug')
  config.refiner.sample.captions = ('a red ring',)
  with pytest.raises(UserError, match=r'sample.captions must be \(\) in a stage that reads no captions'):
    experiments.build(config, 'refiner')
  with pytest.raises(ValueError, match="config 'cifar10' has no captions"):
    importlib.import_module('configs.cifar10').get_config('text')


def test_ids_of_another_length_are_refused():
  one = build().conditions
  with pytest.raises(UserError, match=r'tokens must be 6 ids per image \(text.length\), got \(4,\)'):
    one.values({}, {words.TOKENS: CAPTIONS[:, :4]})
