"""CLIP: images and captions as vectors that are compared; what scores and ranks samples. Variants alone."""

from ml_collections import ConfigDict

from configs import parts
from configs.run import Run
from configs.stages import text

STAGE = 'clip'


def section() -> ConfigDict:
  """The published settings of ViT-B/32 (arXiv:2103.00020); data sets have their own sizes."""
  config = ConfigDict()
  config.experiment = 'clip'
  config.text = text.tokenizer('subword', 49_408, 77)
  config.model = ConfigDict(
    {
      'patch': 32,  # pixels of a side; divides those of the image
      'embedding_size': 512,  # of the vectors of both towers
      'image': {'width': 768, 'num_layers': 12, 'num_heads': 12},
      'text': {'width': 512, 'num_layers': 12, 'num_heads': 8},
      'dtype': 'float32',  # of the towers; what is compared is float32
    }
  )
  config.loss = ConfigDict(
    {
      'kind': 'softmax',  # 'softmax': both cross-entropies over the batch | 'sigmoid': SigLIP's, of each pair
    }
  )
  config.optim = parts.optim(5e-4, schedule='cosine', warmup_steps=2000, b2=0.98, eps=1e-6, weight_decay=0.2)
  config.train = parts.train(400_000, 32_768, grid_every_steps=0)
  config.sample = ConfigDict({'checkpoint': 'latest', 'num_images': 1, 'batch_size': 256, 'seed': 0})
  return config


def debug(stage: ConfigDict, image_size: int) -> None:
  sizes = {'width': 8, 'num_layers': 1, 'num_heads': 2}
  stage.model.update({'patch': image_size // 4, 'embedding_size': 8, 'image': sizes, 'text': sizes})
  stage.optim.warmup_steps = 2


def small(stage: ConfigDict) -> None:
  """A million parameters, for shapes and emoji."""
  stage.model.update(
    {
      'patch': 4,
      'embedding_size': 64,
      'image': {'width': 128, 'num_layers': 4, 'num_heads': 4},
      'text': {'width': 64, 'num_layers': 2, 'num_heads': 4},
    }
  )
  stage.optim.update({'learning_rate': 1e-3, 'warmup_steps': 100, 'weight_decay': 0.1, 'clip_norm': 1.0})
  stage.train = parts.train(
    2000, 256, grid_every_steps=0, save_every_steps=500, eval_every_steps=500, eval_images=1024
  )


def clip(run: Run, kind: str = 'word', vocab_size: int = 64, length: int = 32) -> None:
  """CLIP alone; or, where a stage of the run reads captions, before the others, to score its samples.

  Raises:
    ValueError: captions of these data are not known.
  """
  text.need_captions(run, 'clip')
  run.edit(STAGE, lambda stage: stage.text.update({'kind': kind, 'vocab_size': vocab_size, 'length': length}))
  run.at_end(arrange)


def arrange(run: Run) -> None:
  """Puts CLIP before the stages that the run has by now, where one of them reads captions."""
  others = tuple(stage for stage in run.config.stages if stage != STAGE)
  if any(text.TEXT in run.section(stage) for stage in others):
    run.only(STAGE, *others)
    run.config.evaluate.clip.stage = STAGE
  else:
    run.only(STAGE)


VARIANTS = {'clip': clip}
