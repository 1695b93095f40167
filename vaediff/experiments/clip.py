"""CLIP: images and captions as vectors that are near where they belong together.

Trained by the symmetric cross-entropy over the global batch (Radford et al. 2021, arXiv:2103.00020), or by
SigLIP's sigmoids (arXiv:2303.15343). What it scores is called `clip_own` everywhere: figures of the published
CLIP are of other weights, and nothing here is comparable with them. It draws no images.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vaediff import checks
from vaediff.conditions import text
from vaediff.data import pixels
from vaediff.data.words import TOKENS
from vaediff.errors import UserError
from vaediff.experiments import base, bounds, contrastive
from vaediff.models import layers
from vaediff.models.clip import Compared
from vaediff.models.functional import Model
from vaediff.optim import Optimizer, make_optimizer
from vaediff.spaces.embeddings import CLIP as NETWORK
from vaediff.spaces.embeddings import EMBEDDING, clip_model
from vaediff.types import Batch, Given, Image, Metrics, Params, Read

LARGEST = math.log(100)
"""Of ls, after each update."""
STUCK = 0.99
"""A loss above this share of that of equal vectors has learned nothing."""
LOW = 2.0
"""A scale below it is on its way to 1: it rises where training goes well."""
SIZES = {
  'width': bounds.whole(1, bounds.MAX_WIDTH),
  'num_layers': bounds.whole(1, bounds.MAX_LEVELS),
  'num_heads': bounds.whole(1, bounds.MAX_LEVELS),
}
BOUNDS = {
  **text.OF_TOKENIZERS,
  'model.patch': bounds.whole(1, bounds.MAX_WIDTH),
  'model.embedding_size': bounds.whole(1, bounds.MAX_WIDTH),
  'model.dtype': checks.one_of(layers.DTYPES),
  **bounds.within('model.image', SIZES),
  **bounds.within('model.text', SIZES),
  'loss.kind': checks.one_of(contrastive.LOSSES),
  **bounds.optimizers('optim'),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clip(base.Experiment):
  """The CLIP stage; trains the network `clip`.

  Attributes:
    clip: the architecture.
    optimizer: its optimizer.
    loss: of `contrastive.LOSSES`.
    flip: random horizontal flips; of captions that say left or right the loop refuses them.
  """

  clip: Model
  optimizer: Optimizer
  loss: str
  flip: bool

  draws_images = False
  measures = (EMBEDDING,)
  metrics = {'loss': False, 'recall_1': True, 'floor': False, 'chance': False, 'scale': True}
  bounds = BOUNDS

  @classmethod
  def from_config(cls, config: ConfigDict, stage: str) -> 'Clip':
    """Builds the experiment of `config.<stage>`.

    Raises:
      UserError: for data without captions, a batch in parts, or a value that is not allowed.
    """
    base.check(cls, config, stage)
    section = config[stage]
    if not config.data.caption_feature:
      raise UserError(
        f'the stage {stage!r} compares images with captions, and of these data none are read '
        "(data.caption_feature is ''): name the feature or column that holds them, as 'caption'"
      )
    if section.train.batch_size < 2:
      raise UserError(
        'train.batch_size must be at least 2, got 1: each image is compared with the texts of the batch, and '
        'of one the loss is 0 whatever the network does'
      )
    if section.train.microbatches > 1:
      raise UserError(
        f'train.microbatches must be 1, got {section.train.microbatches}: each image is compared with all '
        'texts of the batch, and parts of it would be smaller batches. Lower train.batch_size, or take more '
        'devices'
      )
    return cls(
      clip=clip_model(config, stage),
      optimizer=make_optimizer(section.optim, section.train.num_steps, decays=decays),
      loss=section.loss.kind,
      flip=section.train.flip,
    )

  @property
  def networks(self) -> Mapping[str, Model]:
    """The one network of this stage."""
    return {NETWORK: self.clip}

  def init(self, key: jax.Array) -> base.TrainState:
    """Returns the state at step 0."""
    network = base.init_network(self.clip, self.optimizer, key)
    return base.TrainState(step=jnp.int32(0), networks={NETWORK: network}, extra={})

  def train_step(
    self, state: base.TrainState, frozen: Read, batch: Batch, key: jax.Array, kind: str = ''
  ) -> tuple[base.TrainState, Metrics]:
    """Returns the state after one update, ls clamped, and what `values` does, over the batch."""
    del frozen, kind
    batch = pixels.prepare(batch, key if self.flip else None)
    real = jnp.ones(len(batch['image']), bool)

    def loss_fn(params: Params) -> tuple[jax.Array, Metrics]:
      values = self.values(params, batch['image'], batch[TOKENS], real)
      metrics = {name: jnp.mean(value) for name, value in values.items()}
      return metrics['loss'], metrics

    grads, metrics = jax.grad(loss_fn, has_aux=True)(state.networks[NETWORK].params)
    state, norms = base.update_one(state, NETWORK, grads, self.optimizer)
    network = state.networks[NETWORK]
    average = None if network.ema_params is None else clamped(network.ema_params)
    network = network.replace(params=clamped(network.params), ema_params=average)
    return state.replace(networks={NETWORK: network}), {**metrics, **norms}

  def eval_step(self, read: Read, batch: Batch, key: jax.Array) -> Metrics:
    """Returns what `values` does, over a batch, and `chance`: the loss of equal vectors, ln B."""
    del key
    real = batch['mask'] > 0
    values = self.values(read[NETWORK], pixels.to_unit_range(batch['image']), batch[TOKENS], real)
    found = {name: base.masked_mean(value, batch['mask']) for name, value in values.items()}
    return {**found, 'chance': jnp.log(jnp.sum(batch['mask']))}

  def values(self, params: Params, image: Image, tokens: jax.Array, real: jax.Array) -> Metrics:
    """Returns loss, its floor, recall at 1, and the scale, of each image, in [-1, 1], among the real ones."""
    seen = self.clip.apply(params, image, tokens)
    logits, right = logits_of(seen), contrastive.same_captions(tokens)
    return {
      'loss': contrastive.BY_NAME[self.loss](logits, right, real),
      'recall_1': contrastive.first_is_right(logits, right, real),
      'floor': contrastive.floor(right, real),
      'scale': jnp.broadcast_to(seen.scale, real.shape),
    }

  def warnings(self, metrics: Mapping[str, float]) -> tuple[str, ...]:
    """Returns that the vectors are still all the same, or that the scale falls, where it is so."""
    found = []
    if self.loss == contrastive.SOFTMAX and metrics['loss'] > STUCK * metrics['chance']:
      found.append(
        f'the loss {metrics["loss"]:.4g} is that of vectors which are all the same, ln B = '
        f'{metrics["chance"]:.4g}. Normal in the first updates; where it stays, nothing is learned: lower '
        'optim.learning_rate, raise optim.warmup_steps, see whether captions belong to their images'
      )
    if metrics['scale'] < LOW:
      found.append(
        f'the scale e^ls is {metrics["scale"]:.3g} and near 1: it rises where training goes well. Images and '
        'captions may not belong together'
      )
    return tuple(found)

  def observe(self, read: Read, batch: Batch, x: Image, key: jax.Array | None = None) -> Given:
    """Returns each image as a vector."""
    del batch, key
    return {EMBEDDING: self.images(read, x)}

  def images(self, read: Read, x: Image) -> jax.Array:
    """Returns images in [-1, 1] as vectors of unit length, float32 [n, embedding_size]."""
    return self.clip.apply(read[NETWORK], x, method='images')

  def texts(self, read: Read, tokens: jax.Array) -> jax.Array:
    """Returns captions, as ids, as vectors of unit length, float32 [n, embedding_size]."""
    return self.clip.apply(read[NETWORK], tokens, method='texts')


def logits_of(seen: Compared) -> contrastive.Logits:
  """Returns e^ls I T^T + b, in float32 also where matrices are multiplied in less."""
  cosines = jnp.matmul(seen.images, seen.texts.T, precision=jax.lax.Precision.HIGHEST)
  return seen.scale * cosines + seen.bias


def clamped(params: Params) -> Params:
  """Returns the parameters with ls at most `LARGEST`."""
  return {**params, 'log_scale': jnp.minimum(params['log_scale'], LARGEST)}


def decays(path: tuple[str, ...]) -> bool:
  """Returns whether weight decay is about a parameter: no gain, no bias, not ls, not the class token."""
  return path[-1] in ('kernel', 'embedding', 'places')
