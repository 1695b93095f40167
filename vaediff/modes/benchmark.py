"""Speed of this device: train steps, samplers, data loading, beside its measured matmul peak."""

import functools
import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vaediff import experiments
from vaediff.data import loader, sources, words
from vaediff.errors import UserError
from vaediff.experiments import quantized
from vaediff.experiments.base import NOISE, Experiment, InSpace, SampleKeys, sampling_keys
from vaediff.experiments.denoiser import DENOISER
from vaediff.experiments.kinds import kinds_of
from vaediff.machine import cost, sharding
from vaediff.modes import paired
from vaediff.run import captions, draw, guard, log, steps
from vaediff.run import frozen as frozen_networks
from vaediff.run import loop as training
from vaediff.run.config import Run
from vaediff.types import Read


def mode(run: Run) -> None:
  """Measures the stages.

  Raises:
    UserError: where the job has several processes.
  """
  if jax.process_count() > 1:
    raise UserError(
      f'--mode=benchmark runs in one process, and this job has {jax.process_count()}: it measures the '
      'devices of one host. Start it on that host alone, with --distributed=off'
    )
  benchmark(run.config, run.stages)


def benchmark(config: ConfigDict, stages: tuple[str, ...]) -> dict[str, Any]:
  """Measures and prints one JSON object; returns it. Networks are freshly initialised, no run is needed.

  Keys: `device`; `matmul_flops_per_second`, the peak that others are compared with: of square products of
  operands of each type that a network computes in, at JAX's default precision; `loader_images_per_second`;
  and per stage `dtype`, `trace_seconds` (until XLA has the program) and `compile_seconds` of the train step
  (a load, where the persistent cache has it), median `step_seconds`, `input_wait_fraction` (of the time of
  steps and loading), `images_per_second`, `flops_per_second` (twice the multiply-accumulates of the forward
  and backward pass over the step time), `fraction_of_matmul_peak` (of its type), `memory_bytes` of the train
  step on one device (arguments, results that take no argument's place, and temporaries, as XLA counts them),
  and for samplers `sample_seconds`, `forward_seconds`, `num_function_evaluations`, `sampler_over_forward`
  (1 = no overhead), and `sampling` (see `measure_parts`). A stage with several kinds of updates gets their
  mean, by how often they come. Of a quantized stage see `paired.measure`.
  """
  repeats = config.benchmark.num_repeats
  mesh = sharding.make_mesh(config.mesh)
  size, types = config.benchmark.matmul_size, [dtype_of(config[stage]) for stage in stages]
  peaks = {dtype: matmul_peak(size, repeats, dtype) * mesh.size for dtype in dict.fromkeys(types)}
  source = sources.open_source(config.data, 'train')
  result = {
    'config': config.name,
    'device': f'{jax.devices()[0].device_kind} x {mesh.size}',
    'jax': jax.__version__,
    'matmul_flops_per_second': peaks,
    'loader_images_per_second': loader_speed(config, config[stages[-1]].train.batch_size, source, repeats),
    'stages': {},
  }
  for stage, dtype in zip(stages, types, strict=True):
    log.say(f'measuring stage {stage}')
    whole = config[stage].experiment == quantized.SECTION
    result['stages'][stage] = (
      paired.measure(config, stage, mesh)
      if whole
      else {'dtype': dtype, **measure_stage(config, stage, source, mesh, peaks[dtype])}
    )
  print(json.dumps(result, indent=2), flush=True)
  return result


def dtype_of(section: ConfigDict) -> str:
  """Returns the type that the network of a stage computes in."""
  return section.model.dtype if 'model' in section and 'dtype' in section.model else 'float32'


def measure_stage(
  config: ConfigDict, stage: str, source: sources.Source, mesh: Mesh, peak: float
) -> dict[str, Any]:
  """Returns the figures of one stage: its train step and, where it samples by steps, its sampler.

  Raises:
    UserError: when the batch cannot be split over the devices.
  """
  experiment, section, repeats = experiments.build(config, stage), config[stage], config.benchmark.num_repeats
  figures, read = measure_training(config, stage, experiment, source, mesh, peak)
  return {
    **figures,
    **measure_sampler(config, experiment, section, read, mesh, repeats),
    **measure_decoding(experiment, read, mesh, config.benchmark),
  }


def measure_training(
  config: ConfigDict,
  stage: str,
  experiment: Experiment,
  source: sources.Source,
  mesh: Mesh,
  peak: float,
) -> tuple[dict[str, Any], Read]:
  """Returns the figures of a stage's train step, and the parameters that its samples read after the steps.

  Args:
    config: of the run.
    stage: its name.
    experiment: of the stage.
    source: images to train on.
    mesh: the devices.
    peak: FLOP/s of all of them in products of the type that the network computes in.

  Raises:
    UserError: when the batch cannot be split over the devices.
  """
  section, repeats = config[stage], config.benchmark.num_repeats
  abstract = training.abstract_state(experiment, mesh, sharding.rules_of(config.mesh))
  where = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  frozen = frozen_networks.fresh(experiment, mesh)
  state = jax.jit(guard.with_counts(experiment.init), out_shardings=where)(jax.random.key(0))
  training.check_batch_size(section, stage, mesh)
  batch = fixed_batch(config, stage, experiment, source, mesh)
  key = jax.device_put(jax.random.key(2), sharding.replicated(mesh))
  kinds = kinds_of(experiment, section.train.num_steps)
  by_kind, trace_seconds, compile_seconds = compiled_steps(
    experiment, section, where, mesh, kinds, (state, frozen, batch, key)
  )
  memory = max(map(step_bytes, by_kind.values()))
  flops = step_flops(experiment, kinds, (abstract, frozen, batch, key))

  def one_step(kind: str = next(iter(kinds))):
    nonlocal state
    state, metrics, _ = by_kind[kind](state, frozen, batch, key)
    return metrics

  seconds = sum(
    share * median_seconds(lambda kind=kind: one_step(kind), repeats) for kind, share in kinds.items()
  )
  size = section.train.batch_size
  rate = f'{size / seconds:.4g} images/s, {flops / seconds / 1e12:.4g} TFLOP/s, {flops / seconds / peak:.2f}'
  log.say(f'  train step: {seconds:.4g} s, {rate} of the matmul peak, {memory / 1e9:.3g} GB')
  figures = {
    'trace_seconds': trace_seconds,
    'compile_seconds': compile_seconds,
    'step_seconds': seconds,
    'input_wait_fraction': input_wait(config, size, source, one_step, repeats),
    'batch_size': size,
    'images_per_second': size / seconds,
    'flops_per_second': flops / seconds,
    'fraction_of_matmul_peak': flops / seconds / peak,
    'memory_bytes': memory,
  }
  return figures, {**frozen, **state.eval_params}


def fixed_batch(
  config: ConfigDict, stage: str, experiment: Experiment, source: sources.Source, mesh: Mesh
) -> dict[str, jax.Array]:
  """Returns the first images as a batch of the stage, and zeros for what is stored beside them.

  Captions are of their full length, of one token throughout. All of it is split over the devices.
  """
  split, section = sharding.batch_sharding(mesh), config[stage]
  rows = np.arange(section.train.batch_size) % len(source)
  batch = sharding.put_batch(source.read(rows), split)
  for name, struct in experiment.stored.items():
    batch[name] = jax.device_put(jnp.zeros((len(rows), *struct.shape), struct.dtype), split)
  if length := captions.length_of(config, stage):
    batch[words.TOKENS] = jax.device_put(jnp.full((len(rows), length), words.BOS, jnp.int32), split)
  return batch


def step_flops(experiment: Experiment, kinds: Mapping[str, float], args: tuple) -> float:
  """Returns twice the multiply-accumulates of an update, the mean of its kinds by their shares."""
  return 2 * sum(
    share * cost.macs(functools.partial(experiment.train_step, kind=kind), *args)
    for kind, share in kinds.items()
  )


def compiled_steps(
  experiment: Experiment, section: ConfigDict, where: Any, mesh: Mesh, kinds: Mapping[str, float], args: tuple
) -> tuple[dict[str, Any], float, float]:
  """Returns the compiled train step of each kind of update, and the seconds of tracing and of compiling.

  Args:
    experiment: of the stage.
    section: of the stage in the config.
    where: shardings of the state.
    mesh: the devices.
    kinds: of the updates; only their names count.
    args: state, frozen parameters, batch and key, on the devices.
  """
  replicated = sharding.replicated(mesh)
  started = time.monotonic()
  lowered = {
    kind: steps.make_step(experiment, section.train, where, replicated, kind).lower(*args) for kind in kinds
  }
  traced = time.monotonic()
  by_kind = {kind: program.compile() for kind, program in lowered.items()}
  compiled = time.monotonic()
  log.say(f'  train step: traced in {traced - started:.1f} s, compiled in {compiled - traced:.1f} s')
  return by_kind, traced - started, compiled - traced


def step_bytes(compiled: Any) -> int:
  """Returns the bytes that a compiled program takes on one device; what it updates in place counts once."""
  found = compiled.memory_analysis()
  results = found.output_size_in_bytes - found.alias_size_in_bytes
  return found.argument_size_in_bytes + results + found.temp_size_in_bytes


def measure_decoding(experiment: Experiment, read: Read, mesh: Mesh, settings: ConfigDict) -> dict[str, Any]:
  """Returns `measure_parts` as `sampling`; {} where samples need no decoding and are measured already."""
  if not isinstance(experiment, InSpace) or (experiment.space.is_data and DENOISER in experiment.networks):
    return {}
  return {'sampling': measure_parts(experiment, read, mesh, settings)}


def measure_parts(
  experiment: InSpace, read: Read, mesh: Mesh, settings: ConfigDict
) -> dict[str, dict[str, int | float]]:
  """Returns what samples cost: all calls of the network, the way back to an image ('decoder'), and 'total'.

  The first is called as the network is, 'denoiser' or 'generator'. Keys of each: `parameters`;
  `giga_macs_per_image`; `memory_bytes` of the compiled program on one device, arguments and results
  included; `seconds_per_batch`, the mean, with `seconds_per_batch_std`, and `seconds_per_100_images`. A table
  of them is printed. The columns are those of LDDGAN's table 2, with its timing (a batch of 100, warm-ups
  first), and with what that table leaves out: all calls of the generator, and the decoder.
  """
  count = sharding.round_up(settings.sample_batch_size, mesh)
  where, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  network = next(iter(experiment.networks))

  def inputs(number: int) -> tuple[Any, SampleKeys]:
    given = {
      name: jnp.zeros((number, *struct.shape), struct.dtype) for name, struct in experiment.inputs.items()
    }
    given[NOISE] = jax.random.normal(jax.random.key(0), given[NOISE].shape)
    return given, sampling_keys(jax.random.split(jax.random.key(1), number))

  def decode(read, y, keys):
    del keys
    return experiment.space.decode(read, y)

  def both(read, given, keys):
    return decode(read, experiment.maps(read, given, keys), keys)

  given, keys = jax.device_put(inputs(count), where)
  one, one_key = inputs(1)
  sizes = {
    network: cost.num_parameters(read[network]),
    'decoder': experiment.space.num_decoder_parameters(read),
  }
  found = {}
  for name, function in ((network, experiment.maps), ('decoder', decode), ('total', both)):
    start, first = (given[NOISE], one[NOISE]) if name == 'decoder' else (given, one)
    compiled = jax.jit(function, out_shardings=everywhere).lower(read, start, keys).compile()
    times = seconds(
      functools.partial(compiled, read, start, keys), settings.num_warmups, settings.num_sample_repeats
    )
    memory = compiled.memory_analysis()
    found[name] = {
      'parameters': sizes[name] if name in sizes else sum(sizes.values()),
      'giga_macs_per_image': cost.macs(function, read, first, one_key) / 1e9,
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


def measure_sampler(
  config: ConfigDict, experiment: Experiment, section: ConfigDict, read: Any, mesh: Mesh, repeats: int
) -> dict[str, Any]:
  """Returns sampling time against the same number of bare forward passes of the denoiser.

  What a sample starts from is given, so that nothing but the sampler is timed.
  """
  if DENOISER not in experiment.networks:
    return {}
  count = sharding.round_up(min(section.sample.batch_size, section.sample.num_images), mesh)
  size, channels = config.data.image_size, config.data.channels
  run = draw.Drawer(experiment, mesh, 0, (size, size, channels), lambda: None)
  model = experiment.networks[DENOISER]
  where = sharding.batch_sharding(mesh)
  args = jax.tree.map(
    lambda shape: jax.device_put(jnp.ones((count, *shape.shape[1:]), shape.dtype), where), model.inputs
  )
  forward = jax.jit(model.apply)
  given = {
    name: np.zeros((count, *struct.shape), struct.dtype) for name, struct in experiment.inputs.items()
  }
  del given[NOISE]
  repeats = max(2, repeats // 3)
  forward_seconds = median_seconds(lambda: forward(read[DENOISER], *args), 3 * repeats)
  sample_seconds = median_seconds(lambda: run(read, np.arange(count), given), repeats)
  evaluations = experiment.num_function_evaluations
  log.say(f'  {count} samples: {sample_seconds:.4g} s; one forward pass: {forward_seconds:.4g} s')
  return {
    'sample_batch_size': count,
    'sample_seconds': sample_seconds,
    'forward_seconds': forward_seconds,
    'num_function_evaluations': evaluations,
    'sampler_over_forward': sample_seconds / (evaluations * forward_seconds),
  }


def matmul_peak(size: int, repeats: int, dtype: str) -> float:
  """Returns the FLOP/s of one device in a square matrix product of operands of this type."""
  a = jax.random.normal(jax.random.key(0), (size, size), dtype)
  product = jax.jit(lambda a: a @ a)
  return 2 * size**3 / median_seconds(lambda: product(a), repeats)


def loader_speed(config: ConfigDict, batch_size: int, source: sources.Source, repeats: int) -> float:
  """Returns the images per second that the loader delivers when nothing else runs."""
  batches = loader.train_batches(
    source,
    batch_size=batch_size,
    seed=0,
    start_step=0,
    num_threads=config.data.num_threads,
    prefetch=config.data.prefetch,
  )
  next(batches)
  count = 10 * repeats
  started = time.monotonic()
  for _ in range(count):
    next(batches)
  return count * batch_size / (time.monotonic() - started)


def input_wait(
  config: ConfigDict, batch_size: int, source: sources.Source, one_step: Callable[[], Any], repeats: int
) -> float:
  """Returns the share of the time of steps and loading in which a step waited for its batch."""
  batches = loader.train_batches(
    source,
    batch_size=batch_size,
    seed=0,
    start_step=0,
    num_threads=config.data.num_threads,
    prefetch=config.data.prefetch,
  )
  next(batches)
  waited, started = 0.0, time.monotonic()
  for _ in range(3 * repeats):
    before = time.monotonic()
    next(batches)
    waited += time.monotonic() - before
    jax.block_until_ready(one_step())
  return waited / (time.monotonic() - started)


def median_seconds(function: Callable[[], Any], repeats: int) -> float:
  """Returns the median time of a call, its result waited for, after one call that is not counted."""
  jax.block_until_ready(function())
  times = []
  for _ in range(repeats):
    started = time.monotonic()
    jax.block_until_ready(function())
    times.append(time.monotonic() - started)
  return statistics.median(times)


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
