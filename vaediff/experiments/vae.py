"""Stage 1 of DiffuseVAE: a ResNet VAE trained on the evidence lower bound.

  loss = sum_pixels (x - x_hat)^2 + beta * KL(q(z | x) || N(0, I)),   pixels in [0, 1],

which is the negative ELBO of a Gaussian decoder of variance 1/2 up to a constant when beta = 1
(Pandey et al. 2022, arXiv:2201.00308, section 3).
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from vaediff import checks, reads
from vaediff.conditions import prior
from vaediff.conditions.vae import CODE, IMAGE
from vaediff.data import pixels
from vaediff.diffusion import losses
from vaediff.experiments import base, bounds
from vaediff.models.functional import Model
from vaediff.optim import Optimizer, make_optimizer
from vaediff.spaces import encoders
from vaediff.types import Batch, Given, Image, Keys, Latent, Metrics, Params, Read

BOUNDS = {
  'loss.reduction': checks.one_of(('sum', 'mean')),
  'loss.beta': bounds.weight(),
  'model.latent_dim': bounds.whole(1, bounds.MAX_WIDTH),
  **prior.BOUNDS,
  'prior.num_encoded': bounds.updates(1),
  **bounds.optimizers('optim'),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vae(base.Experiment):
  """The VAE stage; trains the network `vae`.

  Attributes:
    vae: the architecture.
    optimizer: its optimizer.
    beta: weight of the KL term.
    reduction: over the batch, 'sum' (official code) or 'mean'.
    flip: random horizontal flips.
    microbatches: parts that a batch is split into for the gradient.
    latent_dim: size of z.
    prior: that its own samples are drawn from.
  """

  vae: Model
  optimizer: Optimizer
  beta: float
  reduction: str
  flip: bool
  microbatches: int
  latent_dim: int
  prior: reads.Measured

  titles = {IMAGE: 'VAE'}
  reconstructs = True
  bounds = BOUNDS
  measures = (prior.PRIOR,)
  metrics = {'loss': False, 'loss/reconstruction': False, 'loss/kl': False, 'mse': False}

  @classmethod
  def from_config(cls, config: ConfigDict, stage: str) -> 'Vae':
    """Builds the experiment of `config.<stage>`."""
    section = config[stage]
    base.check(cls, config, stage)
    return cls(
      vae=encoders.vae_model(section.model, config.data),
      optimizer=make_optimizer(section.optim, section.train.num_steps),
      beta=section.loss.beta,
      reduction=section.loss.reduction,
      flip=section.train.flip,
      microbatches=section.train.microbatches,
      latent_dim=section.model.latent_dim,
      prior=prior.measured(stage, ''),
    )

  @property
  def networks(self) -> Mapping[str, Model]:
    """The one network of this stage."""
    return {'vae': self.vae}

  @property
  def inputs(self) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Shape of z, which a sample decodes."""
    return {CODE: jax.ShapeDtypeStruct((self.latent_dim,), jnp.float32)}

  @property
  def ranges(self) -> Mapping[str, str]:
    """What the numbers of z are."""
    return {CODE: prior.RANGE}

  @property
  def frozen(self) -> Mapping[str, reads.Reads]:
    """The prior that its samples are drawn from, once it is trained."""
    return {prior.PRIOR: self.prior}

  def init(self, key: jax.Array) -> base.TrainState:
    """Returns the state at step 0."""
    network = base.init_network(self.vae, self.optimizer, key)
    return base.TrainState(step=jnp.int32(0), networks={'vae': network}, extra={})

  def terms(self, params: Params, x: Image, key: jax.Array) -> dict[str, jax.Array]:
    """Returns, per example, the squared error (sum over pixels in [0, 1]) and the KL term (nats)."""
    mean, logvar = self.vae.apply(params, x, method='encode')
    x_hat = self.vae.apply(params, encoders.draw_latent(mean, logvar, key), method='decode')
    return {
      'reconstruction': losses.squared_error_sum(x, x_hat),
      'kl': losses.kl_to_standard_normal(mean, logvar),
    }

  def train_step(
    self, state: base.TrainState, frozen: Read, batch: Batch, key: jax.Array, kind: str = ''
  ) -> tuple[base.TrainState, Metrics]:
    """Returns the state after one Adam update of the negative ELBO, and the loss terms per example."""
    del frozen, kind

    def loss_fn(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
      key_flip, key_z = jax.random.split(key)
      x = pixels.prepare(batch, key_flip if self.flip else None)['image']
      terms = {name: jnp.mean(values) for name, values in self.terms(params, x, key_z).items()}
      loss = terms['reconstruction'] + self.beta * terms['kl']
      scale = x.shape[0] * self.microbatches if self.reduction == 'sum' else 1
      return scale * loss, {
        'loss': loss,
        **{f'loss/{name}': value for name, value in terms.items()},
      }

    params = state.networks['vae'].params
    grads, metrics = base.gradients(loss_fn, params, batch, key, self.microbatches)
    state, norms = base.update_one(state, 'vae', grads, self.optimizer)
    return state, {**metrics, **norms}

  def eval_step(self, read: Read, batch: Batch, key: jax.Array) -> Metrics:
    """Returns the loss terms, and the mean squared error per pixel in [0, 1] of decode(mean z)."""
    x = pixels.to_unit_range(batch['image'])
    terms = self.terms(read['vae'], x, key)
    x_hat = self.vae.apply(read['vae'], x)
    values = {
      'loss': terms['reconstruction'] + self.beta * terms['kl'],
      **{f'loss/{name}': value for name, value in terms.items()},
      'mse': losses.squared_error_sum(x, x_hat) / x[0].size,
    }
    return {name: base.masked_mean(value, batch['mask']) for name, value in values.items()}

  # What samples and later stages read -------------------------------------------------------------

  likelihood = 'density of pixels in [0, 1]'

  def bound(self, read: Read, batch: Batch, keys: Keys, num_times: int) -> dict[str, jax.Array]:
    """Returns the terms of the bound on -log p(x), in nats per example: 'reconstruction' and 'kl'.

    The decoder is a Gaussian of variance 1/2 over pixels in [0, 1], for which beta = 1 is the bound; the
    constant D/2 log(pi) is part of 'reconstruction'. One z per image.
    """
    del num_times
    x = pixels.to_unit_range(batch['image'])
    mean, logvar = self.posterior(read, x)
    x_hat = self.vae.apply(read['vae'], encoders.draw_latent(mean, logvar, keys), method='decode')
    return {
      'reconstruction': losses.squared_error_sum(x, x_hat) + 0.5 * x[0].size * float(np.log(np.pi)),
      'kl': losses.kl_to_standard_normal(mean, logvar),
    }

  def posterior(self, read: Read, x: Image) -> tuple[Latent, Latent]:
    """Returns mean and log variance of q(z | x) of images in [-1, 1]."""
    return self.vae.apply(read['vae'], x, method='encode')

  def observe(self, read: Read, batch: Batch, x: Image, key: jax.Array | None = None) -> Given:
    """Returns z ~ q(z | x), without a key its mean."""
    del batch
    mean, logvar = self.posterior(read, x)
    return {CODE: mean if key is None else encoders.draw_latent(mean, logvar, key)}

  def draw(self, read: Read, keys: base.SampleKeys, indices: Int[Array, ' batch']) -> Given:
    """Returns z of the prior."""
    del indices
    return {CODE: prior.draw(read[prior.PRIOR], keys.conditions, self.latent_dim)}

  def sample(self, read: Read, given: Given, keys: base.SampleKeys) -> dict[str, Image]:
    """Returns {'x0_vae': decode(z)}; the decoder draws nothing from the keys."""
    del keys
    return {IMAGE: self.vae.apply(read['vae'], given[CODE], method='decode')}
