"""Losses of images and texts that belong together, over all pairs of a batch.

The batch is the global one: of sharded arrays under `jit` the matrix of logits is that of all devices' rows.
Two images of equal captions are both right for either text. To SigLIP's loss the pair alone as the target
would say of equal texts that one is right and the other wrong. The cross-entropies are the same with either
target, for equal texts have equal logits: none can get below the logarithm of how many they are, on average,
which is `floor`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vaediff.models.clip import SIGMOID, SOFTMAX
from vaediff.types import Mask

LOSSES = (SOFTMAX, SIGMOID)
LEAST = -1e30
"""Logit of what is not in the batch: finite, so that 0 times it is 0."""

Pairs = Bool[Array, 'batch batch']
Logits = Float[Array, 'batch batch']
"""Of image i, a row, and text j."""


def same_captions(tokens: Int[Array, 'batch words']) -> Pairs:
  """Returns which captions are equal, id by id."""
  return (tokens[:, None] == tokens[None]).all(axis=-1)


def symmetric(logits: Logits, right: Pairs, real: Mask) -> Float[Array, ' batch']:
  """Returns the mean of both cross-entropies of each row, in nats: image to texts, and text to images.

  Radford et al. 2021 (arXiv:2103.00020), figure 3; the target of a row is what is right, in equal parts.

  Args:
    logits: e^ls times the cosines.
    right: which texts are true of which images; symmetric.
    real: which rows there are, of texts and of images.
  """
  return 0.5 * (_cross_entropy(logits, right, real) + _cross_entropy(logits.T, right.T, real))


def _cross_entropy(logits: Logits, right: Pairs, real: Mask) -> Float[Array, ' batch']:
  targets = (right & real[None]).astype(jnp.float32)
  targets = targets / jnp.maximum(jnp.sum(targets, axis=1, keepdims=True), 1.0)
  logits = jnp.where(real[None], logits, LEAST)
  return -jnp.sum(targets * jax.nn.log_softmax(logits, axis=1), axis=1)


def sigmoid(logits: Logits, right: Pairs, real: Mask) -> Float[Array, ' batch']:
  """Returns the sum over the texts of the logistic losses of each image, in nats.

  SigLIP (Zhai et al. 2023, arXiv:2303.15343), algorithm 1.
  """
  wrong = jax.nn.softplus(jnp.where(right, -logits, logits))
  return jnp.sum(jnp.where(real[None], wrong, 0.0), axis=1)


BY_NAME = {SOFTMAX: symmetric, SIGMOID: sigmoid}


def floor(right: Pairs, real: Mask) -> Float[Array, ' batch']:
  """Returns the least that `symmetric` can be for each row, in nats: ln of how many captions are equal."""
  return jnp.log(jnp.maximum(jnp.sum(right & real[None], axis=1), 1).astype(jnp.float32))


def first_is_right(logits: Logits, right: Pairs, real: Mask) -> Float[Array, ' batch']:
  """Returns 1 where the text with the largest logit is true of the image, else 0: recall at 1."""
  best = jnp.argmax(jnp.where(real[None], logits, LEAST), axis=1)
  return jnp.take_along_axis(right, best[:, None], axis=1)[:, 0].astype(jnp.float32)
