"""Progressive distillation: Salimans & Ho 2022 (arXiv:2202.00512), settings of its code for CIFAR-10."""

from ml_collections import ConfigDict

from configs import parts
from configs.run import Run
from configs.stages import diffusion


def section() -> ConfigDict:
  """Halvings of the number of DDIM steps."""
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
  # to 0 at each end, which replaces an average
  config.optim = parts.optim(5e-5, schedule='linear', clip_norm=1.0)
  config.train = parts.train(50_000, 128)
  config.sample = ConfigDict()
  return config


def debug(stage: ConfigDict, image_size: int) -> None:
  stage.update({'from_steps': 4, 'to_steps': 1})  # two halvings


def reads(stage: ConfigDict) -> tuple[str, ...]:
  """The stages whose sections it needs."""
  return (stage.teacher.stage,)


def distill(run: Run) -> None:
  """After the refiner its progressive distillation; of a guided refiner into students of the weight."""
  student = diffusion.add_student(run, 'distill')
  refiner = run.section('refiner')
  student.guided = refiner.diffusion.condition_dropout > 0 or refiner.sample.guidance_weight > 0


VARIANTS = {'distill': distill}
