"""How ids are drawn of logits, and one after the other: pure functions of arrays.

In this order: guidance l = (1 + w) l_c - w l_u (others' scale is 1 + w), what is illegal, temperature, top-k,
top-p, then one draw for each image with the key of the image and the number of the id.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

Logits = Float[Array, '*batch codes']
Start = Callable[[], tuple[Logits, Any]]
"""() -> (logits of the first id, cache)."""
Step = Callable[[Int[Array, ' rows'], Int[Array, ''], Any], tuple[Logits, Any]]
"""(ids before, n, cache) -> (logits of id n, cache)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
  """How ids are drawn.

  Attributes:
    guidance_weight: w; 0 = the logits as they are.
    temperature: the logits are divided by it; 0 = the most probable id.
    top_k: only so many of the most probable, and what is as probable as the last of them; 0 = all.
    top_p: only the most probable that together have this probability; 1 = all.
  """

  guidance_weight: int | float = 0.0
  temperature: int | float = 1.0
  top_k: int = 0
  top_p: int | float = 1.0


def guided(conditional: Logits, unconditional: Logits, w: int | float) -> Logits:
  """Returns (1 + w) l_c - w l_u (Ho & Salimans 2022, arXiv:2207.12598, of logits)."""
  return (1 + w) * conditional - w * unconditional


def limited(logits: Logits, rule: Rule, legal: Bool[Array, ' codes'] | None = None) -> Logits:
  """Returns the logits that are drawn of: -inf where an id is not to be drawn.

  Of ids as probable as the last of top-k all stay. By top-p an id goes exactly where those before it, in the
  order of their probability, have more than `top_p`: one always stays.
  """
  if legal is not None:
    logits = jnp.where(legal.reshape((1,) * (logits.ndim - 1) + (-1,)), logits, -jnp.inf)
  if rule.temperature == 0:
    best = jnp.argmax(logits, axis=-1, keepdims=True)
    places = jnp.arange(logits.shape[-1]).reshape((1,) * (logits.ndim - 1) + (-1,))
    return jnp.where(places == best, 0.0, -jnp.inf)
  logits = logits / rule.temperature
  if rule.top_k:
    last = jax.lax.top_k(logits, rule.top_k)[0][..., -1:]
    logits = jnp.where(logits >= last, logits, -jnp.inf)
  if rule.top_p < 1:
    order = jnp.argsort(-logits, axis=-1, stable=True)
    sorted_ = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    stays = jnp.cumsum(sorted_, axis=-1) - sorted_ <= rule.top_p
    back = jnp.argsort(order, axis=-1)
    logits = jnp.where(jnp.take_along_axis(stays, back, axis=-1), logits, -jnp.inf)
  return logits


def categorical(keys: Key[Array, ' batch'], n: Int[Array, ''], logits: Logits) -> Int[Array, ' batch']:
  """Returns one id for each image, drawn with the key of the image and the number of the id."""
  draw = lambda key, row: jax.random.categorical(jax.random.fold_in(key, n), row)
  return jax.vmap(draw)(keys, logits).astype(jnp.int32)


def paired(first: Array, second: Array) -> Array:
  """Returns rows of two arrays in turn: what is guided, and what guides it, beside each other."""
  return jnp.stack([first, second], axis=1).reshape(-1, *first.shape[1:])


def sample(
  start: Start, step: Step, keys: Key[Array, ' batch'], count: int, rule: Rule
) -> tuple[Int[Array, 'batch count'], Float[Array, ' batch']]:
  """Returns ids drawn one after the other in one scan, and -log p of each row, in nats.

  With guidance `start` and `step` have two rows for each image, the conditional one first (`paired`); p is
  that of the conditional logits, as they are.
  """

  def drawn(logits: Logits, n: Int[Array, '']) -> tuple[Int[Array, ' batch'], Float[Array, ' batch']]:
    conditional = logits
    if rule.guidance_weight:
      both = logits.reshape(-1, 2, logits.shape[-1])
      conditional = both[:, 0]
      logits = guided(conditional, both[:, 1], rule.guidance_weight)
    codes = categorical(keys, n, limited(logits, rule))
    return codes, nats(conditional, codes)

  def one(carry: Any, n: Int[Array, '']) -> tuple[Any, Int[Array, ' batch']]:
    before, spent, cache = carry
    logits, cache = step(paired(before, before) if rule.guidance_weight else before, n, cache)
    codes, more = drawn(logits, n)
    return (codes, spent + more, cache), codes

  logits, cache = start()
  first, spent = drawn(logits, jnp.int32(0))
  (_, spent, _), others = jax.lax.scan(one, (first, spent, cache), jnp.arange(1, count))
  return jnp.concatenate([first[:, None], others.T], axis=1), spent


def nats(logits: Logits, codes: Int[Array, '*batch']) -> Float[Array, '*batch']:
  """Returns -log p of each id."""
  return -jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), codes[..., None], axis=-1)[..., 0]
