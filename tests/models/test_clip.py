"""Towers of images and words: their sizes, and where a text is read."""

import as_trained
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff.errors import UserError
from vaediff.machine import cost
from vaediff.models.clip import Clip
from vaediff.models.functional import Model
from vaediff.models.text_tower import Tower

TINY = {
  'image_size': 4, 'patch': 2, 'image': Tower(width=8, num_layers=1, num_heads=2), 'vocabulary': 9,
  'text': Tower(width=8, num_layers=1, num_heads=2), 'embedding_size': 6, 'scale': 10.0, 'bias': None,
  'dtype': 'float32',
}  # fmt: skip
VIT_B32 = {
  **TINY, 'image_size': 224, 'patch': 32, 'image': Tower(width=768, num_layers=12, num_heads=12),
  'vocabulary': 49_408, 'text': Tower(width=512, num_layers=12, num_heads=8), 'embedding_size': 512,
}  # fmt: skip


def build(length=5, channels=3, **sizes):
  sizes = {**TINY, **sizes}
  image = jax.ShapeDtypeStruct((1, sizes['image_size'], sizes['image_size'], channels), jnp.float32)
  return Model(module=Clip(**sizes), inputs=(image, jax.ShapeDtypeStruct((1, length), jnp.int32)))


def test_the_published_sizes_have_the_published_number_of_parameters():
  params = jax.eval_shape(build(length=77, **VIT_B32).init, jax.random.key(0))
  assert cost.num_parameters(params) == 151_277_313
  assert cost.num_parameters(params['image_encoder']) == 87_849_216
  assert cost.num_parameters(params['text_encoder']) == 63_428_096


def test_a_text_is_read_where_it_ends_and_padding_nowhere():
  model = build()
  params = as_trained.params_of(model.init)
  run = jax.jit(lambda params, ids: model.apply(params, ids, method='texts'))
  # 8 is the largest id and stands before the end: causal, its own place does not see what follows it
  found = np.asarray(run(params, jnp.array([[2, 8, 4, 3, 0], [2, 8, 5, 3, 0], [2, 8, 4, 5, 3]])))
  np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)
  for one, other in ((0, 1), (0, 2)):
    assert np.abs(found[one] - found[other]).max() > 1e-3
  table = params['text_encoder']['words']
  padded = {**params['text_encoder'], 'words': {'embedding': table['embedding'].at[0].add(7.0)}}
  again = np.asarray(run({**params, 'text_encoder': padded}, jnp.array([[2, 8, 4, 3, 0], [2, 8, 4, 5, 3]])))
  np.testing.assert_array_equal(again, found[[0, 2]])


@pytest.mark.parametrize(
  ('sizes', 'message'),
  [
    ({'patch': 3}, 'model.patch is 3, which does not divide the image size 4'),
    ({'text': Tower(width=8, num_layers=1, num_heads=3)}, 'model.text.num_heads is 3, .* model.text.width 8'),
  ],
)
def test_sizes_that_do_not_divide_are_refused(sizes, message):
  with pytest.raises(UserError, match=message):
    build(**sizes)
