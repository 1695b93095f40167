"""DiffuseVAE, and text to image, on drawn shapes, 16x16 RGB, with captions: no download.

    python -m vaediff.main --config=configs/shapes16.py:text         # captions to images
    python -m vaediff.main --config=configs/shapes16.py:text,mini    # 96 compositions, an hour of a core
    python -m vaediff.main --config=configs/shapes16.py:look,text,mini,control   # ... whose place edges say
    python -m vaediff.main --config=configs/shapes16.py:unclip,mini  # DALL-E 2: CLIP, a prior, its decoder
    python -m vaediff.main --config=configs/shapes16.py              # with a VAE, without captions

`mini`: an hour or two of a core, and what is learned by then: docs/text.md, docs/control.md, docs/unclip.md.
The full sizes: not yet measured.
"""

from configs import base, parts, shapes_parts

DATA = shapes_parts.data(16)
SIZES = shapes_parts.sizes(16, 32, (1, 2, 2), (8,), 8000, 64)


def _mini(run):
  """Circles, squares and triangles of four colours, large, in the corners, on black or white."""
  run.config.data.update({'name': 'shapes/mini', 'num_classes': 3})
  run.edit('refiner', _short)
  run.edit('clip', lambda stage: stage.train.update({'num_steps': 1000}))
  run.edit('embedding_prior', lambda stage: stage.train.update({'num_steps': 1500, 'batch_size': 128}))
  run.at_end(_of_vectors)


def _short(stage):
  stage.model.channel_multipliers = (1, 2)
  stage.train = parts.train(
    8000, 64, save_every_steps=1000, eval_every_steps=1000, grid_every_steps=2000, eval_images=512
  )


def _of_vectors(run):
  """What a vector says is learned sooner than captions are, and then varied enough: docs/unclip.md."""
  refiner = run.section('refiner')
  if 'clip_image' in refiner.conditions:
    refiner.train.num_steps = 3500
    run.section('clip').train.num_steps = 1500


OWN = {**shapes_parts.OWN, 'mini': _mini}


def get_config(variant: str = ''):
  return base.make('shapes16', DATA, SIZES, variant, own=OWN)
