"""What a prior of ids is asked for, and what of: the true ids, of inputs that are not kept, with nulls."""

import dataclasses
import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vaediff import reads
from vaediff.conditions.base import Conditions
from vaediff.conditions.label import Label
from vaediff.experiments import token_prior
from vaediff.experiments.token_source import Source
from vaediff.models import token_sampling
from vaediff.models.functional import Model
from vaediff.optim import make_optimizer
from vaediff.spaces.tokenizers import Tokenizer

GRIDS, SIZES = ((2, 2), (4, 4)), (8, 16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given(Tokenizer):
  """Two levels of ids that are handed over."""

  network = 'given'
  grids = GRIDS
  sizes = SIZES

  def codes(self, params, x):
    raise AssertionError('the ids are given')

  embed = decode = codes


class Told(nn.Module):
  """The logits of every place are a row of a table: that of the class, or of the null."""

  size: int
  rows: int = 11

  @nn.compact
  def __call__(self, ids, before, *above, mask=None, deterministic=True):
    logits = nn.Embed(self.rows, self.size, name='table')(before)
    return jnp.broadcast_to(logits, (*ids.shape, self.size))


class Function(nn.Module):
  """Logits that are a function of the ids, and of those of coarser levels."""

  function: Callable

  def __call__(self, ids, before, *above, mask=None, deterministic=True):
    return self.function(ids, *above)


def prior_of(modules, **changes):
  inputs = jax.ShapeDtypeStruct((1, 4), jnp.int32), jax.ShapeDtypeStruct((1, 1), jnp.int32)
  models = tuple(Model(module=module, inputs=inputs) for module in modules)
  settings = {
    'tokenizer': Given(source=reads.FromStage(stage='given', network='given', workdir='', model=models[0])),
    'models': models,
    'conditions': Conditions(),
    'optimizer': make_optimizer(importlib.import_module('configs.parts').optim(1e-2), 100),
    'rule': token_sampling.Rule(),
    'keep_probability': 1.0,
    'flip': False,
    'microbatches': 1,
    'dimensions': 64,
  }
  return token_prior.TokenPrior(**{**settings, **changes})


def ids(count):
  rng = np.random.default_rng(0)
  return tuple(rng.integers(0, n, (count, *grid), np.int32) for grid, n in zip(GRIDS, SIZES, strict=True))


def test_inputs_may_be_any_ids_and_the_targets_are_the_true_ones():
  truth, seen = ids(32), []
  flat = [level.reshape(32, -1) for level in truth]

  def knows(level):
    def function(*given):
      seen.append(given)
      return jax.device_put(1e4 * np.eye(SIZES[level], dtype=np.float32)[flat[level]])

    return Function(function)

  prior = prior_of([knows(0), knows(1)], keep_probability=1e-6)
  before = prior.source({}, 32)
  params = {name: {} for name in prior.network_names}
  for seed in (0, 1):
    found = prior.nats(params, tuple(map(jnp.asarray, truth)), before, jax.random.key(seed))
    for name in prior.names:
      np.testing.assert_array_equal(found[name], np.zeros(32))
  for level, (given, *above) in enumerate(seen):
    assert np.mean(np.asarray(given) == flat[level % 2]) < 0.25  # of 8 or 16 codes each is one by chance
    assert all(np.mean(np.asarray(coarser) == truth[0]) < 0.25 for coarser in above)
  assert len(seen) == 4 and len(seen[1]) == 2


def test_where_labels_are_dropped_it_is_the_null_that_learns():
  """Guidance is against it: a null that training never reads is what it was initialised to."""
  label = Label(num_classes=10, dropout=0.999)
  prior = prior_of(
    [Told(size) for size in SIZES], conditions=Conditions((label,)), source=Source(num_classes=10)
  )
  truth, labels = ids(8), np.array([0, 1, 2, 3, 4, 5, 6, 8], np.int32)
  image = np.zeros((8, 8, 8, 1), np.uint8)
  batch = {'image': image, 'label': labels, **dict(zip(prior.names, truth, strict=True))}
  state = jax.jit(prior.init)(jax.random.key(0))
  after, _ = jax.jit(prior.train_step)(state, {}, batch, jax.random.key(1))
  for name in prior.network_names:
    start, end = (np.asarray(s.networks[name].params['table']['embedding']) for s in (state, after))
    assert np.abs(end[10] - start[10]).max() > 1e-3
    np.testing.assert_array_equal(end[:10], start[:10])
