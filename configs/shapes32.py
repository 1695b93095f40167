"""DiffuseVAE, and text to image, on drawn shapes, 32x32 RGB, with captions: no download.

    python -m vaediff.main --config=configs/shapes32.py:text
    python -m vaediff.main --workdir=runs/shapes32-text --mode=sample \
        --config.refiner.sample.captions="('a small red ring at the top left on a black background',)"

    python -m vaediff.main --config=configs/shapes32.py:look,text,control      # size and place said by edges

Caption to image as DALL-E 2, by a CLIP stage and a prior of its vectors (docs/unclip.md):

    python -m vaediff.main --config=configs/shapes32.py:unclip
    python -m vaediff.main --config=configs/shapes32.py:unclip,cascade    # 8, 16, then 32 pixels

Hardware, hours and figures: not yet measured.
"""

from configs import base, shapes_parts

DATA = shapes_parts.data(32)
SIZES = shapes_parts.sizes(32, 24, (1, 2, 2, 2), (8,), 8000, 32)
OWN = shapes_parts.OWN


def get_config(variant: str = ''):
  return base.make('shapes32', DATA, SIZES, variant, own=OWN)
