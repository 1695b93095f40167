"""Published networks as the stages of a run: by family, how a file and a config come to say the same."""

from collections.abc import Callable, Mapping
from typing import Any

from vaediff.run.published import autoencoders, diffusevae, gan
from vaediff.run.published.base import Finish, Import
from vaediff.weights.families import Part
from vaediff.weights.state_dicts import StateDict

Adopt = Callable[[Import, StateDict, Part, str], tuple[dict[str, Any], str]]
ADOPT: Mapping[str, Adopt] = {
  'diffusevae_vae': diffusevae.adopt_vae,
  'diffusevae_unet_openai': diffusevae.adopt_unet,
  'diffusevae_unet_ddim': diffusevae.adopt_unet,
  'ncsnpp_generator': gan.adopt_generator,
  'ddgan_discriminator': gan.adopt_discriminator,
  'ldm_autoencoder': autoencoders.adopt,
}
"""By family: (import, file, part, stage) -> options of its table and its origin; edits the config."""
FINISH: Mapping[str, Finish] = {'autoencoder': autoencoders.with_codebook}
"""By experiment: what else of a state depends on parameters that were trained elsewhere."""
