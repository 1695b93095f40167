"""What networks of stages without a sampler are called with for images: records to calibrate them on.

A decoder reads the latents of images, a prior their ids with those before them given, as in training. The
diffusions have `experiments.recorded`: what their networks read depends on what they drew before.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from vaediff.experiments.autoencoder import LATENTS, Autoencoder
from vaediff.experiments.light_decoder import LightDecoder
from vaediff.experiments.token_prior import TokenPrior
from vaediff.experiments.vae import CODE, Vae
from vaediff.spaces import encoders
from vaediff.types import Batch, Image, Keys, Read

Call = tuple[tuple[Any, ...], dict[str, Array | None]]
"""Arguments and keywords, all with a row for each image."""
Calls = dict[str, tuple[Call, ...]]
"""By network; the first of its calls is that with all conditions."""


class Reader(NamedTuple):
  """How the networks of one kind of stage are called.

  Attributes:
    method: of the network; None = its forward pass.
    of: (experiment, read, batch, images in [-1, 1], a key for each) -> the calls.
  """

  method: str | None
  of: Callable[[Any, Read, Batch, Image, Keys], Calls]


def of_code(vae: Vae, read: Read, batch: Batch, x: Image, keys: Keys) -> Calls:
  """Returns what a VAE's decoder reads: z ~ q(z | x)."""
  return {'vae': (((vae.observe(read, batch, x, keys)[CODE],), {}),)}


def of_latents(stage: Autoencoder, read: Read, batch: Batch, x: Image, keys: Keys) -> Calls:
  """Returns what an autoencoder's decoder reads: latents, at their codes where there is a codebook."""
  z = stage.observe(read, batch, x, keys)[LATENTS]
  z = encoders.quantized(stage.autoencoder, read['autoencoder'], z)
  return {'autoencoder': (((z,), {}),)}


def of_taught(stage: LightDecoder, read: Read, batch: Batch, x: Image, keys: Keys) -> Calls:
  """Returns what a light decoder reads: the latents that its teacher would."""
  z = stage.observe(read, batch, x, keys)[LATENTS]
  z = encoders.quantized(stage.autoencoder.model, read['autoencoder'], z)
  return {'decoder': (((z,), {}),)}


def of_ids(prior: TokenPrior, read: Read, batch: Batch, x: Image, keys: Keys) -> Calls:
  """Returns what the network of each level reads: its ids, what is before them, and the coarser ids.

  Where samples are guided it is called without the conditions too.
  """
  del x, keys
  codes = prior.ids(read, batch, None)
  count, found = len(codes[0]), {}
  before = [prior.source(prior.values(read, batch), count)]
  if prior.rule.guidance_weight:
    before.append(prior.source({}, count))
  for level, name in enumerate(prior.network_names):
    own = codes[level].reshape(count, -1)
    found[name] = tuple(((own, one.ids, *codes[:level]), {'mask': one.mask}) for one in before)
  return found


READERS = {
  Vae: Reader('decode', of_code),
  Autoencoder: Reader('decode', of_latents),
  LightDecoder: Reader(None, of_taught),
  TokenPrior: Reader(None, of_ids),
}
"""By kind of experiment."""


def reader_of(experiment: Any) -> Reader | None:
  """Returns how the networks of a stage are called; None where that is not known."""
  return next((reader for kind, reader in READERS.items() if isinstance(experiment, kind)), None)


def keys_of(seed: int, rows: Array) -> Keys:
  """Returns the key of each image: the same in batches of any size."""
  root = jax.random.key(seed)
  return jax.vmap(lambda row: jax.random.fold_in(root, row))(rows)
