"""Vectors as a space: at mean 0 and deviation 1, back on the sphere; which stage they are of."""

import importlib
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff.errors import UserError
from vaediff.models import clip
from vaediff.spaces import embeddings

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))


def space(**changes):
  config = importlib.import_module('configs.shapes16').get_config('unclip,debug')
  config.update_from_flattened_dict(changes)
  return embeddings.embeddings(config, config.embedding_prior.clip, 'clip')


def test_vectors_are_whitened_by_what_was_measured_and_come_back_to_the_sphere():
  one = space()
  z = clip.unit(jax.random.normal(jax.random.key(0), (500, 8)) * jnp.arange(1.0, 9.0)[None] + 2.0)
  found = {'mean': z.mean(axis=0), 'std': z.std(axis=0), 'min': z.min(axis=0), 'max': z.max(axis=0)}
  read = {embeddings.EMBEDDING: found}
  y = one.whitened(read, z)
  np.testing.assert_allclose(y.mean(axis=0), 0, atol=1e-5)
  np.testing.assert_allclose(y.std(axis=0), 1, atol=1e-4)
  np.testing.assert_allclose(one.decode_map(read, y), z, atol=1e-6)
  ((name, again),) = one.decode(read, 1.5 * y).items()
  assert name == 'embedding'
  np.testing.assert_allclose(np.linalg.norm(again, axis=1), 1, rtol=1e-5)
  assert (
    one.shape == (8,) and one.bound is None and not one.is_data and set(one.frozen) == {'clip', 'embedding'}
  )


@pytest.mark.slow
def test_images_become_what_the_clip_stage_makes_of_them():
  one = space()
  params = jax.jit(one.source.model.init)(jax.random.key(0))
  x = jax.random.uniform(jax.random.key(1), (3, 16, 16, 3), minval=-1.0, maxval=1.0)
  read = {'clip': params, 'embedding': one.statistics.neutral()}
  z = jax.jit(lambda x: one.encode(read, x, None))(x)
  np.testing.assert_allclose(z, one.source.model.apply(params, x, method='images'), atol=1e-5)


def test_a_stage_that_is_no_clip_stage_is_refused():
  with pytest.raises(UserError, match="clip.stage is 'refiner', which is no CLIP stage"):
    space(**{'embedding_prior.clip.stage': 'refiner'})
