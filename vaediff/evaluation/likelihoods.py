"""Figures of a model rather than of its samples: bounds, what of z is in use, nats of a prior of ids."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from vaediff import experiments, reads
from vaediff.conditions.vae import CODE
from vaediff.data import sources
from vaediff.diffusion.likelihood import bits_per_dimension
from vaediff.errors import UserError
from vaediff.evaluation import id_counts
from vaediff.evaluation.measures import Figure, mean_with_error
from vaediff.experiments.base import BYTES, IDS, Experiment
from vaediff.machine import sharding
from vaediff.run import draw
from vaediff.run.trained import Trained
from vaediff.types import Read

ACTIVE_VARIANCE = 0.01
"""Least variance over images of a unit's posterior mean for it to count as active (arXiv:1509.00519)."""


def figures(trained: Trained) -> dict[str, Figure]:
  """Returns the bounds of the stage and of its VAE over the evaluation split, and the active units of z.

  'bits_per_dimension' and 'elbo' (nats per image) with the standard error of their mean over images as the
  spread, each with its terms; 'active_units' of the VAE, as a count. Of a prior of ids see `id_counts`.
  """
  settings, found = trained.config.evaluate, {}
  for experiment, read in [(trained.experiment, trained.read), *encoders_of(trained)]:
    if not settings.num_bound or not experiment.likelihood:
      continue
    if experiment.likelihood == IDS:
      found |= id_counts.figures(trained)
      continue
    dimensions = int(np.prod(trained.eval_source.image_shape))
    try:
      terms = bound(
        experiment, read, trained.eval_source, trained.mesh, settings.num_bound,
        settings.num_bound_times, trained.settings.seed, settings.batch_size,
      )  # fmt: skip
    except UserError as error:
      found['bits_per_dimension'] = Figure(missing=str(error))
      continue
    if experiment.likelihood == BYTES:
      unit = functools.partial(bits_per_dimension, dimensions=dimensions)
      found |= of_terms('bits_per_dimension', terms, unit)
    else:
      found |= of_terms('elbo', terms, lambda nats: -nats)
  if settings.num_bound and trained.experiment.no_likelihood:
    found['bits_per_dimension'] = Figure(missing=trained.experiment.no_likelihood)
  if CODE in trained.experiment.inputs:
    count = min(settings.num_reconstructions, len(trained.eval_source))
    code = trained.observe(*trained.eval_images(count))[CODE]
    found['active_units'] = Figure(value=float(active_units(code)), n=count)
    if count < 2 or not np.isfinite(code).all():
      why = 'needs at least 2 images' if count < 2 else 'codes of evaluation images are not finite'
      found['active_units'] = Figure(missing=why)
    found['latent_dim'] = Figure(value=float(code.shape[1]))
  return found


def of_terms(name: str, terms: dict[str, np.ndarray], unit: Callable[[float], float]) -> dict[str, Figure]:
  """Returns a bound and its terms, each a mean over images; `unit` turns nats into what is shown.

  Where one is not finite there is no mean, and the figures say of how many images that is.
  """
  total = sum(terms.values())
  whole = mean_with_error(total)
  if whole.value is None:
    return {name: whole}
  spread = None if whole.spread is None else abs(unit(whole.spread))
  found = {name: dataclasses.replace(whole, value=unit(whole.value), spread=spread)}
  for term, values in terms.items():
    found[f'{name}/{term}'] = Figure(value=unit(float(values.mean())), n=len(total))
  return found


def encoders_of(trained: Trained) -> list[tuple[Experiment, Read]]:
  """Returns the experiments of the earlier stages that have a bound of another kind, and what they read."""
  opened = []
  for name, source in trained.experiment.frozen.items():
    if not isinstance(source, reads.FromStage):
      continue
    experiment = experiments.build(trained.config, source.stage)
    if experiment.likelihood and experiment.likelihood not in (BYTES, IDS):
      opened.append((experiment, {source.network: trained.read[name]}))
  return opened


def bound(
  experiment: Experiment,
  read: Read,
  source: sources.Source,
  mesh: Mesh,
  limit: int,
  num_times: int,
  seed: int,
  batch_size: int,
) -> dict[str, np.ndarray]:
  """Returns the terms of the negative bound of the first `limit` images, in nats, float64 [n]."""
  count = min(limit, len(source))
  where, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)

  @functools.partial(jax.jit, out_shardings=everywhere)
  def run(read, batch, indices):
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(jax.random.key(seed), i))[1])(indices)
    return experiment.bound(read, batch, keys, num_times)

  parts = []
  size = sharding.round_up(min(batch_size, count), mesh)
  for indices, num_real in draw.padded_batches(count, size):
    batch = jax.device_put(source.read(indices), where)
    terms = run(read, batch, jax.device_put(indices, where))
    parts.append({k: np.asarray(v[:num_real], np.float64) for k, v in jax.device_get(terms).items()})
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def active_units(mean: np.ndarray) -> int:
  """Returns how many units of z have a posterior mean [n, d] that varies over images."""
  return int(np.sum(np.var(mean, axis=0) > ACTIVE_VARIANCE))
