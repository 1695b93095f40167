"""Sections that every stage has: how it is optimised, how long it trains, how it is sampled."""

from ml_collections import ConfigDict


def optim(learning_rate: float, **changes) -> ConfigDict:
  """Adam with warm-up, clipping and an exponential moving average of the parameters."""
  config = ConfigDict(
    {
      'learning_rate': learning_rate,
      'schedule': 'constant',  # after warm-up: 'constant' | 'cosine' | 'linear' (to the end at the last step)
      'end_learning_rate': 0.0,  # of 'cosine' and 'linear'
      'warmup_steps': 0,  # linear from 0
      'b1': 0.9,
      'b2': 0.999,
      'eps': 1e-8,
      'weight_decay': 0.0,  # decoupled (AdamW)
      'clip_norm': 0.0,  # global gradient norm; 0 = off
      'ema_decay': 0.0,  # 0 = no average is kept, the parameters themselves are used
      'ema_warmup': False,  # decay = min(ema_decay, (1 + step) / (10 + step))
    }
  ).lock()
  config.update(changes)
  return config


def train(num_steps: int, batch_size: int, **changes) -> ConfigDict:
  """How long a stage trains and how often it reports; all durations in optimizer steps."""
  config = ConfigDict(
    {
      'num_steps': num_steps,
      'batch_size': batch_size,  # images per step over all devices
      'microbatches': 1,  # parts that a batch is split into, one after the other, to save memory
      'flip': False,  # random horizontal flips of image and condition together
      'log_every_steps': 100,
      'save_every_steps': 5000,
      'eval_every_steps': 5000,
      'grid_every_steps': 10000,  # sample grids; 0 = none
      'grid_images': 16,
      'eval_images': 2048,  # most images of the evaluation split; 0 = all
      'keep_checkpoints': 2,
      'on_bad_step': 'stop',  # not finite, or a jump: 'stop' | 'skip' the update and count it
      'spike_factor': 0.0,  # a loss above this many times its running mean is a jump; 0 = never
      'profile_steps': (),  # (first, last): traced for TensorBoard's profile plugin; () = none
      'best_measure': '',  # keep the best checkpoint by it: 'fd_mobilenetv2', 'val/loss', ...; '' = off
      'best_every_steps': 10_000,  # how often it is measured
      'best_images': 1000,  # samples that it is measured on
    }
  ).lock()
  config.update(changes)
  return config


def sample(**more) -> ConfigDict:
  """How many images are drawn, and where they go; `more` are the keys of one experiment."""
  return ConfigDict(
    {
      'checkpoint': 'latest',  # 'latest' | 'best' | a step that is kept, as '8000'
      'num_images': 64,
      'batch_size': 64,  # images in memory at a time, over all devices
      'seed': 0,
      'save_npz': False,
      'save_images': False,  # one PNG per image, <workdir>/samples/<index>.png
      **more,
    }
  )
