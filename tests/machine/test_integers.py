"""Whether products of whole numbers go to the library, by the text of compiled programs."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from vaediff.machine import integers, runtime

PROGRAM = """
import jax
import jax.numpy as jnp
from vaediff.machine import integers
from vaediff.models import integers as numbers
x, kernel = jnp.ones((2, 10, 10, 32), jnp.int8), jnp.ones((64, 3, 3, 32), jnp.int8)
for function in (numbers.convolution_by_product, numbers.convolution):
  text = jax.jit(lambda x, k: function(x, k, (1, 1))).lower(x, kernel).compile().as_text()
  print(*integers.in_library(text))
print(integers.arithmetic())
"""


@pytest.mark.skipif(jax.default_backend() != 'cpu', reason='the library is that of CPUs')
def test_with_the_flag_of_main_products_go_to_the_library_and_convolutions_do_not():
  environment = {
    **os.environ,
    'XLA_FLAGS': runtime.EIGEN_CONVOLUTIONS,
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '0',
    'PYTHONPATH': os.pathsep.join(sys.path),
  }
  said = subprocess.run(
    [sys.executable, '-c', PROGRAM], env=environment, capture_output=True, text=True, check=True
  ).stdout.split('\n')
  assert said[:3] == ['1 0', '0 1', integers.WIDE]


def test_without_such_products_floats_are_made(monkeypatch):
  monkeypatch.setattr(integers, '_compiled', lambda *_: '')
  assert integers.arithmetic.__wrapped__() == integers.FLOATS


def test_products_of_floats_are_not_counted():
  text = jax.jit(jnp.dot).lower(jnp.ones((8, 8)), jnp.ones((8, 8))).compile().as_text()
  assert integers.in_library(text) == (0, 0)
