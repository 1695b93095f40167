"""The diffusion U-Net: stage 2 of DiffuseVAE (arXiv:2201.00308), in any space, on any conditions."""

from ml_collections import ConfigDict, config_dict

from configs import parts
from configs.run import Run
from configs.stages import prior


def section() -> ConfigDict:
  """The refiner of a VAE's image, with DiffuseVAE's common settings."""
  config = ConfigDict()
  config.experiment = 'diffusion'
  config.space = 'pixel'  # where it is diffused: 'pixel' | 'wavelet' | 'latent'
  config.space_factor = 1  # 'pixel': the sides of the data over those of the stage's own images
  config.autoencoder = ConfigDict(
    {
      'stage': 'autoencoder',  # space = latent: the frozen autoencoder, this stage ...
      'workdir': '',  # ... of this other run; '' = this run
      'scaling': 'std',  # 'std' | 'max' | 'tanh': see vaediff/spaces/latents.py
      'posterior': 'sample',  # of a KL bottleneck: 'sample' | 'mean'
      'decoder_stage': '',  # the stage of a light decoder to sample with; '' = the autoencoder's own
    }
  )
  config.vae = ConfigDict(
    {
      'stage': 'vae',  # the frozen VAE: this stage ...
      'workdir': '',  # ... of this other run; '' = this run
    }
  )
  config.start = ConfigDict(
    {
      'stage': 'refiner',  # a diffusion of the same settings, which training begins as: this stage ...
      'workdir': '',  # ... of this other run; '' = training begins fresh
    }
  )
  config.conditions = ConfigDict(  # further ones, by name: a section each
    {
      'vae': {
        'aug_level': 0.0,  # x0_vae is noised: each example has a level in [0, aug_level] in training; 0 = off
      },
    }
  )
  config.model = _unet()
  config.diffusion = ConfigDict(
    {
      # tables of 1000 steps: 'linear' (betas 1e-4 .. 0.02) | 'sqrt_linear' (latent diffusion's, 0.0015 ..
      # 0.0195) | 'iddpm_cosine'; continuous: 'cosine'
      'schedule': 'linear',
      'prediction': 'eps',  # 'eps' | 'x0' | 'v'
      'loss_weight': 'snr',  # of the squared error of x0: 'constant' | 'snr' (plain eps loss) | ...
      'condition': 'formulation1',  # 'none' | 'formulation1' | 'formulation2'
      # of a VAE's code the U-Net reads: False, nothing | True, z | 'pca', its leading directions
      'z_conditioning': config_dict.FieldReference(False, field_type=object),
      'pca': {
        'num_directions': 0,  # that are read; 0 = those that have enough signal
        'min_signal': 0.1,  # ... more than this share of their variance, of what is encoded
        'floor': 0.01,  # added to each variance, times the largest
      },
      'condition_dropout': 0.0,  # probability, per example, of the learned null of x0_vae and of z or its PCA
      'x0_vae_source': 'sample',  # 'sample' | 'mean' of q(z | x) at each step | 'precomputed'
      'variance': 'fixed',  # of the steps: 'fixed' | 'learned', by as many channels more of the network
    }
  )
  config.loss = ConfigDict(
    {
      'objective': 'hybrid',  # of a learned variance: 'hybrid', the bound beside the denoising loss | 'bound'
      'vlb_weight': 0.001,  # hybrid: of the bound, in bits per dimension
      'time_sampler': 'uniform',  # 'uniform' | bound: 'loss_second_moment', importance sampling
      'perceptual': '',  # of x0_hat, beside the rest: 'lpips_vgg16' | 'lpips_alexnet' | '' = none
      'perceptual_weight': 0.0,
    }
  )
  config.optim = parts.optim(2e-4, warmup_steps=5000, clip_norm=1.0, ema_decay=0.9999)
  config.train = parts.train(500_000, 128)
  config.sample = parts.sample(
    # 'ddpm' | 'ddim' | 'heun' | 'dpmpp_2m' | 'euler_maruyama' | for students 'renoise' | 'there_and_back'
    sampler='ddim',
    num_steps=50,
    # of times: 'uniform' | 'quadratic' | 'karras' | 'both_ends' (Improved DDPM's); to repeat published
    # figures, from below t = 1: 'leading' | 'published_uniform' | 'published_quadratic'
    grid='uniform',
    eta=0.0,  # ddim: 0 = deterministic, 1 = ancestral
    recompute_eps=True,  # ddim: eps after clipping is that of the clipped x0_hat; False: the network's own
    variance='large',  # ddpm, and the bound: 'small' | 'large' | 'learned'
    bound_steps=0,  # the variational bound is that of so many steps of the grid; 0 = of the whole table
    temperature=1.0,  # standard deviation of the starting noise, of pictures and figures; students have 1
    guidance_weight=0.0,  # classifier-free guidance, all conditions dropped; 0 = conditional network only
    guidance=(),  # ((condition, weight), ...): each one more term, that condition alone dropped
    captions=(),  # to draw, in turn; () = those of the evaluation split; with the condition `text`
    rerank={  # of several samples of each image the one that fits its caption best is kept
      'stage': '',  # the CLIP stage that says so; '' = one sample
      'workdir': '',  # ... of this other run; '' = this run
      'candidates': 16,  # samples of each image
    },
    labels=(),  # classes to draw, in turn: numbers or names, as 3,7; () = all; with the condition `label`
    guidance_interval=(),  # (low, high): guided where low < sigma / alpha <= high; () = everywhere
    guide={  # a weaker network of the same inputs, for the term ('guide', weight) of `guidance`
      'stage': '',  # its stage; '' = none
      'workdir': '',  # ... of this other run; '' = this run
      'step': 0,  # of its checkpoint; 0 = the latest
    },
    classifier={  # a classifier of noisy states that guides to the class
      'stage': '',  # its stage; '' = none
      'workdir': '',  # ... of this other run; '' = this run
      'scale': 1.0,  # of its gradient; 1 = Bayes' rule
    },
    t_start=1.0,  # below 1: start from x0_vae noised to this time
    clip='static',  # of x0_hat: 'static' to the space's bound | 'dynamic' | 'none', as for latents
    threshold_percentile=99.5,  # dynamic thresholding, in percent
    aug_level=0.0,  # of the noise on x0_vae or the low-resolution image; at most that of training
    with_vae=True,  # show the VAE sample beside each refined one
  )
  return config


def _unet() -> ConfigDict:
  return ConfigDict(
    {
      'variant': 'openai',  # 'openai' | 'ddim'
      'channels': 128,
      'channel_multipliers': (1, 2, 2, 2),
      'num_res_blocks': 2,
      'attention_resolutions': (16,),  # in pixels of the space's maps
      'num_heads': 8,
      'dropout': 0.1,
      'head_channels': 0,  # of each attention head, in place of num_heads; 0 = by num_heads
      'scale_shift_norm': False,
      'resblock_updown': False,  # residual blocks halve and double maps, as in ADM
      'coordinates': False,  # the first map reads where each pixel is
      'guidance_embedding': False,  # the guidance weight is an input: students of guided teachers
      'remat': False,  # recompute activations in the backward pass
      'dtype': 'float32',  # of the computation: 'float32' | 'bfloat16'
    }
  )


def debug(stage: ConfigDict, image_size: int) -> None:
  stage.model.update(
    {
      'channels': 8,
      'channel_multipliers': (1, 2),
      'num_res_blocks': 1,
      'attention_resolutions': (image_size // 2,),  # occurs in all three spaces
      'num_heads': 2,
      'head_channels': 0,
    }
  )
  if 'text' in stage.conditions:
    stage.conditions.text.update({'width': 8, 'num_layers': 1, 'num_heads': 2})
  if 'clip_image' in stage.conditions:
    stage.conditions.clip_image.width = 8
  if stage.diffusion.z_conditioning == 'pca':
    stage.diffusion.pca.min_signal = 0.0  # a few updates make no more
  stage.sample.num_steps = 4
  stage.optim.warmup_steps = 2


def reads(stage: ConfigDict) -> tuple[str, ...]:
  """The stages whose sections it needs."""
  needed = (stage.vae.stage,) if _reads_vae(stage) else ()
  if stage.space == 'latent':
    needed += tuple(filter(None, (stage.autoencoder.stage, stage.autoencoder.decoder_stage)))
  for named in (stage.sample.guide, stage.sample.classifier):
    needed += (named.stage,) if named.stage and not named.workdir else ()
  for condition in stage.conditions.values():
    needed += tuple(condition[field] for field in ('stage', 'prior_stage') if condition.get(field, ''))
  return needed


def _reads_vae(stage: ConfigDict) -> bool:
  return stage.diffusion.condition != 'none' or bool(stage.diffusion.z_conditioning)


def arrange(run: Run, *, vae: bool) -> None:
  """Makes the run the refiner's: before it what its space reads, a VAE or none; after it what reads it."""
  students = tuple(stage for stage in run.config.stages if {'teacher', 'base'} & set(run.section(stage)))
  refiner = run.section('refiner')
  before = ()
  if refiner.space == 'latent':
    before = tuple(filter(None, ('autoencoder', refiner.autoencoder.decoder_stage)))
  classifier = refiner.sample.classifier
  before += ('vae',) if vae else ()
  before += (classifier.stage,) if classifier.stage and not classifier.workdir else ()
  run.only(*before, 'refiner', *students)


def add_student(run: Run, stage: str) -> ConfigDict:
  """Appends a stage that sees the images as the refiner does; returns its section."""
  student, refiner = run.add(stage), run.section('refiner')
  for field in ('batch_size', 'microbatches', 'flip'):
    student.train[field] = refiner.train[field]
  return student


def fit(run: Run) -> None:
  """Of the U-Net's levels keeps those down to 4 pixels, and attention where there are maps of its sides."""
  if 'refiner' not in run.config.stages:
    return
  refiner, side = run.section('refiner'), run.config.data.image_size
  if refiner.space == 'latent':
    side //= 2 ** (len(run.section('autoencoder').model.channel_multipliers) - 1)
    if _reads_vae(refiner) and 'vae' not in run.config.stages:
      arrange(run, vae=True)
  elif refiner.space == 'wavelet':
    side //= 2
  fit_levels(refiner.model, side)


def fit_levels(model: ConfigDict, side: int) -> None:
  """Of a U-Net's levels keeps those down to 4 pixels, for maps of a side, and attention that occurs."""
  halvings = range(len(model.channel_multipliers))
  sides = [side >> level for level in halvings if level < 2 or side >> level >= 4]
  model.channel_multipliers = model.channel_multipliers[: len(sides)]
  if model.attention_resolutions:
    kept = tuple(wanted for wanted in model.attention_resolutions if wanted in sides)
    model.attention_resolutions = kept or tuple(sorted(size for size in sides if size <= 16)[-1:])


# Variants ------------------------------------------------------------------------------------------


def unconditional(run: Run) -> None:
  """The DDPM baseline: no VAE."""
  run.section('refiner').diffusion.update({'condition': 'none', 'z_conditioning': False})
  arrange(run, vae=False)


def formulation1(run: Run) -> None:
  run.edit('refiner', lambda refiner: refiner.diffusion.update({'condition': 'formulation1'}))


def formulation2(run: Run) -> None:
  run.edit('refiner', lambda refiner: refiner.diffusion.update({'condition': 'formulation2'}))


def _z(refiner: ConfigDict) -> None:
  refiner.diffusion.z_conditioning = True
  refiner.model.scale_shift_norm = True


def z(run: Run) -> None:
  """The U-Net also reads the latent code, with scale-shift normalisation as in the official code."""
  run.edit('refiner', _z)


def _pca(refiner: ConfigDict) -> None:
  refiner.diffusion.z_conditioning = 'pca'
  refiner.model.scale_shift_norm = True


def pca(run: Run) -> None:
  """The U-Net also reads the latent code along its principal directions, in deviations."""
  run.edit('refiner', _pca)


def _guided(refiner: ConfigDict) -> None:
  if _reads_vae(refiner):
    refiner.diffusion.condition_dropout = 0.1
  refiner.sample.guidance_weight = 0.5


def guided(run: Run) -> None:
  """Trained with condition dropout, sampled with classifier-free guidance."""
  run.edit('refiner', _guided)
  run.at_end(_drop_what_there_is)


def _drop_what_there_is(run: Run) -> None:
  """Without a VAE its dropout is 0 where another condition, such as the label, has its own."""
  refiner = run.section('refiner')
  if not _reads_vae(refiner) and len(refiner.conditions):
    refiner.diffusion.condition_dropout = 0.0


def _learned_variance(refiner: ConfigDict) -> None:
  refiner.diffusion.variance = 'learned'
  if refiner.diffusion.schedule == 'cosine':
    refiner.diffusion.schedule = 'iddpm_cosine'  # a bound is a sum over a table
  refiner.sample.update({'sampler': 'ddpm', 'variance': 'learned', 'grid': 'both_ends'})


def learned_variance(run: Run) -> None:
  """Improved DDPM: the network says the variance of each step, which the bound beside its loss trains."""
  run.edit('refiner', _learned_variance)


def _label(stage: ConfigDict) -> None:
  with stage.conditions.unlocked():
    stage.conditions.label = ConfigDict({'dropout': 0.1})  # probability, per example, of the learned null


def label(run: Run) -> None:
  """The U-Net also reads the class of the image; a token prior does in its place, where there is one.

  Raises:
    ValueError: the data set has no classes, or it is not known how many.
  """
  run.need_classes('label')
  run.edit(prior.STAGE if prior.STAGE in run.config.stages else 'refiner', _label)


def _restoration(refiner: ConfigDict) -> None:
  with refiner.conditions.unlocked():
    refiner.conditions.degraded = ConfigDict(
      {
        'task': 'inpaint',  # what is learned: 'super_resolution' | 'inpaint' | 'colourise' | 'denoise'
        'factor': 2,  # super_resolution: box-downsampled by this factor
        'noise_std': 0.2,  # denoise: standard deviation, in units of the range [-1, 1]
        'hole_fraction': 0.5,  # inpaint: side of the square hole over the side of the image
        'hole': 'center',  # inpaint: 'center' | 'random', at another place of each image
        'dropout': 0.0,  # probability, per example, of the learned null
      }
    )


def restoration(run: Run) -> None:
  """The U-Net reads a degraded image, and no VAE: it learns to restore (VAEDM, appendix D)."""
  unconditional(run)
  run.edit('refiner', _restoration)


def latent_diffusion(run: Run) -> None:
  """Diffusion in the latents of an autoencoder, scaled to unit deviation, on what the refiner reads."""
  refiner = run.section('refiner')
  refiner.space = 'latent'
  refiner.sample.clip = 'none'  # unit deviation has no bound
  arrange(run, vae=_reads_vae(refiner))
  run.at_end(fit)


def published_latent_diffusion(run: Run, model: dict) -> None:
  """The same with a published network, whose levels are not cut, and latent diffusion's betas."""
  latent_diffusion(run)
  run.section('refiner').diffusion.schedule = 'sqrt_linear'
  run.at_end(lambda run: run.section('refiner').model.update(model))


def wavelet_diffusion(run: Run) -> None:
  """Diffusion of the Haar wavelets: maps of half the side and four times the channels."""
  refiner = run.section('refiner')
  refiner.space = 'wavelet'
  refiner.sample.clip = 'static'
  arrange(run, vae=_reads_vae(refiner))
  run.at_end(fit)


VARIANTS = {
  'unconditional': unconditional,
  'formulation1': formulation1,
  'formulation2': formulation2,
  'z': z,
  'pca': pca,
  'guided': guided,
  'learned_variance': learned_variance,
  'label': label,
  'restoration': restoration,
  'latent_diffusion': latent_diffusion,
  'wavelet_diffusion': wavelet_diffusion,
}
