"""DiffuseVAE on scikit-learn's 1,797 real 8x8 digits: the quickstart, no download.

    python -m vaediff.main --config=configs/digits.py

On 2 cores of a 2.5 GHz Xeon: 270 seconds. `fd_classifier` of 800 samples, mean and standard deviation over 3
seeds: VAE 23.4 +- 0.4, refined 7.11 +- 0.04; real images get 5.5. Mean squared error per pixel (pixels in [0,
1]) over the evaluation digits: 0.0173 for the VAE's reconstructions, 0.0354 for the refined ones.
Variants: configs/base.py.
"""

from configs import base, gan, presets


def get_config(variant: str = ''):
  config = base.default()
  config.name = 'digits'
  config.data.update({'name': 'digits', 'image_size': 8, 'channels': 1})

  config.vae.model.update(
    presets.vae(
      '8x1,8d2,8t4,4x1,4d4,4t1,1x1',
      '1x1,1u4,1t4,4x2,4u2,4t8,8x2',
      '8:32,4:64,1:16',
      16,
    )
  )
  config.vae.model.stem = 'dense'
  # With beta = 1 the 64 pixels do not pay for z: the posterior collapses. With 0.1 the aggregated posterior
  # is so far from any prior that the refiner is given images unlike those it was trained on.
  config.vae.loss.update({'reduction': 'mean', 'beta': 0.2})
  config.vae.optim.update({'learning_rate': 3e-3, 'schedule': 'cosine', 'ema_decay': 0.99})
  config.vae.train = base.train(
    1200, 64, save_every_steps=400, eval_every_steps=400, grid_every_steps=1200, eval_images=0
  )

  config.vae.prior.update({'kind': 'gmm', 'covariance': 'diag', 'num_components': (20, 40, 60)})

  config.refiner.model.update(
    {
      'channels': 32,
      'channel_multipliers': (1, 2),
      'num_res_blocks': 1,
      'attention_resolutions': (4,),
      'num_heads': 4,
      'dropout': 0.0,
    }
  )
  # v trains a small network in few steps better than eps, whose error is multiplied at high noise
  config.refiner.diffusion.update({'prediction': 'v', 'loss_weight': 'v'})
  config.refiner.optim.update(
    {
      'learning_rate': 1e-3,
      'schedule': 'cosine',
      'warmup_steps': 100,
      'ema_decay': 0.995,
      'ema_warmup': True,
    }
  )
  config.refiner.train = base.train(
    1600, 64, save_every_steps=400, eval_every_steps=400, grid_every_steps=1200, eval_images=0
  )
  config.refiner.sample.num_steps = 50
  config.reconstruct.num_images = 297  # the whole evaluation split
  config.evaluate.update(
    {
      'extractors': ('classifier', 'inception'),
      'num_images': 800,  # of 1,797: the floor can be taken at the same N
      'num_seeds': 3,
      'lpips': '',  # its networks were trained on photographs of 64 pixels and more
    }
  )
  config.classifier.train.num_steps = 1000
  # DDIM with 64 steps is as good as with 512 here
  config.distill.from_steps = 64
  config.distill.optim.learning_rate = 5e-4
  config.distill.train = base.train(
    600, 64, save_every_steps=300, eval_every_steps=300, grid_every_steps=0, eval_images=0
  )
  # from far pairs to near ones: in few updates near ones alone do not carry the data to high noise
  config.consistency.loss.update({'q': 2.0, 'double_every_steps': 400, 'level_mean': 0.0})
  config.consistency.optim.update({'learning_rate': 3e-4, 'ema_decay': 0.99, 'ema_warmup': True})
  config.consistency.train = base.train(
    2000, 64, save_every_steps=500, eval_every_steps=500, grid_every_steps=0, eval_images=0
  )
  config.adversarial.discriminator.channels = 64
  config.adversarial.optim.update({'learning_rate': 3e-4, 'ema_decay': 0.99, 'ema_warmup': True})
  config.adversarial.optim_discriminator.learning_rate = 6e-4
  config.adversarial.train = base.train(
    600, 64, save_every_steps=300, eval_every_steps=100, grid_every_steps=0, eval_images=0
  )
  config.matching.discriminator.channels = 64
  config.matching.optim.update({'learning_rate': 1e-4, 'ema_decay': 0.99, 'ema_warmup': True})
  config.matching.optim_fake.learning_rate = 3e-4
  config.matching.train = base.train(
    1500, 64, save_every_steps=500, eval_every_steps=250, grid_every_steps=0, eval_images=0
  )
  gan.small(config)
  config.autoencoder.model.channel_multipliers = (1, 2)
  config.autoencoder.loss.update({'perceptual': '', 'adversarial_weight': 0.0})
  config.decoder.loss.perceptual = ''
  config.ddgan.model.channel_multipliers = (1, 2)
  own = {'wavelet': gan.small_wavelet, 'latent': gan.small_latent, 'free': gan.small_free}
  return base.finish(config, variant, own)
