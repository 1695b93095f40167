"""LADD (arXiv:2403.12015): adversarial distillation in the features of the teacher."""

from ml_collections import ConfigDict

from configs import parts
from configs.run import Run
from configs.stages import diffusion


def section() -> ConfigDict:
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
      'renoise_mean': 1.0,  # of log(sigma / alpha) of what the heads judge; above 0 = high noise
      'renoise_side': 128,  # ... of maps of LADD's side; of others + log(side / this); 0 = of all the same
      'renoise_std': 1.0,
    }
  )
  config.optim = parts.optim(5e-5, b1=0.5, clip_norm=1.0, ema_decay=0.999)
  config.optim_discriminator = parts.optim(1e-4, b1=0.5)
  config.train = parts.train(20_000, 128)
  config.sample = ConfigDict({'sampler': 'renoise', 'num_steps': 2})  # 'renoise' | 'ddim'
  return config


def debug(stage: ConfigDict, image_size: int) -> None:
  stage.discriminator.channels = 8
  stage.teacher_calls = 2


def reads(stage: ConfigDict) -> tuple[str, ...]:
  """The stages whose sections it needs; a teacher that predicts eps is first distilled into one of v."""
  return stage.teacher.stage, 'distill'


def adversarial(run: Run) -> None:
  """After the refiner its adversarial distillation, sampled in 2 steps."""
  diffusion.add_student(run, 'adversarial')


VARIANTS = {'adversarial': adversarial}
