"""How well ids are predicted: nats per token of a prior on the evaluation split, and of tables of counts.

The tables are counts of the very ids that the prior was trained on, + 0.1 each: of an id; of an id at its
place; of an id after its left neighbour (the first of a row has a table of its own); of an id at its place in
an image of its class. A prior that has learned more than these lies below the best of them. One that reads
captions needs more nats where it is given those of other images.
"""

import functools
import math

import jax
import numpy as np

from vaediff.data import pixels, sources
from vaediff.diffusion.likelihood import bits_per_dimension
from vaediff.evaluation.measures import Figure, mean_with_error
from vaediff.experiments.base import IDS
from vaediff.machine import sharding
from vaediff.run import draw
from vaediff.run.precomputed import precomputed
from vaediff.run.trained import Trained

SMOOTHING = 0.1
"""Added to every count."""
CHUNK = 1024
"""Images that are read at a time for their labels."""
OF_OTHERS = 'captions of others'
TABLES = ('unigram', 'position', 'left bigram', 'class + position')


def figures(trained: Trained) -> dict[str, Figure]:
  """Returns nats per token and bits per dimension over the evaluation split, and nats of the tables.

  Of several levels also the nats of each; where captions are read also the nats with those of other images,
  half the split away, and by how much they are more. Spreads are standard errors of the mean over images.
  """
  experiment, mesh = trained.experiment, trained.mesh
  nats, held_out, labels, of_others = measured(trained)
  sizes = {name: math.prod(struct.shape) for name, struct in experiment.handed.items()}
  total, tokens = sum(nats.values()), sum(sizes.values())
  dimensions = int(np.prod(trained.eval_source.image_shape))
  found = {
    'nats_per_token': mean_with_error(total / tokens),
    f'bits_per_dimension ({IDS})': mean_with_error(bits_per_dimension(total, dimensions)),
  }
  if len(sizes) > 1:
    found |= {f'nats_per_token/{name}': mean_with_error(nats[name] / sizes[name]) for name in sizes}
  if of_others is not None and len(of_others) < 2:  # they are its own
    found[f'nats_per_token/{OF_OTHERS}'] = Figure(missing='there is no other caption: it needs at least 2')
  elif of_others is not None:
    found[f'nats_per_token/{OF_OTHERS}'] = mean_with_error(of_others / tokens)
    found[f'nats_per_token/rise by {OF_OTHERS}'] = mean_with_error((of_others - total) / tokens)
  source, classes = trained.images('train'), trained.config.data.num_classes
  stored = precomputed(trained.config, trained.workdir, trained.stage, experiment, trained.read, source, mesh)
  known = labels_of(source) if classes else np.zeros(len(source), np.int32)  # of no classes no table reads it
  spent = {}
  for name, struct in experiment.handed.items():
    views = stored[name].reshape(len(source), -1, *struct.shape)  # with flips two of each image
    train = views.reshape(-1, *struct.shape)
    tables = of_tables(
      train, np.repeat(known, views.shape[1]), held_out[name], labels, classes, experiment.id_sizes[name]
    )
    for table, value in tables.items():
      spent[table] = spent.get(table, 0.0) + value * sizes[name] / tokens
  return found | {f'nats_per_token of counts: {name}': Figure(value=value) for name, value in spent.items()}


def labels_of(source: sources.Source) -> np.ndarray:
  """Returns the labels of all images of a split, int32 [n]; the images are read for them."""
  chunks = np.array_split(np.arange(len(source)), max(1, len(source) // CHUNK))
  return np.concatenate([source.read(rows)[sources.LABEL] for rows in chunks])


def measured(
  trained: Trained,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray, np.ndarray | None]:
  """Returns nats (float64 [n]) and ids of each level, labels, and nats of all levels by captions of others.

  All over the evaluation split; the last is None where no captions are read.
  """
  experiment, source, mesh = trained.experiment, trained.eval_source, trained.mesh
  where, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)

  @functools.partial(jax.jit, out_shardings=everywhere)
  def run(read, batch, other):
    x = pixels.to_unit_range(batch[sources.IMAGE])
    keys = jax.random.split(jax.random.key(0), 1)  # it draws nothing
    more = experiment.bound(read, {**batch, **other}, keys, 0) if other else {}
    return experiment.bound(read, batch, keys, 0), experiment.store(read, batch, x), more

  count = len(source)
  size = sharding.round_up(min(trained.settings.batch_size, count), mesh)
  nats, ids, labels, of_others = {}, {}, [], []
  told = trained.caption_inputs(source.captions) if trained.caption_stage is trained else {}
  for rows, num_real in draw.padded_batches(count, size):
    batch = source.read(rows)
    other = {name: tokens[(rows + count // 2) % count] for name, tokens in told.items()}
    placed = [jax.device_put(part, where) for part in (batch, other)]
    terms, seen, more = jax.device_get(run(trained.read, *placed))
    for name, value in terms.items():
      nats.setdefault(name, []).append(np.asarray(value[:num_real], np.float64))
    for name, value in seen.items():
      shape = experiment.handed[name].shape
      ids.setdefault(name, []).append(value.reshape(len(value), -1, *shape)[:num_real, 0])
    if more:
      of_others.append(sum(np.asarray(value[:num_real], np.float64) for value in more.values()))
    labels.append(batch[sources.LABEL][:num_real])
  whole = lambda parts: {name: np.concatenate(part) for name, part in parts.items()}
  by_others = np.concatenate(of_others) if of_others else None
  return whole(nats), whole(ids), np.concatenate(labels), by_others


def of_tables(
  train: np.ndarray,
  labels: np.ndarray,
  held_out: np.ndarray,
  held_out_labels: np.ndarray,
  num_classes: int,
  num_ids: int,
) -> dict[str, float]:
  """Returns the nats per token of held-out ids by the tables of `TABLES`; without classes not the last.

  Args:
    train: ids [n, height, width].
    labels: of them; each in 0 ... num_classes - 1.
    held_out: ids [m, height, width].
    held_out_labels: of them.
    num_classes: 0 = there are none.
    num_ids: how many ids there are.
  """

  def contexts(ids: np.ndarray, of_classes: np.ndarray) -> tuple[np.ndarray, ...]:
    place = np.arange(ids[0].size).reshape(1, *ids.shape[1:])
    left = np.concatenate([np.full_like(ids[:, :, :1], num_ids), ids[:, :, :-1]], axis=2)
    every = np.broadcast_to(place, ids.shape)
    found = (np.zeros_like(every), every, left)
    return (*found, of_classes.reshape(-1, 1, 1) * ids[0].size + place) if num_classes else found

  pairs = zip(contexts(train, labels), contexts(held_out, held_out_labels), strict=True)
  return {
    name: of_table(before, train, after, held_out, num_ids)
    for name, (before, after) in zip(TABLES, pairs, strict=False)
  }


def of_table(
  context: np.ndarray, ids: np.ndarray, held_out_context: np.ndarray, held_out: np.ndarray, num_ids: int
) -> float:
  """Returns the mean of -log p(id | context), p of counts + `SMOOTHING`; contexts are whole numbers.

  Only what occurs is counted: a table of all contexts and ids would not fit.
  """

  def counted(keys: np.ndarray, asked: np.ndarray) -> np.ndarray:
    known, counts = np.unique(keys.reshape(-1), return_counts=True)
    asked = asked.reshape(-1)
    place = np.minimum(np.searchsorted(known, asked), len(known) - 1)
    return np.where(known[place] == asked, counts[place], 0)

  joined = (context.astype(np.int64) * num_ids + ids, held_out_context.astype(np.int64) * num_ids + held_out)
  hits, total = counted(*joined), counted(context, held_out_context)
  return float(np.mean(np.log(total + SMOOTHING * num_ids) - np.log(hits + SMOOTHING)))
