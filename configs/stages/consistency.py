"""Easy Consistency Tuning (arXiv:2406.14548), with the settings of its quickest run on CIFAR-10."""

from ml_collections import ConfigDict

from configs import parts
from configs.run import Run
from configs.stages import diffusion


def section() -> ConfigDict:
  """Easy Consistency Tuning (arXiv:2406.14548), with the settings of its quickest run on CIFAR-10."""
  config = ConfigDict()
  config.experiment = 'consistency'
  config.teacher = ConfigDict({'stage': 'refiner', 'workdir': ''})
  config.diffusion = ConfigDict({'prediction': 'v'})
  config.loss = ConfigDict(
    {
      # of log(sigma / alpha) of the times that are drawn; t = 1 is 5.1 for the linear schedule, 10 for cosine
      'level_mean': -1.1,
      'level_std': 2.0,
      'q': 256.0,  # the two levels of a pair differ by 1 / q of the larger, or more
      'double_every_steps': 0,  # after which q is q^2, q^3, ...; 0 = never
      'huber': 0.0,  # c of the pseudo-Huber distance; 0 = Euclidean
    }
  )
  config.optim = parts.optim(1e-4, ema_decay=0.9993)
  config.train = parts.train(8000, 128)
  # quadratic: with the linear schedule the second of two steps is at sigma / alpha = 0.8
  config.sample = ConfigDict({'sampler': 'renoise', 'num_steps': 2, 'grid': 'quadratic'})
  return config


def debug(stage: ConfigDict, image_size: int) -> None:
  """Nothing: it is as large as its teacher."""


def reads(stage: ConfigDict) -> tuple[str, ...]:
  """The stages whose sections it needs; a teacher that predicts eps is first distilled into one of v."""
  return stage.teacher.stage, 'distill'


def consistency(run: Run) -> None:
  """After the refiner its consistency tuning, sampled in 2 steps."""
  diffusion.add_student(run, 'consistency')


VARIANTS = {'consistency': consistency}
