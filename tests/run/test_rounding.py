"""Blocks that read more than arrays with a row for each record, as those of a prior of tokens do."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from vaediff import experiments
from vaediff.models.observed import layers_of, quantizable, subtree
from vaediff.models.quantized import Quantized
from vaediff.modes import checked
from vaediff.run import quantize_calibration, rounding, subjects

SECTION = ConfigDict(
  {
    'method': 'adaround', 'ranges': 'minmax', 'percentile': 99.99, 'calibration': {'seed': 0},
    'adaround': {
      'num_steps': 20, 'batch_size': 4, 'learning_rate': 1e-2, 'weight': 0.01, 'warmup': 0.2,
      'beta_start': 20.0, 'beta_end': 2.0,
    },
    'learned_ranges': {'num_steps': 20, 'batch_size': 4, 'learning_rate': 1e-2},
  }
)  # fmt: skip


@pytest.mark.slow
def test_blocks_of_a_prior_of_tokens_are_rounded_on_ids(tmp_path):
  config = importlib.import_module('configs.digits').get_config('vqvae,prior,debug')
  checked.complete(config)
  prior = experiments.build(config, 'prior')
  (model,), random = prior.models, np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: x + 0.1 * random.standard_normal(x.shape).astype(np.float32),
    jax.jit(model.init)(jax.random.key(0)),
  )
  ids, before = (
    jnp.asarray(random.integers(0, most, (6, *struct.shape[1:])), jnp.int32)
    for most, struct in zip((model.module.codebook_size, 1), model.inputs, strict=True)
  )
  subject = subjects.Subject(
    params=params, records=(((ids, before), {'mask': None}),), t=np.zeros(6, np.float32),
    calls=lambda calls: calls, size=4, made_of={'records': 'aa'},
  )  # fmt: skip
  layers = tuple(layer for layer in quantizable(layers_of(model)) if layer.path.startswith('blocks_0/'))
  whole = Quantized.of(model, layers=layers, bits=4, quantized_inputs=True, buckets=8)
  assert layers and whole.buckets == 1
  ((block, own),) = rounding.layers_by_block(model, layers)
  seen = rounding.gatherer(subject, model, (block,))(params, block)
  alone = rounding.first(block.apply(subtree(params, block.path), *seen.arguments(seen.rows)))
  assert own == layers and len(alone) == 6
  np.testing.assert_allclose(alone, seen.output, atol=1e-5)

  scales = quantize_calibration.kernel_scales(params, layers, 4, 'adaround')
  edges = quantize_calibration.time_edges(subject.t, 1)
  bounds = quantize_calibration.input_ranges(subject, whole, edges, SECTION)
  found = {'kernel_scales': scales, 'ranges': bounds, 'times': edges}
  made = rounding.learned(subject, tmp_path, whole, found, SECTION)
  assert made['kernels'].keys() == made['ranges'].keys() == {layer.path for layer in layers}
  tree = whole.quantize(params, **{**found, **made})
  logits, wanted = whole.apply(tree, ids, before), model.apply(params, ids, before)
  assert 0 < jnp.linalg.norm(logits - wanted) < 0.3 * jnp.linalg.norm(wanted)
