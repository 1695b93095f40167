"""`--mode=benchmark` prints one JSON object whose figures fit together."""

import importlib
import json
import pathlib
import sys

import pytest

from vaediff import benchmark

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))


def test_the_figures_fit_together(tmp_path, capsys, one_device):
  config = importlib.import_module('configs.digits').get_config('debug')
  config.data.data_dir = str(tmp_path)
  result = benchmark.benchmark(config, tuple(config.stages))
  printed = capsys.readouterr().out
  assert json.loads(printed[printed.index('{') :]) == result
  assert result['loader_images_per_second'] > 0
  for stage in ('vae', 'refiner'):
    figures = result['stages'][stage]
    assert figures['images_per_second'] == pytest.approx(figures['batch_size'] / figures['step_seconds'])
    share = figures['flops_per_second'] / result['matmul_flops_per_second']
    assert figures['fraction_of_matmul_peak'] == pytest.approx(share)
    assert figures['compile_seconds'] > 0
  refiner = result['stages']['refiner']
  assert refiner['num_function_evaluations'] == config.refiner.sample.num_steps
  forward = refiner['num_function_evaluations'] * refiner['forward_seconds']
  assert refiner['sampler_over_forward'] == pytest.approx(refiner['sample_seconds'] / forward)
