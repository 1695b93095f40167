"""What every run has, and how a config is made: `make`.

A config file names its data, its stages and the sizes of each. Every key is declared once, with its unit:
those of stages in configs/stages, one file per experiment, the others here. A stage's section exists only
where a stage of the run uses it. Types come from the defaults: a wrong type or an unknown key fails at once.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from configs import stages as known
from configs.run import Edit, Run
from configs.stages import classifier, divae

Variants = Mapping[str, Callable[[Run], None]]
STAGES = ('vae', 'refiner')
"""DiffuseVAE: what a run trains where neither its config file nor a variant says otherwise."""
NO_VARIANTS: Variants = {}


def make(
  name: str,
  data: Mapping[str, Any],
  sizes: Mapping[str, Edit],
  variant: str = '',
  stages: tuple[str, ...] = STAGES,
  own: Variants = NO_VARIANTS,
) -> ConfigDict:
  """Returns the locked config of a data set.

  Args:
    name: of the run folder, runs/<name>; variants are appended.
    data: what differs from the defaults of `config.data`.
    sizes: by stage, what edits its section when the stage is added; by other section, at once.
    variant: names joined by commas, applied in this order; those of `LAST` after all others.
    stages: trained in this order.
    own: variants of this data set alone, and those that it has instead of a shared one.

  Raises:
    ValueError: for an unknown variant; the message lists the valid ones.
  """
  config = default()
  config.name = name
  config.lock()
  config.data.update(data)
  run = Run(config, known.BY_NAME, sizes)
  for section in sizes.keys() - known.BY_NAME.keys():
    sizes[section](config[section])
  run.only(*stages)
  variants = {**known.VARIANTS, **own}
  chosen = [item for item in variant.split(',') if item]
  for item in chosen:
    if item not in variants and item not in LAST:
      valid = ', '.join(sorted({*variants, *LAST}))
      raise ValueError(f'config {name!r} has no variant {item!r}; valid: {valid}')
    if item not in LAST:
      variants[item](run)
  used = run.finish()
  for item in LAST:
    if item in chosen:
      LAST[item](config, used)
  with config.unlocked():
    config.update(used)
  config.name = '-'.join([name, *chosen])
  return config.lock()


def default() -> ConfigDict:
  """What every run has; the sections of its stages are in configs/stages."""
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
  config.checkpoints = ConfigDict(
    {
      'check_arrays': True,  # store digests of all arrays, and compare them when they are read
    }
  )
  config.reconstruct = ConfigDict(
    {
      'num_images': 64,  # images of the evaluation split; the grid shows the first 32
      'posterior': 'mean',  # 'mean' | 'sample': which z of q(z | x)
      'through': '',  # '' = what the conditions see in an image, such as z | 'noise' = the x_T it is made of
      'num_steps': (10, 25, 50, 100),  # through noise: DDIM steps there, and as many back; a row each
    }
  )
  config.interpolate = ConfigDict(
    {
      'num_points': 9,  # images in a row, both ends included
      'num_rows': 2,  # rows of each kind
      'from_label': 0,  # attribute direction: mean z of to_label minus mean z of from_label
      'to_label': 1,
      'num_encoded': 1024,  # most images encoded for the class means
      'num_directions': 3,  # rows of walks along principal directions of z, of each drawn z; 0 = none
      'deviations': 3.0,  # ... from so many below the mean to so many above
      'num_pairs': 64,  # pairs of z and of x_T whose change of the image is measured; 0 = none
      'cutoff': 0.25,  # low frequencies: up to this radius, over that of the highest along an axis
    }
  )
  config.restore = ConfigDict(
    {
      'task': 'all',  # 'all' | 'super_resolution' | 'inpaint' | 'colourise' | 'denoise'
      # 'consistent': every step keeps what the degraded image says
      # 'condition': the degraded image takes the place of the VAE's
      'method': 'consistent',
      'num_images': 256,  # most images of the evaluation split
      'num_samples': 4,  # of each image; beside the first one their mean is shown and measured
      'fill_rounds': 5,  # what is not known is first filled by a VAE so often: encode, decode, put in
      'factor': 2,  # super_resolution: box-downsampled by this factor
      'noise_std': 0.2,  # denoise: standard deviation, in units of the range [-1, 1]
      'hole_fraction': 0.5,  # inpaint: side of the square hole over the side of the image
    }
  )
  config.evaluate = evaluate()
  config.classifier = classifier.section()
  config.compile = ConfigDict(
    {
      'topology': 'v5e:4x4',  # of --mode=compile: <chip>:<shape of the slice>, joined by commas
      'effort': -1.0,  # of the compiler, -1 (quick) .. 1 (thorough)
    }
  )
  config.benchmark = benchmark()
  config.quantize = quantize()
  config.export = export()
  config.explore = explore()
  return config


def data() -> ConfigDict:
  """Where pixels come from and how they are cropped and resized; read by `vaediff.data`."""
  return ConfigDict(
    {
      'source': 'tfds',  # 'tfds' | 'idx' | 'image_folder' | 'parquet' | 'npz' | 'synthetic'
      'name': '',  # TFDS name with its config, as 'celeb_a_hq/256'
      'path': '',  # folder or file for idx, image_folder, parquet, npz and noto_emoji
      'data_dir': '',  # '' = $TFDS_DATA_DIR or ~/tensorflow_datasets; also holds the array cache
      'train_split': 'train',
      'eval_split': 'test',
      'image_size': 32,  # pixels, height = width
      'channels': 3,
      'num_classes': 0,  # labels are 0 .. num_classes - 1; 0 = none or unknown
      # the field with captions: a feature of TFDS; a column of parquet files, or of captions.jsonl or
      # metadata.csv in an image folder; '' = none are read
      'caption_feature': '',
      'crop': 'none',  # 'none' | 'center'
      'crop_size': 0,  # pixels; 0 = the shorter side
      # 'none' | 'pad' | 'nearest' | 'bilinear' | 'bicubic' | 'lanczos' | 'box'; what is not square is refused
      # by a filter alone, and distorted by one after 'squash_', such as 'squash_bilinear'
      'resize': 'none',
      'materialize': True,  # store once as memory-mapped uint8 arrays
      'num_threads': 2,  # reading threads per process
      'prefetch': 4,  # batches read ahead per process
      'check_fingerprint': True,  # refuse other images than a stage was trained with; off: only say so
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
      'num_captions': 500,  # samples of captions, of the data set shapes, whose images can be read; 0 = none
      'clip': {  # the CLIP stage by which samples are compared with their captions: clip_own
        'stage': '',  # its stage; '' = none
        'workdir': '',  # ... of this other run; '' = this run
      },
      'num_bound_times': 20,  # times drawn per image for the bound's sum over diffusion steps
      'decoders': {  # of stages that read codes: the same ones drawn again by every decoder of the run
        'samplers': (('ddpm', 1000), ('ddim', 25), ('dpmpp_2m', 10)),  # and their steps, of the first teacher
        'num_images': 256,  # of the evaluation split; 0 = none
        'num_samples': 4,  # of each image
      },
      'sweep': {  # --sweep: one row for each of the product
        'samplers': ('ddpm', 'ddim', 'heun', 'dpmpp_2m'),
        'num_steps': (1, 2, 5, 10, 25, 50),
        'guidance_weights': (),  # () = sample.guidance_weight alone
        'aug_levels': (),  # of the noise on what is read of an image; () = sample.aug_level alone
        'teacher_steps': 512,  # of DDIM: students are compared with such images of the first teacher
        'num_compared': 256,  # ... so many of them
        'student_steps': (),  # the students of a chain with so many steps; () = all
        'workdirs': (),  # other runs of the same data set: unconditional, students, denoising GANs
      },
    }
  )


def benchmark() -> ConfigDict:
  """What `--mode=benchmark` times, how often; read by `vaediff.modes.benchmark`."""
  return ConfigDict(
    {
      'num_repeats': 10,  # timed repetitions of each measurement; medians are reported
      'sample_batch_size': 100,  # denoising GANs: images per timed batch, over all devices
      'num_warmups': 10,  # ... batches before the first that is timed
      'num_sample_repeats': 30,  # ... timed batches
      'matmul_size': 2048,  # side of the square matrices that measure the device's peak
    }
  )


def quantize() -> ConfigDict:
  """How `--mode=quantize` makes a trained stage one of whole numbers; read by `vaediff.modes.quantize`."""
  return ConfigDict(
    {
      'stage': '',  # what is quantized: one of the run, trained; '' = the last of --stages
      'weights': 'int8',  # 'int8' | 'int4', two of which share a byte
      'activations': 'int8',  # what is multiplied with them: 'int8' | 'float32', for weights alone
      # 'minmax': rounded to nearest, within what samples show. For stages with a sampler, on records of it,
      # 'max' | 'mse' | 'adaround': scales of weights, and which way they are rounded (docs/calibration.md)
      'method': 'minmax',
      'keep_float': (),  # patterns of layers that stay as they are, as 'middle/*'
      'time_buckets': 8,  # parts of the time, each with its own scales of activations
      'num_images': 64,  # drawn to see what layers read, with 'minmax'
      'ranges': 'minmax',  # of activations on records: 'minmax' | 'percentile' | 'mse'
      'percentile': 99.99,  # of what a layer reads, below the upper end; as much is above the lower
      # of the error that is left, at each step of the sampler (PTQD): 'none' | 'mean', of the output |
      # 'noise', of the sampler's noise too | 'published', and of its direction as well
      'correction': 'none',
      'correction_images': 64,  # samples of which every step is compared
      'calibration': {
        'kind': 'steps',  # 'steps': evenly spaced ones | 'normal': one of each image, t ~ N(mean, std^2)
        'num_samples': 256,  # records
        'steps': 8,  # of the sampler, with 'steps'; 0 = all
        'mean': 0.4,
        'std': 0.4,
        'seed': 1,
        'batch_size': 64,
      },
      'adaround': {
        'num_steps': 500,  # of each block
        'batch_size': 32,
        'learning_rate': 1e-2,
        'weight': 0.01,  # of the regulariser
        'warmup': 0.2,  # share of the steps without it
        'beta_start': 20.0,
        'beta_end': 2.0,
      },
    }
  )


def export() -> ConfigDict:
  """What `--mode=export` writes of a trained stage; read by `vaediff.modes.export`."""
  return ConfigDict(
    {
      'format': 'onnx',  # one graph from noise to images, run by onnxruntime (extra `[onnx]`)
      'weights': 'float32',  # 'float32' | 'int8', whose products read bytes too (docs/quantization.md)
      'batch_size': 1,  # images of one call
      'output': 'float32',  # of the images: 'float32', in [-1, 1] | 'uint8'
      'num_images': 64,  # own samples: compared with those of this package, and what int8 is calibrated on
      # kernels of 7 bits, for processors whose sums of products of bytes saturate: 'auto', where this one has
      # no instruction for them | 'yes' | 'no'
      'reduce_range': 'auto',
    }
  )


def explore() -> ConfigDict:
  """The page that `--mode=explore` serves on this machine; read by `vaediff.modes.explore`."""
  return ConfigDict(
    {
      'port': 8080,  # of localhost
      'open': False,  # open it in the browser of this machine
      'num_directions': 8,  # principal directions of z that have a slider; 0 = none
      'deviations': 3.0,  # ... so many either way
      'num_encoded': 1024,  # most images of the evaluation split, for the directions of classes
      'num_points': 9,  # pictures of a row between two
      'max_upload_bytes': 10_000_000,  # of a file
      'max_upload_pixels': 40_000_000,  # of an image
    }
  )


# The variants that are about every stage -----------------------------------------------------------


def bfloat16(config: ConfigDict, sections: Mapping[str, ConfigDict]) -> None:
  """All networks compute in it, but for those that their stage keeps in float32."""
  for stage, section in sections.items():
    kept = getattr(known.BY_NAME[stage], 'FLOAT32', ())
    for name, part in section.items():
      if isinstance(part, ConfigDict) and 'dtype' in part and name not in kept:
        part.dtype = 'bfloat16'


def debug(config: ConfigDict, sections: Mapping[str, ConfigDict]) -> None:
  """The same stages, tiny, on synthetic images: seconds on a CPU."""
  if config.data.name != 'digits':
    config.data.update(
      {
        'source': 'synthetic',
        'path': '',
        'train_split': 'train',
        'eval_split': 'test',
        'image_size': 16,
        'num_classes': 10,
        'crop': 'none',
        'crop_size': 0,
        'resize': 'none',
      }
    )
  for stage, section in sections.items():
    known.BY_NAME[stage].debug(section, config.data.image_size)
    _debug_training(section)
  divae.fit_all(sections, config.data.image_size)
  classifier.debug(config.classifier, config.data.image_size)
  _debug_modes(config)


def _debug_training(section: ConfigDict) -> None:
  section.train.update(
    {
      'num_steps': 4,
      'batch_size': 8,
      'log_every_steps': 1,
      'save_every_steps': 2,
      'eval_every_steps': 2,
      'grid_every_steps': 4,
      'grid_images': 4,
      'eval_images': 16,
    }
  )
  if 'teacher' not in section:  # it samples as its teacher does
    section.sample.update({'num_images': 4, 'batch_size': 4})


def _debug_modes(config: ConfigDict) -> None:
  config.reconstruct.num_images = 4
  config.reconstruct.num_steps = (2, 4)
  config.interpolate.update(
    {'num_points': 3, 'num_rows': 1, 'num_encoded': 32, 'num_pairs': 2, 'num_directions': 1}
  )
  config.restore.update({'num_images': 4, 'num_samples': 2, 'fill_rounds': 1})
  config.export.update({'batch_size': 2, 'num_images': 4})
  config.explore.update({'num_directions': 2, 'num_encoded': 32, 'num_points': 3})
  config.quantize.update({'time_buckets': 2, 'num_images': 4, 'correction_images': 2})
  config.quantize.calibration.update({'num_samples': 4, 'steps': 2, 'batch_size': 4})
  config.quantize.adaround.update({'num_steps': 3, 'batch_size': 4})
  config.benchmark.update(
    {
      'num_repeats': 2,
      'sample_batch_size': 4,
      'num_warmups': 1,
      'num_sample_repeats': 2,
      'matmul_size': 256,
    }
  )
  config.evaluate.update(
    {
      'extractors': ('classifier',),
      'num_images': 16,
      'num_reconstructions': 16,
      'batch_size': 16,
      'lpips': '',
      'num_memorisation': 8,
      'num_bound': 8,
      'num_bound_times': 4,
      'num_captions': 8,
    }
  )
  config.evaluate.decoders.update({'samplers': (('ddim', 2),), 'num_images': 8, 'num_samples': 2})
  config.evaluate.sweep.update(
    {'samplers': ('ddim',), 'num_steps': (1, 2), 'teacher_steps': 4, 'num_compared': 8}
  )


LAST = {'bfloat16': bfloat16, 'debug': debug}
"""Applied to the sections that exist when all others are done, wherever they stand in the list."""
VARIANTS = (*known.VARIANTS, *LAST)
"""The names of those that every config shares."""


def variants_with(stage: str) -> list[str]:
  """Returns the shared variants that give a run this stage; of a stage that runs have anyway, none."""
  if stage in STAGES:
    return []
  data = {'num_classes': 1, 'caption_feature': 'caption'}
  return [name for name in known.VARIANTS if stage in make('', data, {}, name).stages]
