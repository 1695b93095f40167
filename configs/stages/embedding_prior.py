"""DALL-E 2 (arXiv:2204.06125): a CLIP stage, a prior of its vectors of images, the decoder that reads them.

The decoder is the refiner's diffusion, without a VAE, on vectors and captions. Larger images come of a
cascade (`unclip,cascade`), whose first stage is the decoder then.
"""

from ml_collections import ConfigDict

from configs import parts
from configs.run import Run
from configs.stages import diffusion, text

STAGE, CLIP = 'embedding_prior', 'clip'
DROPOUT, OF_CAPTIONS = 0.1, 0.5
"""Of vectors and of captions, in the decoder."""


def section() -> ConfigDict:
  """The published settings of DALL-E 2's prior; data sets have their own sizes."""
  config = ConfigDict()
  config.experiment = 'embedding_prior'
  config.clip = ConfigDict(
    {
      'stage': CLIP,  # whose vectors are drawn, and which reads the captions: this stage ...
      'workdir': '',  # ... of this other run; '' = this run
    }
  )
  config.text = text.tokenizer('subword', 49_408, 77)  # as that of the CLIP stage
  config.conditions = ConfigDict({'text': {'dropout': 0.1}})  # probability, per example, of the null
  config.model = ConfigDict(
    {
      'width': 2048,
      'num_layers': 24,
      'num_heads': 32,
      'dropout': 0.0,
      'remat': False,  # recompute activations in the backward pass
      'dtype': 'float32',
    }
  )
  config.diffusion = ConfigDict(
    {
      'schedule': 'iddpm_cosine',  # see the refiner's
      'loss_weight': 'constant',  # of the squared error of the vector, which is predicted itself
    }
  )
  config.optim = parts.optim(1.1e-4, b2=0.96, eps=1e-6, weight_decay=0.06, ema_decay=0.9999)
  config.train = parts.train(600_000, 4096, grid_every_steps=0)
  config.sample = parts.sample(
    sampler='ddpm',
    num_steps=64,
    grid='uniform',
    eta=0.0,  # ddim: 0 = deterministic, 1 = ancestral
    variance='small',  # ddpm: 'small' | 'large'
    temperature=1.0,  # standard deviation of the starting noise
    guidance_weight=0.0,  # classifier-free guidance, the caption dropped; 0 = conditional network only
    candidates=2,  # samples of which the one nearest to the vector of its caption is kept
    captions=(),  # to draw, in turn; () = those of evaluation; a decoder that has some gives its own
  )
  return config


def debug(stage: ConfigDict, image_size: int) -> None:
  stage.model.update({'width': 16, 'num_layers': 1, 'num_heads': 2})
  stage.sample.num_steps = 3
  stage.optim.warmup_steps = 2


def small(stage: ConfigDict) -> None:
  """A million parameters, for shapes and emoji."""
  stage.model.update({'width': 128, 'num_layers': 4, 'num_heads': 4})
  stage.optim = parts.optim(
    1e-3, schedule='cosine', warmup_steps=100, weight_decay=0.01, clip_norm=1.0, ema_decay=0.995,
    ema_warmup=True,
  )  # fmt: skip
  stage.train = parts.train(
    4000, 256, grid_every_steps=0, save_every_steps=1000, eval_every_steps=1000, eval_images=1024
  )
  stage.sample.batch_size = 256


def reads(stage: ConfigDict) -> tuple[str, ...]:
  """The stages whose sections it needs."""
  return (stage.clip.stage,)


def vectors(num_tokens: int = 4, width: int = 64) -> ConfigDict:
  """What a diffusion reads of the vector of an image."""
  return ConfigDict(
    {
      'stage': CLIP,  # that makes it: this stage ...
      'workdir': '',  # ... of this other run; '' = this run
      'of': 'image',  # whose vector: 'image' | 'caption', prior_stage = '': an arm without a prior
      'num_tokens': num_tokens,  # that the network attends to; 0 = it joins the time's embedding alone
      'width': width,  # of a token
      'dropout': DROPOUT,  # probability, per example, of the learned null
      'prior_stage': STAGE,  # in sampling: the samples of this stage; '' = none, they are seen in data
    }
  )


def unclip(run: Run, kind: str = 'word', vocab_size: int = 64, length: int = 32) -> None:
  """CLIP, the prior of its vectors, and the diffusion that decodes them, which reads captions too.

  Raises:
    ValueError: captions of these data are not known.
  """
  text.need_captions(run, 'unclip')
  words = text.tokenizer(kind, vocab_size, length)
  if 'vae' in run.config.stages:  # its image would say what vector and caption are to say
    diffusion.unconditional(run)
  run.edit(CLIP, lambda stage: stage.text.update(words))
  run.edit(STAGE, lambda stage: stage.text.update(words))
  run.edit('refiner', lambda stage: _decoder(stage, words))
  run.at_end(lambda run: run.at_end(arrange))  # after those of other variants, such as a cascade's


def _decoder(stage: ConfigDict, words: ConfigDict) -> None:
  stage.diffusion.condition_dropout = 0.0
  with stage.unlocked():
    stage.text = words
    stage.conditions.text = text.tower()
    stage.conditions.text.dropout = OF_CAPTIONS
    stage.conditions.clip_image = vectors()


def arrange(run: Run) -> None:
  """Puts CLIP and the prior before the stages that the run has by now; what enlarges images reads no more."""
  others = tuple(stage for stage in run.config.stages if stage not in (CLIP, STAGE))
  readers = [run.section(stage) for stage in others if 'conditions' in run.section(stage)]
  if not any('clip_image' in section.conditions for section in readers):
    return  # a later variant has made the run another's
  run.only(CLIP, STAGE, *others)
  run.config.evaluate.clip.stage = CLIP
  for section in readers:
    if 'low_resolution' in section.conditions:
      _enlarge(section)


def _enlarge(section: ConfigDict) -> None:
  """Of a stage of super-resolution: it reads the small image and no more, as DALL-E 2's do."""
  with section.unlocked():
    for name in ('clip_image', 'text'):
      if name in section.conditions:
        del section.conditions[name]
    if 'text' in section:
      del section.text
  if not any('dropout' in one and one.dropout for one in section.conditions.values()):
    section.sample.guidance_weight = 0.0


VARIANTS = {'unclip': unclip}
