"""What of a trained stage goes into a file of another format: one function of arrays, from noise to images.

It is what `--mode=sample` draws with, all networks in it: the stage's own and those that it reads, as the
VAE's decoder. It takes what a sample starts from (`starts`) and draws nothing, so that a sampler which adds
noise in its steps has none.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from vaediff.data import pixels, resize, sources
from vaediff.errors import UserError
from vaediff.experiments import quantized
from vaediff.experiments.base import Experiment
from vaediff.machine import straight
from vaediff.run import draw
from vaediff.run.draw import HostArrays
from vaediff.run.trained import Trained
from vaediff.types import Given, Read

OUTPUTS = ('float32', 'uint8')
"""Types of the images: in [-1, 1], or bytes."""
MAX_CALLS = 64
"""Most forward passes in a program in which each is written out."""
DETERMINISTIC = "'ddim' with sample.eta = 0, 'dpmpp_2m' or 'heun', or one step of any"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
  """A stage as one function.

  Attributes:
    apply: (read, arrays by name) -> images [batch, height, width, channels] in [-1, 1], or bytes.
    read: what the stage reads, on the host: constants of the file.
    inputs: shape and type of each array, with the batch.
    ranges: what the inputs are, in words.
    output: 'float32' or 'uint8'.
    about: what it was made of, and how it draws, in words and ids.
  """

  apply: Callable[[Read, Given], jax.Array]
  read: Read
  inputs: Mapping[str, jax.ShapeDtypeStruct]
  ranges: Mapping[str, str]
  output: str
  about: Mapping[str, str]

  def straight(self) -> Callable[..., jax.Array]:
    """Returns a function of arrays, in the order of `inputs`, that has no loops and reads nothing else."""
    flat, constants = straight.straight(self.apply, self.read, dict(self.inputs)), jax.tree.leaves(self.read)
    return lambda *arrays: flat(*constants, *arrays)[0]


def starts(trained: Trained, indices: np.ndarray) -> HostArrays:
  """Returns what the stage's own samples with these indices start from: drawn, made by others, observed."""
  found = trained.draw_inputs(indices, trained.settings.seed)
  found |= trained.inputs_from_makers(indices, found, trained.settings.seed)
  shape = resize.image_shape(trained.config.data)
  if missing := draw.observed_alone(trained.experiment, trained.read, shape) - found.keys():
    batch = trained.eval_source.read(indices % len(trained.eval_source))
    seen = trained.observe(batch[sources.IMAGE], batch[sources.LABEL])
    found |= {name: seen[name] for name in missing}
  return {name: np.asarray(found[name]) for name in sorted(found)}


def of(trained: Trained, example: HostArrays, output: str, *, bfloat16: bool = False) -> Exported:
  """Returns a stage as one function, of as many images as it is given.

  Args:
    trained: the stage.
    example: what a batch of its samples starts from.
    output: type of the images.
    bfloat16: the format knows it.

  Raises:
    UserError: for a stage that cannot be one.
  """
  check_program(trained, example, bfloat16=bfloat16)
  experiment, of_one = trained.experiment, jax.eval_shape(raw, abstract_keys(1))

  def apply(read: Read, given: Given) -> jax.Array:
    count = next(iter(given.values())).shape[0]  # len() is of a number, which an open size is not
    zeros = jax.tree.map(lambda key: jnp.zeros((count, *key.shape[1:]), key.dtype), of_one)
    keys = jax.tree.map(jax.random.wrap_key_data, zeros)
    found = image(experiment, read, given, keys)
    return pixels.to_bytes(found) if output == 'uint8' else found

  inputs = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in example.items()}
  return Exported(
    apply=apply,
    read=jax.device_get(trained.read),
    inputs=inputs,
    ranges=ranges(experiment, inputs),
    output=output,
    about=about(trained),
  )


def image(experiment: Experiment, read: Read, given: Given, keys: draw.SampleKeys) -> jax.Array:
  """Returns the stage's own images, float32: the last of what it draws."""
  drawn = experiment.sample(read, given, keys)  # a tree that jax returns has its names sorted
  return draw.own_image(drawn).astype(jnp.float32)


def abstract_keys(count: int) -> draw.SampleKeys:
  """Returns the shapes of the keys of so many samples."""
  return jax.eval_shape(lambda: draw.image_keys(0, jnp.arange(count)))


def raw(keys: draw.SampleKeys) -> draw.SampleKeys:
  """Returns the numbers of keys."""
  return jax.tree.map(jax.random.key_data, keys)


def check_kind(trained: Trained) -> None:
  """Raises UserError where a stage is of a kind that cannot be exported; nothing is drawn for that."""
  if not trained.experiment.draws_images:
    raise UserError(f'stage {trained.stage!r} draws no images, so that there is no sampler to export')


def is_quantized(trained: Trained) -> bool:
  """Returns whether `--mode=quantize` has made the stage."""
  return trained.config[trained.stage].experiment == quantized.SECTION


def check(trained: Trained) -> None:
  """Does what `check_kind` does, for formats in which every forward pass is written out, in floats."""
  experiment, stage = trained.experiment, trained.stage
  if is_quantized(trained):
    source = trained.config[stage][quantized.SECTION].stage
    raise UserError(
      f'stage {stage!r} is one of whole numbers, and the format has its own: export {source!r} with '
      "config.export.weights = 'int8'; or this one with config.export.format = 'stablehlo'"
    )
  check_kind(trained)
  if experiment.num_function_evaluations > MAX_CALLS:
    raise UserError(
      f'stage {stage!r} draws with {experiment.num_function_evaluations} forward passes, each of which '
      f'would be written out; at most {MAX_CALLS} can be: lower config.{stage}.sample.num_steps (with '
      f'sample.sampler {DETERMINISTIC}), or export a student'
    )


def in_bfloat16(trained: Trained, example: HostArrays) -> bool:
  """Returns whether anything that draws a batch of samples, which start from `example`, is of bfloat16."""
  keys = abstract_keys(len(next(iter(example.values()))))
  return 'bfloat16' in straight.types(
    functools.partial(image, trained.experiment, trained.read), example, keys
  )


def check_program(trained: Trained, example: HostArrays, *, bfloat16: bool = False) -> None:
  """Raises UserError where a stage's sampler is no function of floats of what its samples start from.

  Args:
    trained: the stage.
    example: what a batch of its samples starts from.
    bfloat16: may be among them.
  """
  experiment, stage = trained.experiment, trained.stage
  keys = abstract_keys(len(next(iter(example.values()))))
  drawer = functools.partial(image, experiment, trained.read)
  if straight.reads(drawer, example, keys)[1]:
    sampler = trained.settings.sampler if 'sampler' in trained.settings else trained.config[stage].experiment
    raise UserError(
      f'stage {stage!r} draws with {sampler!r}, which adds noise in its steps: an exported graph draws none. '
      f'Where the stage has a sampler, set config.{stage}.sample.sampler to {DETERMINISTIC}'
    )
  if not bfloat16 and in_bfloat16(trained, example):
    raise UserError(
      f'stage {stage!r}, or a stage that it reads, computes in bfloat16; float32 can be exported: '
      f'--config.{stage}.model.dtype=float32 (its parameters are float32 in any case)'
    )


def ranges(experiment: Experiment, inputs: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, str]:
  """Returns what the numbers of each input of a stage are; inputs have the batch."""
  return {name: range_of(experiment, name, struct) for name, struct in inputs.items()}


def range_of(experiment: Experiment, name: str, struct: jax.ShapeDtypeStruct) -> str:
  """Returns what the numbers of an input are."""
  if jnp.issubdtype(struct.dtype, jnp.integer):
    return 'whole numbers'
  if name in experiment.limits:
    low, high = experiment.limits[name]
    return f'numbers in [{low:g}, {high:g}]'
  if name in experiment.ranges:
    return experiment.ranges[name]
  return 'an image in [-1, 1]' if len(struct.shape) == 4 else 'numbers'


def about(trained: Trained) -> dict[str, str]:
  """Returns stage, experiment, sampler and the ids of all that it was made of."""
  settings = trained.settings
  shown = ('sampler', 'num_steps', 'grid', 'clip', 'guidance_weight')
  return {
    'stage': trained.stage,
    'experiment': trained.config[trained.stage].experiment,
    'data': trained.config.data.name or trained.config.data.source,
    'sampling': ', '.join(f'{name} {settings[name]}' for name in shown if name in settings),
    **{f'id of {what}': value for what, value in trained.made_of.items()},
  }
