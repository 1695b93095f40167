"""Every number of a stage's section has a bound; what is outside is refused by name, without a program."""

import functools
import importlib
import math
import pathlib
import sys

import jax
import pytest
from ml_collections import ConfigDict

from vaediff import checks, experiments
from vaediff.conditions import label, low_resolution
from vaediff.errors import UserError
from vaediff.experiments import bounds, progressive
from vaediff.run import config as configs
from vaediff.run import students

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent.parent))
VARIANTS = {
  'vae': 'debug',
  'refiner': 'label,debug',
  'autoencoder': 'vq,debug',
  'decoder': 'light,debug',
  'ddgan': 'latent,debug',
  'distill_2': 'guided,distill,debug',
  'consistency': 'consistency,debug',
  'adversarial': 'adversarial,debug',
  'matching': 'matching,debug',
  'sr_8': 'cascade,debug',
  'noisy_classifier': 'classifier_guided,debug',
  'vqvae2': 'vqvae2,debug',
  'prior': 'prior,label,debug',
}
"""By stage, a variant of configs/digits.py that has it."""
ELSEWHERE = {
  *configs.STAGE_BOUNDS, *label.BOUNDS, *low_resolution.BOUNDS, 'train.profile_steps', 'sample.guidance',
  'sample.controls'
}  # fmt: skip
"""Of the loop, of a condition that is not always there, and what depends on the conditions."""


@functools.cache
def made(stage):
  name = {'distill_2': 'distill_guided'}.get(stage, stage)
  config = importlib.import_module('configs.digits').get_config(VARIANTS[stage])
  config.update_from_flattened_dict({'vae.prior.kind': 'gmm'} if stage == 'vae' else {})
  return students.resolve(config), name


def fresh(stage):
  config, name = made(stage)
  return config.copy_and_resolve_references(), name


def bounds_of(stage):
  config, name = made(stage)
  return experiments.BY_NAME[config[name].experiment].bounds


def numbers_of(stage):
  config, name = made(stage)
  return sorted(set(bounds.numeric_fields(config[name])) - ELSEWHERE)


FIELDS = [(stage, field) for stage in VARIANTS for field in numbers_of(stage)]


def put(section, field, value):
  """Sets a field whatever its type, as an edited config.json would."""
  *path, last = field.split('.')
  for name in path:
    section = section[name]
  with section.ignore_type(), section.unlocked():
    section[last] = value


@pytest.fixture
def no_program(monkeypatch):
  """Nothing is compiled and nothing is run."""

  def refused(*args, **kwargs):
    raise AssertionError('a program was made')

  monkeypatch.setattr(jax, 'jit', refused)


def test_every_number_of_every_section_has_a_bound():
  known = importlib.import_module('configs.stages')
  tables = {stage: bounds_of(stage) for stage in VARIANTS}
  tables = {**tables, 'distill': {**tables['distill_2'], **progressive.TEMPLATE_BOUNDS}}
  tables |= dict.fromkeys(known.cascade.STAGES, tables['sr_8'])
  tables |= dict.fromkeys(('vqvae', 'vqgan', 'dvae'), tables['autoencoder'])
  tables |= {name: experiments.BY_NAME[name].bounds for name in ('clip', 'embedding_prior')}
  tables |= dict.fromkeys(known.control.STAGES, experiments.BY_NAME['controlnet'].bounds)
  for stage, module in known.BY_NAME.items():
    missing = set(bounds.numeric_fields(module.section())) - set(tables[stage]) - ELSEWHERE
    assert not missing, f'{stage}: {missing}'
  classifier = set(bounds.numeric_fields(known.classifier.section()))
  assert not classifier - set(experiments.BY_NAME['classifier'].bounds) - ELSEWHERE
  assert len(FIELDS) > 150


@pytest.mark.parametrize('stage', VARIANTS)
def test_no_bound_is_of_a_field_that_is_not_there(stage):
  config, name = made(stage)
  for field in bounds_of(stage):
    part = config[name]
    for word in field.split('.'):
      part = part[word]


@pytest.mark.parametrize('stage', VARIANTS)
def test_defaults_are_within_their_bounds_and_need_no_program(stage, no_program):
  config, name = fresh(stage)
  experiments.build(config, name)


def wrong_values(stage, field):
  """Values that no field of its kind can have; of a tuple those as an item, and none at all."""
  config, name = made(stage)
  value = config[name]
  for word in field.split('.'):
    value = value[word]
  if isinstance(value, tuple):
    items = (math.nan, math.inf, -1, 1.5, 1e300, 'many', -0.5)
    wrong = [(item,) for item in items]
    return [*wrong, 'many', 3, *([] if value == () or 'attention' in field else [()])]
  least = () if 'mean' in field else (-1, -1e-9)
  return [math.nan, math.inf, -math.inf, 1e300 if isinstance(value, float) else 2**70, *least, -1e9]


@pytest.mark.parametrize(('stage', 'field'), FIELDS, ids=lambda value: value)
def test_what_is_outside_is_refused_by_name(stage, field, no_program):
  for value in wrong_values(stage, field):
    config, name = fresh(stage)
    put(config[name], field, value)
    with pytest.raises(UserError) as error:
      experiments.build(config, name)
    message = str(error.value)
    assert message.startswith(f'config.{name}: {field} must '), (value, message)
    assert str(value) in message or repr(value) in message, (value, message)


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('from_steps', 2**70),
    ('from_steps', 0),
    ('to_steps', -1),
    ('last_train_steps', -1),
    ('last_train_steps', 2**70),
    ('data_free_fraction', math.nan),
    ('data_free_calls', 0),
    ('guidance_weights', (0.0, math.inf)),
    ('guidance_weights', (0.0,)),
    ('guidance_weights', ('a', 'b')),
  ],
)
def test_what_halvings_are_made_of_is_checked_before_they_are(field, value):
  config = importlib.import_module('configs.digits').get_config('distill,debug')
  put(config.distill, field, value)
  with pytest.raises(UserError, match=f'^config.distill.{field} must '):
    students.resolve(config)


@pytest.mark.parametrize(
  ('bound', 'allowed', 'refused'),
  [
    (bounds.number(0, 5), (0, 2.5, 5), (-1e-9, 5.1, math.nan, math.inf, 'a', None, True, (1,))),
    (bounds.number(1, 5, above=True), (1.1, 5), (1, 0, 6)),
    (bounds.whole(1, 5), (1, 5), (0, 6, 1.5, 2.0, True, 2**70)),
    (bounds.sizes(8), ((1, 8),), ((), (0,), (9,), (1.5,), ('1',), 'ab', 3)),
    (bounds.sizes(8, empty=True), ((), (1,)), ((0,),)),
    (bounds.probabilities(), ((), (0.5, 0.5)), ((1.1,), (-0.1,), (math.nan,))),
    (bounds.several(bounds.whole(0, 9), 'digits', count=2), ((0, 9),), ((0,), (0, 1, 2), ())),
  ],
)
def test_bounds_of_numbers_and_of_several(bound, allowed, refused):
  for value in allowed:
    checks.check(ConfigDict({'x': value}), {'x': bound})
  for value in refused:
    assert not bound.holds(value)
    assert 'x' in bound.says('x', value) and str(value) in bound.says('x', value)


def test_a_number_says_the_end_that_it_is_beyond():
  bound = bounds.whole(1, 100_000)
  assert bound.says('sample.num_steps', 10**9) == 'sample.num_steps must be <= 100000, got 1000000000'
  assert bound.says('sample.num_steps', 0) == 'sample.num_steps must be >= 1, got 0'
  assert bound.says('sample.num_steps', 1.5) == 'sample.num_steps must be a whole number >= 1, got 1.5'


# Sections that contradict their experiment ------------------------------------------------------------


@pytest.mark.parametrize('stage', VARIANTS)
@pytest.mark.parametrize('other', experiments.BY_NAME)
def test_the_section_of_another_experiment_is_refused(stage, other):
  config, name = fresh(stage)
  if config[name].experiment == other:
    return
  config[name].experiment = other
  which = f"(experiment is '{other}', which has (no field|a teacher|a base)|has no section '{other}')"
  message = rf'config.{name}.*{which}'
  with pytest.raises(UserError, match=message):
    experiments.build(config, name)


@pytest.mark.parametrize(
  ('stage', 'field', 'value', 'message'),
  [
    ('refiner', 'vae.stage', 'refiner', 'vae.stage is .refiner., which is no VAE stage'),
    ('ddgan', 'autoencoder.stage', 'ddgan', 'autoencoder.stage is .ddgan., which is no autoencoder stage'),
    ('decoder', 'autoencoder.stage', 'decoder', 'autoencoder.stage is .decoder., which is no autoencoder'),
    ('matching', 'sample.num_steps', 65, 'sample.num_steps must be <= 64, got 65'),
    ('matching', 'start_stage', 'matching', 'start_stage is .matching., which is no stage of this run'),
    ('matching', 'teacher.stage', 'vae', 'teacher.stage is .vae., which is no stage .* that can teach'),
    ('adversarial', 'teacher.stage', 'none', 'teacher.stage is .none., which is no stage .* that can teach'),
    ('refiner', 'sample.grid', 'log', 'sample.grid is .log.; valid'),
    ('refiner', 'sample.guidance', ('label', 1.0), 'sample.guidance must be pairs .*, label; got .label.'),
    ('refiner', 'sample.guidance', (('label', math.inf),), 'sample.guidance must be pairs'),
    ('refiner', 'sample.guidance', (('label', math.nan),), 'sample.guidance must be pairs'),
    ('sr_8', 'conditions.low_resolution.dropout', 1.0, r'dropout must be in \[0, 1\), got 1.0'),
    ('sr_8', 'conditions.low_resolution.max_level', math.nan, r'max_level must be in \[0, 1\], got nan'),
    ('sr_8', 'conditions.low_resolution.factor', 2.5, 'low_resolution.factor is 2.5: it must divide'),
    ('refiner', 'model.dtype', 'float16', 'model.dtype is .float16.; valid: float32, bfloat16'),
    ('vae', 'model.encoder_blocks', '8x1000000', 'model.encoder_blocks: .8x1000000. is not a step'),
    ('vae', 'model.encoder_channels', '8:9999999', 'encoder_channels: .8:9999999. is not an entry'),
    ('vae', 'prior.num_components', (1.5,), 'prior.num_components must name counts >= 1, whole'),
    ('vae', 'train.best_measure', 'val/fid', 'best_measure is .val/fid.; metrics of this stage: val/loss'),
    ('ddgan', 'train.microbatches', 4, r'train.batch_size / train.microbatches is 2: it must be a multiple'),
    ('autoencoder', 'optim_discriminator.b1', 1.5, r': optim_discriminator.b1 must be in \[0, 1\)'),
    (
      'adversarial', 'optim_discriminator.end_learning_rate', 1.0,
      r'optim_discriminator.end_learning_rate must be in \[0, optim_discriminator.learning_rate\]',
    ),
  ],
)  # fmt: skip
def test_contradictions_are_messages(stage, field, value, message):
  config, name = fresh(stage)
  put(config[name], field, value)
  with pytest.raises(UserError, match=message):
    experiments.build(config, name)
