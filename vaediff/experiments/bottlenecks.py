"""What lies between an autoencoder's two halves while it trains: one class per `model.bottleneck`.

A bottleneck makes of the encoder's output what the decoder takes, and loss terms by name; it may keep arrays
beside the parameters, and change the network before an update and what the optimizer makes of it after one.
Whoever trains knows no more of it than this.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from ml_collections import ConfigDict

from vaediff import checks
from vaediff.errors import UserError
from vaediff.experiments import base, bounds
from vaediff.models import codebook, relaxed_codes
from vaediff.models.autoencoder import NETWORKS
from vaediff.models.functional import Model
from vaediff.spaces import encoders
from vaediff.types import Image, LatentMap, Metrics, Params

RELAXED = {
  'loss.tau_start': bounds.number(0, 1000, above=True),
  'loss.tau_end': bounds.number(0, 1000, above=True),
  'loss.tau_steps': bounds.updates(0),
  'loss.kl_token_weight': bounds.weight(),
  'loss.kl_warmup_steps': bounds.updates(0),
  'model.network': checks.one_of(NETWORKS),
  'model.logits_scale': bounds.number(0, 1000, above=True),
}
"""Bounds of what only relaxed codes read."""


class Passed(NamedTuple):
  """What comes out of a bottleneck.

  Attributes:
    z: what the decoder takes.
    terms: of the loss, scalars by name; each is logged as `loss/<name>`.
    metrics: other scalars to log.
  """

  z: LatentMap
  terms: Mapping[str, Array]
  metrics: Metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bottleneck(abc.ABC):
  """One way from the encoder to the decoder.

  Attributes:
    model: the autoencoder, whose parameters are the network that a step changes.
    loss: the stage's `loss` section.
    reads: the method of the autoencoder whose output it takes.
    metrics: what `figures` may have, and whether the largest value is the best.
  """

  model: Model
  loss: Mapping[str, Any]

  kind: ClassVar[str]
  reads: ClassVar[str] = 'encode'
  metrics: ClassVar[Mapping[str, bool]] = {}

  @classmethod
  def check(cls, section: ConfigDict, latent_shape: tuple[int, int, int]) -> None:
    """Raises UserError for what does not go together in the stage's section."""
    del section, latent_shape

  def init(self, params: Params) -> dict[str, Any]:
    """Returns what is kept beside the parameters, by name in `extra`; made of those at step 0."""
    del params
    return {}

  def trained(self, params: Params) -> dict[str, Any]:
    """Returns the same of parameters that were trained before."""
    return self.init(params)

  def before_update(
    self, network: base.Network, extra: Mapping[str, Any], x: Image, key: jax.Array
  ) -> tuple[base.Network, dict[str, Any], Metrics]:
    """Returns the network and `extra` as the update that follows sees them, and scalars to log.

    Args:
      network: the autoencoder.
      extra: of the state.
      x: the images of the whole global batch, in [-1, 1].
      key: its own.
    """
    del x, key
    return network, dict(extra), {}

  @abc.abstractmethod
  def pass_on(
    self,
    params: Params,
    encoded: Any,
    x: Image,
    key: jax.Array | None,
    step: jax.Array | None,
  ) -> Passed:
    """Returns what the decoder takes of the encoder's output, and the terms of the loss.

    Args:
      params: of the autoencoder.
      encoded: what its method `reads` returns.
      x: the images of this part of the batch.
      key: of noise; None = as it is evaluated, without any.
      step: updates done, for what follows a schedule; None with no key.
    """

  def factors(self, step: jax.Array | None) -> Mapping[str, float | Array]:
    """Returns the factor of each term in the loss, after `step` updates."""
    del step
    return {}

  def counts(self, params: Params, x: Image, weight: Array) -> dict[str, Array]:
    """Returns how often each code occurs in images; see `Experiment.counts`."""
    del params, x, weight
    return {}

  def after_update(self, before: base.Network, after: base.Network) -> base.Network:
    """Returns the network after the optimizer, with what it was not to change as it was `before`."""
    del before
    return after

  def figures(self, params: Params, x: Image, key: jax.Array) -> dict[str, Array]:
    """Returns what an evaluation reports of it beside the reconstructions: a number per image, by name."""
    del params, x, key
    return {}

  def notes(self, num_numbers: int, section: ConfigDict) -> tuple[str, ...]:
    """Returns what is said of it, a line each; of images of so many numbers, and of the stage's section."""
    del num_numbers, section
    return ()


class Kl(Bottleneck):
  """A normal distribution per latent, drawn from in training."""

  kind = 'kl'

  def pass_on(self, params, encoded, x, key, step):
    """Returns latents of the posterior, and its KL in nats per dimension of the image."""
    del params, step
    mean, logvar = encoded
    z = mean
    if key is not None:
      z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
    kl = 0.5 * (mean**2 + jnp.expm1(logvar) - logvar)
    return Passed(z, {'kl': jnp.sum(kl) / x.size}, {})

  def factors(self, step):
    """Returns that of the KL."""
    del step
    return {'kl': self.loss['kl_weight']}


class Plain(Bottleneck):
  """The encoder's output as it is."""

  kind = 'none'

  def pass_on(self, params, encoded, x, key, step):
    """Returns the latents; there is no term."""
    del params, x, key, step
    return Passed(encoded[0], {}, {})


class Vq(Bottleneck):
  """The nearest code of each vector; the codes follow averages or gradients.

  In `extra['codebook']` are averaged counts and sums of the codes, and whether these have had their start.
  """

  kind = 'vq'

  @property
  def averages(self) -> bool:
    """Whether the codes follow averages, not gradients."""
    return self.loss['codebook'] == 'ema'

  @classmethod
  def check(cls, section: ConfigDict, latent_shape: tuple[int, int, int]) -> None:
    """Raises UserError where codes would start anew at every update, or entropies be those of parts."""
    vectors = section.train.batch_size * latent_shape[0] * latent_shape[1]
    codebook.check_restarts(vectors, section.model.codebook_size, section.loss.restart_below)
    weight, parts = section.loss.entropy_weight, section.train.microbatches
    if weight > 0 and parts > 1:
      raise UserError(
        f'loss.entropy_weight is {weight:g} and train.microbatches is {parts}: the entropy of the mean '
        'over a batch is no mean over its parts. Set train.microbatches to 1, or loss.entropy_weight to 0'
      )

  def init(self, params: Params) -> dict[str, Any]:
    """Returns the averages: a count of 1 per code."""
    codes = params[encoders.CODES]
    counts = jnp.ones(codes.shape[0])
    return {'codebook': {'counts': counts, 'sums': jnp.copy(codes), 'started': jnp.bool_(False)}}

  def trained(self, params: Params) -> dict[str, Any]:
    """Returns averages of trained codes: none starts anew because the first batches have no vector of it."""
    kept = self.init(params)['codebook']
    mass = max(1.0, 2.0 * self.loss['restart_below'])
    moved = {'counts': mass * kept['counts'], 'sums': mass * kept['sums'], 'started': jnp.bool_(True)}
    return {'codebook': moved}

  def before_update(
    self, network: base.Network, extra: Mapping[str, Any], x: Image, key: jax.Array
  ) -> tuple[base.Network, dict[str, Any], Metrics]:
    """Returns the network with its codes moved, their averages, and how much of the codebook is in use.

    Before the first update the codes are vectors of the batch, and so is their average; an update that the
    guard leaves out was none. With 'ema' codes then follow the averages; with 'gradient' the loss moves them,
    and they are averaged like every parameter. Either way dead ones start anew, and so do their averages.
    Vectors are those of the whole global batch.
    """
    book = extra['codebook']
    started = book['started']
    z = jax.lax.stop_gradient(encoders.encode(self.model, network.params, x, None))
    known, dead, found = codebook.follow(
      codebook.Codebook(codes=network.params[encoders.CODES], counts=book['counts'], sums=book['sums']),
      started,
      z,
      key,
      decay=self.loss['codebook_decay'],
      threshold=self.loss['restart_below'],
      averages=self.averages,
      compared=self.compared,
    )
    metrics = {f'codebook/{figure}': value for figure, value in found.items()}
    average = known.codes
    if network.ema_params is not None and not self.averages:
      average = jnp.where(started & ~dead[:, None], network.ema_params[encoders.CODES], known.codes)
    book = {'counts': known.counts, 'sums': known.sums, 'started': jnp.ones_like(started)}
    return with_codes(network, known.codes, average), {**extra, 'codebook': book}, metrics

  def pass_on(self, params, encoded, x, key, step):
    """Returns the codes, straight through, with the commitment of the vectors, and of the codes."""
    del x, step
    mean, codes = encoded[0], self.compared(params[encoders.CODES])
    z, indices = codebook.quantize(mean, codes)
    e = codebook.lookup(codes, indices)
    terms = {'commitment': codebook.commitment_loss(mean, e, 1.0)}
    if not self.averages:
      terms['codebook'] = codebook.codebook_loss(mean, e)
    if self.loss['entropy_weight'] > 0:
      terms['entropy'] = codebook.entropy_loss(mean, jax.lax.stop_gradient(codes) if self.averages else codes)
    if key is None:
      z = e  # not z + (e - z), which is rounded: an image of ids is the reconstruction, bit for bit
    return Passed(z, terms, {})

  def factors(self, step):
    """Returns those of the commitment, of the codes' own loss and of the entropies."""
    del step
    entropy = self.loss['entropy_weight']
    return {'commitment': self.loss['commitment_weight'], 'codebook': 1.0, 'entropy': entropy}

  def compared(self, codes: Array) -> Array:
    """Returns codes as vectors are compared with them."""
    return codebook.unit(codes) if self.model.module.normalized_codes else codes

  def counts(self, params: Params, x: Image, weight: Array) -> dict[str, Array]:
    """Returns those of the one codebook."""
    z = encoders.encode(self.model, params, x, None)
    codes = self.compared(params[encoders.CODES])
    return {'codebook': codebook.histogram(codebook.nearest(z, codes), codes.shape[0], weight)}

  def after_update(self, before: base.Network, after: base.Network) -> base.Network:
    """Returns the network with averaged codes as they were: neither decay nor averaging is to move them."""
    if not self.averages:
      return after
    codes = before.params[encoders.CODES]
    return with_codes(after, codes, codes)


def with_codes(network: base.Network, codes: Array, average: Array) -> base.Network:
  """Returns the network with these codes, and its average, if there is one, with those."""
  averaged = network.ema_params
  return network.replace(
    params={**network.params, encoders.CODES: codes},
    ema_params=None if averaged is None else {**averaged, encoders.CODES: average},
  )


class Gumbel(Bottleneck):
  """A mixture of all codes in training, by a temperature that falls; the most likely code afterwards."""

  kind = 'gumbel'
  reads = 'logits'
  metrics = {'mse_relaxed': False, 'kl_per_token': False}

  @classmethod
  def check(cls, section: ConfigDict, latent_shape: tuple[int, int, int]) -> None:
    """Raises UserError for a temperature that would rise."""
    del latent_shape
    if section.loss.tau_end > section.loss.tau_start:
      raise UserError(
        f'loss.tau_end is {section.loss.tau_end:g}, above loss.tau_start = {section.loss.tau_start:g}: the '
        'temperature falls; choose an end in (0, loss.tau_start], as 0.0625'
      )

  def pass_on(self, params, encoded, x, key, step):
    """Returns the mixture at the temperature of this step, or without a key the most likely codes."""
    del x
    ids = relaxed_codes.most_likely(encoded)
    used, perplexity = codebook.usage(ids, encoded.shape[-1])
    metrics = {'codebook/used': used, 'codebook/perplexity': perplexity}
    terms = {'kl_per_token': jnp.mean(relaxed_codes.kl_to_uniform(encoded))}
    if key is None:
      return Passed(codebook.lookup(params[encoders.CODES], ids), terms, metrics)
    metrics |= {'codebook/tau': self.tau(step), 'codebook/kl_weight': self.factors(step)['kl_per_token']}
    return Passed(self.relaxed(params, encoded, key, metrics['codebook/tau']), terms, metrics)

  def relaxed(self, params: Params, logits: Array, key: jax.Array, tau: float | Array) -> LatentMap:
    """Returns the mixture of the codes; with `loss.straight_through` one code, of the mixture's gradient."""
    y = relaxed_codes.relax(logits, relaxed_codes.gumbel(key, logits.shape), tau)
    y = relaxed_codes.straight_through(y) if self.loss['straight_through'] else y
    return relaxed_codes.mix(y, params[encoders.CODES])

  def tau(self, step: jax.Array) -> Array:
    """Returns the temperature after `step` updates."""
    start, end = self.loss['tau_start'], self.loss['tau_end']
    return relaxed_codes.temperature(step, start, end, self.loss['tau_steps'])

  def factors(self, step):
    """Returns that of the KL per token, which warms up; without a step the last."""
    weight, num_steps = self.loss['kl_token_weight'], self.loss['kl_warmup_steps']
    return {'kl_per_token': relaxed_codes.warmed_up(num_steps if step is None else step, weight, num_steps)}

  def figures(self, params: Params, x: Image, key: jax.Array) -> dict[str, Array]:
    """Returns KL per token, and squared error per pixel in [0, 1] of mixtures at the last temperature.

    Where it is far below that of the codes themselves the decoder reads what codes do not carry.
    """
    logits = self.model.apply(params, x, method='logits')
    z = self.relaxed(params, logits, key, self.loss['tau_end'])
    x_hat = jnp.clip(self.model.apply(params, z, method='decode'), -1.0, 1.0)
    return {
      'mse_relaxed': jnp.mean(jnp.square(x - x_hat), axis=(1, 2, 3)) / 4,
      'kl_per_token': jnp.mean(relaxed_codes.kl_to_uniform(logits), axis=(1, 2)),
    }

  def counts(self, params: Params, x: Image, weight: Array) -> dict[str, Array]:
    """Returns those of the most likely codes."""
    logits = self.model.apply(params, x, method='logits')
    ids = relaxed_codes.most_likely(logits)
    return {'codebook': codebook.histogram(ids, logits.shape[-1], weight)}

  def notes(self, num_numbers: int, section: ConfigDict) -> tuple[str, ...]:
    """Returns the memory of the logits, and the weight of the KL as that of a bound per dimension."""
    module, batch_size = self.model.module, section.train.batch_size
    tokens = (self.model.inputs[0].shape[1] // module.factor) ** 2
    weight = self.loss['kl_token_weight']
    megabytes = batch_size * tokens * module.codebook_size * 4 / 1e6
    per_token = num_numbers / tokens
    return (
      f'logits: {tokens} tokens x {module.codebook_size} codes, float32: {megabytes:,.1f} MB for '
      f'{batch_size} images, as much again for their noise and for the mixture',
      f'KL: weight {weight:g} per token: beta = {weight * per_token:g} with the {per_token:g} numbers of the '
      f'image per token here, {192 * weight:g} with the 192 of 256 pixels and f = 8',
    )


BY_KIND: dict[str, type[Bottleneck]] = {kind.kind: kind for kind in (Kl, Plain, Vq, Gumbel)}
"""The class of each `model.bottleneck`."""
