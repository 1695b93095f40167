"""Losses of two players: non-saturating and hinge, R1, the adaptive weight, and the weight over training.

Per-example values; logits are float32. Imports jax, `vaediff.types` and `vaediff.errors` only.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vaediff.errors import UserError
from vaediff.types import Image, Scalar

Logits = Float[Array, '*shape']

WEIGHTED_LEARNING_DELTA = 6.0
RECONSTRUCTION_WEIGHTS = ('none', 'constant', 'linear', 'weighted_learning')
MAX_ADAPTIVE_WEIGHT = 1e4


def generator_loss(fake: Logits) -> Logits:
  """Returns -log sigmoid(fake): the non-saturating loss of Goodfellow et al. 2014 (arXiv:1406.2661)."""
  return jax.nn.softplus(-fake)


def discriminator_loss(real: Logits, fake: Logits) -> Logits:
  """Returns -log sigmoid(real) - log(1 - sigmoid(fake)); LDDGAN, eq. 5 with its missing term."""
  return jax.nn.softplus(-real) + jax.nn.softplus(fake)


def hinge_discriminator_loss(real: Logits, fake: Logits) -> Logits:
  """Returns half of max(0, 1 - real) + max(0, 1 + fake), as in VQGAN (Esser et al. 2021, 2012.09841)."""
  return 0.5 * (jax.nn.relu(1 - real) + jax.nn.relu(1 + fake))


def r1(discriminate: Callable[[Image], Float[Array, ' batch']], x: Image) -> Float[Array, ' batch']:
  """Returns |grad_x D(x)|^2 per example, float32 (Mescheder et al. 2018, arXiv:1801.04406, eq. 9).

  The gradient is of the sum over the batch, since minibatch statistics join its examples; whatever else the
  discriminator reads is held in `discriminate`, and has no part in it.
  """
  gradient = jax.grad(lambda x: jnp.sum(discriminate(x)))(x.astype(jnp.float32))
  return jnp.sum(jnp.square(gradient), axis=(1, 2, 3))


def adaptive_weight(
  of_reconstruction: Float[Array, '...'], of_adversary: Float[Array, '...'], epsilon: float = 1e-4
) -> Scalar:
  """Returns |grad reconstruction| / (|grad adversary| + epsilon), within [0, 1e4], not differentiated.

  VQGAN, eq. 7: both are gradients with respect to the last kernel of the decoder.
  """
  ratio = jnp.linalg.norm(of_reconstruction.ravel()) / (jnp.linalg.norm(of_adversary.ravel()) + epsilon)
  return jax.lax.stop_gradient(jnp.clip(ratio, 0.0, MAX_ADAPTIVE_WEIGHT))


def reconstruction_weight(kind: str, fraction: Float[Array, '']) -> Float[Array, '']:
  """Returns lambda of L_G = L_adv + lambda |x0 - x0'| at a fraction of training in [0, 1].

  'none' is 0, 'constant' 1, 'linear' 1 - fraction, and 'weighted_learning' sigmoid(-phi) with phi from -6 to
  6: LDDGAN, eq. 9, whose printed phi ends at 0 and lambda at 1/2, against its text.

  Raises:
    UserError: for another name.
  """
  check_reconstruction_weight(kind)
  if kind == 'weighted_learning':
    return jax.nn.sigmoid(WEIGHTED_LEARNING_DELTA * (1 - 2 * fraction))
  return {'none': jnp.zeros_like(fraction), 'constant': jnp.ones_like(fraction), 'linear': 1 - fraction}[kind]


def check_reconstruction_weight(kind: str) -> None:
  """Raises UserError for an unknown name."""
  if kind not in RECONSTRUCTION_WEIGHTS:
    valid = ', '.join(RECONSTRUCTION_WEIGHTS)
    raise UserError(f'loss.reconstruction is {kind!r}; valid: {valid}')
