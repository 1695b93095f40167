"""Programs are compiled for absent TPUs, and what is read from them agrees with counts by hand."""

import importlib
import importlib.util
import pathlib
import sys

import jax
import pytest

from vaediff import experiments
from vaediff.errors import UserError
from vaediff.machine import chips, hlo, sharding
from vaediff.modes import compile as aot
from vaediff.modes import compile_tables

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None, reason="libtpu is not installed: pip install -e '.[compile]'"
)
LEAST = -1.0
MB = 1e6


def get_config(name='digits', variant='debug'):
  return importlib.import_module(f'configs.{name}').get_config(variant)


# The chips ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  'name, gigabytes_per_second',
  [
    ('v5e:1x1', float('inf')),
    ('v5e:2x2', 100),  # one link along each side
    ('v5e:8x16', 150),  # the side of 16 closes to a ring
    ('v5e:16x16', 200),  # 1600 Gb/s per chip, as the documentation says
    ('v5p:4x4x4', 600),  # 4800 Gb/s
    ('v5p:2x2x4', 300),  # no whole cube: no rings
    ('v6e:16x16', 400),
    ('h100:1x8', 450),
    ('h100:2x8', 50),
  ],
)
def test_the_worst_placed_device_has_this_interconnect(name, gigabytes_per_second):
  assert chips.parse(name).interconnect_bytes_per_second == gigabytes_per_second * 1e9


@pytest.mark.parametrize(
  'name', ['', 'v5e', 'v5e:', 'v5e:4', 'v5e:2x2x2', 'v5e:0x4', 'v9:2x2', 'h100:8', 'v4:2x2']
)
def test_a_topology_that_is_none_is_refused_with_examples(name):
  with pytest.raises(UserError, match=r'--topology=.*<chip>:<shape>.*v5e.*v5e:16x16'):
    chips.parse(name)


@needs_libtpu
def test_a_shape_that_libtpu_does_not_know_is_refused_with_its_words():
  with pytest.raises(UserError, match='--topology=v5e:3x3.*not divisible.*Examples'):
    chips.devices(chips.parse('v5e:3x3'))


@needs_libtpu
@pytest.mark.parametrize(
  'name, count', [('v5e:16x16', 256), ('v6e:2x4', 8), ('v4:2x2x1', 4), ('v5p:2x2x2', 8)]
)
def test_a_slice_has_one_device_per_chip(name, count):
  assert len(chips.devices(chips.parse(name))) == count


def test_a_missing_compiler_is_told_with_the_command(monkeypatch):
  monkeypatch.delenv('TPU_LIBRARY_PATH', raising=False)
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match='libtpu.*pip install'):
    chips.devices(chips.parse('v5e:2x2'))
  with pytest.raises(UserError, match='CUDA plugin.*pip install'):
    chips.devices(chips.parse('h100:1x8'))


# What is read from a program ----------------------------------------------------------------------

HLO = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[4]{0})->f32[4]{0}}

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%spread (p: f32[8,4]) -> f32[32,4] {
  ROOT %all-gather.1 = bf16[32,4]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=3, replica_groups=[1,4]<=[4]
}

%spread.2 (p: f32[8,4]) -> f32[32,4] {
  ROOT %all-gather.2 = bf16[32,4]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=3, replica_groups=[1,4]<=[4]
}

%all-reduce-scatter (input: f32[16]) -> f32[4] {
  %all-reduce.9 = f32[16]{0} all-reduce(%input), channel_id=9, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %slice = f32[4]{0} dynamic-slice(%all-reduce.9)
}

%all-reduce-scatter.2 (input: f32[16]) -> f32[4] {
  %all-reduce.10 = f32[16]{0} all-reduce(%input), channel_id=9, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %slice.2 = f32[4]{0} dynamic-slice(%all-reduce.10)
}

%hidden (p: f32[4]) -> f32[1] {
  ROOT %reduce-scatter = f32[1]{0} reduce-scatter(%p), channel_id=5, replica_groups={{0,1,2,3}}, to_apply=%add
}

%body (state: (s32[], f32[4])) -> (s32[], f32[4]) {
  %all-to-all = f32[4]{0} all-to-all(%x), channel_id=7, replica_groups={{0,1},{2,3}}, dimensions={0}
  ROOT %next = (s32[], f32[4]{0}) tuple(%i, %all-to-all)
}

%condition (state: (s32[], f32[4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(10)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%endless (state: (s32[], f32[4])) -> pred[] {
  ROOT %lt.2 = pred[] compare(%i, %other), direction=LT
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %both = (f32[100]{0:T(128)S(1)}, /*index=1*/s8[7]{0}) all-reduce(%a, %b), channel_id=1, %GROUPS%
  %start = f32[50]{0} all-reduce-start(%a), channel_id=2, replica_groups=mesh['x'=2,'y'=2] {'y'}
  %done = f32[50]{0} all-reduce-done(%start)
  %fused = bf16[32,4]{1,0} fusion(%a), kind=kCustom, calls=%spread
  %fused.2 = bf16[32,4]{1,0} fusion(%a), kind=kCustom, calls=%spread.2
  %fused.3 = f32[4]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter
  %fused.4 = f32[4]{0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.2
  %async = ((f32[4]{0}), f32[1]{0}, u32[]) async-start(%a), calls=%hidden
  %ag = (f32[2,3]{1,0}, f32[8,3]{1,0}) all-gather-start(%a), channel_id=8, replica_groups=[1,4]<=[4]
  %cp = (f32[6]{0}, f32[6]{0}, u32[]{:S(2)}, u32[]) collective-permute-start(%a), source_target_pairs={{0,1}}
  %loop = (s32[], f32[4]{0}) while(%init), condition=%condition, body=%body
  ROOT %loop.2 = (s32[], f32[4]{0}) while(%init), condition=%condition, body=%body, %KNOWN%
}
"""


@pytest.mark.parametrize(
  'groups',
  [
    'replica_groups={{0,1,2,3}}',
    'replica_groups=[1,4]<=[2,2]T(1,0)',
    "replica_groups=mesh['axis_0'=4] {'axis_0'}",
    "replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0','axis_1'}",
    "replica_groups=mesh['axis_0'=8] {'axis_0':(1)4}",
    'replica_groups={}',
  ],
)
def test_collectives_by_kind(groups):
  known = 'backend_config={"known_trip_count":{"n":"3"}}'
  found = hlo.collectives(HLO.replace('%GROUPS%', groups).replace('%KNOWN%', known), 4)
  assert found['collective_bytes'] == {
    'all-gather': 32 * 4 * 2 + 8 * 3 * 4,  # the two parts of channel 3 are one
    'all-reduce': 100 * 4 + 7 + 50 * 4,
    'reduce-scatter': 2 * 16 * 4 + 4 * 4,  # before scattering; these share a channel but are two
    'collective-permute': 6 * 4,
    'all-to-all': (10 + 3) * 4 * 4,
  }
  sent = (256 + 96 + 144) * 3 / 4 + 407 * 2 * 3 / 4 + 200 * 2 * 1 / 2 + 24 + 208 / 2
  assert found['sent_bytes'] == pytest.approx(sent)
  assert found['unread_loops'] == 0


def test_a_loop_of_unknown_length_counts_once_and_is_named():
  text = HLO.replace('condition=%condition', 'condition=%endless')
  found = hlo.collectives(text, 4)
  assert found['unread_loops'] == 2 and found['collective_bytes']['all-to-all'] == 2 * 4 * 4


def test_accessed_bytes_count_a_fusion_as_one_operation_and_a_loop_by_its_length():
  text = """HloModule m
%inside (p: f32[100]) -> f32[100] {
  ROOT %e = f32[100]{0} exponential(%p)
}
%body (s: f32[100]) -> f32[100] {
  %s = f32[100]{0} parameter(0)
  ROOT %f = f32[100]{0} fusion(%s), kind=kLoop, calls=%inside
}
%condition (s: f32[100]) -> pred[] {
  ROOT %p = pred[] constant(true)
}
ENTRY %main (a: f32[100]) -> f32[10] {
  %a = f32[100]{0} parameter(0)
  %w = f32[100]{0} while(%a), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %c = (f32[10]{0}, s8[999]{0}) custom-call(%w, %a), custom_call_target="x"
}
"""
  assert hlo.accessed_bytes(text) == 5 * 2 * 400 + (40 + 2 * 400)


@pytest.mark.parametrize(
  'text, count',
  [
    ('f32[]', 4),
    ('pred[3]', 3),
    ('bf16[2,3]{1,0:T(2,128)(2,1)}', 12),
    ('(s4[8], f8e4m3fn[5], /*index=2*/u32[])', 13),
  ],
)
def test_bytes_of_types(text, count):
  assert hlo.type_bytes(text) == count


@pytest.mark.parametrize(
  'message, sizes',
  [
    (
      'Ran out of memory in memory space hbm. Used 18.20G of 15.75G hbm. Exceeded hbm capacity',
      (18.2, 15.75),
    ),
    ('the total memory required for HLO temporaries (80.50G) exceeds available HBM (15.75G).', (80.5, 15.75)),
    ('no sizes', (float('inf'), 0)),
  ],
)
def test_sizes_in_the_compilers_refusal(message, sizes):
  assert aot.out_of_memory(f'RESOURCE_EXHAUSTED: {message}') == tuple(size * 2**30 for size in sizes)
  assert aot.out_of_memory(f'INTERNAL: {message}') is None


# Compiled -----------------------------------------------------------------------------------------


def mesh_of(config, count):
  return sharding.make_mesh(config.mesh, jax.devices()[:count])


@needs_libtpu
def test_digits_for_four_chips(capsys):
  """Both stages for a slice of four: the collective is the gradient's mean, and the figures fit together."""
  config = get_config()
  rows = aot.compile_for(config, config.stages, 'v5e:2x2', LEAST)
  assert [(row['stage'], row['program']) for row in rows] == [
    ('vae', 'train'), ('vae', 'sample'), ('refiner', 'train'), ('refiner', 'sample')
  ]  # fmt: skip
  for row in rows:
    assert row['devices'] == 4 and row['fits'] and row['unread_loops'] == 0
    assert row['argument_bytes'] + row['temp_bytes'] < row['total_bytes'] < 2**30
    assert row['seconds'] == max(row['compute_seconds'], row['memory_seconds']) + row['collective_seconds']
    reduced = row['collective_bytes']['all-reduce']
    if row['program'] == 'train':  # the gradients; a few are zero, metrics and random bits add little
      assert reduced == pytest.approx(row['parameter_bytes'], rel=0.05)
      assert row['sent_bytes'] == pytest.approx(2 * 3 / 4 * reduced)
      assert row['parameter_bytes'] + row['optimizer_bytes'] + row['ema_bytes'] <= row['argument_bytes']
    else:
      assert row['sent_bytes'] == 0  # each device draws its own images
    program = aot.train_program if row['program'] == 'train' else aot.sample_program
    mesh = mesh_of(config, 4)
    macs = program(config, row['stage'], experiments.build(config, row['stage']), mesh).macs
    # XLA leaves out what falls on the padding, and counts what is no product
    assert 0.7 < row['flops'] / (2 * macs / 4) < 3
  printed = capsys.readouterr().out
  assert 'v5e:2x2: refiner train, 8 images on 4 devices: fits' in printed
  text = compile_tables.table(rows)
  assert len({len(line) for line in text.splitlines()}) == 1 and 'all-reduce, MB' in text
  assert 'refiner sample, v5e:2x2 (4)' in compile_tables.summary(rows)


@needs_libtpu
def test_a_config_made_too_large_is_refused_with_the_sizes(capsys):
  config = get_config()
  config.refiner.model.channels = 8192
  refusal = (
    r'v5e:2x2: stage refiner, train, batch of 8 on 4 devices needs >= \d\d.* of 15\.75.* GiB of HBM; '
    r'v5e:2x2: stage refiner, sample, .* GiB of HBM\. .*config.mesh.fsdp > 1'
  )
  with pytest.raises(UserError, match=refusal):
    aot.compile_mode(config, ('refiner',), 'v5e:2x2', LEAST)
  assert 'NO' in capsys.readouterr().out


@pytest.mark.skipif(
  importlib.util.find_spec('jax_cuda13_plugin') is None, reason="no CUDA plugin: pip install -e '.[cuda]'"
)
def test_gpus_are_compiled_for_too():
  config = get_config()
  train, sample = aot.compile_for(config, ('vae',), 'h100:1x2', LEAST)
  assert train['fits'] and train['collective_bytes']['all-reduce'] == pytest.approx(
    train['parameter_bytes'], rel=0.05
  )
  assert sample['sent_bytes'] == 0 and sample['accessed_bytes'] > sample['parameter_bytes']


@needs_libtpu
@pytest.mark.long
def test_celeba256_fits_slices_of_4_to_256_chips(capsys):
  """The table of docs/scale.md; about an hour and a half on 2 cores."""
  config = get_config('celeba256', '')
  aot.compile_mode(config, config.stages, 'v5e:2x2,v5e:4x4,v5e:8x8,v5e:16x16', LEAST)
  printed = capsys.readouterr().out
  assert 'train.batch_size 64 -> 256' in printed
  with capsys.disabled():
    print(printed)
