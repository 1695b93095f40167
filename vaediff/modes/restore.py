"""Out-of-the-box restoration: a degraded image takes the place of the VAE reconstruction.

VAEDM (Pandey et al. 2021, arXiv:2201.00308v1), section 3.4: the refiner was trained to repair blurry
images, so it is given a downsampled, noisy or holed one instead.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vaediff.conditions.vae import IMAGE
from vaediff.data import pixels
from vaediff.errors import UserError
from vaediff.evaluation.quality import psnr
from vaediff.modes import pictures
from vaediff.run import images
from vaediff.run.config import Run
from vaediff.run.trained import Trained, open_last, say_figures


def mode(run: Run) -> None:
  """Restores with the last stage and prints the PSNR."""
  out = pictures.out_of(run)
  say_figures(restore(open_last(run), out))


def restore(trained: Trained, out: pathlib.Path | None = None) -> dict[str, float]:
  """Degrades images of the evaluation split and refines them.

  Writes `restored-<task>.png`: data, degraded, restored.

  Args:
    trained: the stage.
    out: folder to write to; None = the run's.

  Returns:
    PSNR in dB of the degraded and of the restored images.
  """
  settings = trained.config.restore
  if IMAGE not in trained.experiment.inputs:
    raise UserError(
      f'--mode=restore needs a refiner with an image condition, stage {trained.stage!r} has none; train one '
      'with diffusion.condition = formulation1 or formulation2, or choose it with --stages'
    )
  data, labels = trained.eval_images(settings.num_images)
  x0 = np.asarray(pixels.to_unit_range(jnp.asarray(data)))
  degraded, known = degrade(x0, settings, trained.settings.seed)
  seen = trained.observe(degraded, labels)
  restored = trained.draw_all({**seen, IMAGE: degraded})['x0']
  if known is not None:
    restored = np.where(known, data, restored)
  degraded = np.asarray(pixels.to_bytes(jnp.asarray(degraded)))
  shown = images.side_by_side(data, degraded, restored)
  pictures.write_grid(trained, f'restored-{settings.task}', shown, 12, out)
  return {'psnr/degraded': psnr(data, degraded), 'psnr/restored': psnr(data, restored)}


def degrade(x0: np.ndarray, settings: ConfigDict, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
  """Returns degraded images in [-1, 1] and, for inpainting, the mask of known pixels.

  Raises:
    UserError: for an unknown task or a strength that is out of range.
  """
  count, size, _, channels = x0.shape
  if settings.task == 'super_resolution':
    factor = settings.factor
    if factor < 2 or size % factor:
      raise UserError(f'config.restore.factor must be >= 2 and divide the image size {size}, got {factor}')
    blocks = x0.reshape(count, size // factor, factor, size // factor, factor, channels)
    return np.asarray(jax.image.resize(blocks.mean(axis=(2, 4)), x0.shape, 'bilinear')), None
  if settings.task == 'denoise':
    if settings.noise_std <= 0:
      raise UserError(f'config.restore.noise_std must be > 0, got {settings.noise_std}')
    noise = np.random.default_rng(seed).standard_normal(x0.shape, np.float32)
    return np.clip(x0 + settings.noise_std * noise, -1, 1).astype(np.float32), None
  if settings.task == 'inpaint':
    if not 0 < settings.hole_fraction < 1:
      raise UserError(f'config.restore.hole_fraction must be in (0, 1), got {settings.hole_fraction}')
    side = max(1, round(size * settings.hole_fraction))
    start = (size - side) // 2
    known = np.ones((1, size, size, 1), bool)
    known[:, start : start + side, start : start + side] = False
    return np.where(known, x0, 0.0).astype(np.float32), known
  raise UserError(f'config.restore.task is {settings.task!r}; valid: super_resolution, denoise, inpaint')
