"""The prior of DALL-E 2: a diffusion that draws, of a caption, the vector that CLIP makes of an image.

Ramesh et al. 2022 (arXiv:2204.06125), section 2.2: a causal transformer (`models.embedding_prior`) that
predicts the vector itself,

    L = E |f(y_t, t, caption) - y|^2,    y a vector at mean 0 and deviation 1 (`spaces.embeddings`)

The CLIP stage is frozen; of every training image the vector is computed once. A sample is the best of
`sample.candidates` by its product with the vector of the caption. It draws no images: a diffusion that reads
such vectors (`conditions.clip_image`) is fed them. A squared error says little about them, for it is mostly
what no caption can know: `vaediff.evaluation.embedded` has cosines and recall.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key
from ml_collections import ConfigDict

from vaediff import checks
from vaediff.conditions.base import Conditions
from vaediff.conditions.clip_text import CAPTION, READ, WORDS, ClipText, clip_text_condition
from vaediff.conditions.text import CHOSEN, OF_CAPTIONS
from vaediff.data import pixels
from vaediff.diffusion import grids, losses, samplers, schedules
from vaediff.errors import UserError
from vaediff.experiments import base, bounds
from vaediff.experiments.denoiser import Denoiser, Term
from vaediff.experiments.diffusion import Diffusion
from vaediff.models import layers, ports
from vaediff.models.embedding_prior import EmbeddingPrior as Module
from vaediff.models.functional import Model
from vaediff.optim import is_kernel, make_optimizer
from vaediff.spaces import embeddings
from vaediff.spaces.embeddings import EMBEDDING, Embeddings
from vaediff.types import Batch, Given, Image, Read, Values, Vectors

MOST_CANDIDATES = 1024
BOUNDS = {
  **OF_CAPTIONS,
  'model.width': bounds.whole(4, bounds.MAX_WIDTH),
  'model.num_layers': bounds.whole(1, bounds.MAX_LEVELS),
  'model.num_heads': bounds.whole(1, bounds.MAX_LEVELS),
  'model.dropout': checks.below_one(),
  'model.dtype': checks.one_of(layers.DTYPES),
  'diffusion.schedule': checks.one_of(schedules.SCHEDULES),
  'diffusion.loss_weight': checks.one_of(losses.LOG_WEIGHTS),
  'sample.sampler': checks.one_of(samplers.SAMPLERS),
  'sample.grid': checks.one_of(grids.ALL_GRIDS),
  'sample.num_steps': bounds.calls(),
  'sample.eta': checks.between(0, 1),
  'sample.variance': checks.one_of(('small', 'large')),
  'sample.temperature': bounds.spread(),
  'sample.guidance_weight': bounds.number(0, 1000),
  'sample.candidates': bounds.whole(1, MOST_CANDIDATES),
  **CHOSEN,
  **bounds.optimizers('optim'),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingPrior(Diffusion):
  """The stage of a prior of vectors; trains the network `denoiser`.

  Attributes:
    space: the vectors.
    text: the captions, the only condition.
    candidates: samples of which the one nearest to its caption is kept.
  """

  space: Embeddings
  text: ClipText
  candidates: int

  bounds = BOUNDS
  draws_images = False
  diffusion = None  # what draws images step by step; this draws none
  no_likelihood = ''

  @classmethod
  def from_config(cls, config: ConfigDict, stage: str) -> 'EmbeddingPrior':
    """Builds the experiment of `config.<stage>`.

    Raises:
      UserError: for a value that is not allowed, a stage that is no CLIP stage, captions that it has by other
        ids, or guidance that training has not prepared.
    """
    base.check(cls, config, stage)
    section = config[stage]
    space = embeddings.embeddings(config, section.clip, 'clip')
    text = clip_text_condition(config, stage, space.source)
    weight, terms = section.sample.guidance_weight, ()
    if weight > 0:
      if not text.dropout:
        raise UserError(
          f'sample.guidance_weight is {weight}; above 0 it needs a prior that was trained with '
          'conditions.text.dropout > 0, such as 0.1'
        )
      terms = (Term(weight=weight, without=(text.name,)),)
    return cls(
      space=space,
      text=text,
      denoiser=denoiser_of(section, space, text, terms),
      optimizer=make_optimizer(section.optim, section.train.num_steps, decays=is_kernel),
      flip=section.train.flip,
      microbatches=section.train.microbatches,
      settings={**section.sample.to_dict(), 'recompute_eps': True, 't_start': 1.0},
      start_image='',
      candidates=section.sample.candidates,
    )

  @property
  def handed(self) -> Mapping[str, jax.ShapeDtypeStruct]:
    """The vectors that the stages which read them are given."""
    return {EMBEDDING: jax.ShapeDtypeStruct(self.space.shape, jnp.float32)}

  @property
  def stored(self) -> Mapping[str, jax.ShapeDtypeStruct]:
    """The vector of every training image, unless images are mirrored."""
    return {} if self.flip else self.handed

  @property
  def num_function_evaluations(self) -> int:
    """Forward passes of the network per vector that is kept."""
    return super().num_function_evaluations * self.candidates

  def store(self, read: Read, batch: Batch, x: Image) -> Given:
    """Returns the vectors of images, of unit length."""
    del batch
    return {EMBEDDING: embeddings.images(self.space.source, read, x)}

  def examples(self, read: Read, batch: Batch, key: jax.Array, *, training: bool) -> tuple[Vectors, Values]:
    """Returns what is diffused, and the values of the captions; in training with flips."""
    batch = pixels.prepare(batch, key if training and self.flip else None)
    z = batch[EMBEDDING] if EMBEDDING in batch else self.store(read, batch, batch['image'])[EMBEDDING]
    given = self.conditions.observe(read, batch, batch['image'], None)
    return self.space.whitened(read, z), self.conditions.values(read, given)

  def sample(self, read: Read, given: Given, keys: base.SampleKeys) -> dict[str, Array]:
    """Returns {EMBEDDING: vectors of unit length}: of each caption the best candidate, of equals the first.

    The first starts from the given noise, the others from noise of their own; none depends on how many there
    are. Of a caption of no words all are equally near.
    """
    values, count = self.conditions.values(read, given), self.candidates
    own = jax.vmap(lambda key: candidate_keys(key, count))(keys.sampler)
    noise = given[base.NOISE][:, None]
    if count > 1:
      others = jax.vmap(jax.vmap(lambda key: jax.random.normal(key, self.space.shape)))(own[:, 1:, 1])
      noise = jnp.concatenate([noise, others], axis=1)
    y = self.settings['temperature'] * noise.reshape(-1, *self.space.shape)
    in_turn = {name: jnp.repeat(value, count, axis=0) for name, value in values.items()}
    denoise = self.sampler_denoiser(read, in_turn)
    y = self.steps(denoise, y, own[:, :, 0].reshape(-1), 1.0)
    z = self.space.decode(read, y)[EMBEDDING].reshape(noise.shape)
    fits = jnp.einsum('bcd,bd->bc', z, self.text.vectors(values), precision=jax.lax.Precision.HIGHEST)
    best = jnp.argmax(fits, axis=1)[:, None, None]
    return {EMBEDDING: jnp.take_along_axis(z, best, axis=1)[:, 0]}


def candidate_keys(key: jax.Array, count: int) -> Key[Array, 'candidates 2']:
  """Returns two keys for each candidate of one sample: of its steps, and of what it starts from."""
  return jax.vmap(lambda number: jax.random.split(jax.random.fold_in(key, number)))(jnp.arange(count))


def denoiser_of(section: ConfigDict, space: Embeddings, text: ClipText, terms: tuple[Term, ...]) -> Denoiser:
  """Returns the transformer of a stage's section, and how it is read."""
  struct = jax.ShapeDtypeStruct
  model = Model(
    module=Module(size=space.shape[0], texts=(WORDS, READ, CAPTION), **section.model.to_dict()),
    inputs=(
      struct((1, *space.shape), jnp.float32),
      struct((1,), jnp.float32),
      ports.structs(text.ports),
    ),
  )
  return Denoiser(
    model=model,
    conditions=Conditions((text,)),
    schedule=schedules.make_schedule(section.diffusion.schedule),
    prediction='x0',
    loss_weight=section.diffusion.loss_weight,
    bound=None,
    clip='none',
    threshold_percentile=100.0,
    terms=terms,
  )
