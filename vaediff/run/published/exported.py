"""The inverse of an import: networks of a stage under the names under which such networks were published."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vaediff.errors import UserError
from vaediff.run.published import gan
from vaediff.run.published.base import LEAST_NORM, SECTION, has_published_groups
from vaediff.run.published.diffusevae import layers_of
from vaediff.weights import families
from vaediff.weights.families import Family, base, ldm


def family_of(config: ConfigDict, stage: str, network: str) -> Family | None:
  """Returns the family of a stage's network; None where there is none."""
  kind = config[stage].experiment
  for family in families.FAMILIES:
    if (family.experiment, family.network) != (kind, network):
      continue
    if kind == 'diffusion' and not family.name.endswith(config[stage].model.variant):
      continue
    return family
  return None


def official(
  config: ConfigDict, stage: str, family: Family | None, arrays: Mapping[str, np.ndarray]
) -> base.Arrays:
  """Returns the state dict of a network's parameters by path.

  Raises:
    UserError: for a network that has no such names, or parts that have none, or of which the published code
      makes other images.
  """
  if family is None:
    known = '; '.join(known.title for known in families.FAMILIES)
    raise UserError(
      f"stage {stage!r} has a network that was never published, so that config.export.names = 'official' has "
      f"none for it; use 'vaediff'. Such names have: {known}"
    )
  check_codes(config, stage, family)
  own = {path: value.shape for path, value in arrays.items()}
  entries = family.entries(own, options_of(config, stage, family, arrays))
  unnamed = sorted(own.keys() - {entry.path for entry in entries})
  if unnamed:
    raise UserError(
      f'{unnamed[0]} (and {len(unnamed) - 1} more) of stage {stage!r} has no name in {family.title}; use '
      "config.export.names = 'vaediff'"
    )
  found = base.to_official([entry for entry in entries if entry.path in own], arrays)
  check_groups(config, stage, family, found)
  return found


def check_codes(config: ConfigDict, stage: str, family: Family) -> None:
  """Raises UserError for an autoencoder whose codes have length 1, which those of the published do not."""
  if family.name == 'ldm_autoencoder' and config[stage].model.normalized_codes:
    raise UserError(
      f'config.{stage}.model.normalized_codes is True: vectors and codes are compared, and decoded, at '
      'length 1. The published code takes them as they are (False), so that its images would be others. Use '
      "config.export.names = 'vaediff'"
    )


def check_groups(config: ConfigDict, stage: str, family: Family, found: base.Arrays) -> None:
  """Raises UserError for a network whose group norms would have other groups there, as an import does."""
  if not config[SECTION].check_groups:
    return
  narrowest = family.fields({name: value.shape for name, value in found.items()}).get('narrowest')
  if narrowest is None or has_published_groups(narrowest):
    return
  raise UserError(
    f'config.{stage}.model.channels is {config[stage].model.channels}, which makes a group norm of '
    f'{narrowest} channels. The published code always has 32 groups; here they are 32 from {LEAST_NORM} '
    'channels on, in multiples of 32, so that its images would be others. Use config.export.names = '
    f"'vaediff'; for a reader with the groups of this package, set --config.{SECTION}.check_groups=False"
  )


def options_of(
  config: ConfigDict, stage: str, family: Family, arrays: Mapping[str, np.ndarray]
) -> dict[str, Any]:
  """Returns what a family's table needs beside shapes."""
  match family.name:
    case 'diffusevae_vae':
      return {'layers': layers_of(config[stage].model.to_dict())}
    case 'ncsnpp_generator':
      _, channels = gan.space_of(config, stage)
      order = config[SECTION].band_order or gan.published_order(config)
      swapped = config[stage].space == 'wavelet' and order == gan.band_order(True)
      return {'order': {'channels': channels, 'patch': config[stage].model.patch_size, 'swapped': swapped}}
    case 'ldm_autoencoder':
      return {'middle': ldm.attends_in_the_middle(arrays)}
  return {}
