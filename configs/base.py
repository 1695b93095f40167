"""Every key that any code reads, declared once, with its unit.

A config file calls `default()`, edits what differs, and ends with `finish(config, variant, VARIANTS)`.
Types come from these defaults: a wrong type or an unknown key fails at once.
"""

from ml_collections import ConfigDict

from configs import distill, gan, presets
from configs.variants import VARIANTS, Variants


def default() -> ConfigDict:
  """The stages `vae` and `refiner` with DiffuseVAE's common settings (arXiv:2201.00308)."""
  config = ConfigDict()
  config.name = ''  # run folder: runs/<name>; variants are appended
  config.stages = ('vae', 'refiner')  # trained in this order by the one loop
  config.seed = 0  # of initialisation, data order and training noise
  config.data = data()
  config.mesh = ConfigDict(
    {
      'data': -1,  # devices that split the batch only; -1 = the rest
      'fsdp': 1,  # devices that split the batch and the state
      'rules': (),  # ((regex, spec), ...) over paths of the state, before the last resort; sharding.rules_of
    }
  )
  config.processes = ConfigDict(
    {
      'join_timeout_seconds': 300,  # for the processes of a job to find each other
      'heartbeat_timeout_seconds': 100,  # after which a silent process is taken for dead
      'silence_timeout_seconds': 3600.0,  # longest time without the end of a step, compilation too; 0 = off
    }
  )
  config.vae = vae_stage()
  config.refiner = refiner_stage()
  config.autoencoder = gan.autoencoder_stage(optim, train)
  config.decoder = gan.light_decoder_stage(optim, train)
  config.ddgan = gan.ddgan_stage(optim, train)
  config.distill = distill.progressive_stage(optim, train)
  config.consistency = distill.consistency_stage(optim, train)
  config.adversarial = distill.adversarial_stage(optim, train)
  config.matching = distill.matching_stage(optim, train)
  config.reconstruct = ConfigDict(
    {
      'num_images': 64,  # images of the evaluation split; the grid shows the first 32
      'posterior': 'mean',  # 'mean' | 'sample': which z of q(z | x)
    }
  )
  config.interpolate = ConfigDict(
    {
      'num_points': 9,  # images in a row, both ends included
      'num_rows': 2,  # rows of each kind
      'from_label': 0,  # attribute direction: mean z of to_label minus mean z of from_label
      'to_label': 1,
      'num_encoded': 1024,  # most images encoded for the class means
    }
  )
  config.restore = ConfigDict(
    {
      'task': 'super_resolution',  # 'super_resolution' | 'denoise' | 'inpaint'
      'num_images': 16,
      'factor': 2,  # super_resolution: box-downsampled by this factor
      'noise_std': 0.2,  # denoise: standard deviation, in units of the range [-1, 1]
      'hole_fraction': 0.5,  # inpaint: side of the square hole over the side of the image
    }
  )
  config.evaluate = evaluate()
  config.classifier = classifier_stage()
  config.compile = ConfigDict(
    {
      'topology': 'v5e:4x4',  # of --mode=compile: <chip>:<shape of the slice>, joined by commas
      'effort': -1.0,  # of the compiler, -1 (quick) .. 1 (thorough)
    }
  )
  config.benchmark = ConfigDict(
    {
      'num_repeats': 10,  # timed repetitions of each measurement; medians are reported
      'sample_batch_size': 100,  # denoising GANs: images per timed batch, over all devices
      'num_warmups': 10,  # ... batches before the first that is timed
      'num_sample_repeats': 30,  # ... timed batches
      'matmul_size': 2048,  # side of the square matrices that measure the device's peak
    }
  )
  return config


def data() -> ConfigDict:
  """Where pixels come from and how they are cropped and resized; read by `vaediff.data`."""
  return ConfigDict(
    {
      'source': 'tfds',  # 'tfds' | 'idx' | 'image_folder' | 'npz' | 'synthetic'
      'name': '',  # TFDS name with its config, as 'celeb_a_hq/256'
      'path': '',  # folder or file for idx, image_folder, npz and noto_emoji
      'data_dir': '',  # '' = $TFDS_DATA_DIR or ~/tensorflow_datasets; also holds the array cache
      'train_split': 'train',
      'eval_split': 'test',
      'image_size': 32,  # pixels, height = width
      'channels': 3,
      'crop': 'none',  # 'none' | 'center'
      'crop_size': 0,  # pixels; 0 = the shorter side
      'resize': 'none',  # 'none' | 'pad' | 'nearest' | 'bilinear' | 'bicubic' | 'lanczos' | 'box'
      'materialize': True,  # store once as memory-mapped uint8 arrays
      'num_threads': 2,  # reading threads per process
      'prefetch': 4,  # batches read ahead per process
    }
  )


def evaluate() -> ConfigDict:
  """What `--mode=evaluate` measures, on how many images; read by `vaediff.evaluation`."""
  return ConfigDict(
    {
      'name': '',  # of the files in <workdir>/evaluation; '' = <stage>-<sampler>-<num_steps>
      # feature networks: 'inception' (FID, IS, KID), 'mobilenetv2', 'vgg16', 'classifier' (own, needs labels)
      'extractors': ('inception', 'mobilenetv2'),
      'inception_weights': '',  # the published .pth file, or the safetensors file that `prepare` makes of it
      'inception_resize': 'pytorch',  # 'pytorch' (half-pixel centres) | 'tf1' (as in the original graph)
      'weights_dir': '',  # '' = $VAEDIFF_WEIGHTS or ~/.cache/vaediff/weights
      'num_images': 10_000,  # samples per seed
      'num_seeds': 1,  # seeds sample.seed, sample.seed + 1, ...; the table shows mean and spread over them
      'num_reconstructions': 10_000,  # most images of the evaluation split
      'batch_size': 100,  # images per feature batch, over all devices
      'max_features': 10_000,  # most features per side for kernel distances, precision and recall
      'num_neighbours': 3,  # k of precision, recall, density and coverage
      'kernel_subsets': 100,
      'kernel_subset_size': 1000,
      'lpips': 'lpips_vgg16',  # 'lpips_vgg16' | 'lpips_alexnet' | '' = none
      'num_diversity_pairs': 500,  # pairs of samples whose mean LPIPS is the diversity
      'num_memorisation': 1000,  # samples whose nearest training image is looked for; 0 = none
      'num_bound': 256,  # images of the evaluation split for the variational bound; 0 = none
      'num_bound_times': 20,  # times drawn per image for the bound's sum over diffusion steps
      'sweep': {  # --sweep: one row for each of the product
        'samplers': ('ddpm', 'ddim', 'heun', 'dpmpp_2m'),
        'num_steps': (1, 2, 5, 10, 25, 50),
        'guidance_weights': (),  # () = sample.guidance_weight alone
        'teacher_steps': 512,  # of DDIM: students are compared with such images of the first teacher
        'num_compared': 256,  # ... so many of them
        'student_steps': (),  # the students of a chain with so many steps; () = all
        'workdirs': (),  # other runs of the same data set: unconditional, students, denoising GANs
      },
    }
  )


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
  )
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
  )
  config.update(changes)
  return config


def vae_stage() -> ConfigDict:
  """Stage 1: the ResNet VAE of DiffuseVAE."""
  config = ConfigDict()
  config.experiment = 'vae'  # file in vaediff/experiments
  config.model = ConfigDict({**presets.VAE['cifar10'], 'stem': 'nearest', 'dtype': 'float32'})
  config.loss = ConfigDict(
    {
      'beta': 1.0,  # weight of the KL term
      'reduction': 'sum',  # over the batch: 'sum' (official) | 'mean'; over pixels and latents always a sum
    }
  )
  config.optim = optim(1e-4)
  config.train = train(200_000, 128)
  config.prior = ConfigDict(
    {
      'kind': 'normal',  # 'normal' | 'gmm' (ex-post density estimation)
      'covariance': 'full',  # 'full' | 'diag' | 'tied'
      'num_components': (25, 50, 100),  # candidates; the best held-out log-likelihood wins
      'holdout_fraction': 0.1,
      'num_encoded': 50_000,  # most training images encoded for the fit
    }
  )
  config.sample = ConfigDict(
    {
      'checkpoint': 'latest',  # 'latest' | 'best'
      'num_images': 64,
      'batch_size': 64,
      'seed': 0,
      'save_npz': False,
      'save_images': False,  # one PNG per image, <workdir>/samples/<index>.png
    }
  )
  return config


def refiner_stage() -> ConfigDict:
  """Stage 2: the conditional diffusion U-Net."""
  config = ConfigDict()
  config.experiment = 'refiner'
  config.vae = ConfigDict(
    {
      'stage': 'vae',  # the frozen VAE: this stage ...
      'workdir': '',  # ... of this other run; '' = this run
    }
  )
  config.model = ConfigDict(
    {
      'variant': 'openai',  # 'openai' | 'ddim'
      'channels': 128,
      'channel_multipliers': (1, 2, 2, 2),
      'num_res_blocks': 2,
      'attention_resolutions': (16,),  # in pixels
      'num_heads': 8,
      'dropout': 0.1,
      'scale_shift_norm': False,
      'guidance_embedding': False,  # the guidance weight is an input: students of guided teachers
      'remat': False,  # recompute activations in the backward pass
      'dtype': 'float32',  # of the computation: 'float32' | 'bfloat16'
    }
  )
  config.diffusion = ConfigDict(
    {
      'schedule': 'linear',  # 'linear' (betas 1e-4 .. 0.02, 1000 steps) | 'cosine'
      'prediction': 'eps',  # 'eps' | 'x0' | 'v'
      'loss_weight': 'snr',  # of the squared error of x0: 'constant' | 'snr' (plain eps loss) | ...
      'condition': 'formulation1',  # 'none' | 'formulation1' | 'formulation2'
      'z_conditioning': False,
      'condition_dropout': 0.0,  # probability, per example, of the learned null condition
      'x0_vae_source': 'sample',  # 'sample' | 'mean' of q(z | x) at each step | 'precomputed'
    }
  )
  config.optim = optim(2e-4, warmup_steps=5000, clip_norm=1.0, ema_decay=0.9999)
  config.train = train(500_000, 128)
  config.sample = ConfigDict(
    {
      'checkpoint': 'latest',  # 'latest' | 'best'
      'num_images': 64,
      'batch_size': 64,  # images in memory at a time, over all devices
      'seed': 0,
      'sampler': 'ddim',  # 'ddpm' | 'ddim' | 'heun' | 'dpmpp_2m' | for students 'renoise' | 'there_and_back'
      'num_steps': 50,
      'grid': 'uniform',  # of times: 'uniform' | 'quadratic' | 'karras'
      'eta': 0.0,  # ddim: 0 = deterministic, 1 = ancestral
      'variance': 'large',  # ddpm: 'small' | 'large'
      'temperature': 1.0,  # standard deviation of the starting noise
      'guidance_weight': 0.0,  # classifier-free guidance; 0 = conditional network only
      't_start': 1.0,  # below 1: start from x0_vae noised to this time
      'clip': 'static',  # of x0_hat: 'static' to [-1, 1] | 'dynamic' | 'none'
      'threshold_percentile': 99.5,  # dynamic thresholding, in percent
      'with_vae': True,  # show the VAE sample beside each refined one
      'save_npz': False,
      'save_images': False,  # one PNG per image, <workdir>/samples/<index>.png
    }
  )
  return config


def classifier_stage() -> ConfigDict:
  """The small classifier whose features `fd_classifier` compares; trained once per data set, not per run."""
  config = ConfigDict()
  config.experiment = 'classifier'
  config.model = ConfigDict(
    {'num_classes': 0, 'channels': 32, 'num_features': 64, 'dropout': 0.2, 'dtype': 'float32'}
  )
  config.optim = optim(2e-3, schedule='cosine', weight_decay=1e-4, ema_decay=0.99, ema_warmup=True)
  config.train = train(
    2000, 128, log_every_steps=500, eval_every_steps=2000, save_every_steps=1000, grid_every_steps=0,
    eval_images=0, keep_checkpoints=1,
  )  # fmt: skip
  config.sample = ConfigDict({'checkpoint': 'latest', 'num_images': 1, 'batch_size': 64, 'seed': 0})
  return config


def finish(config: ConfigDict, variant: str, variants: Variants = {}) -> ConfigDict:  # noqa: B006
  """Applies the comma-separated variants in the order given and locks the config.

  Raises:
    ValueError: for an unknown variant; the message lists the valid ones.
  """
  known = {**VARIANTS, **variants}
  for name in filter(None, variant.split(',')):
    if name not in known:
      raise ValueError(f'config {config.name!r} has no variant {name!r}; valid: {", ".join(sorted(known))}')
    known[name](config)
    config.name = f'{config.name}-{name}'
  return config.lock()
