"""Captions: a diffusion, or a prior of ids, that reads the words of an image's caption. Variants alone."""

from ml_collections import ConfigDict

from configs.run import Run
from configs.stages import prior

TEXT = 'text'


def tokenizer(kind: str, vocab_size: int, length: int) -> ConfigDict:
  """How captions become ids."""
  return ConfigDict(
    {
      'kind': kind,  # 'word': those of the training captions, others are refused | 'subword': any text
      'vocab_size': vocab_size,  # ids at most; rows of the table of words
      'length': length,  # ids of a caption, its begin and end too; a longer one is refused
    }
  )


def tower() -> ConfigDict:
  """What a diffusion reads of captions."""
  return ConfigDict(
    {
      'dropout': 0.1,  # probability, per example, of the learned null
      # 'attention': behind each attention block, nothing at first | 'transformer': latent diffusion's block
      # in the place of each
      'how': 'attention',
      'width': 64,  # of the transformer of words
      'num_layers': 2,
      'num_heads': 4,
      'extends': {  # a diffusion of the same settings but for captions, which training begins as
        'stage': 'refiner',  # its stage ...
        'workdir': '',  # ... of this other run; '' = training begins fresh
      },
    }
  )


def need_captions(run: Run, variant: str) -> None:
  """Raises ValueError where captions of the data are not known, which a variant needs."""
  if not run.config.data.caption_feature:
    raise ValueError(
      f'variant {variant}: the data set of config {run.config.name!r} has no captions, data.caption_feature '
      "is ''; take one that has, as configs/shapes16.py"
    )


def text(run: Run, kind: str = 'word', vocab_size: int = 64, length: int = 32) -> None:
  """The U-Net also reads the caption of the image; a token prior does in its place, where there is one.

  Raises:
    ValueError: captions of these data are not known.
  """
  need_captions(run, 'text')
  of_prior = prior.STAGE in run.config.stages
  reads = ConfigDict({'dropout': tower().dropout}) if of_prior else tower()
  settings = tokenizer(kind, vocab_size, length)
  run.edit(prior.STAGE if of_prior else 'refiner', lambda stage: _read(stage, settings, reads))


def _read(stage: ConfigDict, settings: ConfigDict, reads: ConfigDict) -> None:
  with stage.unlocked():
    stage.text, stage.conditions.text = settings, reads


VARIANTS = {TEXT: text}
