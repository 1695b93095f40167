"""Whole numbers against floats: the same samples drawn by both in turn, so that what else runs slows both."""

import functools
import statistics
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vaediff import experiments
from vaediff.experiments import quantized
from vaediff.experiments.base import NOISE
from vaediff.machine import cost, integers, sharding
from vaediff.models.quantized import ready
from vaediff.run import draw, log
from vaediff.run import frozen as frozen_networks


def measure(config: ConfigDict, stage: str, mesh: Mesh) -> dict[str, Any]:
  """Returns what a quantized stage costs beside the same stage in floats; networks are fresh ones.

  Keys: `arithmetic`, 'products' and 'convolutions' of whole numbers, 'wide products' (floats where a layer
  reads few channels), or 'floats' that are made of them; `cpu_flags` that the processor has;
  `sample_batch_size`; `sample_seconds` and `sample_seconds_float32`, medians of `benchmark.num_repeats`
  calls in turn; `speed` and `speed_range`, seconds of floats over those of whole numbers in each turn: their
  median, the smallest and the largest; `memory_bytes` and `memory_bytes_float32` of the networks, as XLA
  lays them out: those of floats where floats are made.
  """
  own = experiments.build(config, stage)
  section, size = config[stage].sample, config.data.image_size
  count = sharding.round_up(min(section.batch_size, section.num_images), mesh)
  given = {name: np.zeros((count, *struct.shape), struct.dtype) for name, struct in own.inputs.items()}
  given.pop(NOISE, None)
  calls, memory = {}, {}
  for name, experiment in (('float32', quantized.in_floats(own)), ('quantized', own)):
    models, frozen = experiment.networks.items(), frozen_networks.fresh(experiment, mesh)
    params = {network: ready(model, fresh(model.init, mesh)) for network, model in models}
    run = draw.Drawer(experiment, mesh, 0, (size, size, config.data.channels), lambda: None)
    calls[name] = functools.partial(run, {**frozen, **params}, np.arange(count), given)
    memory[name] = cost.device_bytes(params)
  times = in_turn(calls, config.benchmark.num_repeats)
  speeds = [a / b for a, b in zip(times['float32'], times['quantized'], strict=True)]
  found = {
    'arithmetic': integers.arithmetic(),
    'cpu_flags': list(integers.cpu_flags()),
    'sample_batch_size': count,
    'sample_seconds': statistics.median(times['quantized']),
    'sample_seconds_float32': statistics.median(times['float32']),
    'speed': statistics.median(speeds),
    'speed_range': [min(speeds), max(speeds)],
    'memory_bytes': memory['quantized'],
    'memory_bytes_float32': memory['float32'],
  }
  log.say(
    f'{stage}: {found["speed"]:.2f} times as fast as float32 ({min(speeds):.2f} to {max(speeds):.2f}), '
    f'{found["arithmetic"]}, CPU flags {", ".join(found["cpu_flags"]) or "unknown"}'
  )
  return found


def fresh(init: Any, mesh: Mesh) -> Any:
  """Returns fresh parameters on every device."""
  return jax.jit(init, out_shardings=sharding.replicated(mesh))(jax.random.key(0))


def in_turn(calls: dict[str, Any], repeats: int) -> dict[str, list[float]]:
  """Returns the seconds of calls, by name, made one after the other in every turn but a first one."""
  times = {name: [] for name in calls}
  for _ in range(repeats + 1):
    for name, call in calls.items():
      started = time.perf_counter()
      jax.block_until_ready(call())
      times[name].append(time.perf_counter() - started)
  return {name: seconds[1:] for name, seconds in times.items()}
