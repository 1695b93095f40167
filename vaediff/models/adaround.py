"""AdaRound block by block: which way to round each weight (Q-Diffusion: Li et al. 2023, 2302.04304).

After Nagel et al. 2020 (2004.10568, eqs. 22-25), on blocks as BRECQ (Li et al. 2021, 2102.05426):

    w_q = scale clip(floor(w / scale) + h(a), -top, top),    h(a) = clip(1.2 sigmoid(a) - 0.1, 0, 1)
    loss = |block(w_q) - block_float|^2 + weight sum (1 - |2 h - 1|^beta)

The error is summed over channels and averaged over examples and positions. h begins at the fraction that
rounding down leaves, w / scale - floor(w / scale), so that w_q begins at w. beta falls from 20 to 2, after a
share of the updates without the second term, which pushes every h to 0 or 1. Inputs of a block are those of
the network whose earlier blocks are rounded, outputs those of the float network.

Imports jax, optax and this folder's arithmetic only.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from vaediff.models import ranges

Kernels = Mapping[str, Float[Array, '...']]
"""By path."""
STRETCH, SHIFT = 1.2, -0.1
"""Of the sigmoid: its ends are beyond 0 and 1, so that h reaches both."""
EDGE = 1e-4
"""A fraction is kept so far from 0 and 1: there h has a gradient still."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """How roundings are learned.

  Attributes:
    num_steps: updates of each block.
    batch_size: examples of an update.
    learning_rate: of Adam.
    weight: of the regulariser.
    warmup: share of the updates without it.
    beta_start: its exponent after the warm-up.
    beta_end: the same at the end; linear between them.
  """

  num_steps: int = 500
  batch_size: int = 32
  learning_rate: float = 1e-2
  weight: float = 0.01
  warmup: float = 0.2
  beta_start: float = 20.0
  beta_end: float = 2.0


def rectified(a: Float[Array, '*shape']) -> Float[Array, '*shape']:
  """Returns h(a) in [0, 1]."""
  return jnp.clip(STRETCH * jax.nn.sigmoid(a) + SHIFT, 0.0, 1.0)


def start(kernel: Float[Array, '*shape'], scale: Float[Array, '...']) -> Float[Array, '*shape']:
  """Returns the a at which h is the fraction that rounding down leaves of kernel / scale."""
  steps = kernel / scale
  fraction = jnp.clip(steps - jnp.floor(steps), EDGE, 1 - EDGE)
  inside = (fraction - SHIFT) / STRETCH
  return jnp.log(inside) - jnp.log1p(-inside)


def soft(
  kernel: Float[Array, '*shape'], scale: Float[Array, '...'], h: Float[Array, '*shape'], bits: int
) -> Float[Array, '*shape']:
  """Returns w_q of roundings between down (h = 0) and up (h = 1)."""
  top = ranges.largest(bits)
  return scale * jnp.clip(jnp.floor(kernel / scale) + h, -top, top)


def hard(
  kernel: Float[Array, '*shape'], scale: Float[Array, '...'], a: Float[Array, '*shape'], bits: int
) -> Int[Array, '*shape']:
  """Returns the whole numbers, int8, that a learned `a` rounds to: up where h(a) >= 1/2."""
  top = ranges.largest(bits)
  up = (rectified(a) >= 0.5).astype(kernel.dtype)
  return jnp.clip(jnp.floor(kernel / scale) + up, -top, top).astype(jnp.int8)


def beta_at(step: Array | int, settings: Settings) -> Array:
  """Returns the exponent of the regulariser after `step` updates."""
  first = settings.warmup * settings.num_steps
  share = jnp.clip((step - first) / max(settings.num_steps - first, 1), 0.0, 1.0)
  return settings.beta_start + (settings.beta_end - settings.beta_start) * share


def regulariser(h: Float[Array, '*shape'], beta: Array | float) -> Float[Array, '']:
  """Returns sum (1 - |2 h - 1|^beta), 0 where every h is 0 or 1."""
  return jnp.sum(1 - jnp.abs(2 * h - 1) ** beta)


def block_error(outputs: Array, wanted: Array) -> Float[Array, '']:
  """Returns the squared error, summed over channels and averaged over examples and positions."""
  return jnp.mean(jnp.sum(jnp.square(outputs - wanted), axis=-1))


class Rounded(NamedTuple):
  """The whole numbers of a block's kernels.

  Attributes:
    kernels: int8, by path.
    error: of the block, over all examples.
    nearest: the same, of rounding to nearest.
  """

  kernels: dict[str, Int[Array, '...']]
  error: float
  nearest: float


def learn(
  block: Callable[..., Array],
  kernels: Kernels,
  scales: Kernels,
  args: Any,
  wanted: Float[Array, 'examples *shape'],
  settings: Settings,
  key: jax.Array,
  bits: int,
) -> Rounded:
  """Returns the learned roundings of the kernels of one block.

  They are the nearest ones, with `error` equal to `nearest`, where the learned ones have the larger error
  over all examples, as after too few updates.

  Args:
    block: (kernels, *args) -> outputs, differentiable in its kernels.
    kernels: float32.
    scales: of the same paths, with as many axes as the kernel, broadcast over it.
    args: what the block is given, arrays or trees of arrays with a row per example.
    wanted: the float block's outputs.
    settings: how they are learned.
    key: of which examples an update sees.
    bits: of the whole numbers.
  """
  learned, near = _learned(
    block, dict(kernels), dict(scales), args, wanted, key, settings=settings, bits=bits
  )

  def error(whole: Mapping[str, Array]) -> float:
    back = {path: scales[path] * whole[path] for path in whole}
    return error_over(block, back, args, wanted, settings.batch_size)

  errors = error(learned), error(near)
  return Rounded(learned, *errors) if errors[0] < errors[1] else Rounded(near, errors[1], errors[1])


def error_over(
  block: Callable[..., Array],
  params: Mapping[str, Array],
  args: Any,
  wanted: Float[Array, 'examples *shape'],
  size: int,
) -> float:
  """Returns the error of a block, (params, *args) -> outputs, over all examples, `size` at a time."""
  parts = range(0, len(wanted), size)
  each = [_error(block, dict(params), _rows(args, i, size), wanted[i : i + size]) for i in parts]
  return sum(map(float, each)) / len(wanted)


def _rows(args: Any, first: int, size: int) -> Any:
  return jax.tree.map(lambda x: x[first : first + size], args)


@functools.partial(jax.jit, static_argnums=0)
def _error(block: Callable[..., Array], params: Kernels, args: Any, wanted: Array) -> Array:
  return block_error(block(params, *args), wanted) * len(wanted)


@functools.partial(jax.jit, static_argnums=0, static_argnames=('settings', 'bits'))
def _learned(
  block: Callable[..., Array],
  kernels: dict[str, Array],
  scales: dict[str, Array],
  args: Any,
  wanted: Array,
  key: jax.Array,
  *,
  settings: Settings,
  bits: int,
) -> tuple[dict[str, Array], dict[str, Array]]:
  """Returns the whole numbers that are learned, and the nearest ones, in one program for all updates."""
  adam = optax.adam(settings.learning_rate)
  count = len(wanted)

  def loss(a: dict[str, Array], rows: Array, step: Array) -> Array:
    h = jax.tree.map(rectified, a)
    rounded = {path: soft(kernels[path], scales[path], h[path], bits) for path in kernels}
    outputs = block(rounded, *jax.tree.map(lambda x: x[rows], args))
    beta = beta_at(step, settings)
    pushed = sum(regulariser(each, beta) for each in h.values())
    after = step >= settings.warmup * settings.num_steps
    return block_error(outputs, wanted[rows]) + jnp.where(after, settings.weight, 0.0) * pushed

  def update(carry: tuple[Any, Any], step: Array) -> tuple[tuple[Any, Any], None]:
    a, state = carry
    chosen = jax.random.randint(jax.random.fold_in(key, step), (min(settings.batch_size, count),), 0, count)
    updates, state = adam.update(jax.grad(loss)(a, chosen, step), state, a)
    return (optax.apply_updates(a, updates), state), None

  a = {path: start(kernels[path], scales[path]) for path in kernels}
  (a, _), _ = jax.lax.scan(update, (a, adam.init(a)), jnp.arange(settings.num_steps))
  learned = {path: hard(kernels[path], scales[path], a[path], bits) for path in kernels}
  near = {path: ranges.nearest(kernels[path], scales[path], bits) for path in kernels}
  return learned, near
