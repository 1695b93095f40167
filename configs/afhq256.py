"""DiffuseVAE on AFHQ dogs, 256x256.

    python -m vaediff.main --config=configs/afhq256.py

Data: an image folder, `--config.data.path=.../afhq/train/dog`. Settings of the official code
(arXiv:2201.00308). The last twentieth of the images is held out for evaluation.

Hardware, hours and figures: not yet measured.
"""

from configs import base, presets


def get_config(variant: str = ''):
  config = base.default()
  config.name = 'afhq256'
  config.data.update(
    {
      'source': 'image_folder',
      'name': 'afhq_dog',
      'image_size': 256,
      'train_split': 'train[:95%]',
      'eval_split': 'train[95%:]',
      'resize': 'bilinear',
    }
  )
  config.vae.model.update(presets.VAE['afhq256'])
  config.vae.train = base.train(74_000, 32, flip=True)
  config.refiner.model.update({'channel_multipliers': (1, 1, 2, 2, 4, 4), 'attention_resolutions': (16,)})
  config.refiner.optim.learning_rate = 2e-5
  config.refiner.train = base.train(200_000, 64, flip=True)
  config.refiner.sample.update({'variance': 'small', 'batch_size': 16})
  return base.finish(config, variant)
