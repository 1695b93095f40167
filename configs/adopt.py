"""How published files are imported: the section `adopt` of every config."""

from ml_collections import ConfigDict


def section() -> ConfigDict:
  """What `--mode=import` reads, and what no file says; read by `vaediff.modes.adopt`."""
  return ConfigDict(
    {
      'path': '',  # the published file; several, such as those of two stages, joined by commas
      'sizes': 'config',  # of networks: 'config', others are refused | 'file', they are taken from it
      'weights': 'ema',  # what is sampled: 'ema', the average where the file has one | 'raw'
      'formulation': '',  # of a U-Net: 'formulation1' | 'formulation2' | '' = its name, or the config
      'num_heads': 0,  # of a U-Net's attention; 0 = its name, or as published
      'band_order': '',  # of wavelets: 'pytorch_wavelets' | 'wavecnet' | '' = as published for the data set
      'latent_scale': 0.0,  # LDDGAN's latents are divided by it; 0 = as published for the data set
      'step': 0,  # updates done; 0 = what the file says, or 1
      'check_groups': True,  # refuse networks so narrow that the published group norms are others
    }
  )
