"""A stage's sampler as one ONNX file: made, compared with JAX at once, and only then written."""

import functools
import json
import os
import pathlib
import statistics
from collections.abc import Iterator

import jax
import numpy as np
from ml_collections import ConfigDict

import vaediff
from vaediff.errors import UserError
from vaediff.machine import integers
from vaediff.modes import paired
from vaediff.run import draw, exported, log
from vaediff.run.draw import HostArrays
from vaediff.run.exported import Exported
from vaediff.run.trained import Trained
from vaediff.storage import files
from vaediff.weights import onnx_file

WEIGHTS = ('float32', 'int8')
REDUCED = ('auto', 'yes', 'no')
TOLERANCE = {'float32': 1e-4, 'uint8': 1}
"""Most that images of floats may differ from those of JAX, by their type: of [-1, 1], or in bytes."""
DOT_PRODUCTS = ('avx512_vnni', 'avx_vnni', 'amx_int8', 'asimddp', 'i8mm')
"""Flags of processors that add products of bytes to 32 bits at once, so that no sum saturates."""
Figures = dict[str, int | float]


def check() -> None:
  """Raises UserError where packages are missing."""
  onnx_file.check_installed()


def export(
  trained: Trained, settings: ConfigDict, out: pathlib.Path, repeats: int
) -> tuple[pathlib.Path, Figures]:
  """Writes `<out>/<stage>.onnx`, or `<stage>_int8.onnx`; returns its path and what was measured.

  Figures: `file_bytes` of floats, `max_difference` of its images from those of JAX, `onnx_ms` and `jax_ms` of
  one call on this machine, medians of calls in turn, and `onnx_speed`, the median of jax over onnx in each
  turn; of whole numbers `file_bytes_int8`, `onnx_int8_ms`, `onnx_int8_speed` (over jax too), and from the
  floats' images `max_difference_int8` and `mean_difference_int8`.

  Args:
    trained: the stage.
    settings: `config.export`.
    out: the folder.
    repeats: of the calls that are timed.

  Raises:
    UserError: for a stage that cannot be exported, or a file that draws other images: nothing is written.
  """
  exported.check(trained)
  batches = list(batches_of(trained, settings))
  whole = exported.of(trained, batches[0], settings.output)
  log.say(f'{trained.stage}: converting {trained.experiment.num_function_evaluations or 1} forward passes')
  graph = onnx_file.simplified(onnx_file.convert(whole.straight(), whole.inputs))
  content, threads = onnx_file.stored(graph, about(whole, 'float32')), num_threads()
  in_jax, in_onnx = in_jax_of(whole), onnx_file.runner(content, threads)
  found: Figures = {'file_bytes': len(content)}
  found['max_difference'] = compare(trained, whole, in_jax, in_onnx, batches)
  calls = {'jax': functools.partial(in_jax, batches[0]), 'onnx': functools.partial(in_onnx, batches[0])}
  path = out / f'{trained.stage}.onnx'
  if settings.weights == 'int8':
    path = out / f'{trained.stage}_int8.onnx'
    reduced = reduces(settings.reduce_range)
    log.say(
      f'{trained.stage}: int8, calibrated on {len(batches)} batches, kernels of {7 if reduced else 8} bits'
    )
    whole_numbers = onnx_file.quantized(graph, iter(batches), reduce_range=reduced)
    content = onnx_file.stored(whole_numbers, about(whole, 'int8'))
    in_int8 = onnx_file.runner(content, threads)
    apart = [differences(in_int8(batch), in_onnx(batch)) for batch in batches]
    found |= {
      'file_bytes_int8': len(content),
      'max_difference_int8': float(max(part.max() for part in apart)),
      'mean_difference_int8': float(np.mean([part.mean() for part in apart])),
    }
    calls['onnx_int8'] = functools.partial(in_int8, batches[0])
  times = paired.in_turn(calls, repeats)
  found |= {f'{name}_ms': 1e3 * statistics.median(seconds) for name, seconds in times.items()}
  found |= {f'{name}_speed': speed(times['jax'], times[name]) for name in calls if name != 'jax'}
  log.say(
    f'{trained.stage}: calls of {settings.batch_size} images on {threads} threads; CPU flags '
    f'{", ".join(integers.cpu_flags()) or "unknown"}'
  )
  with files.replacing(path) as temporary:
    temporary.write_bytes(content)
  return path, found


def batches_of(trained: Trained, settings: ConfigDict) -> Iterator[HostArrays]:
  """Yields what `export.num_images` of the stage's own samples start from, in batches of one size."""
  for indices in draw.batches(settings.num_images, settings.batch_size):
    yield exported.starts(trained, indices)


def in_jax_of(whole: Exported) -> onnx_file.Runner:
  """Returns what draws the same images by JAX, on its first device."""
  device = jax.local_devices()[0]
  read = jax.device_put(whole.read, device)
  compiled = jax.jit(whole.apply)
  return lambda given: jax.device_get(compiled(read, jax.device_put(dict(given), device)))


def compare(
  trained: Trained,
  whole: Exported,
  in_jax: onnx_file.Runner,
  in_onnx: onnx_file.Runner,
  batches: list[HostArrays],
) -> float:
  """Returns the largest difference of the images of a file from those of JAX.

  Raises:
    UserError: where it is more than `TOLERANCE`.
  """
  apart = max(float(differences(in_onnx(batch), in_jax(batch)).max()) for batch in batches)
  if not apart <= TOLERANCE[whole.output]:  # nan is not
    raise UserError(
      f'the ONNX graph of stage {trained.stage!r} draws other images than JAX: they differ by {apart:.3g}, '
      f'and {TOLERANCE[whole.output]:g} is allowed (config.export.output = {whole.output!r}). Nothing was '
      'written. Other versions of jax2onnx or onnxruntime may do better'
    )
  return apart


def speed(of: list[float], own: list[float]) -> float:
  """Returns how many times as fast calls are as others that were made in turn with them, a median."""
  return statistics.median(a / b for a, b in zip(of, own, strict=True))


def differences(images: np.ndarray, others: np.ndarray) -> np.ndarray:
  """Returns how far the numbers of two sets of images are apart."""
  return np.abs(images.astype(np.float32) - others.astype(np.float32))


def reduces(choice: str) -> bool:
  """Returns whether kernels have 7 bits; 'auto' = this processor cannot add products of bytes exactly."""
  if choice == 'auto':
    return not set(DOT_PRODUCTS) & set(integers.cpu_flags())
  return choice == 'yes'


def num_threads() -> int:
  """Returns how many processors this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def about(whole: Exported, weights: str) -> dict[str, str]:
  """Returns the metadata of a file: what it was made of, and what goes in and comes out."""
  images = 'in [-1, 1]; others are to be clipped' if whole.output == 'float32' else 'bytes'
  inputs = {
    name: f'{struct.dtype} {list(struct.shape)}, {whole.ranges[name]}'
    for name, struct in whole.inputs.items()
  }
  return {
    'vaediff': vaediff.__version__,
    'weights': weights,
    'inputs': json.dumps(inputs),
    'output': f'{onnx_file.OUTPUT}: {whole.output} [batch, height, width, channels], {images}',
    **whole.about,
  }
