"""What modes are told: a section each, of those that are not in `configs.base`."""

from ml_collections import ConfigDict


def edit() -> ConfigDict:
  """What `--mode=edit` changes in a picture, and how it trains for that; read by `vaediff.modes.edit`."""
  return ConfigDict(
    {
      'image': '',  # a file; '' = evaluation images of the data set shapes, one attribute of each changed
      'caption': '',  # what the picture is to show
      'name': '',  # of the folder <workdir>/edits/<name>; '' = by the file, and by what the edit is made of
      # between the vectors that show the picture, 0, and those of the caption, 1; at most 1.5
      'etas': (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
      'num_images': 20,  # without a file: so many
      'num_seeds': 1,  # strips that are drawn, of which the CLIP stage chooses one
      'clip': {  # the CLIP stage that says which fits the caption best
        'stage': '',  # its stage; '' = none, for one seed
        'workdir': '',  # ... of this other run; '' = this run
      },
      # the vectors of the caption, optimised to show the picture; batches hold it so often, with other times
      # and noise
      'embedding': {'num_steps': 100, 'batch_size': 16, 'learning_rate': 1e-3},
      # the denoiser, tuned to the picture at those vectors
      'finetune': {'num_steps': 500, 'batch_size': 16, 'learning_rate': 1e-4},
    }
  )
