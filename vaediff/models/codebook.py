"""Vector quantisation: nearest codes, their losses, and a codebook kept by moving averages.

Van den Oord et al. 2017 (1711.00937). A vector z is replaced by its nearest code e and the gradient passes
straight through (section 3.2). z is drawn towards its code by the commitment loss; the codes are drawn
towards their vectors either by `codebook_loss` (eq. 3) or, without gradients, by `ema_update` (appendix A.1):

  N_k <- g N_k + (1 - g) n_k        n_k: vectors whose nearest code is k
  m_k <- g m_k + (1 - g) sum of these vectors
  e_k  = m_k / N~_k,  N~_k = n (N_k + eps) / (n + K eps),  n = sum of N over all K codes

Two habits keep a codebook in use. Codes start at vectors of a batch (`data_init`), and a code whose count
falls below a threshold starts anew at one (`restart_dead`). A count starts at 1, the mass of its sum: codes
with a count of 0 and a sum that is not zero are divided by almost nothing, and explode.

All sums run over the batch that the function sees. Under `jax.jit` that is the global batch, however many
devices hold it.

Everything is pure functions of arrays, and float32. Must not import flax.linen, diffusion, experiments,
train, config or data.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Key

from vaediff.errors import UserError
from vaediff.types import Scalar

# Distances are found for this many codes at a time: with all of a large codebook at once they would be the
# largest array of a training step.
CHUNK = 2048

# Squares below it are taken for it, where vectors are brought to length 1.
UNIT_EPSILON = 1e-24
# Of the softmax over codes in `entropy_loss`: that of MaskGIT's tokenizer (2202.04200) and of LlamaGen.
ENTROPY_TEMPERATURE = 0.01

Vectors = Float[Array, '*positions dim']
"""Vectors along the last axis, of any leading shape."""
Codes = Float[Array, 'codes dim']
Indices = Integer[Array, '*positions']
"""One code per vector."""


@flax.struct.dataclass
class Codebook:
  """Codes and the averages that they are made of.

  Attributes:
    codes: e, float32 [codes, dim].
    counts: N, float32 [codes]: the average number of a batch's vectors that a code is nearest to.
    sums: m, float32 [codes, dim]: the average sum of these vectors.
  """

  codes: Any  # Any: as a pytree it also holds shapes, shardings or specs in place of arrays
  counts: Any
  sums: Any


def uniform_codes(key: Key[Array, ''], shape: tuple[int, int]) -> Codes:
  """Returns codes from U(-1/n, 1/n) with n = shape[0], the usual start of a codebook moved by gradients."""
  return jax.random.uniform(key, shape, jnp.float32, -1.0 / shape[0], 1.0 / shape[0])


def init_codes(key: Key[Array, ''], size: int, dim: int) -> Codebook:
  """Returns `size` codes from U(-1/size, 1/size), each with a count of 1."""
  return _fresh(uniform_codes(key, (size, dim)))


def data_init(z: Vectors, key: Key[Array, ''], size: int) -> Codebook:
  """Returns codes that are vectors of z, all different ones if there are enough, each with a count of 1."""
  z = _flat(z)
  rows = jax.random.choice(key, z.shape[0], (size,), replace=z.shape[0] < size)
  return _fresh(z[rows])


def nearest(z: Vectors, codes: Codes) -> Indices:
  """Returns for each vector the index of the code with the least squared distance; the first of equals.

  |z - e|^2 = |z|^2 - 2 z.e + |e|^2. The first term is the same for all codes and is left out, which
  changes no index and keeps the small differences between the others exact. The codes' mean is taken from
  both, for the same reason: where it is a thousand times the distance of two codes, rounding hides what the
  squares differ by. Of the mean 8 bits are enough, and subtracting them rounds nothing.
  """
  codes = jax.lax.stop_gradient(codes).astype(jnp.float32)
  centre = jax.lax.reduce_precision(codes.mean(axis=0, keepdims=True), exponent_bits=8, mantissa_bits=7)
  flat, codes = _flat(z) - centre, codes - centre
  if codes.shape[0] <= CHUNK:
    _, indices = _nearest_in(flat, codes)
    return indices.reshape(z.shape[:-1])
  num_chunks = -(-codes.shape[0] // CHUNK)
  # The last code fills up the last chunk; being the same, and later, its copies are never chosen.
  padded = jnp.pad(codes, ((0, num_chunks * CHUNK - codes.shape[0]), (0, 0)), mode='edge')

  def step(best, chunk):
    index, chunk_codes = chunk
    distance, indices = _nearest_in(flat, chunk_codes)
    closer = distance < best[0]
    best = (jnp.where(closer, distance, best[0]), jnp.where(closer, indices + index * CHUNK, best[1]))
    return best, None

  start = (jnp.full(flat.shape[:1], jnp.inf), jnp.zeros(flat.shape[:1], jnp.int32))
  chunks = (jnp.arange(num_chunks, dtype=jnp.int32), padded.reshape(num_chunks, CHUNK, -1))
  (_, indices), _ = jax.lax.scan(step, start, chunks)
  return indices.reshape(z.shape[:-1])


def unit(vectors: Vectors) -> Vectors:
  """Returns the vectors at length 1, float32; of length 0 where they are, with a gradient that is finite."""
  vectors = vectors.astype(jnp.float32)
  squares = jnp.sum(jnp.square(vectors), axis=-1, keepdims=True)
  return vectors * jax.lax.rsqrt(jnp.maximum(squares, UNIT_EPSILON))


def lookup(codes: Codes, indices: Indices) -> Vectors:
  """Returns the codes at the indices; differentiable with respect to the codes."""
  return jnp.take(codes, indices, axis=0)


def quantize(z: Vectors, codes: Codes) -> tuple[Vectors, Indices]:
  """Returns z_q, the nearest codes, and their indices.

  The gradient of z_q passes straight through to z: z + sg(e - z), van den Oord et al. 2017, section 3.2.
  The codes get none; for the losses take them from `lookup`.
  """
  indices = nearest(z, codes)
  z = z.astype(jnp.float32)
  return z + jax.lax.stop_gradient(lookup(codes, indices) - z), indices


def commitment_loss(z: Vectors, e: Vectors, beta: float = 0.25) -> Scalar:
  """Returns beta mean (sg(e) - z)^2, the third term of eq. 3: vectors stay near their codes.

  Args:
    z: the vectors before quantisation.
    e: their codes, `lookup(codes, indices)`.
    beta: weight; it belongs to this term and not to `codebook_loss`.
  """
  return beta * jnp.mean(jnp.square(jax.lax.stop_gradient(e) - z.astype(jnp.float32)))


def codebook_loss(z: Vectors, e: Vectors) -> Scalar:
  """Returns mean (sg(z) - e)^2, the second term of eq. 3: codes move to their vectors, by gradient."""
  return jnp.mean(jnp.square(jax.lax.stop_gradient(z.astype(jnp.float32)) - e))


def entropy_loss(z: Vectors, codes: Codes, temperature: float = ENTROPY_TEMPERATURE) -> Scalar:
  """Returns the mean entropy of p(code | z) less that of its mean over z, in nats, in [-log K, 0].

  p = softmax(-|z - e|^2 / temperature). Least where every vector is sure of its code and all codes are used
  alike. It holds an array of all distances, vectors times codes. Differentiable in z and in the codes.
  """
  flat = z.reshape(-1, z.shape[-1]).astype(jnp.float32)
  products = jnp.matmul(flat, codes.T, precision=jax.lax.Precision.HIGHEST)
  distances = jnp.square(flat).sum(axis=1)[:, None] - 2.0 * products + jnp.square(codes).sum(axis=1)[None]
  log_p = jax.nn.log_softmax(-distances / temperature, axis=-1)
  p = jnp.exp(log_p)
  mean = p.mean(axis=0)
  own = -jnp.sum(p * log_p, axis=-1).mean()
  return own + jnp.sum(mean * jnp.log(mean + 1e-10))


def count(state: Codebook, indices: Indices, decay: float = 0.99) -> Codebook:
  """Returns the codebook with the averaged counts of one batch; codes and sums as they were.

  Of codes that the gradient moves: their counts say which are dead.
  """
  found = _histogram(indices.reshape(-1), state.codes.shape[0])
  return state.replace(counts=decay * state.counts + (1.0 - decay) * found)


def ema_update(
  state: Codebook, z: Vectors, indices: Indices, decay: float = 0.99, eps: float = 1e-5
) -> Codebook:
  """Returns the codebook after one batch (module docstring, with g = `decay`).

  Args:
    state: the codebook; not changed.
    z: the vectors before quantisation; no gradient passes.
    indices: their nearest codes.
    decay: in [0, 1).
    eps: smooths the counts, after Laplace, so that no code is divided by zero.
  """
  size = state.codes.shape[0]
  flat, rows = _flat(z), indices.reshape(-1)
  counts = decay * state.counts + (1.0 - decay) * _histogram(rows, size)
  sums = decay * state.sums + (1.0 - decay) * jax.ops.segment_sum(flat, rows, size)
  total = counts.sum()
  smoothed = total * (counts + eps) / (total + size * eps)
  return Codebook(codes=sums / smoothed[:, None], counts=counts, sums=sums)


def restart_dead(state: Codebook, z: Vectors, key: Key[Array, ''], threshold: float = 1.0) -> Codebook:
  """Returns the codebook with every code whose count is below `threshold` at a random vector of z.

  Its count is 1 again and its sum the vector. The counts of all codes add up to the vectors in a batch, so a
  batch should hold several times `threshold` vectors per code; else most codes restart at every step
  (`check_restarts`).
  """
  flat = _flat(z)
  rows = jax.random.randint(key, state.counts.shape, 0, flat.shape[0])
  dead, fresh = state.counts < threshold, _fresh(flat[rows])
  return jax.tree.map(
    lambda new, old: jnp.where(dead.reshape(-1, *[1] * (old.ndim - 1)), new, old), fresh, state
  )


def follow(
  state: Codebook,
  started: Array,
  z: Vectors,
  key: Key[Array, ''],
  *,
  decay: float,
  threshold: float,
  averages: bool = True,
  compared: Callable[[Codes], Codes] = lambda codes: codes,
) -> tuple[Codebook, Array, dict[str, Scalar]]:
  """Returns the codebook after one batch, which of its codes start anew, and figures of the batch.

  The codes before the first batch are vectors of it, each with a count of 1. The figures are 'used' and
  'perplexity' of `usage`, and 'dead', the fraction that start anew.

  Args:
    state: the codebook; not changed.
    started: whether it has had its first batch.
    z: the vectors before quantisation, of the whole global batch.
    key: its own.
    decay: of `ema_update`.
    threshold: of `restart_dead`.
    averages: the codes follow averages; else their counts alone do.
    compared: makes of codes what vectors are compared with.
  """
  key_init, key_restart = jax.random.split(key)
  size = state.codes.shape[0]
  state = jax.lax.cond(started, lambda: state, lambda: data_init(z, key_init, size))
  indices = nearest(z, compared(state.codes))
  used, perplexity = usage(indices, size)
  state = ema_update(state, z, indices, decay) if averages else count(state, indices, decay)
  dead = state.counts < threshold
  figures = {'used': used, 'perplexity': perplexity, 'dead': jnp.mean(dead)}
  return restart_dead(state, z, key_restart, threshold), dead, figures


def check_restarts(num_vectors: int, size: int, threshold: float) -> None:
  """Raises UserError where codes would restart for want of vectors, and not because they are not used.

  In the long run the counts of all codes add up to the vectors in a batch. With fewer than `threshold` per
  code some must be below it at every update, however evenly the codes are used; with twice as many a code is
  one that is used half as often as the others, or less.
  """
  if num_vectors < 2 * threshold * size:
    raise UserError(
      f'loss.restart_below is {threshold:g}, but {size} codes (model.codebook_size) share the {num_vectors} '
      f'vectors of a batch, {num_vectors / size:.3g} each: most codes would start anew at every update. A '
      f'batch needs twice loss.restart_below vectors per code: lower it to {num_vectors / (2 * size):.3g} or '
      'less (0 = none start anew), take a larger train.batch_size, or fewer codes'
    )


def histogram(indices: Indices, size: int, weight: Array | None = None) -> Float[Array, ' size']:
  """Returns how often each of the `size` codes occurs; a row of the batch counts `weight` times."""
  if weight is None:
    return _histogram(indices.reshape(-1), size)
  each = jnp.broadcast_to(weight.reshape(-1, *[1] * (indices.ndim - 1)), indices.shape)
  return jax.ops.segment_sum(each.reshape(-1).astype(jnp.float32), indices.reshape(-1), size)


def usage(indices: Indices, size: int) -> tuple[Scalar, Scalar]:
  """Returns the fraction of the `size` codes that occur, and the perplexity exp(-sum p log(p + 1e-10))."""
  counts = _histogram(indices.reshape(-1), size)
  p = counts / indices.size
  return jnp.mean(counts > 0), jnp.exp(-jnp.sum(p * jnp.log(p + 1e-10)))


def _flat(z: Vectors) -> Float[Array, 'rows dim']:
  """Returns the vectors as rows, float32, cut off from the gradient."""
  return jax.lax.stop_gradient(z.reshape(-1, z.shape[-1]).astype(jnp.float32))


def _fresh(codes: Codes) -> Codebook:
  return Codebook(codes=codes, counts=jnp.ones(codes.shape[:1]), sums=codes)


def _histogram(rows: Integer[Array, ' rows'], size: int) -> Float[Array, ' size']:
  return jax.ops.segment_sum(jnp.ones(rows.shape), rows, size)


def _nearest_in(z: Array, codes: Array) -> tuple[Array, Array]:
  """Returns for each row the least |e|^2 - 2 z.e and the index of its code, int32."""
  # The highest precision: with products rounded to bfloat16, near codes change places.
  products = jnp.matmul(z, codes.T, precision=jax.lax.Precision.HIGHEST)
  distances = jnp.square(codes).sum(axis=1)[None] - 2.0 * products
  indices = jnp.argmin(distances, axis=1).astype(jnp.int32)
  return jnp.min(distances, axis=1), indices
