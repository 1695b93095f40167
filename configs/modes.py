"""What modes are told: a section of every config each."""

from ml_collections import ConfigDict


def reconstruct() -> ConfigDict:
  """Which images `--mode=reconstruct` makes again, and through what."""
  return ConfigDict(
    {
      'num_images': 64,  # images of the evaluation split; the grid shows the first 32
      'posterior': 'mean',  # 'mean' | 'sample': which z of q(z | x)
      'through': '',  # '' = what the conditions see in an image, such as z | 'noise' = the x_T it is made of
      'num_steps': (10, 25, 50, 100),  # through noise: DDIM steps there, and as many back; a row each
    }
  )


def interpolate() -> ConfigDict:
  """Rows that `--mode=interpolate` draws."""
  return ConfigDict(
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


def restore() -> ConfigDict:
  """What `--mode=restore` takes away from images, and how it is filled in."""
  return ConfigDict(
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


def vary() -> ConfigDict:
  """How `--mode=vary` makes images again of their vectors (docs/unclip.md)."""
  return ConfigDict(
    {
      'image': '',  # files of pictures, joined by commas; '' = the first images of the evaluation split
      'num_images': 4,  # of these
      'num_variations': 7,  # of each image
      'num_steps': 50,  # of DDIM, to the noise of an image and back
      'eta': 1.0,  # noise of the way back: 0 = the image again, 1 = all that its vector leaves open
    }
  )


def text_diff() -> ConfigDict:
  """How `--mode=text_diff` turns the vectors of images towards a difference of captions."""
  return ConfigDict(
    {
      'image': '',  # files of pictures, joined by commas; '' = images of the evaluation split
      'num_images': 4,  # of these; on the data set `shapes` those that show what `source` tells
      'source': '',  # what the image shows; '' = nothing in particular, the mean of captions
      'target': '',  # what it is to show
      'num_points': 6,  # of the strip, both ends included
      'max_theta': 0.5,  # share of the angle from the image's vector to the difference of the captions'
      'num_steps': 50,  # of DDIM, to the noise of the image and back
    }
  )


def edit() -> ConfigDict:
  """What `--mode=edit` changes in a picture, and how it trains for that; read by `vaediff.modes.edit`."""
  return ConfigDict(
    {
      'image': '',  # a file; '' = evaluation images of the data set shapes, one attribute of each changed
      'caption': '',  # what the picture is to show
      'name': '',  # of the folder <workdir>/edits/<name>; '' = by the file, and by what the edit is made of
      # between the vectors that show the picture, 0, and those of the caption, 1; at most 1.5
      'etas': (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
      'num_images': 20,  # without a file: so many
      'num_seeds': 1,  # strips that are drawn, of which the CLIP stage chooses one
      'clip': {  # the CLIP stage that says which fits the caption best
        'stage': '',  # its stage; '' = none, for one seed
        'workdir': '',  # ... of this other run; '' = this run
      },
      # the vectors of the caption, optimised to show the picture; batches hold it so often, with other times
      # and noise
      'embedding': {'num_steps': 100, 'batch_size': 16, 'learning_rate': 3e-2},
      # the denoiser, tuned to the picture at those vectors
      'finetune': {'num_steps': 50, 'batch_size': 16, 'learning_rate': 1e-4},
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
      'num_controls': 500,  # samples that follow control images of the evaluation split; 0 = none
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


def compile() -> ConfigDict:
  """The hardware that `--mode=compile` compiles for."""
  return ConfigDict(
    {
      'topology': 'v5e:4x4',  # of --mode=compile: <chip>:<shape of the slice>, joined by commas
      'effort': -1.0,  # of the compiler, -1 (quick) .. 1 (thorough)
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
      # 'minmax': rounded to nearest, within what samples show. On records of what the network reads, 'max' |
      # 'mse' | 'adaround': scales of weights, and which way they are rounded (docs/calibration.md)
      'method': 'minmax',
      # a quantized VAE or autoencoder of this run, read in place of the one in floats; '' = that one
      'reads': '',
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
      # with 'adaround', after each block: ranges of its inputs, by the error that is left (Q-Diffusion)
      'learned_ranges': {'num_steps': 0, 'batch_size': 32, 'learning_rate': 2e-3},  # 0 = they are not
    }
  )


def export() -> ConfigDict:
  """What `--mode=export` writes of a trained stage; read by `vaediff.modes.export`."""
  return ConfigDict(
    {
      # one program from noise to images: 'onnx' for onnxruntime (extra `[onnx]`) | 'stablehlo' for JAX alone;
      # weights alone: 'safetensors'
      'format': 'onnx',
      'weights': 'float32',  # 'float32' | 'int8', whose products read bytes too (docs/quantization.md)
      'batch_size': 1,  # images of one call
      'output': 'float32',  # of the images: 'float32', in [-1, 1] | 'uint8'
      'num_images': 64,  # own samples: compared with those of this package, and what int8 is calibrated on
      # kernels of 7 bits, for processors whose sums of products of bytes saturate: 'auto', where this one has
      # no instruction for them | 'yes' | 'no'
      'reduce_range': 'auto',
      'names': 'vaediff',  # safetensors: 'vaediff', its own paths | 'official', those that were published
      'platforms': ('cpu', 'cuda', 'tpu'),  # of stablehlo: those that the file runs on; 'rocm' too
      'any_batch': True,  # of stablehlo: one file for any number of images; False = of batch_size
    }
  )


def adopt() -> ConfigDict:
  """What `--mode=import` reads, and what no file says; read by `vaediff.modes.adopt`."""
  return ConfigDict(
    {
      'path': '',  # the published file; several, such as those of two stages, joined by commas
      'sizes': 'config',  # of networks: 'config', others are refused | 'file', they are taken from it
      'weights': 'ema',  # what is sampled: 'ema', the average where the file has one | 'raw'
      'formulation': '',  # of a U-Net: 'formulation1' | 'formulation2' | '' = its name, or the config
      'num_heads': 0,  # of a U-Net's attention; 0 = its name, or as published
      'band_order': '',  # of wavelets: 'pytorch_wavelets' | 'wavecnet' | '' = as published for the data set
      'latent_scale': 0.0,  # LDDGAN's latents are divided by it; 0 = as published for the data set
      'step': 0,  # updates done; 0 = what the file says, or 1
      # refuse networks so narrow that the published group norms are others; so does an export of such names
      'check_groups': True,
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


SECTIONS = {
  'reconstruct': reconstruct,
  'interpolate': interpolate,
  'restore': restore,
  'vary': vary,
  'text_diff': text_diff,
  'edit': edit,
  'evaluate': evaluate,
  'compile': compile,
  'benchmark': benchmark,
  'quantize': quantize,
  'export': export,
  'adopt': adopt,
  'explore': explore,
}
"""Of every config, by name: that of the mode, but `adopt`, of `--mode=import`."""


def debug(config: ConfigDict) -> None:
  """As little of each as shows that it runs."""
  config.reconstruct.num_images = 4
  config.reconstruct.num_steps = (2, 4)
  config.interpolate.update(
    {'num_points': 3, 'num_rows': 1, 'num_encoded': 32, 'num_pairs': 2, 'num_directions': 1}
  )
  config.restore.update({'num_images': 4, 'num_samples': 2, 'fill_rounds': 1})
  config.vary.update({'num_images': 2, 'num_variations': 2, 'num_steps': 3})
  config.text_diff.update({'num_images': 2, 'num_points': 3, 'num_steps': 3})
  config.export.update({'batch_size': 2, 'num_images': 4})
  config.edit.update({'etas': (0.0, 0.5, 1.0), 'num_images': 2})
  config.edit.embedding.update({'num_steps': 2, 'batch_size': 8})
  config.edit.finetune.update({'num_steps': 2, 'batch_size': 8})
  config.explore.update({'num_directions': 2, 'num_encoded': 32, 'num_points': 3})
  config.quantize.update({'time_buckets': 2, 'num_images': 4, 'correction_images': 2})
  config.quantize.calibration.update({'num_samples': 4, 'steps': 2, 'batch_size': 4})
  config.quantize.adaround.update({'num_steps': 3, 'batch_size': 4})
  config.quantize.learned_ranges.update({'num_steps': 2, 'batch_size': 4})
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
      'num_controls': 8,
    }
  )
  config.evaluate.decoders.update({'samplers': (('ddim', 2),), 'num_images': 8, 'num_samples': 2})
  config.evaluate.sweep.update(
    {'samplers': ('ddim',), 'num_steps': (1, 2), 'teacher_steps': 4, 'num_compared': 8}
  )
