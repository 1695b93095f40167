"""Edges of images and how far those of two images agree: what a control image shows, and its score.

An edge is where the Sobel filter of any channel, normalised to the change from one pixel to the next, is
above a number: in grey a green shape on grey would have none. It is a function of the image alone, written
here in JAX so that it is computed beside the update, of images that were mirrored before; `shapes.control` is
the same on the host.

Agreement allows an edge to be one pixel off, across or along:

    precision = |E & near(C)| / |E|,   recall = |C & near(E)| / |C|,   F1 = 2 / (1 / precision + 1 / recall)

with E the edges of a sample and C those of its control: what share of its edges the control has, and what
share of the control's edges it has.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

LEAST = 0.06
"""Of an edge, for pixels in [0, 1]."""
F1, PRECISION, RECALL = 'edge_f1', 'edge_precision', 'edge_recall'

Edges = Float[Array, 'n height width 1']
"""1 on an edge, 0 elsewhere."""


def edges(x: Float[Array, 'n height width channels'], least: float = LEAST) -> Edges:
  """Returns the edges of images in [0, 1]."""
  x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode='edge')
  across = (x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]) / 4
  along = (x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]) / 4
  right = (across[:, :, 2:] - across[:, :, :-2]) / 2
  down = (along[:, 2:] - along[:, :-2]) / 2
  squares = jnp.square(right) + jnp.square(down)
  return (jnp.max(squares, axis=-1, keepdims=True) > least**2).astype(jnp.float32)


def near(e: Edges) -> Edges:
  """Returns where an edge is, or one of the eight pixels around it is one."""
  e = jnp.pad(e, ((0, 0), (1, 1), (1, 1), (0, 0)))
  rows = jnp.maximum(jnp.maximum(e[:, :-2], e[:, 1:-1]), e[:, 2:])
  return jnp.maximum(jnp.maximum(rows[:, :, :-2], rows[:, :, 1:-1]), rows[:, :, 2:])


def agreement(e: Edges, c: Edges) -> dict[str, Float[Array, ' n']]:
  """Returns F1, precision and recall of the edges `e` of each sample, for those of its control `c`.

  Where neither has an edge all are 1, and where one alone has, 0.
  """

  def share(of: Edges, seen: Edges, others: Edges) -> Array:
    count = jnp.sum(of, axis=(1, 2, 3))
    found = jnp.sum(of * seen, axis=(1, 2, 3)) / jnp.maximum(count, 1)
    return jnp.where(count > 0, found, (jnp.sum(others, axis=(1, 2, 3)) == 0).astype(jnp.float32))

  precision, recall = share(e, near(c), c), share(c, near(e), e)
  f1 = 2 * precision * recall / jnp.maximum(precision + recall, 1e-12)
  return {F1: f1, PRECISION: precision, RECALL: recall}
