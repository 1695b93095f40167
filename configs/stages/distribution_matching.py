"""DMD2 (arXiv:2405.14867): distribution matching."""

from ml_collections import ConfigDict

from configs import parts
from configs.run import Run
from configs.stages import diffusion


def section() -> ConfigDict:
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
  config.optim = parts.optim(5e-5, clip_norm=10.0, ema_decay=0.999)  # the student's
  config.optim_fake = parts.optim(5e-5, clip_norm=10.0)
  config.train = parts.train(100_000, 128)
  config.sample = ConfigDict({'sampler': 'renoise', 'num_steps': 2})
  return config


def debug(stage: ConfigDict, image_size: int) -> None:
  stage.discriminator.channels = 8
  stage.fake_updates = 2


def reads(stage: ConfigDict) -> tuple[str, ...]:
  """The stages whose sections it needs; a teacher that predicts eps is first distilled into one of v."""
  return stage.teacher.stage, 'distill'


def matching(run: Run) -> None:
  """Distribution matching in 2 steps, from the refiner or, after `adversarial`, from its student."""
  student = diffusion.add_student(run, 'matching')
  if 'adversarial' in run.config.stages:
    student.start_stage = 'adversarial'


VARIANTS = {'matching': matching}
