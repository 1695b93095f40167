"""How `--mode=vary` and `--mode=text_diff` make images again of their vectors (docs/unclip.md)."""

from ml_collections import ConfigDict


def vary() -> ConfigDict:
  return ConfigDict(
    {
      'image': '',  # files of pictures, joined by commas; '' = the first images of the evaluation split
      'num_images': 4,  # of these
      'num_variations': 7,  # of each image
      'num_steps': 50,  # of DDIM, to the noise of an image and back
      'eta': 1.0,  # noise of the way back: 0 = the image again, 1 = all that its vector leaves open
    }
  )


def text_diff() -> ConfigDict:
  return ConfigDict(
    {
      'image': '',  # files of pictures, joined by commas; '' = images of the evaluation split
      'num_images': 4,  # of these; on the data set `shapes` those that show what `source` tells
      'source': '',  # what the image shows; '' = nothing in particular, the mean of captions
      'target': '',  # what it is to show
      'num_points': 6,  # of the strip, both ends included
      'max_theta': 0.5,  # share of the angle from the image's vector to the difference of the captions'
      'num_steps': 50,  # of DDIM, to the noise of the image and back
    }
  )


def debug(config: ConfigDict) -> None:
  config.vary.update({'num_images': 2, 'num_variations': 2, 'num_steps': 3})
  config.text_diff.update({'num_images': 2, 'num_points': 3, 'num_steps': 3})
