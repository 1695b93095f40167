"""The stages of distillation and their defaults. A teacher is named; its network and VAE are taken over.

Progressive distillation: Salimans & Ho 2022 (arXiv:2202.00512), with the settings of its code for CIFAR-10.
"""

from ml_collections import ConfigDict


def progressive_stage(optim, train) -> ConfigDict:
  """Halvings of the number of DDIM steps. `optim` and `train` make those sections."""
  config = ConfigDict()
  config.experiment = 'progressive'
  config.teacher = ConfigDict({'stage': 'refiner', 'workdir': ''})  # of this run, or of another
  config.from_steps = 512  # the first teacher's; one stage for each halving: distill_256, ..., distill_1
  config.to_steps = 1
  config.guided = False  # first a stage whose student reads the guidance weight
  config.guidance_weights = (0.0, 4.0)  # guided: weights are drawn between these
  config.data_free_fraction = 0.0  # of a batch: x0_vae from the prior, y from the student itself
  config.data_free_calls = 4  # ... in at most this many calls
  config.last_train_steps = 0  # updates of the students of 2 and 1 steps; 0 = train.num_steps
  config.diffusion = ConfigDict(
    {
      'prediction': 'v',  # of the students: 'v' | 'x0'
      'loss_weight': 'truncated_snr',
    }
  )
  config.optim = optim(5e-5, schedule='linear', clip_norm=1.0)  # to 0 at each end, which replaces an average
  config.train = train(50_000, 128)
  config.sample = ConfigDict()
  return config


def consistency_stage(optim, train) -> ConfigDict:
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
  config.optim = optim(1e-4, ema_decay=0.9993)
  config.train = train(8000, 128)
  # quadratic: with the linear schedule the second of two steps is at sigma / alpha = 0.8
  config.sample = ConfigDict({'sampler': 'renoise', 'num_steps': 2, 'grid': 'quadratic'})
  return config


def adversarial_stage(optim, train) -> ConfigDict:
  """LADD (arXiv:2403.12015): heads on the frozen teacher's encoder, and the teacher's images beside them."""
  config = ConfigDict()
  config.experiment = 'adversarial_distillation'
  config.teacher = ConfigDict({'stage': 'refiner', 'workdir': ''})
  config.teacher_calls = 4  # of its DDIM from the student's time to x0*, the target of the distillation loss
  config.start_probabilities = ()  # of the student's times from t = 1 on; () = equal
  # LADD, 4 steps: (0, 0, 0.5, 0.5) for 500 updates, then (0.7, 0.1, 0.1, 0.1)
  config.warmup = ConfigDict({'num_steps': 0, 'start_probabilities': ()})  # ... in the first updates
  config.diffusion = ConfigDict({'loss_weight': 'truncated_snr'})  # of the distillation loss
  config.discriminator = ConfigDict({'channels': 256, 'dtype': 'float32'})
  config.loss = ConfigDict(
    {
      'adversarial_weight': 1.0,
      'distillation_weight': 1.0,  # of |x0_hat - x0*|^2, mean over pixels; 0 = none
      'r1_gamma': 1e-5,  # of R1 on the heads' inputs; 0 = none
      'renoise_mean': 1.0,  # of logit(t') of the times at which images are judged; above 0 = high noise
      'renoise_std': 1.0,
    }
  )
  config.optim = optim(5e-5, b1=0.5, clip_norm=1.0, ema_decay=0.999)
  config.optim_discriminator = optim(1e-4, b1=0.5)
  config.train = train(20_000, 128)
  config.sample = ConfigDict({'sampler': 'renoise', 'num_steps': 2})  # 'renoise' | 'ddim'
  return config


def matching_stage(optim, train) -> ConfigDict:
  """DMD2 (arXiv:2405.14867), with the weights and the ratio of updates of its code for ImageNet 64."""
  config = ConfigDict()
  config.experiment = 'distribution_matching'
  config.teacher = ConfigDict({'stage': 'refiner', 'workdir': ''})
  config.start_stage = ''  # of this run, whose student it goes on from; '' = the teacher
  config.teacher_calls = 4  # of its DDIM from the student's time to what val/loss compares with
  config.start_probabilities = ()  # of the student's times from t = 1 on; () = equal
  config.fake_updates = 5  # updates of the fake denoiser for one of the student
  config.diffusion = ConfigDict({'loss_weight': 'v'})  # of the fake denoiser's loss, and of val/loss
  config.discriminator = ConfigDict({'channels': 256, 'dtype': 'float32'})
  config.loss = ConfigDict(
    {
      'min_time': 0.02,  # of the times at which the two denoisers are compared
      'max_time': 0.98,
      'adversarial_weight': 3e-3,  # in the student's loss; 0 = no discriminator
      'fake_adversarial_weight': 1e-2,  # in the fake denoiser's
    }
  )
  config.optim = optim(5e-5, clip_norm=10.0, ema_decay=0.999)  # the student's
  config.optim_fake = optim(5e-5, clip_norm=10.0)
  config.train = train(100_000, 128)
  config.sample = ConfigDict({'sampler': 'renoise', 'num_steps': 2})
  return config


# Variants ------------------------------------------------------------------------------------------


def _add(config: ConfigDict, stage: str) -> None:
  """Appends a stage that sees the images as the refiner does."""
  config.stages = (*config.stages, stage)
  for field in ('batch_size', 'microbatches', 'flip'):
    config[stage].train[field] = config.refiner.train[field]


def distill(config: ConfigDict) -> None:
  """After the refiner its progressive distillation; of a guided refiner into students of the weight."""
  _add(config, 'distill')
  config.distill.guided = config.refiner.diffusion.condition_dropout > 0


def consistency(config: ConfigDict) -> None:
  """After the refiner its consistency tuning, sampled in 2 steps."""
  _add(config, 'consistency')


def adversarial(config: ConfigDict) -> None:
  """After the refiner its adversarial distillation, sampled in 2 steps."""
  _add(config, 'adversarial')


def matching(config: ConfigDict) -> None:
  """Distribution matching in 2 steps, from the refiner or, after `adversarial`, from its student."""
  if 'adversarial' in config.stages:
    config.matching.start_stage = 'adversarial'
  _add(config, 'matching')


VARIANTS = {
  'distill': distill,
  'consistency': consistency,
  'adversarial': adversarial,
  'matching': matching,
}


def debug(config: ConfigDict) -> None:
  """Two halvings; narrow heads."""
  config.distill.update({'from_steps': 4, 'to_steps': 1})
  config.adversarial.discriminator.channels = config.matching.discriminator.channels = 8
  config.matching.fake_updates = 2
  config.adversarial.teacher_calls = 2
