"""DiVAE (arXiv:2206.00386): a tokenizer, then a diffusion as the decoder of its codes. Variants alone.

The diffusion is the refiner's, which reads no VAE, with a learned variance (arXiv:2102.09672). Codes enter in
the middle of the U-Net, which has as many levels as the tokenizer halves the image, and one more.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from configs.run import Run
from configs.stages import diffusion, prior

DROPOUT = 0.1
"""Of the codes, where samples are guided."""
FACTORS: Mapping[str, Callable[[ConfigDict], int]] = {
  'autoencoder': lambda section: 2 ** (len(section.model.channel_multipliers) - 1),
  'hierarchy': lambda section: 4,
}
"""By experiment of a tokenizer: how many times its finest grid is smaller than the image."""
NO_MODELS: Mapping[int, dict[str, Any]] = {}


def codes(stage: str) -> ConfigDict:
  """What a diffusion reads of codes."""
  return ConfigDict(
    {
      'stage': stage,  # the tokenizer: this stage ...
      'workdir': '',  # ... of this other run; '' = this run
      'position': 'middle',  # where they enter, at the U-Net's bottom level: 'encoder' | 'middle' | 'decoder'
      'how': 'concat',  # 'concat' | 'add' | 'attention', whose grid is free
      'dropout': 0.0,  # probability, per example, of the learned null, one vector for all positions
      # of the tokenizer: 'frozen', as its stage has trained it | 'joint', this stage trains its encoder and
      # codes, with the settings of its section `loss` | 'warm', so too, beginning as the trained one
      'training': 'frozen',
      'prior_stage': '',  # whose samples they are in sampling: this stage; '' = none, they are seen in data
    }
  )


def _divae(tokenizer: str, refiner: ConfigDict) -> None:
  refiner.space = 'pixel'
  refiner.diffusion.update({'condition': 'none', 'z_conditioning': False, 'condition_dropout': 0.0})
  refiner.model.dropout = 0.0
  refiner.model.scale_shift_norm = True
  with refiner.conditions.unlocked():
    refiner.conditions.codes = codes(tokenizer)


def divae(run: Run, models: Mapping[int, dict[str, Any]] = NO_MODELS) -> None:
  """A tokenizer, the run's or else a VQ-VAE, then the diffusion decoder of its codes.

  Args:
    run: that is made.
    models: fields of the U-Net, by how many times the grid of the codes is smaller than the image; for others
      the refiner's levels are kept or repeated.
  """
  diffusion.learned_variance(run)
  _divae(prior.chosen(run.config.stages) or prior.TOKENIZERS[0], run.section('refiner'))
  arrange(run)
  run.at_end(lambda run: fill(run, models))


def arrange(run: Run) -> None:
  """Puts the tokenizer and the decoder before all that comes after them."""
  refiner, stages = run.section('refiner'), run.config.stages
  named = refiner.conditions.codes
  named.stage = prior.chosen(stages) or named.stage
  named.prior_stage = prior.STAGE if prior.STAGE in stages else ''
  read = diffusion.reads(refiner)
  own = (named.stage,) if named.training != 'joint' else ()
  before = dict.fromkeys((*own, *(stage for stage in stages if stage in read and stage != named.stage)))
  unread = () if 'vae' in read else ('vae',)
  known = {*before, 'refiner', named.stage, *unread}
  run.only(*before, 'refiner', *(stage for stage in stages if stage not in known))


def fill(run: Run, models: Mapping[int, dict[str, Any]]) -> None:
  """Makes the decoder fit the tokenizer that the run has by now; guided it drops codes in training."""
  arrange(run)
  refiner = run.section('refiner')
  if refiner.sample.guidance_weight > 0:
    refiner.conditions.codes.dropout = DROPOUT
  factor = factor_of(run.section(refiner.conditions.codes.stage))
  if factor in models:
    refiner.model.update(models[factor])
  fit(refiner.model, factor, run.config.data.image_size)


def factor_of(tokenizer: ConfigDict) -> int:
  """Returns how many times the finest grid of a tokenizer is smaller than the image."""
  return FACTORS[tokenizer.experiment](tokenizer)


def fit_all(sections: Mapping[str, ConfigDict], image_size: int) -> None:
  """Makes every U-Net that reads codes fit the tokenizer, where both have been made smaller."""
  for section in sections.values():
    if 'conditions' in section and 'codes' in section.conditions:
      fit(section.model, factor_of(sections[section.conditions.codes.stage]), image_size)


def fit(model: ConfigDict, factor: int, image_size: int) -> None:
  """Gives the U-Net log2 f + 1 levels: repeats the last, or leaves out the deepest; attention that occurs."""
  levels, known = factor.bit_length(), model.channel_multipliers
  model.channel_multipliers = (*known, *[known[-1]] * (levels - len(known)))[:levels]
  sides = [image_size >> level for level in range(levels)]
  model.attention_resolutions = tuple(side for side in model.attention_resolutions if side in sides)


def divae_joint(run: Run, models: Mapping[int, dict[str, Any]] = NO_MODELS) -> None:
  """The tokenizer's encoder and codes are trained by the diffusion, from the start."""
  _trained(run, 'joint', models)


def divae_warm(run: Run, models: Mapping[int, dict[str, Any]] = NO_MODELS) -> None:
  """The same, beginning as a trained tokenizer."""
  _trained(run, 'warm', models)


def _trained(run: Run, training: str, models: Mapping[int, dict[str, Any]]) -> None:
  divae(run, models)
  run.section('refiner').conditions.codes.training = training


VARIANTS = {'divae': divae, 'divae_joint': divae_joint, 'divae_warm': divae_warm}
