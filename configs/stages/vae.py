"""Stage 1 of DiffuseVAE (arXiv:2201.00308): the ResNet VAE, and the prior of its codes."""

from ml_collections import ConfigDict

from configs import parts, presets
from configs.run import Run


def section() -> ConfigDict:
  """The official VAE for CIFAR-10."""
  config = ConfigDict()
  config.experiment = 'vae'  # file in vaediff/experiments
  config.model = ConfigDict({**presets.VAE['cifar10'], 'stem': 'nearest', 'dtype': 'float32'})
  config.loss = ConfigDict(
    {
      'beta': 1.0,  # weight of the KL term
      'reduction': 'sum',  # over the batch: 'sum' (official) | 'mean'; over pixels and latents always a sum
    }
  )
  config.optim = parts.optim(1e-4)
  config.train = parts.train(200_000, 128)
  config.prior = ConfigDict(
    {
      'kind': 'normal',  # 'normal' | 'gmm' (ex-post density estimation)
      'covariance': 'full',  # 'full' | 'diag' | 'tied'
      'num_components': (25, 50, 100),  # candidates; the best held-out log-likelihood wins
      'holdout_fraction': 0.1,
      'num_encoded': 50_000,  # most training images encoded for the fit
    }
  )
  config.sample = parts.sample()
  return config


def debug(stage: ConfigDict, image_size: int) -> None:
  stage.model.update(presets.tiny_vae(image_size))
  stage.prior.update({'num_components': (1, 2), 'num_encoded': 64})


def gmm(run: Run) -> None:
  """Ex-post density estimation: z from a Gaussian mixture fitted to the encoded training set."""
  run.edit('vae', lambda vae: vae.prior.update({'kind': 'gmm'}))


VARIANTS = {'gmm': gmm}
