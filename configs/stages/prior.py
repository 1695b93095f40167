"""A token prior: a transformer that draws the ids of a tokenizer, so that images come of nothing.

Sizes of taming-transformers (arXiv:2012.09841) and LlamaGen (arXiv:2406.06525): `configs.presets.PRIOR`.
"""

from ml_collections import ConfigDict

from configs import parts, presets
from configs.run import Run

STAGE = 'prior'
TOKENIZERS = ('vqvae', 'vqvae2', 'vqgan', 'dvae')
"""Stages with codes; without one of their variants it is the first."""


def section() -> ConfigDict:
  """LlamaGen's smallest, with its settings (arXiv:2406.06525); data sets have their own sizes."""
  config = ConfigDict()
  config.experiment = 'token_prior'
  config.tokenizer = ConfigDict(
    {
      'stage': 'vqvae',  # whose ids are learned: this stage ...
      'workdir': '',  # ... of this other run; '' = this run
    }
  )
  config.conditions = ConfigDict()  # what the ids are given: sections `label`, `text`, see the variants
  config.model = ConfigDict(
    {
      'form': 'decoder',  # 'decoder' | 'encoder_decoder': what is given is encoded, and read by every block
      **presets.PRIOR['llamagen_b'],
      'num_encoder_layers': 1,  # encoder_decoder
      'dropout': 0.1,  # of the input, and after attention and MLP
      'remat': False,  # recompute activations in the backward pass
      'dtype': 'float32',
    }
  )
  config.loss = ConfigDict(
    {
      'keep_probability': 1.0,  # of each id among the inputs of training; others are any id at all
    }
  )
  config.optim = parts.optim(1e-4, b2=0.95, weight_decay=0.05, clip_norm=1.0)
  config.train = parts.train(1_500_000, 256, flip=True)
  config.sample = parts.sample(
    guidance_weight=0.0,  # w of (1 + w) l_c - w l_u, of logits; others' scale is 1 + w
    temperature=1.0,  # logits are divided by it; 0 = the most probable id
    top_k=0,  # only so many of the most probable ids; 0 = all
    top_p=1.0,  # only the most probable ids that together have this probability
    captions=(),  # to draw, in turn; () = those of the evaluation split; with the condition `text`
    rerank={  # of several samples of each image the one that fits its caption best is kept
      'stage': '',  # the CLIP stage that says so; '' = one sample
      'workdir': '',  # ... of this other run; '' = this run
      'candidates': 16,  # samples of each image
    },
    labels=(),  # classes to draw, in turn: numbers or names, as 3,7; () = all; with the condition `label`
  )
  return config


def small(stage: ConfigDict) -> None:
  """3 blocks of width 64 in the style of taming: 0.16 million parameters, 2 minutes of a core on digits."""
  stage.model.update({'style': 'gpt', 'width': 64, 'num_layers': 3, 'num_heads': 4})
  stage.optim = parts.optim(3e-3, schedule='cosine', warmup_steps=50, weight_decay=0.1, clip_norm=1.0)
  stage.train = parts.train(1000, 64, save_every_steps=500, eval_every_steps=500, grid_every_steps=0)


def debug(stage: ConfigDict, image_size: int) -> None:
  stage.model.update({'width': 16, 'num_layers': 2, 'num_heads': 2})
  stage.optim.warmup_steps = 2


def reads(stage: ConfigDict) -> tuple[str, ...]:
  """The stages whose sections it needs."""
  return (stage.tokenizer.stage,)


def prior(run: Run) -> None:
  """After the run's tokenizer, or else a VQ-VAE, the prior of its ids.

  A diffusion decoder of the same ids is given those of the prior; the tokenizer's own decoder shows them too.
  """
  if not chosen(run.config.stages):
    run.only(TOKENIZERS[0])
  run.add(STAGE)
  run.at_end(arrange)


def chosen(stages: tuple[str, ...]) -> str:
  """Returns the tokenizer among stages; '' = none."""
  return next((stage for stage in stages if stage in TOKENIZERS), '')


def arrange(run: Run) -> None:
  """Puts the prior right after the tokenizer that the run has by now: what reads its ids comes later.

  A diffusion decoder that trains the tokenizer too is the tokenizer.
  """
  stages, tokenizer = run.config.stages, chosen(run.config.stages)
  codes = run.section('refiner').conditions.get('codes') if 'refiner' in stages else None
  if codes is not None:
    tokenizer = tokenizer if codes.training == 'frozen' else 'refiner'
  if STAGE not in stages or not tokenizer:
    return  # a later variant has made the run another's
  run.section(STAGE).tokenizer.stage = tokenizer
  others = [stage for stage in stages if stage != STAGE]
  place = others.index(tokenizer) + 1
  run.only(*others[:place], STAGE, *others[place:])
  if codes is not None:
    codes.prior_stage = STAGE
  if codes is not None or 'refiner' not in stages:
    _take(run.section('refiner'), run.section(STAGE))


def _take(decoder: ConfigDict, own: ConfigDict) -> None:
  """Classes and captions are the prior's, whichever variant came first: ids of nothing are of none."""
  with decoder.unlocked(), own.unlocked():
    for name in ('label', 'text'):
      if name in decoder.conditions:
        own.conditions[name] = {'dropout': decoder.conditions[name].dropout}
        del decoder.conditions[name]
    if 'text' in decoder:
      own.text = decoder.text
      del decoder.text


VARIANTS = {'prior': prior}
