"""What is measured on records: ranges by time, roundings block by block, and the error of that."""

import dataclasses
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from vaediff.errors import UserError
from vaediff.models import adaround, learned_ranges, ranges
from vaediff.models.observed import block_io, inputs_of, layers_of, quantizable, subtree
from vaediff.models.quantized import Quantized
from vaediff.run import calibration, quantize_calibration, rounding, subjects

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from test_calibration import SECTION, stage  # noqa: E402, F401

BLOCKS = ('middle/res_0', 'up_1/res_0')
QUANTIZE = ConfigDict(
  {
    'method': 'adaround',
    'ranges': 'minmax',
    'percentile': 99.99,
    'correction': 'noise',
    'correction_images': 4,
    'calibration': {**SECTION.to_dict(), 'steps': 4, 'num_samples': 32, 'batch_size': 16},
    'adaround': dataclasses.asdict(adaround.Settings(num_steps=60, batch_size=16)),
    'learned_ranges': dataclasses.asdict(learned_ranges.Settings(batch_size=16, learning_rate=0.01)),
  }
)


@pytest.fixture(scope='module')
def made(stage):  # noqa: F811
  """Two blocks of the network, in four bits with inputs of eight."""
  model = stage.experiment.denoiser.model
  layers = tuple(layer for layer in quantizable(layers_of(model)) if layer.path.startswith(BLOCKS))
  rows = quantize_calibration.rows_of(stage, QUANTIZE)
  quantized = Quantized.of(model, layers=layers, bits=4, quantized_inputs=True, buckets=3, rows=rows)
  found = quantize_calibration.hand_over(stage, QUANTIZE, quantized, 'denoiser')
  correction = quantize_calibration.correction(stage, quantized, found, QUANTIZE)
  return quantized, {**found, 'correction': correction}


def test_edges_lie_between_the_times_of_buckets():
  t = np.float32([1.0, 0.5, 0.2, 0.1, 0.5, 1.0])
  np.testing.assert_allclose(quantize_calibration.time_edges(t, 2), [0.35])
  np.testing.assert_allclose(quantize_calibration.time_edges(t, 4), [0.15, 0.35, 0.75])
  np.testing.assert_allclose(quantize_calibration.time_edges(np.float32([1.0]), 3), [1, 1])
  assert len(quantize_calibration.time_edges(t, 1)) == 0


@pytest.mark.slow
def test_blocks_are_those_that_were_asked_for(stage, made):  # noqa: F811
  """Alone they give what they give inside of the network."""
  quantized, _ = made
  model, params = stage.experiment.denoiser.model, stage.read['denoiser']
  found = rounding.layers_by_block(model, quantized.layers)
  blocks = tuple(block for block, _ in found)
  assert [block.path for block in blocks] == list(BLOCKS)
  assert {layer.path.rpartition('/')[2] for layer in found[1][1]} == {'conv_1', 'conv_2', 'skip', 'emb'}
  records = calibration.load(stage, QUANTIZE.calibration).rows(slice(0, 2))
  batch = jax.tree.map(jnp.asarray, (records.y, records.t, records.values))
  found = block_io(model, params, *subjects.arguments(stage.experiment.denoiser, batch), blocks=blocks)
  for block in blocks:
    args, output = found[block.path]
    np.testing.assert_allclose(block.apply(subtree(params, block.path), *args), output, atol=1e-5)


@pytest.mark.slow
def test_ranges_are_those_of_each_bucket(stage, made):  # noqa: F811
  quantized, found = made
  records = calibration.load(stage, QUANTIZE.calibration)
  batch = jax.tree.map(jnp.asarray, (records.y, records.t, records.values))
  args = subjects.arguments(stage.experiment.denoiser, batch)
  _, inputs = inputs_of(
    stage.experiment.denoiser.model, stage.read['denoiser'], *args, layers=quantized.layers
  )
  bucket = np.searchsorted(found['times'], records.t, side='left')
  assert set(bucket) == {0, 1, 2}
  assert {layer.parts for layer in quantized.layers} == {1, 2}
  for layer in quantized.layers:
    table = found['ranges'][layer.path]
    assert table.shape == (3, layer.parts, 2)
    for part, channels in enumerate(layer.slices):
      values = np.asarray(inputs[layer.path])[..., channels]
      for k in range(3):
        low, high = values[bucket == k].min(), values[bucket == k].max()
        np.testing.assert_allclose(table[k, part], (min(low, 0), max(high, 0)), atol=1e-5)


@pytest.mark.slow
def test_roundings_are_down_or_up_and_are_not_learned_twice(stage, made, monkeypatch):  # noqa: F811
  quantized, found = made
  assert found['kernels'].keys() == {layer.path for layer in quantized.layers}
  for layer in quantized.layers:
    kernel = subtree(stage.read['denoiser'], layer.path)['kernel']
    steps = np.asarray(kernel / ranges.spread(found['kernel_scales'][layer.path], layer.shape, layer.slices))
    whole = found['kernels'][layer.path]
    low, high = (np.clip(np.floor(steps) + up, -7, 7) for up in (0, 1))
    assert ((whole == low) | (whole == high)).all()

  def learn(*args):
    raise AssertionError('learned again')

  monkeypatch.setattr(adaround, 'learn', learn)
  subject, folder = subjects.of(stage, QUANTIZE.calibration, 'denoiser'), stage.workdir / stage.stage
  again = rounding.learned(subject, folder, quantized, found, QUANTIZE)
  assert again.keys() == {'kernels'}
  assert all((again['kernels'][path] == whole).all() for path, whole in found['kernels'].items())
  other = dataclasses.replace(subject, made_of={**subject.made_of, 'records': 'x'})
  with pytest.raises(AssertionError, match='learned again'):
    rounding.learned(other, folder, quantized, found, QUANTIZE)


@pytest.mark.slow
def test_learned_ranges_stretch_what_was_measured_and_lower_the_error_of_blocks(stage, made, capsys):  # noqa: F811
  quantized, found = made
  section = ConfigDict(QUANTIZE.to_dict())
  section.learned_ranges.num_steps, section.adaround.num_steps = 100, 3
  subject, folder = subjects.of(stage, section.calibration, 'denoiser'), stage.workdir / stage.stage
  other = rounding.learned(subject, folder, quantized, found, section)
  assert other['ranges'].keys() == found['ranges'].keys()
  for path, measured in found['ranges'].items():
    factor = other['ranges'][path][..., 1] / measured[..., 1]  # one of both ends: the zero point stays
    np.testing.assert_allclose(other['ranges'][path], factor[..., None] * measured, rtol=1e-4, atol=1e-6)
  lines = re.findall(r'error (\S+), of the measured ranges (\S+)', capsys.readouterr().out)
  pairs = [tuple(map(float, line)) for line in lines]
  assert len(pairs) == 2 and all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)
  assert (
    rounding.learned(subject, folder, quantized, found, section)['ranges'].keys() == other['ranges'].keys()
  )
  assert 'error' not in capsys.readouterr().out  # of the file


@pytest.mark.slow
def test_the_corrected_network_has_no_bias(stage, made):  # noqa: F811
  """Over the records of each step, and less error than without the correction."""
  quantized, found = made
  table, params = found['correction'], stage.read['denoiser']
  assert table['gain'].shape == (5, 1) and (table['std'] > 0).all()
  asked = ConfigDict({**QUANTIZE.calibration.to_dict(), 'steps': 0, 'num_samples': 20})
  records = calibration.load(stage, asked)
  batch = jax.tree.map(jnp.asarray, (records.y, records.t, records.values))
  args = subjects.arguments(stage.experiment.denoiser, batch)
  wanted = stage.experiment.denoiser.model.apply(params, *args)
  plain, corrected = (
    np.asarray(quantized.apply(quantized.quantize(params, **{**found, 'correction': table}), *args) - wanted)
    for table in (None, table)
  )
  for step in range(5):
    own = records.step == step
    assert abs(corrected[own].mean()) < 1e-5 < abs(plain[own].mean())
    assert np.std(corrected[own]) == pytest.approx(table['std'][step], rel=1e-2)


def test_what_cannot_be_is_refused(stage):  # noqa: F811
  plain = dataclasses.replace(stage, experiment=type('Plain', (), {'diffusion': None})())
  assert quantize_calibration.rows_of(plain, ConfigDict({'correction': 'none'})) == 0
  with pytest.raises(UserError, match="correction is 'mean'.*'refiner' has none: set it to 'none'"):
    quantize_calibration.rows_of(plain, ConfigDict({'correction': 'mean'}))
  with pytest.raises(
    UserError, match="stage 'refiner' has no sampler .* does not read what follows from an image"
  ):
    subjects.of(plain, QUANTIZE.calibration, 'denoiser')
  wrong = ConfigDict({**QUANTIZE.to_dict(), 'percentile': 40.0})
  none = Quantized.of(stage.experiment.denoiser.model, layers=(), bits=4, quantized_inputs=True, buckets=1)
  with pytest.raises(UserError, match='config.quantize.percentile'):
    quantize_calibration.hand_over(stage, wrong, none, 'denoiser')
