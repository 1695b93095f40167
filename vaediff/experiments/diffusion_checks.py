"""Fields of the section of a diffusion that contradict each other."""

from ml_collections import ConfigDict

from vaediff.conditions.base import Conditions
from vaediff.errors import UserError
from vaediff.spaces import Space


def check(section: ConfigDict, space: Space, conditions: Conditions) -> None:
  """Raises UserError for fields of a section that contradict each other."""
  diffusion, sample, train = section.diffusion, section.sample, section.train
  if diffusion.condition_dropout > 0 and diffusion.condition == 'none' and not diffusion.z_conditioning:
    raise UserError(
      f'diffusion.condition_dropout is {diffusion.condition_dropout}, but the U-Net reads nothing of a VAE '
      'that could be dropped; set diffusion.condition or z_conditioning, or set the dropout to 0'
    )
  if sample.t_start < 1 and diffusion.condition == 'none':
    raise UserError(
      "sample.t_start < 1 starts from a noised x0_vae, which diffusion.condition = 'none' does not have"
    )
  if sample.guidance_weight > 0 and not conditions.droppable:
    raise UserError(
      f'sample.guidance_weight is {sample.guidance_weight}; guidance_weight > 0 needs a network trained with '
      'diffusion.condition_dropout > 0, or that of another condition, such as conditions.label.dropout > 0; '
      'here none is dropped'
    )
  if sample.clip != 'none' and space.bound is None:
    raise UserError(
      f'sample.clip = {sample.clip!r} brings x0_hat into [-1, 1], where the maps of space = '
      f"{section.space!r} of unit deviation are not; use 'none'"
    )
  if diffusion.x0_vae_source == 'precomputed' and diffusion.z_conditioning and train.flip:
    raise UserError(
      "diffusion.x0_vae_source = 'precomputed' with z_conditioning cannot be joined with train.flip: the "
      "stored z belongs to the image as it is; use 'mean', or train.flip = False"
    )
