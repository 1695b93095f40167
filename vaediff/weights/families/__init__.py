"""Published networks that have a place here: which of them a state dict holds, and which tensors are none.

One file per family; each gives one table that is read both ways, to import and to export.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from vaediff.errors import UserError
from vaediff.weights import state_dicts
from vaediff.weights.families import base, diffusevae, ldm, ncsnpp
from vaediff.weights.families.base import Family, Shapes

FAMILIES = (
  diffusevae.VAE,
  diffusevae.OPENAI,
  diffusevae.DDIM,
  ncsnpp.GENERATOR,
  ncsnpp.DISCRIMINATOR,
  ldm.AUTOENCODER,
)
BY_NAME = {family.name: family for family in FAMILIES}
ONLINE, TARGET = 'online_network.decoder.', 'target_network.decoder.'
LITEMA = 'model_ema.'
"""Before names of the averages of Lightning's modules, which have lost their dots."""
PLACES = (
  (ONLINE, TARGET),
  ('vae.', ''),
  ('first_stage_model.', ''),
  (state_dicts.GENERATOR, state_dicts.AVERAGE),
  (state_dicts.DISCRIMINATOR, ''),
  ('', LITEMA),
)
"""Where in a state dict a network may be: how its names begin, and those of its average."""
SKIPPED = (
  (r'^(online|target)_network\.[a-z_0-9]+$', 'tables of the noise schedule'),
  (r'^loss\.', 'networks of the training loss'),
  (r'^colorize$', 'a table of colours'),
  (r'(^|\.)model_ema\.', 'averages of other parts, and their counters'),
  (r'^model\.diffusion_model\.', "latent diffusion's U-Net"),
  (r'^cond_stage_model\.', "latent diffusion's conditioner"),
  (r'^first_stage_model\.loss\.', 'networks of the training loss'),
  (r'^(betas|alphas_cumprod.*|sqrt_.*|log_one_minus.*|posterior_.*|logvar|scale_factor|lvlb_weights)$',
   'tables of the noise schedule'),
)  # fmt: skip
"""Patterns of names of what is left out, and what that is; the first that matches says it."""
BESIDE = {
  'vae.': 'the VAE beside the U-Net, which this config has no stage for',
  state_dicts.DISCRIMINATOR: 'the discriminator',
}
"""How names of networks begin that are left out as a whole, where they are not used as one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """A network in a state dict.

  Attributes:
    family: of it.
    names: by its own name that in the state dict.
    averages: the same of its average; {} = there is none.
    shapes: by its own names.
  """

  family: Family
  names: Mapping[str, str]
  averages: Mapping[str, str]
  shapes: Shapes

  def fields(self) -> dict[str, Any]:
    """Returns what the shapes say.

    Raises:
      UserError: for a relative that has no place here, or when a tensor is missing.
    """
    for pattern, what in self.family.refused.items():
      named = next((name for name in self.shapes if re.search(pattern, name)), None)
      if named:
        raise UserError(f'{named} is of {what}, which has no place here')
    try:
      return self.family.fields(self.shapes)
    except UserError:
      raise
    except (KeyError, IndexError, ValueError) as error:
      missing = error.args[0] if isinstance(error, KeyError) else 'the shape that is expected of a tensor'
      raise UserError(f'it is {self.family.title}, but it lacks {missing}') from error


def parts(shapes: Shapes) -> list[Part]:
  """Returns the networks of a state dict that have a place here."""
  found = []
  for prefix, average in PLACES:
    names = {name.removeprefix(prefix): name for name in shapes if name.startswith(prefix)}
    family = next((family for family in FAMILIES if family.is_of(names)), None)
    if family is None:
      continue
    averages = {}
    if average == LITEMA:
      own = {name: f'{LITEMA}{short}' for name, short in ldm.names_of_averages(list(names)).items()}
      averages = {name: other for name, other in own.items() if other in shapes}
    elif average:
      averages = {name: f'{average}{name}' for name in names if f'{average}{name}' in shapes}
    found.append(
      Part(
        family=family,
        names=names,
        averages=averages,
        shapes={name: shapes[other] for name, other in names.items()},
      )
    )
  return found


def left_out(shapes: Shapes, used: set[str]) -> tuple[dict[str, int], list[str]]:
  """Returns how many tensors are left out, by what they are; and the names of those that nobody knows."""
  skipped, unknown = {}, []
  for name in shapes:
    if name in used:
      continue
    what = next((what for pattern, what in SKIPPED if re.search(pattern, name)), None)
    beside = next((prefix for prefix in BESIDE if name.startswith(prefix)), None)
    if beside and not any(other.startswith(beside) for other in used):
      what = BESIDE[beside]
    if what is None:
      unknown.append(name)
    else:
      skipped[what] = skipped.get(what, 0) + 1
  return skipped, unknown


__all__ = ['BY_NAME', 'FAMILIES', 'Family', 'Part', 'base', 'left_out', 'parts']
