"""Bytes of StableHLO hold a function with what it closes over, for all platforms and any batch."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff.errors import UserError
from vaediff.weights import stablehlo_file

INSTALLED = importlib.util.find_spec(stablehlo_file.PACKAGE) is not None
needs_flatbuffers = pytest.mark.skipif(not INSTALLED, reason='the extra [stablehlo] is not installed')
INPUTS = {'z': jax.ShapeDtypeStruct((2, 3), jnp.float32), 'label': jax.ShapeDtypeStruct((2,), jnp.int32)}
KERNEL = np.arange(6, dtype=np.float32).reshape(3, 2)


def function(given):
  step = lambda y, weight: (y * weight, None)  # a loop stays one
  y, _ = jax.lax.scan(step, given['z'] @ KERNEL, jnp.asarray([2.0, 3.0]))
  return y + given['label'][:, None].astype(y.dtype)


@needs_flatbuffers
@pytest.mark.parametrize('count', [1, 2, 5])
def test_one_program_for_any_batch(count):
  content = stablehlo_file.convert(function, INPUTS, ('cpu', 'cuda', 'tpu'), any_batch=True)
  given = {'z': np.ones((count, 3), np.float32), 'label': np.arange(count, dtype=np.int32)}
  wanted = 6 * np.array([[6.0, 9.0]]) + np.arange(count)[:, None]
  np.testing.assert_allclose(stablehlo_file.runner(content)(given), wanted)
  about = stablehlo_file.about(content)
  assert about['platforms'] == 'cpu, cuda, tpu' and '32[batch,3]' in about['shapes']


@needs_flatbuffers
def test_a_fixed_batch_is_that_one():
  content = stablehlo_file.convert(function, INPUTS, ('cpu',), any_batch=False)
  given = {'z': np.ones((3, 3), np.float32), 'label': np.zeros(3, np.int32)}
  with pytest.raises(ValueError, match='shape'):
    stablehlo_file.runner(content)(given)
  assert stablehlo_file.runner(content)({k: v[:2] for k, v in given.items()}).shape == (2, 2)


@needs_flatbuffers
def test_a_function_that_asks_for_the_number_is_refused():
  asks = lambda given: given['z'] * len(given['z'])
  with pytest.raises(UserError, match=r'this sampler for cpu: .*With --config.export.any_batch=False'):
    stablehlo_file.convert(asks, INPUTS, ('cpu',), any_batch=True)
  content = stablehlo_file.convert(asks, INPUTS, ('cpu',), any_batch=False)
  assert stablehlo_file.about(content)['platforms'] == 'cpu'


def test_a_missing_package_is_named(monkeypatch):
  monkeypatch.setattr(stablehlo_file, 'PACKAGE', 'no_such_package')
  with pytest.raises(UserError, match=r"no_such_package; .*: pip install -e '\.\[stablehlo\]'"):
    stablehlo_file.check_installed()
