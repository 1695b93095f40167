"""`--mode=compile`: compiles train steps and sampler for hardware that is not here: do they fit, how fast?

The compiler for the target (libtpu, or JAX's CUDA plugin) runs on the CPU of this machine. What it reports is
for one device of the mesh. Times are estimates from the chip's peaks, never measured: the longer of compute
(FLOPs over peak) and memory (bytes over bandwidth), and then the collectives (bytes that a device sends over
what its links carry), which in truth overlap with the rest and never run at the peak.

For GPUs XLA counts neither FLOPs nor bytes: FLOPs are those of the products, bytes are summed from the
program, and the workspaces that cuDNN picks when it runs are missing from the memory. JAX takes 75 % of a GPU
unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
"""

import contextlib
import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vaediff import experiments
from vaediff.data import resize, sources
from vaediff.errors import UserError
from vaediff.experiments.base import Experiment
from vaediff.experiments.kinds import kinds_of
from vaediff.machine import chips, cost, hlo, sharding
from vaediff.modes import compile_tables as tables
from vaediff.run import captions, checkpoint, draw, log, steps
from vaediff.run import frozen as frozen_networks
from vaediff.run import loop as training
from vaediff.run.config import Run

PLATFORM_OPTIONS: dict[str, dict[str, Any]] = {
  'tpu': {},
  # without a GPU nothing can be timed, and the Triton products need tile sizes that were found by timing
  'cuda': {'xla_gpu_autotune_level': 0, 'xla_gpu_enable_triton_gemm': False},
}
UNITS = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


def mode(run: Run) -> None:
  """Compiles the stages for `config.compile.topology`."""
  settings = run.config.compile
  compile_mode(run.config, run.stages, settings.topology, settings.effort)


def compile_mode(config: ConfigDict, stages: tuple[str, ...], topology: str, effort: float) -> None:
  """Prints a table per topology, and one of all of them where there are several; writes nothing.

  Args:
    config: of the run.
    stages: names of the stages to compile.
    topology: names as `v5e:4x4`, joined by commas.
    effort: of the compiler, in [-1, 1]; see `compile_for`.

  Raises:
    UserError: for a topology that is not known, a compiler that is not installed, a batch that the devices
      cannot split; and, after the tables, when a program does not fit (names it and the sizes).
  """
  rows = []
  names = [name.strip() for name in topology.split(',')]
  for name in names:
    chips.parse(name)  # all of them, before the first minutes are spent
  for name in names:
    rows += compile_for(config, stages, name, effort)
    log.say('\n' + tables.table([row for row in rows if row['topology'] == name]))
  if len(names) > 1:
    log.say('\n' + tables.summary(rows))
  refused = [row for row in rows if not row['fits']]
  if refused:
    raise UserError(
      '; '.join(
        f'{row["topology"]}: stage {row["stage"]}, {row["program"]}, batch of {row["batch_size"]} on '
        f'{row["devices"]} devices needs {tables.need(row)} of {tables.gib(row["hbm_bytes"])} GiB of HBM'
        for row in refused
      )
      + '. Use more devices, config.mesh.fsdp > 1 (splits parameters, optimizer and average), '
      'model.remat = True where a model has it (recomputes activations) or a smaller batch_size'
    )


def compile_for(
  config: ConfigDict, stages: tuple[str, ...], topology: str, effort: float
) -> list[dict[str, Any]]:
  """Compiles every stage's train steps and sampler for a slice; returns one row per program.

  The train steps are those that `train` runs, one for each of `kinds_of` updates; the sampler is the one of
  `--mode=sample` (parameters on every device), with `sample.batch_size` rounded up to the devices. A stage
  that draws nothing, as CLIP, has none.
  Where `train.batch_size` is smaller than the number of devices, it is taken to be that number, times
  `train.microbatches`, and the row's `note` says so.

  Args:
    config: of the run; `config.mesh` says how the devices are used.
    stages: names of stages.
    topology: one name, as `v5e:4x4`.
    effort: -1 (least) to 1 (most) that the compiler spends on speed and on fitting into memory; 0 is its
      default, at which memory is what a real run would need.

  Returns:
    Dicts with: `topology`, `devices`, `stage`, `program` (see `Program.name`), `batch_size` (images over all
    devices), `note`, `compile_seconds`, `fits`, `hbm_bytes` (of a device). Bytes per device:
    `parameter_bytes`, `optimizer_bytes`, `ema_bytes`, `frozen_bytes` (from shapes and shardings, without
    padding); `argument_bytes` (of those that the program reads), `temp_bytes`, `code_bytes`, `total_bytes`
    (as the compiler lays them out, padded; the total is arguments, results that reuse no argument,
    temporaries and code); `activation_bytes` (temporaries less one set of gradients). Work per device, of the
    whole program, which for a sampler is the whole batch: `flops`, `accessed_bytes`, `collective_bytes` by
    kind, `sent_bytes`, `unread_loops` (whose repetitions could not be read: their collectives are counted
    once). Estimates: `compute_seconds`, `memory_seconds`, `collective_seconds`, `seconds`,
    `images_per_second`. All that the compiler reports is missing where it refused the program for its size.

  Raises:
    UserError: see `compile_mode`; a program that does not fit has a row and raises nothing.
  """
  if not -1 <= effort <= 1:
    raise UserError(
      f'config.compile.effort must be in [-1, 1] (least to most; 0 is the default of XLA), got {effort}'
    )
  slice_ = chips.parse(topology)
  mesh = sharding.make_mesh(config.mesh, chips.devices(slice_))
  rows = []
  for stage in stages:
    experiment = experiments.build(config, stage)
    for make in programs_of(experiment, config[stage].train.num_steps):
      rows.append(compile_program(make(config, stage, experiment, mesh), stage, slice_, mesh, effort))
  return rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """A function to compile, with all that its figures need.

  Attributes:
    name: 'train', 'train (<kind>)' for updates of a kind that has a name, as 'train (r1)', or 'sample'.
    function: jitted.
    args: ShapeDtypeStructs with shardings.
    batch_size: images over all devices.
    dtype: of the network's computation.
    sizes: bytes per device by name.
    gradient_bytes: per device, of one set of gradients; 0 where there are none.
    macs: multiply-accumulates of the whole program on all devices.
    macs_once: the same with every loop run once, as XLA counts: the sampler's, and that over microbatches.
      Bytes are scaled by the same ratio, so that those of the optimizer, outside of it, count too often.
    note: what differs from the config; '' = nothing.
  """

  name: str
  function: Any
  args: tuple[Any, ...]
  batch_size: int
  dtype: str
  sizes: dict[str, int]
  gradient_bytes: int
  macs: int
  macs_once: int
  note: str


def programs_of(experiment: Experiment, num_steps: int) -> tuple[Callable[..., Program], ...]:
  """Returns what makes the programs of a stage: no sampler where it draws nothing, for itself or others."""
  updates = tuple(functools.partial(train_program, kind=kind) for kind in kinds_of(experiment, num_steps))
  return (*updates, sample_program) if experiment.draws_images or experiment.handed else updates


def train_program(
  config: ConfigDict, stage: str, experiment: Experiment, mesh: Mesh, kind: str = ''
) -> Program:
  """Returns the train step of a stage for updates of a kind, for abstract arguments.

  Raises:
    UserError: when the batch is larger than the number of devices and no multiple of it.
  """
  section, note = config[stage], ''
  batch_size = section.train.batch_size
  if batch_size < mesh.size:
    parts = section.train.microbatches
    per_part = f' and each of {parts} microbatches' if parts > 1 else ''
    note = f'train.batch_size {batch_size} -> {mesh.size * parts}, one image per device{per_part}'
    batch_size = mesh.size * parts
  else:
    training.check_batch_size(section, stage, mesh)
  state = training.abstract_state(experiment, mesh, sharding.rules_of(config.mesh))
  where, replicated = jax.tree.map(lambda leaf: leaf.sharding, state), sharding.replicated(mesh)
  frozen = frozen_networks.abstract(experiment, mesh)
  shapes = sources.batch_structs(config.data, batch_size, captions.length_of(config, stage))
  shapes |= {name: ((batch_size, *struct.shape), struct.dtype) for name, struct in experiment.stored.items()}
  split = sharding.batch_sharding(mesh)
  batch = {name: _abstract(shape, dtype, split) for name, (shape, dtype) in shapes.items()}
  key = jax.eval_shape(lambda: jax.random.key(0))
  args = (state, frozen, batch, _abstract(key.shape, key.dtype, replicated))
  networks = state.networks.values()
  parameter_bytes = bytes_per_device([network.params for network in networks])
  macs, macs_once = cost.macs_and_once(functools.partial(experiment.train_step, kind=kind), *args)
  return Program(
    name=f'train ({kind})' if kind else 'train',
    function=steps.make_step(experiment, section.train, where, replicated, kind),
    args=args,
    batch_size=batch_size,
    dtype=section.model.dtype,
    sizes={
      'parameter_bytes': parameter_bytes,
      'optimizer_bytes': bytes_per_device([network.opt_state for network in networks]),
      'ema_bytes': bytes_per_device([network.ema_params for network in networks]),
      'frozen_bytes': bytes_per_device(frozen),
    },
    gradient_bytes=parameter_bytes,
    macs=macs,
    macs_once=macs_once,
    note=note,
  )


def sample_program(config: ConfigDict, stage: str, experiment: Experiment, mesh: Mesh) -> Program:
  """Returns the sampler of a stage with z ~ N(0, I), for abstract arguments."""
  section = config[stage]
  batch_size = sharding.round_up(section.sample.batch_size, mesh)
  where, replicated = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  params = {name: checkpoint.abstract_params(model, mesh) for name, model in experiment.networks.items()}
  frozen = frozen_networks.abstract(experiment, mesh)
  indices, seed = _abstract((batch_size,), jnp.int32, where), _abstract((), jnp.int32, replicated)
  shape = resize.image_shape(config.data)
  seen = {name: experiment.inputs[name] for name in draw.observed_alone(experiment, frozen | params, shape)}
  given = {name: _abstract((batch_size, *each.shape), each.dtype, where) for name, each in seen.items()}
  args = ({**frozen, **params}, indices, given, seed)
  macs, macs_once = cost.macs_and_once(draw.sampler(experiment), *args)
  return Program(
    name='sample',
    function=jax.jit(draw.sampler(experiment)),
    args=args,
    batch_size=batch_size,
    dtype=section.model.dtype,
    sizes={
      'parameter_bytes': bytes_per_device(params),
      'optimizer_bytes': 0,
      'ema_bytes': 0,
      'frozen_bytes': bytes_per_device(frozen),
    },
    gradient_bytes=0,
    macs=macs,
    macs_once=macs_once,
    note='',
  )


def compile_program(
  program: Program, stage: str, slice_: chips.Slice, mesh: Mesh, effort: float
) -> dict[str, Any]:
  """Returns the row of one program; see `compile_for`."""
  title = f'{slice_.name}: {stage} {program.name}, {program.batch_size} images on {mesh.size} devices'
  log.say(f'{title}: compiling' + (f' ({program.note})' if program.note else ''))
  row = {
    'topology': slice_.name,
    'devices': mesh.size,
    'stage': stage,
    'program': program.name,
    'batch_size': program.batch_size,
    'note': program.note,
    'hbm_bytes': slice_.chip.hbm_bytes,
    **program.sizes,
  }
  started = time.monotonic()
  try:
    with _nothing_cached():
      options = {'exec_time_optimization_effort': effort, 'memory_fitting_effort': effort}
      compiled = program.function.lower(*program.args).compile(
        compiler_options={**options, **PLATFORM_OPTIONS[slice_.chip.platform]}
      )
  except jax.errors.JaxRuntimeError as error:
    sizes = out_of_memory(str(error))
    if sizes is None:
      raise
    row.update({'total_bytes': sizes[0], 'hbm_bytes': sizes[1] or row['hbm_bytes'], 'fits': False})
    compiled = None
  row['compile_seconds'] = time.monotonic() - started
  if compiled:
    row.update(measure(compiled, program, slice_, mesh))
  verdict = 'fits' if row['fits'] else 'DOES NOT FIT'
  log.say(
    f'{title}: {verdict}, {tables.need(row)} of {tables.gib(row["hbm_bytes"])} GiB; compiled in '
    f'{row["compile_seconds"]:.0f} s'
  )
  return row


@contextlib.contextmanager
def _nothing_cached() -> Iterator[None]:
  """Keeps programs out of the compilation cache, which cannot load them again without the device."""
  option = 'jax_persistent_cache_min_compile_time_secs'
  before = getattr(jax.config, option)
  jax.config.update(option, math.inf)
  try:
    yield
  finally:
    jax.config.update(option, before)


def out_of_memory(message: str) -> tuple[float, float] | None:
  """Returns the bytes that XLA says are needed and there, from its error; None for any other error.

  The need is a lower bound: it may be that of the temporaries alone. Where no sizes are named it is (inf, 0).
  """
  if 'RESOURCE_EXHAUSTED' not in message:
    return None
  size = r'([\d.]+)([KMGT]?)'
  for pattern in (rf'Used {size} of {size} hbm', rf'required .*?\({size}\) exceeds available HBM \({size}\)'):
    match = re.search(pattern, message)
    if match:
      used, used_unit, there, there_unit = match.groups()
      return float(used) * UNITS.get(used_unit, 1), float(there) * UNITS.get(there_unit, 1)
  return math.inf, 0.0


def measure(compiled: Any, program: Program, slice_: chips.Slice, mesh: Mesh) -> dict[str, Any]:
  """Returns what the compiler says of a program, and the estimates."""
  chip, memory, text = slice_.chip, compiled.memory_analysis(), compiled.as_text()
  total = (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.generated_code_size_in_bytes
  )
  found = hlo.collectives(text, mesh.size)
  analysis, repeats = compiled.cost_analysis(), program.macs / program.macs_once if program.macs_once else 1.0
  if analysis:  # XLA counts the body of a loop once, and names nothing of which there is none
    flops, accessed = (analysis.get(name, 0.0) * repeats for name in ('flops', 'bytes accessed'))
  else:  # none for GPUs
    flops, accessed = 2 * program.macs / mesh.size, hlo.accessed_bytes(text)
  peak = chip.flops_per_second if program.dtype == 'bfloat16' else chip.float32_flops_per_second
  compute, transfer = flops / peak, accessed / chip.hbm_bytes_per_second
  sending = found['sent_bytes'] / slice_.interconnect_bytes_per_second
  seconds = max(compute, transfer) + sending
  return {
    'argument_bytes': memory.argument_size_in_bytes,
    'temp_bytes': memory.temp_size_in_bytes,
    'activation_bytes': max(0, memory.temp_size_in_bytes - program.gradient_bytes),
    'code_bytes': memory.generated_code_size_in_bytes,
    'total_bytes': total,
    'fits': total <= chip.hbm_bytes,
    'flops': flops,
    'accessed_bytes': accessed,
    **found,
    'compute_seconds': compute,
    'memory_seconds': transfer,
    'collective_seconds': sending,
    'seconds': seconds,
    'images_per_second': program.batch_size / seconds if seconds else math.inf,
  }


def bytes_per_device(tree: Any) -> int:
  """Returns the bytes that one device holds of a tree of ShapeDtypeStructs with shardings."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
  )


def _abstract(shape: tuple[int, ...], dtype: Any, where: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype, sharding=where)
