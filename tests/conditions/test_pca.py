"""The PCA of a code, on a latent whose answer is known; and the ways that do not work, with the reason why.

The latent is that of a VAE of which 80 of 128 units have collapsed: their means vary by 3e-4, their posterior
is the prior. The other 48 have means of deviation .97, and what is left of unit variance for the posterior.
"""

import functools
import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff import checks, reads
from vaediff.conditions import make_conditions, pca
from vaediff.errors import UserError
from vaediff.models.ports import Port
from vaediff.spaces.pixels import Pixels

DIM, ACTIVE, COUNT, SIGNAL = 128, 48, 4000, 0.97
SETTINGS = {'num_directions': 0, 'min_signal': 0.1, 'floor': 0.01}
SOUND = functools.partial(dict, SETTINGS)


@functools.cache
def latent():
  """Mean and log variance of q(z | x) of COUNT images, and one z of each."""
  rng = np.random.default_rng(0)
  mean = rng.standard_normal((COUNT, DIM)) * np.where(np.arange(DIM) < ACTIVE, SIGNAL, 3e-4) + 0.2
  variance = np.broadcast_to(np.where(np.arange(DIM) < ACTIVE, 1 - SIGNAL**2, 1.0), mean.shape)
  z = mean + np.sqrt(variance) * rng.standard_normal(mean.shape)
  return mean, np.log(variance), z


def of_prior(count=COUNT):
  return 0.2 + np.random.default_rng(9).standard_normal((count, DIM))


@functools.cache
def spectrum():
  mean, logvar, _ = latent()
  return pca.spectrum_of([(mean[rows], logvar[rows]) for rows in np.array_split(np.arange(COUNT), 7)], 'vae')


def arrays(**changes):
  return pca.arrays_of(spectrum(), SOUND(**changes), 'vae')


def code(found, z):
  return np.asarray(pca.code_of(found, jnp.asarray(z, jnp.float32)))


# What is measured -------------------------------------------------------------------------------------


def test_moments_of_parts_are_those_of_the_whole_in_any_order():
  rng = np.random.default_rng(1)
  mean = 50 + rng.standard_normal((101, 6)) @ rng.standard_normal((6, 6))
  logvar = rng.standard_normal((101, 6))
  parts = [(mean[rows], logvar[rows]) for rows in np.split(np.arange(101), [1, 40, 47])]
  for order in itertools.permutations(parts):
    found = functools.reduce(pca.joined, (pca.moments_of(*part) for part in order))
    assert found.count == 101
    np.testing.assert_allclose(found.mean, mean.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.scatter / 101, np.cov(mean.T, bias=True), rtol=0, atol=1e-10)
    np.testing.assert_allclose(found.noise, np.exp(logvar).mean(axis=0), rtol=1e-12)


def test_directions_are_orthonormal_and_leave_out_what_their_eigenvalues_say():
  mean, logvar, _ = latent()
  found = spectrum()
  directions, signal = found['directions'], found['signal']
  np.testing.assert_allclose(directions.T @ directions, np.eye(DIM), atol=1e-12)
  assert (np.diff(signal) <= 0).all() and int(found['count']) == COUNT
  largest = np.argmax(np.abs(directions), axis=0)
  assert (directions[largest, np.arange(DIM)] > 0).all()
  centred = mean - mean.mean(axis=0)
  for k in (1, 20, 48, 128):
    left = centred - centred @ directions[:, :k] @ directions[:, :k].T
    assert np.square(left).sum(axis=1).mean() == pytest.approx(signal[k:].sum(), abs=1e-9)
  # the scales are of z, by the law of total covariance
  total = np.cov(mean.T, bias=True) + np.diag(np.exp(logvar).mean(axis=0))
  np.testing.assert_allclose(found['spread'], np.diag(directions.T @ total @ directions), rtol=1e-10)


def test_codes_that_are_not_finite_are_refused():
  bad = np.full((4, 3), np.inf)
  with pytest.raises(UserError, match="stage 'vae' encodes training images to codes that are not finite"):
    pca.spectrum_of([(np.ones((4, 3)), np.zeros((4, 3))), (np.zeros((4, 3)), bad)], 'vae')


# The code ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('number', [0, DIM])
def test_a_code_has_unit_deviation_in_training_and_in_sampling(number):
  """By the signal fraction the 48 active units are kept; forced to all, it stays as sound."""
  found, (mean, _, z) = arrays(num_directions=number), latent()
  kept = ACTIVE if number == 0 else DIM
  assert np.count_nonzero(np.abs(found['directions']).sum(axis=0)) == kept
  for which, low in ((z, 0.9), (of_prior(), 0.88), (mean, 0.0)):
    c = code(found, which)
    assert c.dtype == np.float32 and c.shape == (COUNT, DIM) and np.isfinite(c).all()
    assert np.abs(c).max() <= pca.LIMIT
    assert np.abs(c.mean(axis=0)).max() < 0.1
    assert (c.std(axis=0)[:kept] > low).all() and (c.std(axis=0) < 1.1).all()
    assert np.all(c[:, kept:] == 0)  # there is room for what is not kept
  assert np.square(code(found, z)).sum(axis=1).mean() == pytest.approx(kept, rel=0.05)


def test_it_is_the_formula_and_clips():
  found, (_, _, z) = arrays(num_directions=5), latent()
  v, s2 = spectrum()['directions'][:, :5], spectrum()['spread']
  wanted = (z - spectrum()['mean']) @ v / np.sqrt(s2[:5] + 0.01 * s2.max())
  np.testing.assert_allclose(code(found, z), np.clip(wanted, -4, 4), atol=1e-5)
  assert np.abs(wanted).max() > 4
  np.testing.assert_allclose(found['deviation'], np.sqrt(s2[:5]), rtol=1e-6)
  far = spectrum()['mean'] + 100 * v[:, 0]
  np.testing.assert_allclose(code(found, far[None])[0], [4, 0, 0, 0, 0], atol=1e-4)


def test_the_same_image_has_the_same_code_in_any_batch():
  found, z = arrays(), latent()[2][:60]
  whole = code(found, z)
  for size in (1, 7, 60):
    parts = [code(found, z[start : start + size]) for start in range(0, 60, size)]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=2e-6)
  np.testing.assert_allclose(code(found, z[::-1])[::-1], whole, atol=2e-6)


def test_no_gradient_changes_what_was_measured():
  found, z = arrays(), jnp.asarray(latent()[2][:3], jnp.float32)
  gradients = jax.grad(lambda found: jnp.sum(pca.code_of(found, z)))(found)
  assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize('number', [0, 3, DIM])
def test_shapes_are_known_before_anything_is_measured(number):
  shapes = lambda found: {name: (value.shape, value.dtype) for name, value in found.items()}
  source = pca.measured('vae', 'elsewhere', DIM, SOUND(num_directions=number))
  assert shapes(source.neutral()) == shapes(arrays(num_directions=number))
  assert source.settings['num_directions'] == number and source.workdir == 'elsewhere'


def test_a_walk_moves_one_number_of_the_code_alone():
  found, z = arrays(num_directions=4), of_prior(1)[0]
  moved = pca.along(found, z, 2, np.array([-3.0, 0.0, 3.0]))
  before, after = code(found, z[None])[0], code(found, moved)
  ratio = found['deviation'][2] / found['scale'][2]
  np.testing.assert_allclose(after[:, 2], np.array([-3, 0, 3]) * ratio, atol=1e-4)
  np.testing.assert_allclose(after[:, [0, 1, 3]], np.tile(before[[0, 1, 3]], (3, 1)), atol=1e-4)
  assert np.linalg.matrix_rank(moved - z, tol=1e-3) == 1 and moved.dtype == np.float32


# What does not work, and why --------------------------------------------------------------------------


def test_whitening_by_the_spectrum_of_the_means_explodes_on_what_is_sampled():
  """Beyond the active units the means hardly vary, but z does: the quotient is thousands of deviations."""
  found, z = spectrum(), latent()[2]
  scores = (z - found['mean']) @ found['directions']
  assert scores.std(axis=0).max() < 1.1  # not the scores, as for pixels: it is the division
  whitened = scores / np.sqrt(found['signal'])
  assert whitened[:, :32].std(axis=0).max() < 1.2  # k = 32 is fine, and 64 is not
  assert whitened[:, :64].std(axis=0).max() > 1e3 and np.abs(whitened[:, :64]).max() > 1e4
  for which in (z, of_prior()):
    assert np.abs(code(arrays(num_directions=64), which)).max() <= 4


def test_the_pca_of_a_batch_has_fewer_directions_than_the_batch_has_images():
  """64 centred images span 63 directions: along the 64th nothing was seen, and it is divided by nothing."""
  mean, _, z = (part[:64].astype(np.float32) for part in latent())
  _, singular, rows = np.linalg.svd(mean - mean.mean(axis=0), full_matrices=False)
  assert singular[62] > 100 * singular[63]
  whitened = (z - mean.mean(axis=0)) @ rows.T / (singular / 8)
  assert np.abs(whitened[:, 63]).max() > 1e4
  assert (np.abs(whitened[:, :48]).std(axis=0) < 10).all()


@pytest.mark.slow
def test_the_pca_of_each_batch_is_noise():
  """Even without dividing: an image has other numbers in each batch, where the sound code has the same."""
  mean, _, z = latent()
  scores = []
  for rows in np.array_split(np.arange(COUNT), 60):
    centre = mean[rows].mean(axis=0)
    basis = np.linalg.svd(mean[rows] - centre, full_matrices=False)[2][:32]
    scores.append((z[0] - centre) @ basis.T)
  scores = np.stack(scores)
  assert np.median(np.abs(scores.mean(axis=0)) / scores.std(axis=0)) < 0.25


def test_directions_of_samples_know_nothing_of_the_signal():
  """The covariance of sampled z is about I, whose eigenvectors are arbitrary."""
  mean, _, z = latent()
  of_samples = np.linalg.eigh(np.cov(z.T))[1][:, ::-1][:, :ACTIVE]
  centred = mean - mean.mean(axis=0)
  kept = lambda v: np.square(centred @ v).sum() / np.square(centred).sum()
  assert kept(of_samples) < 0.6 and kept(spectrum()['directions'][:, :ACTIVE]) > 0.999


@pytest.mark.parametrize('which', ['duplicates', 'collapsed'])
def test_the_gradient_through_the_pca_of_a_batch_is_not_finite(which):
  """It has 1 / (sigma_i^2 - sigma_j^2), of singular values that are equal."""
  rng = np.random.default_rng(2)
  z = rng.choice([-1.0, 1.0], (8, 6)).astype(np.float32)
  if which == 'duplicates':
    z[2:] = z[:2].repeat(3, axis=0)  # two images, over and over
  else:
    z[:, 2:] = 0.0

  def scores(z):
    _, _, rows = jnp.linalg.svd(z - z.mean(axis=0, keepdims=True), full_matrices=False)
    return jnp.sum(jnp.square(z @ rows.T) * jnp.arange(1.0, 7.0)[None])

  assert np.isfinite(scores(z))  # the loss itself says nothing of it
  assert not np.isfinite(jax.grad(scores)(z)).all()
  found = pca.arrays_of(pca.spectrum_of([(z, np.zeros_like(z))], 'vae'), SOUND(num_directions=6), 'vae')
  assert np.isfinite(jax.grad(lambda z: jnp.sum(jnp.square(pca.code_of(found, z))))(z)).all()


# Which directions are kept ----------------------------------------------------------------------------


def test_a_vae_that_has_collapsed_has_no_directions():
  rng = np.random.default_rng(3)
  nothing = pca.spectrum_of([(1e-3 * rng.standard_normal((50, 4)), np.zeros((50, 4)))], 'vae2')
  for number in (0, 2):
    with pytest.raises(pca.NoSignal, match=r"stage 'vae2' says nothing .* vae2\.loss\.beta"):
      pca.kept(nothing, SOUND(num_directions=number), 'vae2')
  assert len(pca.kept(nothing, SOUND(min_signal=0.0), 'vae2')) == 4


def test_no_more_directions_than_the_images_span():
  rng = np.random.default_rng(4)
  few = pca.spectrum_of([(rng.standard_normal((5, 8)), np.full((5, 8), -3.0))], 'vae')
  assert len(pca.kept(few, SOUND(num_directions=4), 'vae')) == 4
  with pytest.raises(UserError, match='num_directions is 5, but 5 training images span at most 4'):
    pca.kept(few, SOUND(num_directions=5), 'vae')
  assert len(pca.kept(few, SOUND(), 'vae')) == 4


# Of a config ------------------------------------------------------------------------------------------


def of_config(variant='pca,debug', **changes):
  config = importlib.import_module('configs.digits').get_config(variant)
  config.update_from_flattened_dict({f'refiner.{name}': value for name, value in changes.items()})
  checks.check(config.refiner, pca.BOUNDS)
  return make_conditions(config, 'refiner', Pixels(shape=(8, 8, 1)))


@pytest.mark.parametrize(
  ('variant', 'image', 'title'),
  [
    ('formulation1,pca,debug', ['x0_vae'], 'formulation1+pca'),
    ('formulation2,pca,debug', ['x0_vae'], 'formulation2+pca'),
  ],
)
def test_it_takes_the_place_of_z_beside_the_image(variant, image, title):
  conditions = of_config(variant, **{'diffusion.pca.num_directions': 5})
  assert list(conditions.ports) == [*image, 'pca'] and conditions.title == title
  assert conditions.ports['pca'] == Port(enters='vector', shape=(5,), zero=True)
  assert isinstance(conditions.frozen['pca'], reads.Measured) and conditions.frozen['pca'].stage == 'vae'
  assert list(conditions.inputs) == ['z', 'x0_vae']  # as before: what is given is z


def test_it_can_be_read_alone_and_is_dropped_as_z_is():
  changes = {'diffusion.condition': 'none', 'diffusion.condition_dropout': 0.2}
  conditions = of_config(**changes)
  assert list(conditions.ports) == ['pca'] and conditions.title == 'none+pca'
  assert conditions.ports['pca'].shape == (16,) and conditions.ports['pca'].droppable
  assert set(conditions.drop(jax.random.key(0), 3)) == {'pca'} and conditions.droppable == ('vae',)
  z = jnp.asarray(np.random.default_rng(0).standard_normal((3, 16)), jnp.float32)
  found = pca.neutral(16, 16) | {'scale': np.full(16, 2, np.float32)}
  values = conditions.values({'pca': found}, {'z': z})
  assert set(values) == {'pca'}
  np.testing.assert_allclose(values['pca'], z / 2, rtol=1e-6)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'diffusion.pca.num_directions': 17}, "num_directions is 17, but the code of 'vae' has 16 numbers"),
    ({'diffusion.pca.num_directions': -1}, 'num_directions must be >= 0, got -1'),
    ({'diffusion.pca.floor': 0.0}, r'pca.floor must be in \(0, 1\), got 0.0'),
    ({'diffusion.pca.min_signal': 1.0}, r'pca.min_signal must be in \[0, 1\), got 1.0'),
    ({'diffusion.z_conditioning': 'ica'}, "z_conditioning is 'ica'; valid: False, True, pca"),
    ({'diffusion.z_conditioning': 1}, 'z_conditioning is 1; valid: False, True, pca'),
    ({'vae.stage': 'refiner'}, "vae.stage is 'refiner', which is no VAE stage of this config"),
  ],
)
def test_what_cannot_be_is_refused(changes, message):
  with pytest.raises(UserError, match=message):
    of_config(**changes)


# It helps ---------------------------------------------------------------------------------------------


def toy_losses(condition, others=None, steps=600, seed=0):
  """Returns the last losses of a toy that removes noise from 8 numbers that are a function of the signal.

  One hidden layer by Adam, in NumPy; the projection of the condition begins at zero.

  Args:
    condition: z [n, d] -> what is read [n, k], k may be 0.
    others: what of the condition is read once it is trained, [n, k] -> [n, k]; None = its own.
  """
  mean, _, z = latent()
  rng = np.random.default_rng(seed)
  target = mean @ (rng.standard_normal((DIM, 8)) * (np.arange(DIM) < ACTIVE)[:, None]) / np.sqrt(ACTIVE)
  c = condition(z)
  sizes = {'x': (8, 96), 'out': (96, 8), 'c': (c.shape[1], 96), 'b': (96,)}
  params = {name: np.zeros(size) for name, size in sizes.items()}
  for name in ('x', 'out'):
    params[name] = rng.standard_normal(sizes[name]) / np.sqrt(sizes[name][0])
  first, second = ({name: np.zeros(size) for name, size in sizes.items()} for _ in range(2))

  def loss_of(x, y, c):
    hidden = np.tanh(x @ params['x'] + c @ params['c'] + params['b'])
    return hidden, hidden @ params['out'] - y

  losses = []
  for step in range(1, steps + 1):
    rows = rng.integers(0, 3000, 64)
    x = target[rows] + rng.standard_normal((64, 8))
    hidden, error = loss_of(x, target[rows], c[rows])
    losses.append(np.square(error).mean())
    back = (2 * error / error.size) @ params['out'].T * (1 - hidden**2)
    grads = {'x': x.T @ back, 'c': c[rows].T @ back, 'b': back.sum(axis=0)}
    grads['out'] = hidden.T @ (2 * error / error.size)
    for name, grad in grads.items():
      first[name] += 0.1 * (grad - first[name])
      second[name] += 0.001 * (grad**2 - second[name])
      rate = 3e-3 * np.sqrt(1 - 0.999**step) / (1 - 0.9**step)
      params[name] -= rate * first[name] / (np.sqrt(second[name]) + 1e-8)
  x = target[3000:] + rng.standard_normal((1000, 8))
  read = c[3000:] if others is None else others(c[3000:])
  return np.array(losses), np.square(loss_of(x, target[3000:], read)[1]).mean()


@pytest.mark.slow
def test_a_toy_learns_more_with_the_code_and_is_led_astray_by_that_of_others():
  sound = functools.partial(code, arrays())
  losses_none, none = toy_losses(lambda z: np.zeros((COUNT, 0)))
  losses, own = toy_losses(sound)
  _, others = toy_losses(sound, others=lambda c: np.roll(c, 1, axis=0))
  assert losses[0] == pytest.approx(losses_none[0], abs=1e-6)  # it begins as the one without
  assert np.isfinite(losses).all() and losses.max() < 3
  assert own < 0.9 * none and others > 1.1 * none


def test_the_same_toy_on_whitened_means_starts_with_a_loss_of_thousands():
  found = spectrum()
  whitened = lambda z: (z - found['mean']) @ found['directions'][:, :64] / np.sqrt(found['signal'][:64])
  losses, _ = toy_losses(whitened, steps=60)
  ours, _ = toy_losses(functools.partial(code, arrays(num_directions=64)), steps=60)
  assert ours.max() < 3 < losses[1:].max()
