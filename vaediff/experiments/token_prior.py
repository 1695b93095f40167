"""The prior of a tokenizer's ids: a transformer that draws them one after the other.

  L = mean over places of -log p(c_n | c_<n, class and caption),   nats per token

The ids of the training images are computed once; the tokenizer is frozen. With several levels (VQ-VAE-2,
arXiv:1906.00446) there is one network for each, coarse first, and the ids of a level are predicted given all
coarser ones: p(top) p(bottom | top), trained side by side.

Samples are ids; the tokenizer's own decoder shows them as images, and a stage that reads ids, as a diffusion
decoder does, is fed them as they are.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from vaediff import checks, reads
from vaediff.conditions import SAMPLE_BOUNDS
from vaediff.conditions.base import Conditions
from vaediff.data import pixels
from vaediff.diffusion.likelihood import bits_per_dimension
from vaediff.errors import UserError
from vaediff.experiments import base, bounds, id_usage
from vaediff.experiments.token_source import Before, Source, conditions_of
from vaediff.models import layers, token_sampling, transformer, transformer_blocks
from vaediff.models.functional import Model
from vaediff.optim import Optimizer, global_norm, is_kernel, make_optimizer
from vaediff.spaces import tokenizers
from vaediff.spaces.tokenizers import TOKENIZER, Grids, Tokenizer
from vaediff.types import Batch, Given, Image, Keys, Metrics, Params, Read, Values

FORMS = {'decoder': transformer.Decoder, 'encoder_decoder': transformer.EncoderDecoder}
NETWORK = 'prior'
"""Name of the network; of several, coarse first, with '_0', '_1', ..."""
MOST_LEVELS = 4
BOUNDS = {
  'model.form': checks.one_of(FORMS),
  'model.style': checks.one_of(transformer_blocks.STYLES),
  'model.width': bounds.whole(1, bounds.MAX_WIDTH),
  'model.num_layers': bounds.whole(1, bounds.MAX_LEVELS),
  'model.num_encoder_layers': bounds.whole(1, bounds.MAX_LEVELS),
  'model.num_heads': bounds.whole(1, bounds.MAX_LEVELS),
  'model.dropout': checks.below_one(),
  'model.dtype': checks.one_of(layers.DTYPES),
  'loss.keep_probability': bounds.number(0, 1, above=True),
  'sample.guidance_weight': bounds.number(0, 1000),
  'sample.temperature': bounds.number(0, 1000),
  'sample.top_k': bounds.whole(0, 2**22),
  'sample.top_p': bounds.number(0, 1, above=True),
  **SAMPLE_BOUNDS,
  **bounds.optimizers('optim'),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenPrior(base.Experiment):
  """The stage of a token prior; trains one network for each level of ids.

  Attributes:
    tokenizer: whose ids they are.
    models: of the levels, coarse first.
    conditions: the label, the caption, both, or nothing.
    optimizer: of each network.
    rule: how ids are drawn.
    keep_probability: that an id is the one that it is, among the inputs of training; others are any.
    flip: half of the training images are mirrored.
    microbatches: parts that a batch is split into for the gradient.
    dimensions: of an image.
    source: how the conditions stand before the ids.
  """

  tokenizer: Tokenizer
  models: tuple[Model, ...]
  conditions: Conditions
  optimizer: Optimizer
  rule: token_sampling.Rule
  keep_probability: float
  flip: bool
  microbatches: int
  dimensions: int
  source: Source = Source()

  likelihood = base.IDS
  bounds = BOUNDS
  metrics = {
    'loss': False,
    'bits_per_dimension': False,
    **{f'nats_per_token/{name}': False for name in tokenizers.names_of(MOST_LEVELS)},
  }

  @classmethod
  def from_config(cls, config: ConfigDict, stage: str) -> 'TokenPrior':
    """Builds the experiment of `config.<stage>`."""
    base.check(cls, config, stage)
    section, data = config[stage], config.data
    named = section.tokenizer
    tokenizer = tokenizers.tokenizer_of(config, named.stage, named.workdir, 'tokenizer.stage')
    conditions, source = conditions_of(config, stage), Source.of(config, stage)
    return cls(
      tokenizer=tokenizer,
      models=models_of(section.model, tokenizer, source),
      source=source,
      conditions=conditions,
      optimizer=make_optimizer(section.optim, section.train.num_steps, decays=is_kernel),
      rule=rule_of(section.sample, tokenizer, conditions),
      keep_probability=section.loss.keep_probability,
      flip=section.train.flip,
      microbatches=section.train.microbatches,
      dimensions=data.image_size**2 * data.channels,
    )

  @property
  def names(self) -> tuple[str, ...]:
    """Names of the ids, coarse first."""
    return tokenizers.names_of(len(self.models))

  @property
  def network_names(self) -> tuple[str, ...]:
    """Names of the networks, coarse first."""
    return tuple(name.replace(tokenizers.CODES, NETWORK) for name in self.names)

  @property
  def networks(self) -> Mapping[str, Model]:
    """One transformer for each level."""
    return dict(zip(self.network_names, self.models, strict=True))

  @property
  def frozen(self) -> Mapping[str, reads.Reads]:
    """The tokenizer, and what the conditions read."""
    return {TOKENIZER: self.tokenizer.source, **self.conditions.frozen}

  @property
  def draws_images(self) -> bool:
    """Whether the tokenizer has a decoder of its own; else ids alone, for the diffusion that decodes them."""
    return self.tokenizer.decodes

  @property
  def handed(self) -> Mapping[str, jax.ShapeDtypeStruct]:
    """The ids of each level, for the stages that read them."""
    grids = zip(self.names, self.tokenizer.grids, strict=True)
    return {name: jax.ShapeDtypeStruct(grid, jnp.int32) for name, grid in grids}

  @property
  def id_sizes(self) -> Mapping[str, int]:
    """Number of codes of each level."""
    return dict(zip(self.names, self.tokenizer.sizes, strict=True))

  @property
  def inputs(self) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Of the conditions; and ids, then not drawn: with those of coarser levels alone the finer ones are."""
    return {**self.conditions.inputs, **self.handed}

  @property
  def stored(self) -> Mapping[str, jax.ShapeDtypeStruct]:
    """The ids of every training image; of its mirror image too, whose ids are not the mirrored ones."""
    views, struct = (2,) if self.flip else (), jax.ShapeDtypeStruct
    return {name: struct((*views, *each.shape), each.dtype) for name, each in self.handed.items()}

  @property
  def classes(self) -> tuple[int, ...]:
    """Classes that samples are asked to be of, in turn: those of the label."""
    return self.conditions.classes

  @property
  def num_groups(self) -> int:
    """Number of kinds that samples come in, in turn: those of the label."""
    return self.conditions.num_groups

  @property
  def can_be_guided(self) -> bool:
    """Whether training drops a condition."""
    return bool(self.conditions.droppable)

  @property
  def num_tokens(self) -> int:
    """Number of tokens of an image, those of all levels."""
    return sum(math.prod(grid) for grid in self.tokenizer.grids)

  def init(self, key: jax.Array) -> base.TrainState:
    """Returns the state at step 0."""
    keys = jax.random.split(key, len(self.models))
    pairs = zip(self.networks.items(), keys, strict=True)
    networks = {name: base.init_network(model, self.optimizer, one) for (name, model), one in pairs}
    return base.TrainState(step=jnp.int32(0), networks=networks, extra={})

  # Training ---------------------------------------------------------------------------------------

  def store(self, read: Read, batch: Batch, x: Image) -> Given:
    """Returns the ids of each image, and with flips of its mirror image."""
    del batch
    seen = self.tokenizer.codes(read[TOKENIZER], x)
    if self.flip:
      mirrored = self.tokenizer.codes(read[TOKENIZER], x[:, :, ::-1])
      seen = tuple(jnp.stack(pair, axis=1) for pair in zip(seen, mirrored, strict=True))
    return dict(zip(self.names, seen, strict=True))

  def check_stored(self, stored: Mapping[str, np.ndarray]) -> None:
    """Raises UserError where ids are none of the tokenizer's, or a level says next to nothing."""
    for name, size in self.id_sizes.items():
      id_usage.check(name, stored[name], size, self.tokenizer.source.stage)

  def ids(self, read: Read, batch: Batch, key: jax.Array | None) -> Grids:
    """Returns the ids of a batch, stored or made of its images; with a key and flips those of one view."""
    known = self.handed.keys() <= batch.keys()
    made = batch if known else self.store(read, batch, pixels.to_unit_range(batch['image']))
    stored = {name: made[name] for name in self.names}
    if not self.flip:
      return tuple(stored.values())
    if key is None:
      return tuple(value[:, 0] for value in stored.values())
    mask = pixels.random_flip(key, len(batch['image']))[:, None, None]
    return tuple(jnp.where(mask, value[:, 1], value[:, 0]) for value in stored.values())

  def values(self, read: Read, batch: Batch) -> Values:
    """Returns what the conditions see of a batch."""
    x = pixels.to_unit_range(batch['image'])
    return self.conditions.values(read, self.conditions.observe(read, batch, x, None))

  def nats(
    self, params: Mapping[str, Params], codes: Grids, before: Before, key: jax.Array | None = None
  ) -> dict[str, Float[Array, ' batch']]:
    """Returns -log p of the ids of each level given those above, summed over places, by name.

    With a key as training has it: dropout, and inputs that are not kept.
    """
    found, keys = {}, (None,) * len(codes) if key is None else tuple(jax.random.split(key, len(codes)))
    for level, (name, own) in enumerate(zip(self.names, keys, strict=True)):
      inputs, flat, dropout = codes, codes[level].reshape(len(before.ids), -1), None
      if own is not None:
        key_keep, dropout = jax.random.split(own)
        inputs = self.corrupted(codes, key_keep)
      logits = self.models[level].apply(
        params[self.network_names[level]], inputs[level].reshape(flat.shape), before.ids, *inputs[:level],
        mask=before.mask, key_dropout=dropout,
      )  # fmt: skip
      found[name] = jnp.sum(token_sampling.nats(logits, flat), axis=1)
    return found

  def corrupted(self, codes: Grids, key: jax.Array) -> Grids:
    """Returns ids of which each is any other with the probability that it is not kept."""
    if self.keep_probability == 1:
      return codes
    found = []
    for ids, size, own in zip(codes, self.tokenizer.sizes, jax.random.split(key, len(codes)), strict=True):
      key_keep, key_id = jax.random.split(own)
      kept = jax.random.bernoulli(key_keep, self.keep_probability, ids.shape)
      found.append(jnp.where(kept, ids, jax.random.randint(key_id, ids.shape, 0, size, ids.dtype)))
    return tuple(found)

  def report(self, nats: Mapping[str, Array]) -> dict[str, Array]:
    """Returns nats per token, those of each level of several, and bits per dimension; per image."""
    total = sum(nats.values())
    bits = bits_per_dimension(total, self.dimensions)
    figures = {'loss': total / self.num_tokens, 'bits_per_dimension': bits}
    if len(nats) > 1:
      grids = zip(nats.items(), self.tokenizer.grids, strict=True)
      figures |= {f'nats_per_token/{name}': value / math.prod(grid) for (name, value), grid in grids}
    return figures

  def train_step(
    self, state: base.TrainState, frozen: Read, batch: Batch, key: jax.Array, kind: str = ''
  ) -> tuple[base.TrainState, Metrics]:
    """Returns the state after one update of every level's cross-entropy, and the figures of `report`."""
    del kind

    def loss_fn(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
      key_view, key_drop, key_nats = jax.random.split(key, 3)
      codes = self.ids(frozen, batch, key_view)
      drop = self.conditions.drop(key_drop, len(codes[0]))
      before = self.source(self.values(frozen, batch), len(codes[0]), drop)
      nats = self.nats(params, codes, before, key_nats)
      places = zip(nats.values(), self.tokenizer.grids, strict=True)
      loss = sum(jnp.mean(value) / math.prod(grid) for value, grid in places)
      return loss, {name: jnp.mean(value) for name, value in self.report(nats).items()}

    params = {name: network.params for name, network in state.networks.items()}
    grads, metrics = base.gradients(loss_fn, params, batch, key, self.microbatches)
    networks = {
      name: base.apply_gradients(network, grads[name], self.optimizer, state.step)
      for name, network in state.networks.items()
    }
    norms = {f'grad_norm/{name}': global_norm(value) for name, value in grads.items()}
    return base.TrainState(step=state.step + 1, networks=networks, extra=state.extra), {**metrics, **norms}

  def eval_step(self, read: Read, batch: Batch, key: jax.Array) -> Metrics:
    """Returns nats per token, those of each level of several, and bits per dimension of the image."""
    figures = self.report(self.bound(read, batch, jax.random.split(key, 1), 0))
    return {name: base.masked_mean(value, batch['mask']) for name, value in figures.items()}

  def bound(self, read: Read, batch: Batch, keys: Keys, num_times: int) -> dict[str, jax.Array]:
    """Returns -log p of the ids of each level, in nats per image: no bound, but the mass itself."""
    del keys, num_times
    codes = self.ids(read, batch, None)
    return self.nats(read, codes, self.source(self.values(read, batch), len(codes[0])))

  # Sampling ---------------------------------------------------------------------------------------

  def draw(self, read: Read, keys: base.SampleKeys, indices: Int[Array, ' batch']) -> Given:
    """Returns the labels and captions, in turn."""
    return self.conditions.draw(read, keys.conditions, indices)

  def sample(self, read: Read, given: Given, keys: base.SampleKeys) -> dict[str, Array]:
    """Returns the ids of each level, and {'x0': their images} where the tokenizer has a decoder."""
    own = jax.vmap(lambda key: jax.random.split(key, len(self.models)))(keys.sampler)
    before = self.source(self.conditions.values(read, given), len(own))
    codes = ()
    for level, name in enumerate(self.names):
      if name in given:
        codes += (self.checked(name, given[name]),)
      else:
        codes += (self.drawn(read, level, before, codes, own[:, level]),)
    found = dict(zip(self.names, codes, strict=True))
    if not self.draws_images:
      return found
    return {**found, 'x0': jnp.clip(self.tokenizer.decode(read[TOKENIZER], codes), -1.0, 1.0)}

  def checked(self, name: str, codes: Array) -> Array:
    """Returns ids that are given; raises UserError where they have another grid."""
    wanted = self.handed[name].shape
    if codes.shape[1:] != wanted:
      raise UserError(f'{name} must be ids on a grid of {wanted}, got {codes.shape[1:]}')
    return codes

  def drawn(self, read: Read, level: int, before: Before, above: Grids, keys: Keys) -> Array:
    """Returns ids of a level given the coarser ones, drawn in one scan that keeps keys and values."""
    model, params = self.models[level], read[self.network_names[level]]
    if self.rule.guidance_weight:
      before = before.paired(self.source({}, len(before.ids)))
      above = tuple(token_sampling.paired(ids, ids) for ids in above)
    context = model.apply(params, *above, method='context')
    grid = self.tokenizer.grids[level]
    codes, _ = token_sampling.sample(
      lambda: model.apply(params, before.ids, context, before.mask, method='start'),
      lambda codes, n, cache: model.apply(params, codes, n, cache, context, method='step'),
      keys, math.prod(grid), self.rule,
    )  # fmt: skip
    return codes.reshape(-1, *grid)


def models_of(section: ConfigDict, tokenizer: Tokenizer, source: Source) -> tuple[Model, ...]:
  """Returns the network of each level of a tokenizer, coarse first.

  Raises:
    UserError: for fields that do not fit each other.
  """
  fields = section.to_dict()
  form, encoder_layers = fields.pop('form'), fields.pop('num_encoder_layers')
  own = {'num_encoder_layers': encoder_layers} if form == 'encoder_decoder' else {}
  levels, found = tuple(zip(tokenizer.grids, tokenizer.sizes, strict=True)), []
  ids = lambda *shape: jax.ShapeDtypeStruct((1, *shape), jnp.int32)
  for number, (grid, size) in enumerate(levels):
    above = levels[:number]
    module = FORMS[form](
      grid=grid, codebook_size=size, above=above, source_size=source.size, source_length=source.length,
      **fields, **own,
    )
    inputs = (ids(math.prod(grid)), ids(source.length), *(ids(*each) for each, _ in above))
    found.append(Model(module=module, inputs=inputs))
  return tuple(found)


def rule_of(sample: ConfigDict, tokenizer: Tokenizer, conditions: Conditions) -> token_sampling.Rule:
  """Returns how ids are drawn.

  Raises:
    UserError: for guidance that training has not prepared, or more ids than a level has.
  """
  least = min(tokenizer.sizes)
  if sample.top_k > least:
    raise UserError(
      f'sample.top_k must be in 0 ... {least}, the codes of {tokenizer.source.stage!r}, got {sample.top_k}'
    )
  if sample.guidance_weight > 0 and not conditions.droppable:
    raise UserError(
      f'sample.guidance_weight is {sample.guidance_weight}; above 0 it needs a prior that was trained with a '
      'label (variant label) or captions (variant text) and their dropout > 0, such as 0.1'
    )
  fields = [field.name for field in dataclasses.fields(token_sampling.Rule)]
  return token_sampling.Rule(**{name: sample[name] for name in fields})
