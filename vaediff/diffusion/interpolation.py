"""Ways from one array to another, on the host: straight, along the circle of noise, along that of a sphere.

    slerp(a, b, w) = (sin((1 - w) angle) a + sin(w angle) b) / sin(angle)

Of noise the lengths are kept as they are, so that unit variance stays; a sphere has vectors of length 1, such
as those of a CLIP stage, and between opposite ones there is no one way.

Imports numpy and `vaediff.errors` only.
"""

import numpy as np
from jaxtyping import Float

from vaediff.errors import UserError

OPPOSITE = 1e-3
"""Vectors whose angle is nearer to pi than this, in radians, are opposite."""
EQUAL = 1e-4
"""Below this angle the circle is a line."""


def lerp(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """Returns (1 - w) a + w b for each weight w."""
  w = weights.reshape(-1, *[1] * a.ndim)
  return (1 - w) * a + w * b


def slerp(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """Returns the points on the great circle from a to b, so that unit-variance noise keeps its variance."""
  cosine = np.sum(a * b) / (np.linalg.norm(a) * np.linalg.norm(b))
  angle = np.arccos(np.clip(cosine, -1.0, 1.0))
  if np.sin(angle) < 1e-4:  # the same or opposite directions: no unique great circle
    return lerp(a, b, weights)
  w = weights.reshape(-1, *[1] * a.ndim)
  return ((np.sin((1 - w) * angle) * a + np.sin(w * angle) * b) / np.sin(angle)).astype(a.dtype)


def unit(x: Float[np.ndarray, '*n d']) -> Float[np.ndarray, '*n d']:
  """Returns vectors of length 1, float64."""
  x = np.asarray(x, np.float64)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def on_sphere(
  a: Float[np.ndarray, ' d'], b: Float[np.ndarray, ' d'], weights: Float[np.ndarray, ' n']
) -> Float[np.ndarray, 'n d']:
  """Returns the unit vectors on the great circle from a to b, one for each weight in [0, 1]; float32.

  Args:
    a: at weight 0, of any length but 0.
    b: at weight 1.
    weights: shares of the angle.

  Raises:
    UserError: for opposite vectors: every way between them is as long.
  """
  a, b = unit(a), unit(b)
  angle = 2 * np.arctan2(np.linalg.norm(a - b), np.linalg.norm(a + b))  # exact at both ends
  if np.pi - angle < OPPOSITE:
    raise UserError(
      f'the two vectors are opposite, {np.pi - angle:.2g} radians from it (at least {OPPOSITE:g} are '
      'needed): there is no one shortest way between them. Choose other images or captions'
    )
  w = np.asarray(weights, np.float64)[:, None]
  if angle < EQUAL:
    return unit(lerp(a, b, w[:, 0])).astype(np.float32)
  return ((np.sin((1 - w) * angle) * a + np.sin(w * angle) * b) / np.sin(angle)).astype(np.float32)
