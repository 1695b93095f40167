import jax
import numpy as np

from vaediff.diffusion import noise_correction
from vaediff.models import correction


def test_an_error_of_known_slope_and_bias_is_taken_out(key):
  """Measured at three times; each example gets the row nearest to its own."""
  outputs = np.asarray(jax.random.normal(key, (3, 8, 4, 4, 2)))
  slopes, biases = (0.0, 0.1, 0.5), np.float32([[0, 0], [0.2, -0.1], [-1, 2]])
  quantized = [(1 + k) * f + b for f, k, b in zip(outputs, slopes, biases, strict=True)]
  rows = [noise_correction.fit(np.asarray(f), np.asarray(q)) for f, q in zip(outputs, quantized, strict=True)]
  table = noise_correction.stacked(np.array([1.0, 0.5, 0.1]), rows)
  table = jax.tree.map(jax.numpy.asarray, table)
  for f, q, t in zip(outputs, quantized, (0.9, 0.7, 0.0), strict=True):
    found = correction.corrected(table, jax.numpy.asarray(q), jax.numpy.full(8, t))
    np.testing.assert_allclose(found, f, atol=2e-6)
  first = jax.numpy.stack([q[0] for q in quantized])
  mixed = correction.corrected(table, first, jax.numpy.array([1.0, 0.45, 0.2]))
  np.testing.assert_allclose(mixed, outputs[:, 0], atol=2e-6)


def test_nothing_corrected_is_the_same_bits(key):
  table = jax.tree.map(jax.numpy.asarray, noise_correction.none(np.array([1.0, 0.5]), 3))
  output = jax.random.normal(key, (2, 4, 4, 3))
  np.testing.assert_array_equal(correction.corrected(table, output, jax.numpy.array([0.2, 0.9])), output)
