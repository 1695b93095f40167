"""DiffuseVAE, and text to image, on drawn shapes, 64x64 RGB, with captions: no download. Sizes are for a GPU.

    python -m vaediff.main --config=configs/shapes64.py:text

Hardware, hours and figures: not yet measured.
"""

from configs import base, shapes_parts

DATA = shapes_parts.data(64)
SIZES = shapes_parts.sizes(64, 64, (1, 2, 2, 2), (16, 8), 50_000, 64)
OWN = shapes_parts.OWN


def get_config(variant: str = ''):
  return base.make('shapes64', DATA, SIZES, variant, own=OWN)
