"""Guidance as a config says it: a weaker network, a noisy classifier, an interval; students; refusals."""

import importlib
import pathlib
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff import experiments, reads
from vaediff.diffusion import gaussian
from vaediff.errors import UserError
from vaediff.experiments import base, noisy_classifier
from vaediff.experiments.classifier import cross_entropy
from vaediff.run import students

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from random_parameters import made  # noqa: E402

EARLIER = {
  'refiner.sample.guide.stage': 'refiner',
  'refiner.sample.guide.step': 2,
  'refiner.sample.guidance': (('label', 1.0), ('guide', 0.5)),
}
COUNT = 4


def configured(variant, **changes):
  config = importlib.import_module('configs.digits').get_config(variant)
  config.update_from_flattened_dict(changes)
  return students.resolve(config)


def build(variant, stage='refiner', **changes):
  return experiments.build(configured(variant, **changes), stage)


def read_of(experiment):
  """Random parameters for all that it reads when it is sampled."""

  def one(name, source):
    match source:
      case reads.FromStage():
        return made(source.model, zlib.crc32(name.encode()) % 1000)
      case reads.Measured():
        return jax.tree.map(jnp.asarray, source.neutral())
      case reads.Published():
        return jax.tree.map(jnp.asarray, source.load())

  sources = {**experiment.frozen, **experiment.for_sampling}
  own = {name: made(model, number) for number, (name, model) in enumerate(experiment.networks.items())}
  return {**{name: one(name, source) for name, source in sources.items()}, **own}


def given_of(experiment, read):
  keys = base.sampling_keys(jax.random.split(jax.random.key(3), COUNT))
  return keys, experiment.draw(read, keys, jnp.arange(COUNT))


def values_of(experiment, read):
  _, given = given_of(experiment, read)
  return experiment.conditions.values(read, experiment.conditions.complete(read, given))


def state_of(space, seed=6):
  return jax.random.normal(jax.random.key(seed), (COUNT, *space.shape)), jnp.linspace(0.1, 0.9, COUNT)


# A weaker network -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_term_of_another_checkpoint():
  experiment = build('label,formulation2,debug', **EARLIER)
  (source,) = experiment.for_sampling.values()
  assert (source.stage, source.step, source.workdir, source.network) == ('refiner', 2, '', 'denoiser')
  assert 'guide' not in experiment.frozen and experiment.denoiser.calls_per_step == 3
  read = read_of(experiment)
  values, (y, t) = values_of(experiment, read), state_of(experiment.space)
  denoiser = experiment.denoiser
  weaker = denoiser.x0_hat({'denoiser': read['guide']}, values)(y, t)
  strong, null = denoiser.x0_hat(read, values)(y, t), denoiser.x0_hat(read, values, ('label',))(y, t)
  expected = jnp.clip(2.5 * strong - null - 0.5 * weaker, -1, 1)
  np.testing.assert_allclose(denoiser.denoise(read, values)(y, t), expected, atol=1e-5)
  assert float(jnp.max(jnp.abs(weaker - strong))) > 1e-2


@pytest.mark.slow
def test_a_stage_that_trains_is_drawn_without_it():
  experiment = build('label,debug', **EARLIER)
  alone = experiment.alone()
  assert not alone.for_sampling and [term.without for term in alone.denoiser.terms] == [('label',)]
  assert alone.networks == experiment.networks and alone.frozen.keys() == experiment.frozen.keys()
  read = {name: value for name, value in read_of(experiment).items() if name != 'guide'}
  keys, given = given_of(alone, read)
  assert alone.sample(read, given, keys)['x0'].shape == (COUNT, 8, 8, 1)
  guided = build('classifier_guided,debug')
  assert guided.denoiser.classifier and not guided.alone().denoiser.classifier


@pytest.mark.slow
def test_a_given_weight_takes_the_place_of_the_configured_one_alone():
  """A student of the weight is taught by the other terms, too."""
  experiment = build('label,debug', **EARLIER, **{'refiner.sample.guidance_weight': 7.0})
  read = read_of(experiment)
  values, (y, t) = values_of(experiment, read), state_of(experiment.space)
  w, denoiser = jnp.arange(float(COUNT)), experiment.denoiser
  weaker = denoiser.x0_hat({'denoiser': read['guide']}, values)(y, t)
  strong, null = denoiser.x0_hat(read, values)(y, t), denoiser.x0_hat(read, values, ('label',))(y, t)
  expected = strong + w[:, None, None, None] * (strong - null) + 0.5 * (strong - weaker)
  actual = denoiser.denoise(read, {**values, 'guidance': w})(y, t)
  np.testing.assert_allclose(actual, jnp.clip(expected, -1, 1), atol=1e-5)


def test_passes_are_counted_from_the_grid():
  """4 steps of DDIM: t = 1, 0.75, 0.5, 0.25; the interval holds the middle two."""
  experiment = build('label,debug', **EARLIER, **{'refiner.sample.guidance_interval': (1.0, 20.0)})
  level = np.exp(-0.5 * experiment.denoiser.schedule.logsnr(np.array([1, 0.75, 0.5, 0.25])))
  assert [1.0 < x <= 20 for x in level] == [False, True, True, False]
  assert experiment.num_function_evaluations == 4 + 2 * 2
  assert build('label,debug', **EARLIER).num_function_evaluations == 4 * 3
  heun = build(
    'label,debug', **EARLIER,
    **{'refiner.sample.guidance_interval': (1.0, 20.0), 'refiner.sample.sampler': 'heun'},
  )  # fmt: skip
  assert heun.num_function_evaluations == 7 + 2 * 4  # each of the two is an end of one step, and a start


# A classifier -----------------------------------------------------------------------------------------


SPACES = {
  'pixels': 'unconditional,classifier_guided,debug',
  'formulation2': 'formulation2,z,classifier_guided,debug',
  'label': 'label,classifier_guided,debug',
  'wavelets': 'unconditional,wavelet_diffusion,classifier_guided,debug',
  'latents': 'unconditional,latent_diffusion,classifier_guided,debug',
}


@pytest.mark.slow
@pytest.mark.parametrize('prediction', gaussian.PREDICTIONS)
@pytest.mark.parametrize('space', SPACES)
def test_a_classifier_guides_in_every_space_and_prediction(space, prediction):
  """x0_hat + s (sigma^2 / alpha) g, with g at y_t, and then clipped: at y_t and not at x_t."""
  changes = {'refiner.diffusion.prediction': prediction, 'refiner.sample.classifier.scale': 2.0}
  experiment = build(SPACES[space], **changes)
  classifier = build(SPACES[space], 'noisy_classifier', **changes)
  assert (classifier.space.shape, classifier.schedule) == (
    experiment.space.shape, experiment.denoiser.schedule
  )  # fmt: skip
  assert 'noisy_classifier' not in experiment.frozen
  read = read_of(experiment)
  values, (y, t) = values_of(experiment, read), state_of(experiment.space)
  np.testing.assert_array_equal(values['label'], np.arange(COUNT))
  denoiser, model = experiment.denoiser, classifier.classifier
  jacobian = jax.grad(
    lambda y: -jnp.sum(cross_entropy(model.apply(read['noisy_classifier'], y, t), jnp.arange(COUNT)))
  )(y)
  alpha, sigma = denoiser.schedule.alpha(t), denoiser.schedule.sigma(t)
  step = (2 * sigma**2 / alpha)[:, None, None, None] * jacobian
  assert float(jnp.max(jnp.abs(step))) > 1e-2
  expected = denoiser.x0_hat(read, values)(y, t) + step
  if experiment.space.bound is not None:
    expected = jnp.clip(expected, -1, 1)
  scale = 1 + float(jnp.max(jnp.abs(expected)))
  np.testing.assert_allclose(denoiser.denoise(read, values)(y, t), expected, atol=1e-4 * scale)


@pytest.mark.slow
def test_a_sample_is_guided_to_its_own_class():
  experiment = build(SPACES['pixels'], **{'refiner.sample.classifier.scale': 5.0})
  read = read_of(experiment)
  keys, given = given_of(experiment, read)
  assert experiment.num_groups == 10 and experiment.conditions.title == 'none'
  run = jax.jit(lambda label: experiment.sample(read, {**given, 'label': label}, keys)['x0'])
  first, other = run(jnp.array([0, 1, 2, 3])), run(jnp.array([0, 1, 2, 9]))
  np.testing.assert_allclose(first[:3], other[:3], atol=1e-5)
  assert float(jnp.max(jnp.abs(first[3] - other[3]))) > 1e-3


def test_the_noisy_classifier_reads_state_and_time_alone():
  classifier = build(SPACES['formulation2'], 'noisy_classifier')
  assert [struct.shape for struct in classifier.classifier.inputs] == [(1, 8, 8, 1), (1,)]
  assert not classifier.frozen and not classifier.draws_images
  assert set(build(SPACES['latents'], 'noisy_classifier').frozen) == {'autoencoder', 'latents'}


@pytest.mark.slow
def test_the_noisy_classifier_learns_and_reports_its_bins():
  changes = {'noisy_classifier.optim.learning_rate': 5e-3, 'noisy_classifier.train.num_steps': 60}
  classifier = build(SPACES['pixels'], 'noisy_classifier', **changes)
  state = classifier.init(jax.random.key(0))
  image = np.full((64, 8, 8, 1), 0, np.uint8)
  image[32:] = 255  # dark and bright: two classes
  batch = {'image': jnp.asarray(image), 'label': jnp.arange(64) // 32, 'mask': jnp.ones(64)}
  step, eval_step = jax.jit(classifier.train_step), jax.jit(classifier.eval_step)
  key = jax.random.key(1)
  for number in range(60):
    state, _ = step(state, {}, batch, jax.random.fold_in(key, number))
  read = {'noisy_classifier': state.networks['noisy_classifier'].params}
  found = {name: float(value) for name, value in eval_step(read, batch, jax.random.key(2)).items()}
  assert set(found) == set(classifier.metrics)
  names = noisy_classifier.ACCURACIES
  assert found[names[-1]] == 1.0 and found[names[0]] < found[names[-1]]  # not in noise


def test_bins_cover_the_schedule():
  for name in ('linear', 'cosine'):
    schedule = noisy_classifier.schedules.make_schedule(name)
    found = noisy_classifier.bins(schedule)
    assert found[0][1] == 1.0 and all(low < high for low, high in found)
    assert [low for low, _ in found[:-1]] == [high for _, high in found[1:]]
    edges = [float(schedule.logsnr(low)) for low, _ in found[:-1]]
    np.testing.assert_allclose(edges, [-3, -1, 1, 3], atol=1e-2)


# Students ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize('variant', ['label,distill', 'label,guided,distill', 'label,consistency'])
def test_a_student_is_taught_by_all_that_guides_its_teacher(variant):
  changes = {**EARLIER, 'refiner.sample.guidance_interval': (0.5, 30.0)}
  config = configured(f'{variant},debug', **changes)
  stage = next(name for name in config.stages if 'teacher' in config[name])
  if config[stage].teacher.stage != 'refiner':
    pytest.fail('the first student is not taught by the refiner')
  student = experiments.build(config, stage)
  assert student.frozen['teacher_guide'].step == 2 and not student.for_sampling
  assert student.student.denoiser.guiding_terms() == () and student.student.denoiser.interval == ()
  teacher = experiments.build(config, 'refiner')
  read = read_of(student)
  values, (y, t) = values_of(teacher, read), state_of(teacher.space)
  as_teacher = {'denoiser': read['teacher'], 'guide': read['teacher_guide']}
  expected = teacher.denoiser.denoise(as_teacher, values)(y, t)
  np.testing.assert_allclose(student.teacher.denoise(read, values)(y, t), expected, atol=1e-6)
  plain = teacher.denoiser.x0_hat(as_teacher, values)(y, t)
  assert float(jnp.max(jnp.abs(expected - jnp.clip(plain, -1, 1)))) > 1e-2


def test_a_student_of_a_classifiers_guidance_must_read_the_class():
  with pytest.raises(UserError, match="'refiner' is guided by a classifier .* does not read, label: train"):
    build('unconditional,classifier_guided,distill,debug', 'distill_2')
  student = build('label,classifier_guided,distill,debug', 'distill_2')
  assert student.teacher.classifier.network == 'teacher_noisy_classifier'
  assert 'teacher_noisy_classifier' in student.frozen


# Refused ----------------------------------------------------------------------------------------------


GUIDED = {'refiner.sample.guidance': (('guide', 0.5),)}
REFUSED = [
  (
    'label,debug', {**GUIDED},
    "got .'guide', 0.5.; sample.guide.stage names no weaker network",
  ),
  (
    'label,debug', {'refiner.sample.guide.stage': 'refiner', 'refiner.sample.guide.step': 2},
    "sample.guide.stage is 'refiner', but no term of sample.guidance is of it",
  ),
  (
    'label,debug', {**GUIDED, 'refiner.sample.guide.stage': 'refiner'},
    "sample.guide.stage is 'refiner' at its latest checkpoint, which is the stage itself",
  ),
  (
    'label,debug', {**GUIDED, 'refiner.sample.guide.stage': 'vae'},
    "sample.guide.stage is 'vae', which is no stage of this config with a denoiser",
  ),
  (
    'label,debug', {**EARLIER, 'refiner.sample.guide.workdir': '/nowhere'},
    "sample.guide.workdir is '/nowhere', whose stage 'refiner' has no section here yet",
  ),
  ('label,debug', {'refiner.sample.guidance_interval': (2.0, 1.0)}, r'got \(2.0, 1.0\)'),
  ('label,debug', {'refiner.sample.guidance_interval': (200.0, 300.0)}, r'levels from 0.01 to 157'),
  (
    'classifier_guided,debug', {'refiner.sample.classifier.stage': 'vae'},
    "sample.classifier.stage is 'vae', whose experiment is 'vae'; only one that was trained on noisy states",
  ),
  (
    'classifier_guided,debug', {'refiner.sample.classifier.stage': 'classifier'},
    "experiment is 'classifier'.*a classifier of clean images has no gradient at noise",
  ),
  (
    'classifier_guided,debug', {'noisy_classifier.diffusion.schedule': 'cosine'},
    "whose diffusion.schedule is 'cosine', but that of this one is 'linear'",
  ),
  (
    'classifier_guided,debug', {'noisy_classifier.space': 'wavelet'},
    r'a stage of the space wavelet \(4, 4, 4\), but this one is of pixel \(8, 8, 1\)',
  ),
  (
    'unconditional,latent_diffusion,classifier_guided,debug', {'noisy_classifier.autoencoder.scaling': 'max'},
    "space latent of 'autoencoder', max .* but this one is of latent of 'autoencoder', std",
  ),
  ('debug', {'refiner.sample.guidance_weight': 1.0}, r'guidance_weight is 1.0.*conditions.label.dropout > 0'),
]  # fmt: skip


@pytest.mark.parametrize(('variant', 'changes', 'message'), REFUSED)
def test_what_cannot_guide_is_refused_by_name(variant, changes, message):
  config = configured(variant, **changes)
  with pytest.raises(UserError, match=message) as error:
    experiments.build(config, 'refiner')
  assert str(error.value).startswith('config.refiner')


def other_stage(**changes):
  """A config with a second diffusion to be guided by, that differs in something."""
  config = configured('label,debug', **GUIDED)
  with config.unlocked():
    config.small = config.refiner.copy_and_resolve_references()
    config.small.sample.guidance = ()
    config.update_from_flattened_dict({f'small.{field}': value for field, value in changes.items()})
  config.refiner.sample.guide.stage = 'small'
  return config


@pytest.mark.slow
def test_a_smaller_network_of_the_same_inputs_can_guide():
  config = other_stage(**{'model.channels': 4, 'model.num_heads': 1, 'diffusion.prediction': 'x0'})
  experiment = experiments.build(config, 'refiner')
  assert experiment.for_sampling['guide'].model != experiment.denoiser.model
  read = read_of(experiment)
  values, (y, t) = values_of(experiment, read), state_of(experiment.space)
  assert bool(jnp.isfinite(experiment.denoiser.denoise(read, values)(y, t)).all())


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'diffusion.schedule': 'cosine'}, "whose diffusion.schedule is 'cosine', but .* 'linear'"),
    ({'space': 'wavelet'}, r'the space wavelet \(4, 4, 4\), but this one is of pixel'),
    ({'diffusion.z_conditioning': True}, r"'small', whose network reads .*z \(vector, .* but that of this"),
    ({'diffusion.condition': 'none'}, r'whose network reads label \(vector, 10\), but that of this stage'),
  ],
)
def test_a_network_of_other_inputs_space_or_schedule_cannot(changes, message):
  with pytest.raises(UserError, match=message):
    experiments.build(other_stage(**changes), 'refiner')


def test_a_network_that_reads_the_weight_takes_no_other_terms():
  config = configured('label,guided,distill,debug')
  stage = config.stages[-1]
  config[stage].sample.guidance = (('label', 1.0),)
  with pytest.raises(UserError, match='the network reads the guidance weight and is guided by that alone'):
    experiments.build(config, stage)
