"""A small decoder in the place of an autoencoder's own, which at 256 pixels is most of the work of sampling.

  L = |teacher(z) - student(z)| + w LPIPS(teacher(z), student(z)),   z the latents of training images,

so that the student is asked for what the teacher draws, not for what the latents have lost.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vaediff import reads
from vaediff.data import pixels
from vaediff.experiments import base, bounds
from vaediff.experiments.perceptual import Perceptual
from vaediff.models.functional import Model
from vaediff.optim import Optimizer, make_optimizer
from vaediff.spaces import encoders
from vaediff.spaces.latents import LATENTS, RANGE
from vaediff.types import Batch, Given, Image, Metrics, Params, Read

BOUNDS = {
  'model.channels': bounds.whole(1, bounds.MAX_WIDTH),
  'model.num_blocks': bounds.whole(1, bounds.MAX_LEVELS),
  'loss.perceptual_weight': bounds.weight(),
  **bounds.optimizers('optim'),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LightDecoder(base.Experiment):
  """The stage of the light decoder; trains the network `decoder`.

  Attributes:
    decoder: the student.
    autoencoder: the frozen teacher.
    optimizer: of the student.
    perceptual: LPIPS, or nothing.
    flip: random horizontal flips.
    microbatches: parts that a batch is split into for the gradient.
    latent_shape: (height, width, channels).
  """

  decoder: Model
  autoencoder: reads.FromStage
  optimizer: Optimizer
  perceptual: Perceptual
  flip: bool
  microbatches: int
  latent_shape: tuple[int, int, int]

  @classmethod
  def from_config(cls, config: ConfigDict, stage: str) -> 'LightDecoder':
    """Builds the experiment of `config.<stage>`."""
    base.check(cls, config, stage)
    section = config[stage]
    named = section.autoencoder
    source = encoders.autoencoder_of(config, named.stage, named.workdir, 'autoencoder.stage')
    return cls(
      decoder=encoders.light_decoder_model(config, stage),
      autoencoder=source,
      optimizer=make_optimizer(section.optim, section.train.num_steps),
      perceptual=Perceptual.of(
        section.loss.perceptual, section.loss.perceptual_weight, config.evaluate.weights_dir
      ),
      flip=section.train.flip,
      microbatches=section.train.microbatches,
      latent_shape=encoders.latent_shape(config[named.stage].model, config.data),
    )

  reconstructs = True
  bounds = BOUNDS
  metrics = dict.fromkeys(('loss', 'mse_to_teacher', 'mse', 'mse_of_teacher'), False)

  @property
  def inputs(self) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Shapes of the latents before quantisation, which a sample decodes."""
    return {LATENTS: jax.ShapeDtypeStruct(self.latent_shape, jnp.float32)}

  @property
  def ranges(self) -> Mapping[str, str]:
    """What the numbers of latents are."""
    return {LATENTS: RANGE}

  @property
  def networks(self) -> Mapping[str, Model]:
    """The one network of this stage."""
    return {'decoder': self.decoder}

  @property
  def frozen(self) -> Mapping[str, reads.Reads]:
    """The autoencoder, and the network of the perceptual distance."""
    return {'autoencoder': self.autoencoder, **self.perceptual.frozen}

  def init(self, key: jax.Array) -> base.TrainState:
    """Returns the state at step 0."""
    network = base.init_network(self.decoder, self.optimizer, key)
    return base.TrainState(step=jnp.int32(0), networks={'decoder': network}, extra={})

  def pair(self, params: Params, frozen: Read, x: Image, key: jax.Array) -> tuple[Image, Image]:
    """Returns what teacher and student make of the same latents of x."""
    model, known = self.autoencoder.model, frozen['autoencoder']
    z = encoders.encode(model, known, x, jax.random.normal(key, (x.shape[0], *self.latent_shape)))
    taught = encoders.decode(model, known, z)
    return taught, self.decoder.apply(params, encoders.quantized(model, known, z))

  def train_step(
    self, state: base.TrainState, frozen: Read, batch: Batch, key: jax.Array, kind: str = ''
  ) -> tuple[base.TrainState, Metrics]:
    """Returns the state after one update of the distance between student and teacher."""
    del kind

    def loss_fn(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
      key_flip, key_z = jax.random.split(key)
      x = pixels.prepare(batch, key_flip if self.flip else None)['image']
      taught, learned = self.pair(params, frozen, x, key_z)
      pixel = jnp.mean(jnp.abs(taught - learned))
      perceptual = jnp.mean(self.perceptual(frozen, taught, learned))
      loss = pixel + perceptual
      return loss, {'loss': loss, 'loss/pixel': pixel, 'loss/perceptual': perceptual}

    params = state.networks['decoder'].params
    grads, metrics = base.gradients(loss_fn, params, batch, key, self.microbatches)
    state, norms = base.update_one(state, 'decoder', grads, self.optimizer)
    return state, {**metrics, **norms}

  def eval_step(self, read: Read, batch: Batch, key: jax.Array) -> Metrics:
    """Returns the pixel loss, and squared errors per pixel in [0, 1] to the teacher and to the data."""
    x = pixels.to_unit_range(batch['image'])
    taught, learned = self.pair(read['decoder'], read, x, key)

    def mse(a: Image, b: Image) -> jax.Array:
      return jnp.mean(jnp.square(jnp.clip(a, -1, 1) - jnp.clip(b, -1, 1)), axis=(1, 2, 3)) / 4

    values = {
      'loss': jnp.mean(jnp.abs(taught - learned), axis=(1, 2, 3)),
      'mse_to_teacher': mse(taught, learned),
      'mse': mse(x, learned),
      'mse_of_teacher': mse(x, taught),
    }
    return {name: base.masked_mean(value, batch['mask']) for name, value in values.items()}

  def observe(self, read: Read, batch: Batch, x: Image, key: jax.Array | None = None) -> Given:
    """Returns the latents of each image: the mean, or with a key of a KL bottleneck drawn ones."""
    del batch
    noise = None if key is None else encoders.normal(key, (x.shape[0], *self.latent_shape))
    return {LATENTS: encoders.encode(self.autoencoder.model, read['autoencoder'], x, noise)}

  def sample(self, read: Read, given: Given, keys: base.SampleKeys) -> dict[str, Image]:
    """Returns {'x0': images of the latents by the light decoder}."""
    del keys
    z = encoders.quantized(self.autoencoder.model, read['autoencoder'], given[LATENTS])
    return {'x0': jnp.clip(self.decoder.apply(read['decoder'], z), -1.0, 1.0)}
