"""A control for a trained diffusion: ControlNet, Zhang et al. 2023 (arXiv:2302.05543).

Two stages can be trained of one refiner, `control` and `control_low`, and sampled together
(`config.control.sample.controls`).
"""

from ml_collections import ConfigDict

from configs import parts
from configs.run import Run
from configs.stages import diffusion

CONTROL, LOW = 'control', 'control_low'
STAGES = (CONTROL, LOW)
PUBLISHED = {'channels': (16, 16, 32, 32, 96, 96, 256), 'strides': (1, 1, 2, 1, 2, 1, 2)}
"""The encoder of the published control: of images 8 times as large as the latents."""


def section() -> ConfigDict:
  """What differs from the base: its network, space and conditions, and how it is sampled, are the base's."""
  config = ConfigDict()
  config.experiment = 'controlnet'
  config.base = ConfigDict({'stage': 'refiner', 'workdir': ''})  # of this run, or of another
  config.control = ConfigDict(
    {
      'kind': 'edges',  # what is followed: 'edges' of any channel (Sobel) | 'low_resolution'
      'least': 0.06,  # edges: change from a pixel to the next, of pixels in [0, 1], from which on it is one
      'channels': 1,  # edges: as the network reads them; 3 = three times the same, as the published one does
      'factor': 4,  # low_resolution: means of so many pixels a side
    }
  )
  config.hint = ConfigDict(
    {
      'channels': (16, 16, 32),  # of 3x3 convolutions; one that is zero at first follows
      'strides': (),  # as many, 1 or 2; () = the last ones halve, as often as the maps are smaller
    }
  )
  config.only_middle = False  # adds to the middle's map alone
  config.base_locked = True  # False = its way up is trained too
  config.caption_dropout = 0.5  # of the base's captions, where it drops some; 0 = as often as the base
  config.score_steps = 10  # of DDIM, of samples that each validation compares with their control; 0 = none
  config.optim = parts.optim(1e-5, weight_decay=0.01)
  config.train = parts.train(50_000, 128)
  config.sample = ConfigDict(
    {
      'control': (),  # files of control images, in turn; () = those of images of the evaluation split
      'strength': 1.0,  # of all that is added; 0 = the base
      'strengths': (),  # ... of each map, the middle's is the last; () = 1
      # ... by the map's depth: 'even' | 'decay', 0.825 to the number of maps below it | 'resolution', the
      # side of the first map over its own
      'depth': 'even',
      'branches': 'both',  # of guidance: the control is read in 'both' | 'conditional' alone
      'controls': (),  # ((stage, weight), ...): other controls of the same base, which are added
      'transfer': {  # another network in the base's place, such as a fine-tuned one or a student
        'stage': '',  # its stage; '' = none
        'workdir': '',  # ... of this other run; '' = this run
        'how': 'offset',  # the copy is changed by tuned - base, or 'as_is'
      },
    }
  )
  return config


def debug(stage: ConfigDict, image_size: int) -> None:
  stage.hint.update({'channels': (4, 4, 4), 'strides': ()})
  stage.score_steps = 2


def reads(stage: ConfigDict) -> tuple[str, ...]:
  """The stages whose sections it needs."""
  return (stage.base.stage,)


def small(stage: ConfigDict) -> None:
  """For networks of a million parameters, in pixels."""
  stage.optim.update(
    {'learning_rate': 3e-4, 'weight_decay': 0.0, 'clip_norm': 1.0, 'ema_decay': 0.995, 'ema_warmup': True}
  )
  stage.train = parts.train(
    2000, 64, save_every_steps=500, eval_every_steps=250, grid_every_steps=500, eval_images=256
  )


def control(run: Run) -> None:
  """After the refiner a control: samples follow the edges of an image."""
  diffusion.add_student(run, CONTROL)


def control_low(run: Run) -> None:
  """After the refiner a control of low-resolution images."""
  diffusion.add_student(run, LOW).control.kind = 'low_resolution'


VARIANTS = {CONTROL: control, LOW: control_low}
