"""The autoencoder of latent models: a map of latents instead of one vector, sharp instead of probable.

  L = |x - x_hat| + w LPIPS(x, x_hat) + the bottleneck's loss + lambda * adversarial loss

with lambda the adaptive weight of VQGAN (Esser et al. 2021, arXiv:2012.09841, eq. 7) times a factor, from a
start step on. The bottleneck is one of: KL (Rombach et al. 2022, arXiv:2112.10752, weight about 1e-6), none
(deterministic and bounded by tanh: the free latents of LDDGAN), VQ, whose codes follow averages or
gradients, or relaxed codes (the discrete VAE of DALL-E, Ramesh et al. 2021, arXiv:2102.12092). With VQ a
later stage models the vectors before quantisation, and the decoder quantises; of relaxed codes the codes.
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
from vaediff.diffusion import adversarial
from vaediff.experiments import autoencoder_checks, base, bottlenecks, bounds, pixel_loss
from vaediff.experiments.perceptual import Perceptual
from vaediff.models.autoencoder import Outputs, last_kernel, with_last_kernel
from vaediff.models.functional import Model
from vaediff.models.patch_discriminator import PatchDiscriminator
from vaediff.optim import Optimizer, global_norm, is_kernel, make_optimizer
from vaediff.spaces import encoders
from vaediff.spaces.latents import LATENTS, RANGE
from vaediff.types import Batch, Given, Image, Metrics, Params, Read

ADVERSARIAL = 'adversarial'
"""Kind of the updates from `loss.adversarial_start_step` on: of both networks, each against the other."""
JUDGED = 'judged'
"""Kind of those from `loss.discriminator_start_step` to there: the discriminator learns, without a weight."""

BOUNDS = {
  **pixel_loss.BOUNDS,
  **bottlenecks.RELAXED,
  'loss.codebook': checks.one_of(('ema', 'gradient')),
  'loss.codebook_decay': checks.below_one(),
  'loss.kl_weight': bounds.weight(),
  'loss.commitment_weight': bounds.weight(),
  'loss.restart_below': bounds.weight(),
  'loss.adversarial_weight': bounds.weight(),
  'loss.adversarial_start_step': bounds.updates(0),
  'loss.discriminator_start_step': bounds.updates(0),
  'loss.entropy_weight': bounds.weight(),
  'loss.perceptual_weight': bounds.weight(),
  'model.latent_channels': bounds.whole(1, bounds.MAX_WIDTH),
  'model.codebook_size': bounds.whole(0, 2**22),
  'model.inner_channels': bounds.whole(0, bounds.MAX_WIDTH),
  **bounds.within('model', bounds.CONVOLUTIONAL),
  'discriminator.channels': bounds.whole(1, bounds.MAX_WIDTH),
  'discriminator.num_layers': bounds.whole(1, 16),
  **bounds.optimizers('optim', 'optim_discriminator'),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Autoencoder(base.Experiment):
  """The autoencoder stage; trains the networks `autoencoder` and, with an adversarial loss, `discriminator`.

  Attributes:
    autoencoder: encoder, decoder and codes.
    bottleneck: what lies between encoder and decoder.
    pixel_loss: how far the decoder's output is from an image.
    discriminator: judges patches; None without an adversarial loss.
    optimizer: of the autoencoder.
    optimizer_discriminator: of the discriminator.
    perceptual: LPIPS, or nothing.
    loss: the stage's `loss` section.
    flip: random horizontal flips.
    microbatches: parts that a batch is split into for the gradient.
    latent_shape: (height, width, channels).
    notes: see `base.Experiment`.
  """

  autoencoder: Model
  bottleneck: bottlenecks.Bottleneck
  pixel_loss: pixel_loss.PixelLoss
  discriminator: Model | None
  optimizer: Optimizer
  optimizer_discriminator: Optimizer
  perceptual: Perceptual
  loss: Mapping[str, Any]
  flip: bool
  microbatches: int
  latent_shape: tuple[int, int, int]
  notes: tuple[str, ...] = ()

  @classmethod
  def from_config(cls, config: ConfigDict, stage: str) -> 'Autoencoder':
    """Builds the experiment of `config.<stage>`."""
    section, size, channels = config[stage], config.data.image_size, config.data.channels
    base.check(cls, config, stage)
    latent_shape = encoders.latent_shape(section.model, config.data)
    autoencoder = encoders.autoencoder_model(section.model, config.data)
    autoencoder_checks.check(config, stage, autoencoder)
    bottleneck = bottlenecks.BY_KIND[section.model.bottleneck]
    bottleneck.check(section, latent_shape)
    pixel_loss.check(section)
    between = bottleneck(model=autoencoder, loss=section.loss.to_dict())
    discriminator = None
    if section.loss.adversarial_weight > 0:
      discriminator = Model(
        module=PatchDiscriminator(**section.discriminator.to_dict()),
        inputs=(jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32),),
      )
    return cls(
      autoencoder=autoencoder,
      bottleneck=between,
      pixel_loss=pixel_loss.PixelLoss.of(section),
      discriminator=discriminator,
      optimizer=make_optimizer(section.optim, section.train.num_steps, decays=is_kernel),
      optimizer_discriminator=make_optimizer(
        section.optim_discriminator, section.train.num_steps, 'optim_discriminator', is_kernel
      ),
      perceptual=Perceptual.of(
        section.loss.perceptual, section.loss.perceptual_weight, config.evaluate.weights_dir
      ),
      loss=section.loss.to_dict(),
      flip=section.train.flip,
      microbatches=section.train.microbatches,
      latent_shape=latent_shape,
      notes=autoencoder_checks.notes_of(section) + between.notes(size * size * channels, section),
    )

  reconstructs = True
  bounds = BOUNDS
  measures = (LATENTS,)
  metrics = {
    **dict.fromkeys(('loss', 'mse', 'lpips_vgg16', 'lpips_alexnet', 'discriminator_loss'), False),
    **{'codebook/used': True, 'codebook/perplexity': True, 'codebook/unused': False},
    **bottlenecks.Gumbel.metrics,
  }

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
    """The autoencoder, and the discriminator where there is one."""
    networks = {'autoencoder': self.autoencoder}
    return networks | ({'discriminator': self.discriminator} if self.discriminator else {})

  @property
  def frozen(self) -> Mapping[str, reads.Reads]:
    """The network of the perceptual distance."""
    return self.perceptual.frozen

  def kind_of(self, step: int) -> str:
    """Returns 'adversarial' from its start step on, before it 'judged' from its own, with a discriminator."""
    if not self.discriminator:
      return ''
    if step >= self.loss['adversarial_start_step']:
      return ADVERSARIAL
    return JUDGED if step >= self.loss['discriminator_start_step'] else ''

  def init(self, key: jax.Array) -> base.TrainState:
    """Returns the state at step 0; in `extra` is what the bottleneck keeps."""
    keys = dict(zip(('autoencoder', 'discriminator'), jax.random.split(key), strict=True))
    networks = {'autoencoder': base.init_network(self.autoencoder, self.optimizer, keys['autoencoder'])}
    if self.discriminator:
      networks['discriminator'] = base.init_network(
        self.discriminator, self.optimizer_discriminator, keys['discriminator']
      )
    extra = self.bottleneck.init(networks['autoencoder'].params)
    return base.TrainState(step=jnp.int32(0), networks=networks, extra=extra)

  # Training ---------------------------------------------------------------------------------------

  def train_step(
    self, state: base.TrainState, frozen: Read, batch: Batch, key: jax.Array, kind: str = ''
  ) -> tuple[base.TrainState, Metrics]:
    """Returns the state after an update of the autoencoder and, by kind, one of the discriminator."""
    key_flip, key_codes, key_loss, key_discriminator = jax.random.split(key, 4)
    x = pixels.prepare(batch, key_flip if self.flip else None)['image']
    network, extra, metrics = self.bottleneck.before_update(
      state.networks['autoencoder'], state.extra, x, key_codes
    )
    judge = state.networks['discriminator'].params if kind == ADVERSARIAL else None
    weight = None  # found with the loss, where one part is the whole batch
    if judge is not None and self.loss['adaptive_weight'] and self.microbatches > 1:
      weight = self.whole_batch_weight(network.params, judge, frozen, x, key_loss, state.step)

    def loss_fn(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
      return self.autoencoder_loss(params, judge, frozen, batch['x'], key, state.step, weight)

    grads, found = base.gradients(loss_fn, network.params, {'x': x}, key_loss, self.microbatches)
    metrics |= found | {'grad_norm/autoencoder': global_norm(grads)}
    after = base.apply_gradients(network, grads, self.optimizer, state.step)
    network = self.bottleneck.after_update(network, after)
    networks = {**state.networks, 'autoencoder': network}

    if kind in (ADVERSARIAL, JUDGED):

      def judge_fn(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        x_hat = self.image_of(self.reconstruct(network.params, batch['x'], key, state.step)[0])
        return self.discriminator_loss(params, batch['x'], jax.lax.stop_gradient(x_hat))

      before = state.networks['discriminator']
      grads, found = base.gradients(judge_fn, before.params, {'x': x}, key_discriminator, self.microbatches)
      metrics |= found | {'grad_norm/discriminator': global_norm(grads)}
      networks['discriminator'] = base.apply_gradients(
        before, grads, self.optimizer_discriminator, state.step
      )
    return base.TrainState(step=state.step + 1, networks=networks, extra=extra), metrics

  def reconstruct(
    self, params: Params, x: Image, key: jax.Array | None, step: jax.Array | None = None
  ) -> tuple[Outputs, Array, bottlenecks.Passed]:
    """Returns the decoder's output, its last features before, and what came out of the bottleneck.

    With a key, after `step` updates, the bottleneck may draw, and dropout is on.
    """
    key_noise, key_dropout = (None, None) if key is None else jax.random.split(key)
    dropout = {} if key is None else {'key_dropout': key_dropout, 'deterministic': False}
    encoded = self.autoencoder.apply(params, x, method=self.bottleneck.reads, **dropout)
    passed = self.bottleneck.pass_on(params, encoded, x, key_noise, step)
    features = self.autoencoder.apply(params, passed.z, method='decode_features', **dropout)
    return self.autoencoder.apply(params, features, method='last_conv'), features, passed

  def image_of(self, outputs: Outputs) -> Image:
    """Returns x_hat, not clipped, of the decoder's output."""
    return self.autoencoder.module.image_of(outputs)

  def autoencoder_loss(
    self,
    params: Params,
    judge: Params | None,
    frozen: Read,
    x: Image,
    key: jax.Array | None,
    step: jax.Array | None,
    weight: jax.Array | None = None,
  ) -> tuple[jax.Array, Metrics]:
    """Returns the autoencoder's loss, a mean over the batch, and its terms.

    Without a `weight` of the adversarial loss it is the adaptive one of these images, or 1.
    """
    outputs, features, passed = self.reconstruct(params, x, key, step)
    reconstruction = self.distance(frozen, x, outputs)
    factors = self.bottleneck.factors(step)
    loss = reconstruction + sum(factors[name] * value for name, value in passed.terms.items())
    metrics = {'loss/reconstruction': reconstruction, **passed.metrics}
    metrics |= {f'loss/{name}': value for name, value in passed.terms.items()}
    if judge is not None:
      if weight is None and self.loss['adaptive_weight']:
        fixed = (params, judge, frozen, x, features)
        gradients = jax.grad(lambda kernels: self.at_last_kernel(*fixed, kernels))(two_kernels(params))
        weight = adversarial.adaptive_weight(**gradients)
      weight = jnp.float32(1.0) if weight is None else weight
      deception = self.deception(judge, outputs)
      loss += self.loss['adversarial_weight'] * weight * deception
      metrics |= {'loss/adversarial': deception, 'adaptive_weight': weight}
    return loss, {'loss': loss, **metrics}

  def whole_batch_weight(
    self, params: Params, judge: Params, frozen: Read, x: Image, key: jax.Array, step: jax.Array
  ) -> jax.Array:
    """Returns the adaptive weight of a batch that is split into parts: of the gradients of the whole.

    A ratio of norms is no mean over parts, so that they are passed through once more, forwards; with the same
    key, part by part, as the loss: the images are the same.
    """

    def of_part(kernels: dict[str, Array], batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
      _, features, _ = self.reconstruct(params, batch['x'], key, step)
      return self.at_last_kernel(params, judge, frozen, batch['x'], features, kernels), {}

    gradients, _ = base.gradients(of_part, two_kernels(params), {'x': x}, key, self.microbatches)
    return adversarial.adaptive_weight(**gradients)

  def at_last_kernel(
    self, params: Params, judge: Params, frozen: Read, x: Image, features: Array, kernels: dict[str, Array]
  ) -> jax.Array:
    """Returns the distance with the one last kernel plus the deception with the other; both means."""
    fixed = jax.lax.stop_gradient((params, features))

    def outputs_of(kernel: Array) -> Outputs:
      return self.autoencoder.apply(with_last_kernel(fixed[0], kernel), fixed[1], method='last_conv')

    distance = self.distance(frozen, x, outputs_of(kernels['of_reconstruction']))
    return distance + self.deception(judge, outputs_of(kernels['of_adversary']))

  def distance(self, frozen: Read, x: Image, outputs: Outputs) -> jax.Array:
    """Returns pixel and perceptual loss of the decoder's output, a mean over the batch."""
    x_hat = self.image_of(outputs)
    return jnp.mean(self.pixel_loss(x, x_hat, outputs)) + jnp.mean(self.perceptual(frozen, x, x_hat))

  def deception(self, judge: Params, outputs: Outputs) -> jax.Array:
    """Returns minus the mean logit of the reconstructions, the generator's side of the hinge loss."""
    return -jnp.mean(self.discriminator.apply(judge, self.image_of(outputs)))

  def discriminator_loss(self, params: Params, x: Image, x_hat: Image) -> tuple[jax.Array, Metrics]:
    """Returns the hinge loss over patches, and the mean logits."""
    real, fake = self.judged(params, x, x_hat)
    loss = jnp.mean(adversarial.hinge_discriminator_loss(real, fake))
    return loss, {
      'loss/discriminator': loss,
      'logits/real': jnp.mean(real),
      'logits/fake': jnp.mean(fake),
    }

  def judged(self, params: Params, x: Image, x_hat: Image) -> tuple[Array, Array]:
    """Returns the logits of the patches of images and of reconstructions, [batch, rows, columns]."""
    return self.discriminator.apply(params, x), self.discriminator.apply(params, x_hat)

  def eval_step(self, read: Read, batch: Batch, key: jax.Array) -> Metrics:
    """Returns pixel and perceptual loss, and the squared error per pixel in [0, 1], from the mean latents.

    With a discriminator also its hinge loss: 1 where it is at chance, or not trained yet.
    """
    x = pixels.to_unit_range(batch['image'])
    outputs = self.reconstruct(read['autoencoder'], x, None)[0]
    decoded = self.image_of(outputs)
    x_hat = jnp.clip(decoded, -1.0, 1.0)
    pixel, perceptual = self.pixel_loss(x, x_hat, outputs), self.perceptual(read, x, x_hat)
    values = {'loss': pixel + perceptual, 'mse': jnp.mean(jnp.square(x - x_hat), axis=(1, 2, 3)) / 4}
    values |= self.bottleneck.figures(read['autoencoder'], x, key)
    if self.perceptual.source:
      values[f'lpips_{self.perceptual.network}'] = perceptual / self.perceptual.weight
    if self.discriminator:
      logits = self.judged(read['discriminator'], x, decoded)
      values['discriminator_loss'] = jnp.mean(adversarial.hinge_discriminator_loss(*logits), axis=(1, 2))
    return {name: base.masked_mean(value, batch['mask']) for name, value in values.items()}

  def counts(self, read: Read, batch: Batch) -> dict[str, jax.Array]:
    """Returns those of the bottleneck's codes."""
    x = pixels.to_unit_range(batch['image'])
    return self.bottleneck.counts(read['autoencoder'], x, batch['mask'])

  # What later stages read -------------------------------------------------------------------------

  def observe(self, read: Read, batch: Batch, x: Image, key: jax.Array | None = None) -> Given:
    """Returns the latents of each image: the mean, or with a key of a KL bottleneck drawn ones.

    With a codebook they are those before quantisation, with relaxed codes the most likely code.
    """
    del batch
    noise = None if key is None else encoders.normal(key, (x.shape[0], *self.latent_shape))
    return {LATENTS: encoders.encode(self.autoencoder, read['autoencoder'], x, noise)}

  def sample(self, read: Read, given: Given, keys: base.SampleKeys) -> dict[str, Image]:
    """Returns {'x0': images of the latents}."""
    del keys
    images = encoders.decode(self.autoencoder, read['autoencoder'], given[LATENTS])
    return {'x0': jnp.clip(images, -1.0, 1.0)}


def two_kernels(params: Params) -> dict[str, Array]:
  """Returns the last kernel twice, for the two losses that `adversarial.adaptive_weight` compares."""
  return dict.fromkeys(('of_reconstruction', 'of_adversary'), last_kernel(params))
