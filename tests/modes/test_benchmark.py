"""`--mode=benchmark` prints one JSON object whose figures fit together."""

import importlib
import json
import pathlib
import sys

import jax
import pytest
from ml_collections import ConfigDict

from vaediff import experiments
from vaediff.data import sources
from vaediff.errors import UserError
from vaediff.experiments import kinds
from vaediff.machine import sharding
from vaediff.modes import benchmark
from vaediff.run import config as configs

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))


@pytest.mark.slow
def test_the_figures_fit_together(tmp_path, capsys, one_device):
  config = importlib.import_module('configs.digits').get_config('debug')
  config.data.data_dir = str(tmp_path)
  result = benchmark.benchmark(config, tuple(config.stages))
  printed = capsys.readouterr().out
  assert json.loads(printed[printed.index('{') :]) == result
  assert result['loader_images_per_second'] > 0
  assert printed.index('compiled in') < printed.index('images/s') < printed.index('one forward pass')
  for stage in ('vae', 'refiner'):
    figures = result['stages'][stage]
    assert figures['images_per_second'] == pytest.approx(figures['batch_size'] / figures['step_seconds'])
    share = figures['flops_per_second'] / result['matmul_flops_per_second'][figures['dtype']]
    assert figures['fraction_of_matmul_peak'] == pytest.approx(share)
    assert figures['trace_seconds'] > 0 and figures['compile_seconds'] > 0
  refiner = result['stages']['refiner']
  assert refiner['num_function_evaluations'] == config.refiner.sample.num_steps
  forward = refiner['num_function_evaluations'] * refiner['forward_seconds']
  assert refiner['sampler_over_forward'] == pytest.approx(refiner['sample_seconds'] / forward)


@pytest.mark.slow
def test_the_cost_of_a_denoising_gan_is_split(tmp_path, one_device, capsys):
  config = importlib.import_module('configs.digits').get_config('light,debug')
  config.data.data_dir = str(tmp_path)
  figures = benchmark.benchmark(config, ('ddgan',))['stages']['ddgan']
  printed = capsys.readouterr().out
  parts = figures['sampling']
  assert list(parts) == ['generator', 'decoder', 'total']
  for name in ('parameters', 'giga_macs_per_image'):
    assert parts['total'][name] == pytest.approx(parts['generator'][name] + parts['decoder'][name])
  assert all(row['seconds_per_batch'] > 0 and row['memory_bytes'] > 0 for row in parts.values())
  assert 'GMAC/image' in printed and '4 calls' in printed


def test_the_state_lies_by_the_rules_of_the_config(monkeypatch):
  config = importlib.import_module('configs.digits').get_config('debug')
  config.mesh.update({'fsdp': 2, 'rules': (('.*', 'replicated'),)})
  config.data.source = 'synthetic'
  abstract_state = benchmark.training.abstract_state

  class Reached(Exception):
    pass

  def reach(*args):
    raise Reached(abstract_state(*args))

  monkeypatch.setattr(benchmark.training, 'abstract_state', reach)
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:2])
  with pytest.raises(Reached) as reached:
    benchmark.measure_stage(config, 'vae', sources.open_source(config.data, 'train'), mesh, 1.0)
  specs = {leaf.sharding.spec for leaf in jax.tree.leaves(reached.value.args[0])}
  assert specs == {jax.sharding.PartitionSpec()}


def test_several_processes_are_refused_before_anything_is_measured(monkeypatch, tmp_path):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(benchmark, 'benchmark', lambda *args: pytest.fail('measured'))
  with pytest.raises(UserError, match='--mode=benchmark runs in one process, and this job has 2.*alone'):
    benchmark.mode(configs.Run(ConfigDict(), tmp_path, ('vae',)))


def test_kinds_of_updates_are_weighed_by_how_often_they_come():
  config = importlib.import_module('configs.digits').get_config('ddgan')
  config.ddgan.loss.r1_every_steps = 5
  assert kinds.kinds_of(experiments.build(config, 'ddgan'), 1000) == {'': 0.8, 'r1': 0.2}


def test_a_kind_that_begins_late_is_one_too():
  config = importlib.import_module('configs.digits').get_config('vqgan')
  config.vqgan.loss.update({'discriminator_start_step': 100, 'adversarial_start_step': 90_000})
  config.vqgan.train.num_steps = 100_000
  found = kinds.kinds_of(experiments.build(config, 'vqgan'), 100_000)
  assert found == {'judged': 0.8, 'adversarial': 0.2}
