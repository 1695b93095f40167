"""A light decoder, distilled from an autoencoder's (LDDGAN, thesis)."""

from ml_collections import ConfigDict

from configs import parts


def section() -> ConfigDict:
  """A decoder of 1 to 2 million parameters, taught by the autoencoder's."""
  config = ConfigDict()
  config.experiment = 'light_decoder'
  config.autoencoder = ConfigDict({'stage': 'autoencoder', 'workdir': ''})
  config.model = ConfigDict({'channels': 64, 'num_blocks': 4, 'dtype': 'float32'})
  config.loss = ConfigDict({'perceptual': 'lpips_vgg16', 'perceptual_weight': 1.0})
  config.optim = parts.optim(3e-4, schedule='cosine', ema_decay=0.999, ema_warmup=True)
  config.train = parts.train(100_000, 32, flip=True)
  config.sample = parts.sample(with_vae=False)
  return config


def debug(stage: ConfigDict, image_size: int) -> None:
  stage.model.update({'channels': 8, 'num_blocks': 1})
  stage.loss.perceptual = ''  # its weights are fetched


def reads(stage: ConfigDict) -> tuple[str, ...]:
  """The stages whose sections it needs."""
  return (stage.autoencoder.stage,)


VARIANTS = {}
