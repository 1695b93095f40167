"""The label as a condition: which classes are drawn, what a network makes of one, what a code is drawn of."""

import dataclasses
import importlib
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from vaediff import experiments
from vaediff.conditions import prior
from vaediff.conditions.label import Label
from vaediff.experiments import base
from vaediff.run import draw, students

TESTS = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / 'experiments'), str(TESTS.parent)]
from random_parameters import frozen_of, made  # noqa: E402


def build(variant='unconditional,label', stage='refiner', **changes):
  config = importlib.import_module('configs.digits').get_config(f'{variant},debug')
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  return experiments.build(students.resolve(config), stage)


def read_of(experiment):
  return {**frozen_of(experiment), 'denoiser': made(experiment.denoiser.model, 0)}


# Which classes ------------------------------------------------------------------------------------


def test_all_classes_are_drawn_in_turn_or_those_that_are_chosen():
  indices = jnp.arange(7)
  one = Label(num_classes=3, dropout=0.1)
  assert one.classes == (0, 1, 2) and one.num_groups == 3
  drawn = one.draw({}, jax.random.split(jax.random.key(0), 7), indices)
  assert drawn['label'].tolist() == [0, 1, 2, 0, 1, 2, 0] and drawn['label'].dtype == jnp.int32
  chosen = dataclasses.replace(one, chosen=(2, 0))
  assert chosen.classes == (2, 0) and chosen.num_groups == 2
  drawn = chosen.draw({}, jax.random.split(jax.random.key(0), 7), indices)
  assert drawn['label'].tolist() == [2, 0, 2, 0, 2, 0, 2] and drawn['label'].dtype == jnp.int32
  assert chosen.for_training() == one  # what a picture shows is no matter of training


def test_a_bound_counts_the_label_too():
  experiment = build()
  nats = experiment.conditions.nats({}, jnp.zeros((3, 8, 8, 1)))
  assert experiment.likelihood and list(nats) == ['label']
  np.testing.assert_allclose(nats['label'], np.full(3, np.log(10)), rtol=1e-6)


@pytest.mark.parametrize('labels', [(), (3,), (7, 3, 3)])
def test_the_stage_says_of_which_class_each_sample_is(labels):
  experiment = build(**{'refiner.sample.labels': labels})
  indices = np.array([0, 5, 11, 3])
  keys = draw.image_keys(0, jnp.asarray(indices))
  drawn = experiment.draw({}, keys, jnp.asarray(indices))
  asked = experiment.classes_of(indices)
  np.testing.assert_array_equal(asked, drawn['label'])
  assert asked.dtype == np.int32 and experiment.num_groups == len(labels or range(10))
  assert build('unconditional').classes_of(indices) is None


def test_a_student_is_taught_all_classes_whatever_its_pictures_show():
  """Examples free of data draw a label, and sample.labels chooses those of pictures alone."""
  for stage, variant in (('distill_2', 'distill'), ('consistency', 'consistency')):
    changes = {'refiner.sample.labels': (3, 7), 'refiner.diffusion.prediction': 'v'}
    experiment = build(f'unconditional,label,{variant}', stage, **changes)
    assert experiment.classes == (3, 7)
    labels = np.concatenate([
      experiment.drawn_values({}, jax.random.key(seed), 4)['label'] for seed in range(20)
    ])  # fmt: skip
    assert set(labels) == set(range(10))


# What the network makes of it ---------------------------------------------------------------------


@pytest.mark.slow
def test_dropped_is_the_last_row_of_the_table_bit_for_bit():
  experiment = build()
  read, denoiser = read_of(experiment), experiment.denoiser
  y, t = jax.random.normal(jax.random.key(1), (4, 8, 8, 1)), jnp.full(4, 0.5)
  labels = jnp.array([0, 3, 7, 9])
  dropped = denoiser.output(read, y, t, {'label': labels}, {'label': jnp.ones(4, bool)})
  np.testing.assert_array_equal(dropped, denoiser.output(read, y, t, {'label': jnp.full(4, 10)}))
  np.testing.assert_array_equal(
    denoiser.x0_hat(read, {'label': labels}, ('label',))(y, t),
    denoiser.x0_hat(read, {'label': labels[::-1]}, ('label',))(y, t),
  )
  kept = denoiser.output(read, y, t, {'label': labels})
  assert float(jnp.abs(kept - dropped).min(axis=0).max()) > 0 and float(jnp.abs(kept - dropped).max()) > 1e-3


@pytest.mark.slow
def test_an_example_depends_on_its_own_label_alone():
  experiment = build()
  read, denoiser = read_of(experiment), experiment.denoiser
  y, t = jax.random.normal(jax.random.key(1), (4, 8, 8, 1)), jnp.full(4, 0.5)
  labels = jnp.array([0, 3, 7, 9])
  before = denoiser.output(read, y, t, {'label': labels})
  after = denoiser.output(read, y, t, {'label': labels.at[1].set(4)})
  np.testing.assert_array_equal(np.delete(before, 1, 0), np.delete(after, 1, 0))
  assert float(jnp.abs(before[1] - after[1]).max()) > 1e-3


@pytest.mark.slow
def test_the_gradient_reaches_the_rows_of_the_batch_and_that_of_the_dropped():
  experiment = build(**{'refiner.conditions.label.dropout': 0.5})
  read = read_of(experiment)
  labels = jnp.array([0, 3, 3, 7, 7, 9, 9, 9])

  def loss(params, key):
    x0 = jax.random.normal(jax.random.key(1), (8, 8, 8, 1))
    own = {**read, 'denoiser': params}
    return experiment.denoiser.losses(own, x0, {'label': labels}, key, training=True).sum()

  table = jax.grad(loss)(read['denoiser'], jax.random.key(3))['label_table']['embedding']
  reached = set(np.flatnonzero(np.abs(table).max(axis=1)).tolist())
  assert 10 in reached and reached & {0, 3, 7, 9} and reached <= {0, 3, 7, 9, 10}


@pytest.mark.slow
def test_an_image_depends_on_its_key_and_label_alone():
  experiment = build('formulation2,z,guided,label', **{'refiner.sample.labels': (3, 7)})
  read = read_of(experiment)
  run = jax.jit(draw.sampler(experiment))
  some, _ = run(read, jnp.arange(4), {}, 0)
  others, _ = run(read, jnp.array([9, 2, 7, 0]), {}, 0)
  for name in ('x0_vae', 'x0'):
    difference = np.abs(np.asarray(some[name], int)[[2, 0]] - np.asarray(others[name], int)[[1, 3]])
    assert difference.max() <= 1


# With a VAE: a code of the same class -------------------------------------------------------------

MIXTURE = {
  'weights': np.array([0.2, 0.3, 0.5], np.float32),
  'means': np.array([[4.0, 0.0], [-4.0, 0.0], [0.0, 4.0]], np.float32),
}
FACTORS = {
  'diag': np.full((3, 2), 0.5, np.float32),
  'full': np.tile(np.array([[0.5, 0.0], [0.2, 0.4]], np.float32), (3, 1, 1)),
  'tied': np.array([[0.5, 0.0], [0.2, 0.4]], np.float32),
}


@pytest.mark.parametrize('covariance', FACTORS)
def test_components_are_of_the_classes_whose_codes_they_hold(covariance):
  mixture = {**MIXTURE, covariance: FACTORS[covariance]}
  rng = np.random.default_rng(0)
  component = rng.integers(0, 3, 900)
  factor = FACTORS[covariance]
  factor = {'diag': np.diag([0.5, 0.5]), 'full': factor[0], 'tied': factor}[covariance]
  z = mixture['means'][component] + rng.normal(size=(900, 2)) @ factor.T
  labels = np.where(component == 2, 0, 2)  # class 2 has two components, class 0 one, class 1 and 3 none
  weights = prior.of_classes(mixture, z, labels, 4)
  assert weights.shape == (4, 3) and weights.dtype == np.float32
  np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
  np.testing.assert_allclose(weights[0], [0, 0, 1], atol=0.01)
  np.testing.assert_allclose(weights[2], [0.5, 0.5, 0], atol=0.06)
  np.testing.assert_allclose(weights[[1, 3]], [mixture['weights']] * 2, rtol=1e-6)
  # each share is the density of the component over that of all
  shares = prior.shares_of(mixture, z[:5])
  covariances = factor @ factor.T
  for row, code in enumerate(z[:5]):
    off = code - mixture['means']
    logs = -0.5 * np.einsum('kd,de,ke->k', off, np.linalg.inv(covariances), off)
    density = mixture['weights'] * np.exp(logs)
    np.testing.assert_allclose(shares[row], density / density.sum(), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize('covariance', FACTORS)
def test_a_class_has_a_mixture_of_its_own_codes_and_a_rare_one_the_components_that_hold_it(covariance):
  mixture = {**MIXTURE, covariance: FACTORS[covariance]}
  rng = np.random.default_rng(0)
  places = np.array([[4.0, 0.0], [-4.0, 0.0], [0.0, 4.0]])
  labels = np.concatenate([np.repeat([0, 1], 300), np.full(5, 2)])
  z = places[[0, 1, 2]][labels] + 0.1 * rng.normal(size=(605, 2))
  z[:150, 1] += 8  # class 0 lies in two places, of which the mixture knows one
  section = ConfigDict({'num_components': (2, 6), 'covariance': covariance, 'holdout_fraction': 0.1})
  found = prior.fit_classes(mixture, z, labels, 3, section, 0)
  assert set(found) == set(prior.arrays_of_classes(section))
  keys = jax.random.split(jax.random.key(0), (3, 1000))
  weights = jnp.asarray(found.pop('class_weights'))
  np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
  np.testing.assert_allclose(found['weights'], weights.mean(axis=0), rtol=1e-6)
  drawn = [
    np.asarray(prior.draw(found, own, 2, jnp.tile(row, (1000, 1))))
    for own, row in zip(keys, weights, strict=True)
  ]
  above = drawn[0][:, 1] > 4
  assert 0.44 < above.mean() < 0.56
  np.testing.assert_allclose(drawn[0][above].mean(axis=0), [4, 8], atol=0.05)
  np.testing.assert_allclose(drawn[0][above].std(axis=0), 0.1, rtol=0.3)
  np.testing.assert_allclose(drawn[1].mean(axis=0), [-4, 0], atol=0.03)
  np.testing.assert_allclose(
    drawn[2].mean(axis=0), [0, 4], atol=0.1
  )  # five codes: the component of the mixture
  assert drawn[2].std(axis=0).min() > 0.35


@pytest.mark.slow
def test_a_code_is_of_the_class_that_the_sample_is_asked_to_be_of():
  means = np.zeros((3, 16), np.float32)
  means[:, 0] = [-6.0, 0.0, 6.0]
  mixture = {
    'weights': np.full(3, 1 / 3, np.float32), 'means': means, 'diag': np.full((3, 16), 0.3, np.float32)
  }  # fmt: skip
  table = np.full((10, 3), 1 / 3, np.float32)
  table[3], table[7] = [0, 1, 0], [0.5, 0, 0.5]
  for labels in ((3, 7), ()):
    experiment = build('label', **{'refiner.sample.labels': labels})
    read = {**read_of(experiment), 'prior': mixture, 'prior_of_classes': {**mixture, 'class_weights': table}}
    indices = jnp.arange(400)
    drawn = experiment.draw(read, draw.image_keys(0, indices), indices)
    z, label = np.asarray(drawn['z'][:, 0]), np.asarray(drawn['label'])
    assert np.abs(z[label == 3]).max() < 2 and np.abs(z[label == 7]).min() > 4
    if not labels:
      assert np.abs(z[label == 0]).min() < 2 and np.abs(z[label == 0]).max() > 4


def test_without_a_mixture_or_a_label_the_code_is_that_of_before():
  """N(0, I) has no components, and a stage without a label reads no classes of them."""
  experiment = build('label')
  read = {name: experiment.frozen[name].neutral() for name in ('prior', 'prior_of_classes')}
  assert read == {'prior': {}, 'prior_of_classes': {}}
  indices = jnp.arange(5)
  plain = build('formulation1')
  assert set(plain.frozen) == {'vae', 'prior'}
  assert set(experiment.frozen) == {'vae', 'prior', 'prior_of_classes'}
  both = [one.draw(read, draw.image_keys(0, indices), indices)['z'] for one in (experiment, plain)]
  np.testing.assert_array_equal(*both)


# Students -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('variant', 'stage'),
  [('distill', 'distill_guided'), ('consistency', 'consistency'), ('adversarial', 'adversarial'),
   ('matching', 'matching')],
)  # fmt: skip
def test_a_guided_teacher_of_labels_can_teach(variant, stage):
  """`guided` drops the label alone where there is no VAE, in any order of the variants."""
  names = {}
  for order in (f'unconditional,label,guided,{variant}', f'guided,unconditional,label,{variant}'):
    experiment = build(order, stage, **{'refiner.diffusion.prediction': 'v'})
    teacher = experiment.teacher
    names[order] = [(term.weight, term.without) for term in teacher.terms]
    assert experiment.conditions.droppable == ('label',) and experiment.classes == tuple(range(10))
  assert set(map(str, names.values())) == {"[(0.5, ('label',))]"}


def test_guided_without_anything_to_drop_is_still_refused():
  with pytest.raises(base.UserError, match='guidance_weight > 0 needs a network .*here none is dropped'):
    build('unconditional,guided')
