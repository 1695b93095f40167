"""VQ-VAE-2: an autoencoder with codes on several grids (Razavi et al. 2019, 1906.00446).

  L = |x - x_hat|^2 + beta sum over levels of |sg(e) - z|^2,   means over batch, positions and channels,

with pixels in [-1, 1]. The codes of each level follow averages of the vectors that are nearest to them, start
at vectors of the first batch, and start anew there where they are not used (`models.codebook`).

Its samples are reconstructions: of all levels, and, to see what each level holds, of the upper levels alone.
A level that is left out is its mean code over the training images, or zeros; the name of an image says which.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from ml_collections import ConfigDict

from vaediff import checks, reads
from vaediff.data import pixels
from vaediff.errors import UserError
from vaediff.experiments import base, bounds
from vaediff.models import codebook, layers
from vaediff.models.functional import Model
from vaediff.models.hierarchy import MAX_LEVELS, NAMES, Map
from vaediff.optim import Optimizer, global_norm, is_kernel, make_optimizer
from vaediff.spaces import hierarchies, tokenizers
from vaediff.spaces.hierarchies import NETWORK
from vaediff.types import Batch, Given, Image, Metrics, Params, Read

FILLS = ('mean', 'zeros')
"""What takes the place of a level that is left out: its mean code over the training images, or 0."""
ALL_NAMES = tuple(dict.fromkeys(name for names in NAMES for name in names))
"""Of the levels of any hierarchy."""
BOUNDS = {
  'model.num_levels': bounds.whole(1, MAX_LEVELS),
  'model.channels': bounds.whole(2, bounds.MAX_WIDTH),
  'model.num_res_blocks': bounds.whole(1, bounds.MAX_LEVELS),
  'model.res_channels': bounds.whole(1, bounds.MAX_WIDTH),
  'model.latent_channels': bounds.whole(1, bounds.MAX_WIDTH),
  'model.codebook_size': bounds.whole(1, 2**22),
  'model.dtype': checks.one_of(layers.DTYPES),
  'loss.commitment_weight': bounds.weight(),
  'loss.codebook_decay': checks.below_one(),
  'loss.restart_below': bounds.weight(),
  'sample.fill': checks.one_of(FILLS),
  **bounds.optimizers('optim'),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hierarchy(base.Experiment):
  """The stage of VQ-VAE-2; trains the network `hierarchy`.

  Attributes:
    hierarchy: encoders, decoders and codes of all levels.
    optimizer: of all but the codes.
    loss: the stage's `loss` section.
    flip: random horizontal flips.
    microbatches: parts that a batch is split into for the gradient.
    fill: of `FILLS`; '' = no level is left out.
    usage: how often each code is used over the training images.
  """

  hierarchy: Model
  optimizer: Optimizer
  loss: Mapping[str, Any]
  flip: bool
  microbatches: int
  fill: str
  usage: reads.Measured

  reconstructs = True
  bounds = BOUNDS
  measures = (tokenizers.FREQUENCIES,)
  metrics = {
    'loss': False,
    'mse': False,
    **{f'codebook/{name}/used': True for name in ALL_NAMES},
    **{f'codebook/{name}/perplexity': True for name in ALL_NAMES},
    **{f'codebook/{name}/unused': False for name in ALL_NAMES},
  }

  @classmethod
  def from_config(cls, config: ConfigDict, stage: str) -> 'Hierarchy':
    """Builds the experiment of `config.<stage>`."""
    base.check(cls, config, stage)
    section = config[stage]
    tokenizer = tokenizers.levels(config, stage, '')
    check_restarts(tokenizer, section)
    return cls(
      hierarchy=tokenizer.source.model,
      optimizer=make_optimizer(section.optim, section.train.num_steps, decays=is_kernel),
      loss=section.loss.to_dict(),
      flip=section.train.flip,
      microbatches=section.train.microbatches,
      fill=section.sample.fill,
      usage=tokenizers.frequencies(tokenizer),
    )

  def alone(self) -> 'Hierarchy':
    """Returns the stage without reconstructions by level: the mean codes are known once it is trained."""
    return dataclasses.replace(self, fill='')

  @property
  def names(self) -> tuple[str, ...]:
    """Names of the levels, coarse first."""
    return self.hierarchy.module.names

  @property
  def networks(self) -> Mapping[str, Model]:
    """The one network of this stage."""
    return {NETWORK: self.hierarchy}

  @property
  def inputs(self) -> Mapping[str, jax.ShapeDtypeStruct]:
    """The ids of each level."""
    grids = zip(tokenizers.names_of(len(self.names)), hierarchies.grids(self.hierarchy), strict=True)
    return {name: jax.ShapeDtypeStruct(grid, jnp.int32) for name, grid in grids}

  @property
  def for_sampling(self) -> Mapping[str, reads.Reads]:
    """What the mean codes are made of, where they take the place of a level."""
    return {tokenizers.FREQUENCIES: self.usage} if self.fill == 'mean' and self.partial else {}

  @property
  def partial(self) -> dict[str, int]:
    """How many levels, from the top on, each image has that is not of all; by the image's name."""
    if not self.fill:
      return {}
    # names that sort, as those of results do, with fewer levels first
    prefix = f'x0_{self.fill}_below_'
    return {prefix + '_'.join(self.names[:kept]): kept for kept in range(1, len(self.names))}

  @property
  def titles(self) -> Mapping[str, str]:
    """Which levels an image is made of, and what takes the place of the others."""
    below = {'mean': 'mean code', 'zeros': 'zeros', '': ''}[self.fill]
    shown = {name: f'{" + ".join(self.names[:kept])} (below: {below})' for name, kept in self.partial.items()}
    return {**shown, 'x0': 'all levels'} if shown else {}

  def init(self, key: jax.Array) -> base.TrainState:
    """Returns the state at step 0.

    In `extra['codebook']` are, by level, averaged counts and sums of the codes, and whether these have had
    their start.
    """
    network = base.init_network(self.hierarchy, self.optimizer, key)
    books = {}
    for name, codes in zip(self.names, hierarchies.codes_of(self.hierarchy, network.params), strict=True):
      counts = jnp.ones(codes.shape[0])
      books[name] = {'counts': counts, 'sums': jnp.copy(codes), 'started': jnp.bool_(False)}
    return base.TrainState(step=jnp.int32(0), networks={NETWORK: network}, extra={'codebook': books})

  # Training ---------------------------------------------------------------------------------------

  def train_step(
    self, state: base.TrainState, frozen: Read, batch: Batch, key: jax.Array, kind: str = ''
  ) -> tuple[base.TrainState, Metrics]:
    """Returns the state after the codes have moved and the rest has had one update."""
    del frozen, kind
    key_flip, key_codes, key_parts = jax.random.split(key, 3)
    x = pixels.prepare(batch, key_flip if self.flip else None)['image']
    network, books, metrics = self.move_codes(state, x, key_codes)

    def loss_fn(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
      del key
      return self.losses(params, batch['x'])

    grads, found = base.gradients(loss_fn, network.params, {'x': x}, key_parts, self.microbatches)
    metrics |= found | {f'grad_norm/{NETWORK}': global_norm(grads)}
    codes = hierarchies.codes_of(self.hierarchy, network.params)
    network = base.apply_gradients(network, grads, self.optimizer, state.step)
    network = self.with_codes(network, codes)  # neither decay nor averaging is to move them
    extra = {**state.extra, 'codebook': books}
    return base.TrainState(step=state.step + 1, networks={NETWORK: network}, extra=extra), metrics

  def move_codes(
    self, state: base.TrainState, x: Image, key: jax.Array
  ) -> tuple[base.Network, dict[str, Any], Metrics]:
    """Returns the network with the codes of all levels moved, their averages, and how much of them is used.

    From the top on, each level's vectors made with the codes above as they are by then: so the codes of a
    first batch are vectors of it at every level. Vectors are those of the whole global batch. It costs one
    more pass of the encoders.
    """
    network, metrics, books, moved = state.networks[NETWORK], {}, {}, []
    params = jax.lax.stop_gradient(network.params)
    keys = jax.random.split(key, len(self.names))
    before = hierarchies.codes_of(self.hierarchy, params)

    def move(level: int, z: Map) -> Map:
      name = self.names[level]
      book = state.extra['codebook'][name]
      known, _, found = codebook.follow(
        codebook.Codebook(codes=before[level], counts=book['counts'], sums=book['sums']),
        book['started'],
        z,
        keys[level],
        decay=self.loss['codebook_decay'],
        threshold=self.loss['restart_below'],
      )
      moved.append(known.codes)
      books[name] = {'counts': known.counts, 'sums': known.sums, 'started': jnp.ones_like(book['started'])}
      metrics.update({f'codebook/{name}/{figure}': value for figure, value in found.items()})
      return codebook.lookup(known.codes, codebook.nearest(z, known.codes))

    hierarchies.walk(self.hierarchy, params, x, move)
    return self.with_codes(network, moved), books, metrics

  def losses(self, params: Params, x: Image) -> tuple[jax.Array, Metrics]:
    """Returns the loss, a mean over the batch, and its terms."""
    terms, books = {}, hierarchies.codes_of(self.hierarchy, params)

    def quantise(level: int, z: Map) -> Map:
      q, ids = codebook.quantize(z, books[level])
      e = codebook.lookup(books[level], ids)
      terms[f'loss/commitment/{self.names[level]}'] = codebook.commitment_loss(z, e, 1.0)
      return q

    x_hat = hierarchies.decode(self.hierarchy, params, hierarchies.walk(self.hierarchy, params, x, quantise))
    reconstruction = jnp.mean(jnp.square(x - x_hat))
    loss = reconstruction + self.loss['commitment_weight'] * sum(terms.values())
    return loss, {'loss': loss, 'loss/reconstruction': reconstruction, **terms}

  def with_codes(self, network: base.Network, codes: list[Array] | tuple[Array, ...]) -> base.Network:
    """Returns the network with these codes at its levels, and its average, if there is one, too."""
    named = dict(zip(map(hierarchies.codes_key, self.names), codes, strict=True))
    average = network.ema_params
    return network.replace(
      params={**network.params, **named}, ema_params=None if average is None else {**average, **named}
    )

  def eval_step(self, read: Read, batch: Batch, key: jax.Array) -> Metrics:
    """Returns the squared error, pixels in [-1, 1], as `loss`, and that of clipped images in [0, 1]."""
    del key
    x, params = pixels.to_unit_range(batch['image']), read[NETWORK]
    ids = hierarchies.encode(self.hierarchy, params, x)
    x_hat = hierarchies.decode(self.hierarchy, params, hierarchies.embed(self.hierarchy, params, ids))
    values = {
      'loss': jnp.mean(jnp.square(x - x_hat), axis=(1, 2, 3)),
      'mse': jnp.mean(jnp.square(x - jnp.clip(x_hat, -1.0, 1.0)), axis=(1, 2, 3)) / 4,
    }
    return {name: base.masked_mean(value, batch['mask']) for name, value in values.items()}

  def counts(self, read: Read, batch: Batch) -> dict[str, jax.Array]:
    """Returns how often each code occurs in the images with mask 1, by level; see `Experiment.counts`."""
    ids = hierarchies.encode(self.hierarchy, read[NETWORK], pixels.to_unit_range(batch['image']))
    size = self.hierarchy.module.codebook_size
    return {
      f'codebook/{name}': codebook.histogram(rows, size, batch['mask'])
      for name, rows in zip(self.names, ids, strict=True)
    }

  # What later stages read -------------------------------------------------------------------------

  def observe(self, read: Read, batch: Batch, x: Image, key: jax.Array | None = None) -> Given:
    """Returns the ids of each image, by level."""
    del batch, key
    return dict(zip(self.inputs, hierarchies.encode(self.hierarchy, read[NETWORK], x), strict=True))

  def sample(self, read: Read, given: Given, keys: base.SampleKeys) -> dict[str, Image]:
    """Returns images of the ids: of the top alone, of one level more, ..., and {'x0': of all}."""
    del keys
    params, ids, last = read[NETWORK], tuple(given[name] for name in self.inputs), len(self.names)
    fill = self.fill_vectors(read) if self.partial else ()
    images = {}
    for name, kept in {**self.partial, 'x0': last}.items():
      missing = {level: fill[level] for level in range(kept, last)}
      carried = hierarchies.embed(self.hierarchy, params, ids, missing)
      images[name] = jnp.clip(hierarchies.decode(self.hierarchy, params, carried), -1.0, 1.0)
    return images

  def fill_vectors(self, read: Read) -> tuple[Array, ...]:
    """Returns, for each level, the vector [size of a code] that takes the place of its codes."""
    books = hierarchies.codes_of(self.hierarchy, read[NETWORK])
    if self.fill == 'zeros':
      return tuple(jnp.zeros_like(codes[0]) for codes in books)
    usage = read[tokenizers.FREQUENCIES]
    return tuple(usage[tokenizers.level_key(level)] @ codes for level, codes in enumerate(books))


def check_restarts(tokenizer: tokenizers.Levels, section: ConfigDict) -> None:
  """Raises UserError where the codes of a level would start anew for want of vectors."""
  for (height, width), size in zip(tokenizer.grids, tokenizer.sizes, strict=True):
    try:
      codebook.check_restarts(section.train.batch_size * height * width, size, section.loss.restart_below)
    except UserError as error:
      raise UserError(f'the level of {height}x{width} codes: {error}') from error
