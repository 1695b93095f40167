"""Chips as facts, and slices of them as devices to compile for: none of the hardware needs to be here.

A topology is written `<chip>:<shape>`. For TPUs the shape is that of the slice, `v5e:4x4`, and libtpu
compiles for it. For GPUs it is hosts x GPUs per host, `h100:2x8`, and JAX's CUDA plugin does.
"""

import dataclasses
import importlib.util
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from vaediff.errors import UserError

GIB = 2**30
EXAMPLES = 'v5e:2x2, v5e:16x16, v6e:4x4, v4:2x2x1, v5p:4x4x4, h100:1x8, a100-40:2x8'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """What one chip can do; all figures are its vendor's peaks.

  Attributes:
    platform: 'tpu' or 'cuda'.
    hbm_bytes: capacity.
    flops_per_second: dense bfloat16 matrix products.
    float32_flops_per_second: float32 operands at JAX's default precision: one bfloat16 pass on TPUs, TF32 on
      NVIDIA GPUs.
    hbm_bytes_per_second: bandwidth of its memory.
    link_bytes_per_second: of one link to a neighbour, in one direction. TPU: a link of the mesh. GPU: all of
      NVLink together.
    dimensions: numbers in the shape of a slice: sides of a TPU's, hosts and GPUs per host.
    wrap_multiple: TPU: a dimension of the slice whose length is a multiple of it closes to a ring.
    network_bytes_per_second: GPU: of its network card, in one direction, once there are several hosts.
    options: TPU: of the topology description.
    target: GPU: the device as XLA's compiler is told of it.
  """

  platform: str
  hbm_bytes: int
  flops_per_second: float
  float32_flops_per_second: float
  hbm_bytes_per_second: float
  link_bytes_per_second: float
  dimensions: int
  wrap_multiple: int = 0
  network_bytes_per_second: float = 0.0
  options: tuple[tuple[str, Any], ...] = ()
  target: str = ''


def _tpu(
  hbm_gib: int, flops: float, bandwidth: float, link: float, sides: int, wrap: int, **options: Any
) -> Chip:
  return Chip(
    platform='tpu',
    hbm_bytes=hbm_gib * GIB,
    flops_per_second=flops,
    float32_flops_per_second=flops,
    hbm_bytes_per_second=bandwidth,
    link_bytes_per_second=link,
    dimensions=sides,
    wrap_multiple=wrap,
    options=tuple(options.items()),
  )


def _gpu(
  name: str,
  hbm_mib: int,
  flops: float,
  bandwidth: float,
  nvlink: float,
  network: float,
  *,
  capability: int,
  cores: int,
  fpus: int,
  shared_kib: int,
  l2_mib: int,
  clock_ghz: float,
) -> Chip:
  """Returns a GPU; `cores` are streaming multiprocessors, `shared_kib` is the shared memory of each."""
  facts = {
    'threads_per_block_limit': 1024,
    'threads_per_warp': 32,
    'threads_per_core_limit': 2048,
    'shared_memory_per_block': 48 * 1024,
    'shared_memory_per_core': shared_kib * 1024,
    'shared_memory_per_block_optin': (shared_kib - 1) * 1024,  # 1 KiB is the system's
    'registers_per_core_limit': 65536,
    'registers_per_block_limit': 65536,
    'block_dim_limit_x': 2**31 - 1,
    'block_dim_limit_y': 65535,
    'block_dim_limit_z': 65535,
    'core_count': cores,
    'fpus_per_core': fpus,
    'l2_cache_size': l2_mib * 2**20,
    'clock_rate_ghz': clock_ghz,
    'memory_bandwidth': int(bandwidth),
    'device_memory_size': hbm_mib * 2**20,
  }
  device = '\n'.join(f'  {field}: {value}' for field, value in facts.items())
  return Chip(
    platform='cuda',
    hbm_bytes=hbm_mib * 2**20,
    flops_per_second=flops,
    float32_flops_per_second=flops / 2,  # TF32 runs at half the bfloat16 rate on these chips
    hbm_bytes_per_second=bandwidth,
    link_bytes_per_second=nvlink,
    dimensions=2,
    network_bytes_per_second=network,
    target=(
      f'gpu_device_info {{\n{device}\n  cuda_compute_capability {{ major: {capability} }}\n}}\n'
      'platform_name: "CUDA"\ndnn_version_info { major: 9 minor: 12 }\n'
      f'runtime_version {{ major: 13 }}\ndevice_description_str: "{name}"\n'
    ),
  )


CHIPS: dict[str, Chip] = {
  # Cloud TPU documentation, pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e": memory, peak, bandwidth, and the
  # bidirectional interconnect bandwidth per chip (v5e 400, v5p 1200, v6e 800 GB/s; v4: 2400 Gb/s one way)
  # over both directions and the 4 (2D) or 6 (3D) links. Rings: 2D slices only at the full pod's side of 16,
  # 3D slices of whole 4x4x4 cubes. A v4 chip is one device when its two cores are joined (megacore).
  'v4': _tpu(32, 275e12, 1200e9, 50e9, 3, 4, chip_config_name='megacore'),
  'v5e': _tpu(16, 197e12, 819e9, 50e9, 2, 16),
  'v5p': _tpu(95, 459e12, 2765e9, 100e9, 3, 4),
  'v6e': _tpu(32, 918e12, 1638e9, 100e9, 2, 16),
  # NVIDIA data sheets and architecture white papers of A100, H100 and H200 (SXM, dense rates, without
  # sparsity), memory as nvidia-smi reports it. NVLink 600 and 900 GB/s in both directions together. Network:
  # the DGX of that generation, one card of 200 or 400 Gb/s per GPU.
  'a100-40': _gpu(
    'NVIDIA A100-SXM4-40GB', 40960, 312e12, 1555e9, 300e9, 25e9,
    capability=8, cores=108, fpus=64, shared_kib=164, l2_mib=40, clock_ghz=1.41,
  ),
  'a100-80': _gpu(
    'NVIDIA A100-SXM4-80GB', 81920, 312e12, 2039e9, 300e9, 25e9,
    capability=8, cores=108, fpus=64, shared_kib=164, l2_mib=40, clock_ghz=1.41,
  ),
  'h100': _gpu(
    'NVIDIA H100 80GB HBM3', 81559, 989e12, 3350e9, 450e9, 50e9,
    capability=9, cores=132, fpus=128, shared_kib=228, l2_mib=50, clock_ghz=1.98,
  ),
  'h200': _gpu(
    'NVIDIA H200', 143771, 989e12, 4800e9, 450e9, 50e9,
    capability=9, cores=132, fpus=128, shared_kib=228, l2_mib=50, clock_ghz=1.98,
  ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice:
  """Chips joined to one machine.

  Attributes:
    name: as it was asked for, `v5e:4x4`.
    chip: what each of its devices is.
    shape: TPU: chips along each side. GPU: (hosts, GPUs per host).
  """

  name: str
  chip: Chip
  shape: tuple[int, ...]

  @property
  def interconnect_bytes_per_second(self) -> float:
    """What the worst placed device can send at best, over all its links at once; inf for a single device.

    A TPU in the corner of a mesh has one link along each side that is longer than 1, and two where the side
    closes to a ring. A GPU has NVLink, and with several hosts no more than its network card.
    """
    chip = self.chip
    if chip.platform == 'cuda':
      hosts, per_host = self.shape
      if hosts > 1:
        return chip.network_bytes_per_second
      return chip.link_bytes_per_second if per_host > 1 else float('inf')
    rings = [length % chip.wrap_multiple == 0 for length in self.shape]
    if chip.dimensions == 3:  # only slices of whole cubes have the links that close a side
      rings = [all(rings)] * 3
    links = sum(2 if ring else 1 for length, ring in zip(self.shape, rings, strict=True) if length > 1)
    return links * chip.link_bytes_per_second or float('inf')


def parse(topology: str) -> Slice:
  """Returns the slice that a topology names.

  Raises:
    UserError: when it is not `<chip>:<shape>` with a known chip.
  """
  match = re.fullmatch(r'([\w\-]+):(\d+(?:x\d+)*)', topology)
  chip = CHIPS.get(match.group(1)) if match else None
  shape = tuple(map(int, match.group(2).split('x'))) if match else ()
  if chip is None or len(shape) != chip.dimensions or 0 in shape:
    raise UserError(
      f'--topology={topology}: write <chip>:<shape> with a chip of {", ".join(CHIPS)}; the shape is that of '
      f'a TPU slice, or hosts x GPUs per host: {EXAMPLES}'
    )
  return Slice(name=topology, chip=chip, shape=shape)


def devices(slice_: Slice) -> list[jax.Device]:
  """Returns the devices of a slice; they can be compiled for, not run on.

  Raises:
    UserError: when the compiler is not installed, or knows no such slice (says what it says).
  """
  check_compiler(slice_.chip.platform)
  chip = slice_.chip
  if chip.platform == 'tpu':
    # read by libtpu when it is loaded: no TPU is opened, so several processes may load it; and the machine
    # need not be a worker of a slice, of which libtpu would complain at length
    os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
    os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
    os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-4')
    options = {'topology_name': slice_.name, **dict(chip.options)}
  else:
    hosts, per_host = slice_.shape
    options = {'topology_name': '', 'topology': f'1x{hosts}x{per_host}', 'target_config': chip.target}
  try:
    return list(topologies.get_topology_desc(platform=chip.platform, **options).devices)
  except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
    raise UserError(
      f'--topology={slice_.name}: the compiler knows no such slice: {str(error).splitlines()[0]}. '
      f'Examples: {EXAMPLES}'
    ) from error


def check_compiler(platform: str) -> None:
  """Raises UserError, with the command that installs it, where the compiler for a platform is missing."""
  if platform == 'tpu':
    if importlib.util.find_spec('libtpu') is None and not os.environ.get('TPU_LIBRARY_PATH'):
      raise UserError(
        '--mode=compile needs libtpu to compile for TPUs, which is not installed (no TPU is needed): '
        'pip install -e ".[compile]", or pip install libtpu'
      )
  elif not any(_found(f'jax_plugins.xla_cuda{version}') for version in (12, 13)):
    raise UserError(
      '--mode=compile needs the CUDA plugin of JAX to compile for GPUs, which is not installed (no GPU is '
      'needed): pip install -e ".[cuda]"'
    )


def _found(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:
    return False
