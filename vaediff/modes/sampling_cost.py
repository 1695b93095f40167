"""What a sample of a denoising GAN costs, split into the generator's steps and the way back to an image.

The columns of LDDGAN's table 2, with its timing (a batch of 100, warm-ups first), and with what that table
leaves out: all calls of the generator, and the decoder.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vaediff.experiments.ddgan import Ddgan
from vaediff.machine import cost, sharding
from vaediff.models import ports
from vaediff.run import log
from vaediff.types import Read

PARTS = ('generator', 'decoder', 'total')


def measure(
  experiment: Ddgan,
  read: Read,
  mesh: Mesh,
  settings: ConfigDict,
) -> dict[str, dict[str, int | float]]:
  """Returns figures of 'generator' (all T calls), 'decoder' (latents or wavelets to pixels) and 'total'.

  Keys of each: `parameters`; `giga_macs_per_image`; `memory_bytes` of the compiled program on one device,
  arguments and results included; `seconds_per_batch`, the mean, with `seconds_per_batch_std`, and
  `seconds_per_100_images`.
  A table of them is printed.
  """
  count = sharding.round_up(settings.sample_batch_size, mesh)
  where, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)

  def inputs(number: int) -> tuple[Any, ...]:
    noise = jax.random.normal(jax.random.key(0), (number, *experiment.space.shape))
    keys = jax.random.split(jax.random.key(1), number)
    channels = ports.channels(experiment.conditions.named_ports)
    return noise, keys, (jnp.zeros((*noise.shape[:-1], channels)) if channels else None)

  def generate(read, noise, keys, beside):
    return experiment.draw_map(read['generator'], noise, beside, keys)

  def decode(read, y, keys, beside):
    del keys, beside
    return experiment.space.decode(read, y)['x0']

  def both(read, noise, keys, beside):
    return decode(read, generate(read, noise, keys, beside), keys, beside)

  args = (read, *jax.device_put(inputs(count), where))
  one = (read, *inputs(1))
  sizes = {
    'generator': cost.num_parameters(read['generator']),
    'decoder': experiment.space.num_decoder_parameters(read),
  }
  found = {}
  for name, function in zip(PARTS, (generate, decode, both), strict=True):
    compiled = jax.jit(function, out_shardings=everywhere).lower(*args).compile()
    run = functools.partial(compiled, *args)
    times = seconds(run, settings.num_warmups, settings.num_sample_repeats)
    memory = compiled.memory_analysis()
    found[name] = {
      'parameters': sizes.get(name, sum(sizes.values())),
      'giga_macs_per_image': cost.macs(function, *one) / 1e9,
      'memory_bytes': memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes,
      'seconds_per_batch': statistics.fmean(times),
      'seconds_per_batch_std': statistics.stdev(times) if len(times) > 1 else 0.0,
      'seconds_per_100_images': 100 * statistics.fmean(times) / count,
    }
  log.say(
    f'{"":>10}{"parameters M":>14}{"GMAC/image":>12}{"memory GB":>11}{f"s per {count}":>12}{"std":>8}   '
    f'{experiment.num_function_evaluations} calls, {jax.devices()[0].device_kind} x {mesh.size}'
  )
  for name, row in found.items():
    figures = f'{row["parameters"] / 1e6:>14.3f}{row["giga_macs_per_image"]:>12.3f}'
    times = f'{row["seconds_per_batch"]:>12.4f}{row["seconds_per_batch_std"]:>8.4f}'
    log.say(f'{name:>10}{figures}{row["memory_bytes"] / 1e9:>11.3f}{times}')
  return found


def seconds(function: Callable[[], Any], num_warmups: int, repeats: int) -> list[float]:
  """Returns the seconds of each call after the warm-ups, every result waited for."""
  for _ in range(num_warmups):
    jax.block_until_ready(function())
  times = []
  for _ in range(repeats):
    started = time.monotonic()
    jax.block_until_ready(function())
    times.append(time.monotonic() - started)
  return times
