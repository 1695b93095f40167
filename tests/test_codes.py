"""Codes of real digits: what the stages with codebooks must reach, minutes of one core each."""

import importlib
import pathlib
import sys

import pytest

from vaediff.modes import train

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
KMEANS = 0.0057
"""Squared error of the evaluation digits by k-means of raw 2x2 patches: as many codes on the same grid."""


def trained(variant, tmp_path, **changes):
  """The last figures of a stage of the digits at full size."""
  config = importlib.import_module('configs.digits').get_config(variant)
  config.data.data_dir = str(tmp_path / 'data')
  (stage,) = config.stages
  config.update_from_flattened_dict({f'{stage}.{name}': value for name, value in changes.items()})
  (summary,) = train.run_stages(config, tmp_path / 'run', config.stages)
  return summary['last']


@pytest.mark.long
@pytest.mark.parametrize('kind', ['ema', 'gradient'])
def test_learned_codes_are_better_than_k_means_of_patches_and_in_use(kind, tmp_path, one_device):
  last = trained('vqvae', tmp_path, **{'loss.codebook': kind})
  assert last['val/mse'] < KMEANS
  assert last['val/codebook/perplexity'] >= 20 and last['val/codebook/used'] >= 0.9


@pytest.mark.long
def test_the_discriminator_stays_in_the_game(tmp_path, one_device):
  plain = trained('vqgan', tmp_path / 'plain', **{'loss.adversarial_weight': 0.0})
  against = trained('vqgan', tmp_path / 'against')
  assert against['val/mse'] <= 1.6 * plain['val/mse']
  assert 0.05 < against['val/discriminator_loss'] < 0.95
