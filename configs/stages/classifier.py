"""The small classifier whose features `fd_classifier` compares; trained once per data set, not per run."""

from ml_collections import ConfigDict

from configs import parts


def section() -> ConfigDict:
  config = ConfigDict()
  config.experiment = 'classifier'
  config.model = ConfigDict(
    {'num_classes': 0, 'channels': 32, 'num_features': 64, 'dropout': 0.2, 'dtype': 'float32'}
  )
  config.optim = parts.optim(2e-3, schedule='cosine', weight_decay=1e-4, ema_decay=0.99, ema_warmup=True)
  config.train = parts.train(
    2000, 128, log_every_steps=500, eval_every_steps=2000, save_every_steps=1000, grid_every_steps=0,
    eval_images=0, keep_checkpoints=1,
  )  # fmt: skip
  config.sample = ConfigDict({'checkpoint': 'latest', 'num_images': 1, 'batch_size': 64, 'seed': 0})
  return config


def debug(stage: ConfigDict, image_size: int) -> None:
  stage.model.update({'channels': 8, 'num_features': 8})
  stage.train.update({'num_steps': 4, 'batch_size': 8, 'log_every_steps': 2, 'eval_every_steps': 4})


VARIANTS = {}
