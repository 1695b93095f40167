import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff.errors import UserError
from vaediff.machine import cost
from vaediff.models.functional import Model
from vaediff.models.patch_discriminator import PatchDiscriminator


def build(size: int = 32, **changes) -> Model:
  module = PatchDiscriminator(**{'channels': 8, 'num_layers': 2, **changes})
  return Model(module=module, inputs=(jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32),))


def shapes(model: Model):
  return jax.eval_shape(model.init, jax.random.key(0))


@pytest.fixture
def rng():
  return np.random.default_rng(0)


def random_params(model: Model, rng):
  return jax.tree.map(lambda leaf: jnp.float32(0.1 * rng.normal(size=leaf.shape)), shapes(model))


def test_parameters_are_the_published_network():
  # With batch norm on pairs of colour images, 6 channels, it is known as 2.769 M.
  model = build(256, channels=64, num_layers=3)
  assert cost.num_parameters(shapes(model)) == 2_765_633
  assert cost.num_parameters(shapes(model)) + 3 * 16 * 64 == 2_768_705
  # Without the norms' scales and biases, but with three biases of the convolutions.
  without = build(256, channels=64, num_layers=3, norm='none')
  assert cost.num_parameters(shapes(without)) == 2_765_633 - (128 + 256 + 512)


@pytest.mark.parametrize(('size', 'num_layers', 'side'), [(256, 3, 30), (32, 3, 2), (64, 2, 14), (8, 1, 2)])
def test_one_logit_per_patch(size, num_layers, side):
  model = build(size, num_layers=num_layers)
  logits = jax.eval_shape(model.apply, shapes(model), jax.ShapeDtypeStruct((5, size, size, 3), jnp.float32))
  assert logits.shape == (5, side, side) and logits.dtype == jnp.float32


def test_a_logit_sees_seventy_pixels(rng):
  model = build(128, channels=4, num_layers=3, norm='none')
  params = random_params(model, rng)
  image = jnp.float32(rng.normal(size=(1, 128, 128, 3)))
  gradient = jax.jit(jax.grad(lambda x: model.apply(params, x)[0, 7, 7]))(image)
  rows = np.flatnonzero(np.abs(gradient).sum(axis=(0, 2, 3)))
  assert rows.max() - rows.min() + 1 == 70


@pytest.mark.parametrize('norm', ['group', 'none'])
def test_an_image_is_judged_alone(rng, norm):
  """With batch norm it would not be."""
  model = build(norm=norm)
  params, images = random_params(model, rng), jnp.float32(rng.normal(size=(3, 32, 32, 3)))
  run = jax.jit(model.apply)
  np.testing.assert_allclose(run(params, images)[:1], run(params, images[:1]), atol=1e-5)


def test_bfloat16_is_close_and_returns_float32(rng):
  exact, rough = build(), build(dtype='bfloat16')
  params, images = random_params(exact, rng), jnp.float32(rng.normal(size=(2, 32, 32, 3)))
  a, b = jax.jit(exact.apply)(params, images), jax.jit(rough.apply)(params, images)
  assert b.dtype == jnp.float32
  assert 0.0 < np.abs(a - b).max() < 0.05 * np.abs(a).max()


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'norm': 'batch'}, "model.norm is 'batch'; choose one of group, none"),
    ({'num_layers': 0}, 'model.num_layers is 0; it must be at least 1'),
    ({'channels': 0}, 'model.channels is 0; it must be at least 1'),
    ({'dtype': 'float16'}, "model.dtype is 'float16'"),
  ],
)
def test_mistakes_are_user_errors(changes, message):
  with pytest.raises(UserError, match=message):
    PatchDiscriminator(**changes)


def test_images_that_are_too_small_are_user_errors():
  with pytest.raises(UserError, match='images are 16 x 16, but model.num_layers is 3, .* at least 24 x 24'):
    shapes(build(16, num_layers=3))
  assert shapes(build(24, num_layers=3))
