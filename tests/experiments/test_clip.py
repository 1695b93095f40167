"""CLIP: one loss over the global batch, a scale that is clamped, what is refused, what is said."""

import importlib
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff import experiments
from vaediff.data import words
from vaediff.errors import UserError
from vaediff.experiments import clip
from vaediff.machine import cost, sharding

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
BATCH = 16


def build(**changes):
  config = importlib.import_module('configs.shapes16').get_config('clip,debug')
  config.clip.optim.update({'warmup_steps': 0, 'learning_rate': 5e-3, 'schedule': 'constant'})
  config.update_from_flattened_dict(changes)
  return experiments.build(config, 'clip')


def batch_of(seed=0):
  """Images of one colour each, and captions that tell it; two are equal."""
  rng = np.random.default_rng(seed)
  colours = rng.integers(0, 256, (BATCH, 1, 1, 3)).astype(np.uint8)
  colours[1] = colours[0]
  numbers = np.arange(BATCH) + 4
  numbers[1] = numbers[0]
  tokens = np.zeros((BATCH, 32), np.int32)
  tokens[:, 0], tokens[:, 1], tokens[:, 2] = words.BOS, numbers, words.EOS
  return {
    'image': np.broadcast_to(colours, (BATCH, 16, 16, 3)).copy(), words.TOKENS: tokens,
    'label': np.zeros(BATCH, np.int32), 'mask': np.ones(BATCH, np.float32),
  }  # fmt: skip


def put(tree, mesh, where):
  return jax.tree.map(lambda leaf: jax.device_put(leaf, where(mesh)), tree)


def test_one_device_and_eight_take_the_same_update_and_it_learns():
  experiment = build()
  config = importlib.import_module('configs.base').default()
  step = jax.jit(lambda state, batch, key: experiment.train_step(state, {}, batch, key))
  first, key = jax.jit(experiment.init)(jax.random.key(0)), jax.random.key(1)
  one, metrics = step(first, batch_of(), key)
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:8])
  _, others = step(put(first, mesh, sharding.replicated), put(batch_of(), mesh, sharding.batch_sharding), key)
  assert float(metrics['loss']) == pytest.approx(float(others['loss']), rel=1e-5)
  norm = 'grad_norm/clip'
  assert float(metrics[norm]) == pytest.approx(float(others[norm]), rel=1e-4)
  state, losses = one, []
  for _ in range(150):
    state, metrics = step(state, batch_of(), key)
    losses.append(float(metrics['loss'] - metrics['floor']))
  assert losses[-1] < 0.2 * losses[0], losses[::30]
  found = jax.jit(experiment.eval_step)({'clip': state.networks['clip'].params}, batch_of(), key)
  assert found.keys() == experiment.metrics.keys()
  assert float(found['recall_1']) >= 0.9 and float(found['chance']) == pytest.approx(math.log(BATCH))
  assert float(found['floor']) == pytest.approx(math.log(2) * 2 / BATCH)


def test_the_scale_is_clamped_and_decay_leaves_it_and_gains_alone():
  experiment = build(**{'clip.optim.learning_rate': 10.0, 'clip.optim.ema_decay': 0.5})
  state = jax.eval_shape(experiment.init, jax.random.key(0))
  params = {'log_scale': jnp.float32(9), 'a': 1}
  assert float(clip.clamped(params)['log_scale']) == pytest.approx(math.log(100)) and params['a'] == 1
  paths = jax.tree_util.tree_leaves_with_path(state.networks['clip'].params)
  names = {tuple(key.key for key in path): clip.decays(tuple(key.key for key in path)) for path, _ in paths}
  assert {name[-1] for name, decays in names.items() if not decays} == {'bias', 'scale', 'log_scale', 'class'}
  assert {name[-1] for name, decays in names.items() if decays} == {'kernel', 'embedding', 'places'}


def test_the_scale_of_each_loss_at_step_0():
  for kind, (scale, bias) in {'softmax': (1 / 0.07, None), 'sigmoid': (10.0, -10.0)}.items():
    module = build(**{'clip.loss.kind': kind}).clip.module
    assert (module.scale, module.bias) == (scale, bias)


def test_the_preset_is_the_published_network():
  config = importlib.import_module('configs.captions256').get_config('clip_vit_b32')
  params = jax.eval_shape(experiments.build(config, 'clip').clip.init, jax.random.key(0))
  assert cost.num_parameters(params) == 151_277_313 and config.stages == ('clip',)


def test_what_is_refused():
  with pytest.raises(UserError, match='config.clip: train.microbatches must be 1, got 2: each image'):
    build(**{'clip.train.microbatches': 2})
  with pytest.raises(UserError, match='config.clip: train.batch_size must be at least 2, got 1'):
    build(**{'clip.train.batch_size': 1})
  with pytest.raises(UserError, match="data.caption_feature is ''"):
    build(**{'data.caption_feature': ''})
  with pytest.raises(UserError, match='loss.kind'):
    build(**{'clip.loss.kind': 'hinge'})
  with pytest.raises(UserError, match='model.image.num_heads is 3, which does not divide'):
    build(**{'clip.model.image.num_heads': 3})


def test_what_is_said_of_a_training_that_has_learned_nothing():
  experiment = build()
  good = {'loss': 1.0, 'chance': math.log(128), 'scale': 20.0}
  assert experiment.warnings(good) == ()
  (stuck,) = experiment.warnings({**good, 'loss': 4.8520})
  assert 'the loss 4.852 is that of vectors which are all the same, ln B = 4.852' in stuck
  (falling,) = experiment.warnings({**good, 'scale': 1.2})
  assert 'the scale e^ls is 1.2 and near 1' in falling
