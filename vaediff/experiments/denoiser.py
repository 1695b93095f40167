"""A network and how it is read: the state, the values beside it, and what its output means.

With y_t = x_t - shift, where the shift is 0 (no condition, Formulation 1) or x0_vae (Formulation 2), both
formulations are plain DDPM in y: y_t = alpha_t x0 + sigma_t eps. The shift is added only where the network
reads x_t (Pandey et al. 2022, arXiv:2201.00308, section 3.3 and appendix B, with the coefficients
corrected). Losses, samplers and guidance work in y alone.

A dropped condition (classifier-free guidance) has no shift and the network's learned nulls. Guidance is a
list of terms, each against a weaker branch, which is the network without some conditions, or a worse network
(autoguidance, Karras et al. 2024, arXiv:2406.02507):

    x0_hat + sum_k w_k (x0_hat - x0_hat of the weaker branch of term k)

(Ho & Salimans 2022, arXiv:2207.12598, eq. 6, in x0). Two terms are nested guidance: with weights a for
"without v" and b for "without c and v", x(0) + w1 (x(c) - x(0)) + w2 (x(c, v) - x(c)) has a = w2 - w1 and
b = w1 - 1.

A network with a learned variance (Nichol & Dhariwal 2021, arXiv:2102.09672) has as many channels more, v: the
log variance of each pixel's step is between its two bounds at f = (v + 1) / 2, unclamped. It is trained by
the variational bound beside the denoising loss, whose mean part the bound then does not move:

    loss + vlb_weight T vb_t,    vb_t = one term of the bound, in bits per dimension

or by the bound alone.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vaediff.conditions.base import Conditions
from vaediff.conditions.weight import WEIGHT
from vaediff.diffusion import gaussian, guidance, likelihood, losses, schedules
from vaediff.diffusion.gaussian import Denoise, DenoiseBoth
from vaediff.experiments.perceptual import Perceptual
from vaediff.models.functional import Model
from vaediff.types import Drop, Read, Time, Values

State = Float[Array, 'batch *shape']
DENOISER = 'denoiser'
"""Name of the network that a diffusion trains."""
LEARNED = 'learned'
"""The variance of a network that says it; others have a 'fixed' one."""
OBJECTIVES = ('hybrid', 'bound')
"""Of a learned variance: the bound beside the denoising loss, or alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Term:
  """One term of guidance.

  Attributes:
    weight: of x0_hat less that of the weaker branch.
    without: names of the conditions that the weaker branch does not read.
    guide: the weaker branch is another network, at the same values; None = the network itself.
  """

  weight: int | float
  without: tuple[str, ...] = ()
  guide: 'Denoiser | None' = None


@runtime_checkable
class Classifier(Protocol):
  """A network that says what a noisy state shows; a frozen dataclass.

  Attributes:
    scale: s of `guidance.with_classifier`.
    network: its name in `read`.
    needs: names of the values that say what it should show.
  """

  scale: int | float
  network: str
  needs: tuple[str, ...]

  def log_prob(self, read: Read, values: Values) -> guidance.LogProb:
    """Returns (y_t, t) -> log p(what the values ask for | y_t): the state as it is, without a shift."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoiser:
  """A denoising network and how it is read.

  Attributes:
    model: (x_t, t, values, drop) -> output.
    conditions: what the values are made of.
    schedule: alpha and sigma of t.
    prediction: what the output is, 'x0', 'eps' or 'v'.
    loss_weight: of the squared error of x0, by name.
    bound: the data are in [-bound, bound]; None = unbounded.
    clip: of x0_hat when sampling: 'static', 'dynamic' or 'none'; without a bound 'static' does nothing.
    threshold_percentile: of dynamic clipping.
    terms: of guidance.
    classifier: that guides beside them, or None.
    interval: of sigma_t / alpha_t, outside of which nothing guides; () = everywhere.
    shift: name of the value that is added to the state (Formulation 2); '' = none.
    network: its name in `read`.
    variance: 'fixed', or 'learned' by a network whose output is twice as wide.
    objective: of a learned variance, 'hybrid' or 'bound'.
    vlb_weight: of the bound in the hybrid objective.
    of_bytes: the data are bytes scaled to [-1, 1], whose bound is of a mass; else it is of a density.
    perceptual: the distance of x0_hat from the image, beside the denoising loss; None = without it.
  """

  model: Model
  conditions: Conditions
  schedule: schedules.Schedule
  prediction: str
  loss_weight: str
  bound: float | None
  clip: str
  threshold_percentile: float
  terms: tuple[Term, ...] = ()
  classifier: Classifier | None = None
  interval: guidance.Interval = ()
  shift: str = ''
  network: str = DENOISER
  variance: str = 'fixed'
  objective: str = 'hybrid'
  vlb_weight: float = 0.0
  of_bytes: bool = False
  perceptual: Perceptual | None = None

  @property
  def reads_weight(self) -> bool:
    """Whether the guidance weight is an input, so that one pass guides."""
    return WEIGHT in self.conditions.ports

  @property
  def calls_per_step(self) -> int:
    """Forward passes for one guided x0_hat, those of weaker networks too; a classifier's do not count."""
    return 1 + len(self.guiding_terms())

  def num_calls(self, times: Float[np.ndarray, ' times']) -> int:
    """Returns the forward passes for one guided x0_hat at each of these times."""
    guided_at = np.count_nonzero(guidance.inside(self.interval, self.schedule, times))
    return len(times) + (self.calls_per_step - 1) * int(guided_at)

  def guiding_terms(self) -> tuple[Term, ...]:
    """Returns the terms of a weight that is not 0; none where the weight is an input."""
    return () if self.reads_weight else tuple(term for term in self.terms if term.weight != 0)

  def state(self, y: State, values: Values, drop: Drop) -> State:
    """Returns x_t of y_t; the only place where Formulation 2 adds its shift."""
    if not self.shift:
      return y
    shift = values[self.shift]
    if self.shift in drop:
      shift = jnp.where(gaussian.per_example(drop[self.shift], y), 0.0, shift)
    return y + shift

  def inputs(self, y: State, t: Time, values: Values, drop: Drop) -> tuple[State, Time, Values, Drop]:
    """Returns what the network reads at y_t: of the values those that it has a port for."""
    own = {name: values[name] for name in self.conditions.ports if name in values}
    return self.state(y, values, drop), t, own, drop

  def output(
    self,
    read: Read,
    y: State,
    t: Time,
    values: Values,
    drop: Drop = {},  # noqa: B006
    key_dropout: jax.Array | None = None,
  ) -> State:
    """Returns the network's prediction at y_t; with a key dropout is on."""
    return self.outputs(read, y, t, values, drop, key_dropout)[0]

  def outputs(
    self,
    read: Read,
    y: State,
    t: Time,
    values: Values,
    drop: Drop = {},  # noqa: B006
    key_dropout: jax.Array | None = None,
  ) -> tuple[State, State | None]:
    """Returns the prediction, and the fraction f of a learned log variance, float32; None of a fixed one."""
    inputs = self.inputs(y, t, values, drop)
    return self.parts(self.model.apply(read[self.network], *inputs, key_dropout=key_dropout))

  def parts(self, output: State) -> tuple[Array, Array | None]:
    """Returns the two parts of the network's output; see `outputs`."""
    if self.variance != LEARNED:
      return output, None
    prediction, v = jnp.split(output, 2, axis=-1)
    return prediction, (v.astype(jnp.float32) + 1) / 2

  def features(self, read: Read, y: State, t: Time, values: Values) -> list[Array]:
    """Returns the maps of the network's way down and middle at y_t."""
    return self.model.apply(read[self.network], *self.inputs(y, t, values, {}), method='features')

  def feature_shapes(self) -> list[tuple[int, int, int]]:
    """Returns (height, width, channels) of the maps of `features`."""
    params = jax.eval_shape(self.model.init, jax.random.key(0))
    maps = jax.eval_shape(
      lambda params, inputs: self.model.apply(params, *inputs, method='features'), params, self.model.inputs
    )
    return [leaf.shape[1:] for leaf in maps]

  def x0_hat(self, read: Read, values: Values, without: tuple[str, ...] = ()) -> Denoise:
    """Returns (y, t) -> x0_hat as the network says it, without some of its conditions."""

    def denoise(y: State, t: Time) -> State:
      drop = self.conditions.without(without, y.shape[0])
      output = self.output(read, y, t, values, drop)
      return gaussian.to_x0(self.prediction, output, y, t, self.schedule)

    return denoise

  def guided(self, read: Read, values: Values, first: Denoise | None = None) -> Denoise:
    """Returns (y, t) -> x0_hat, guided and not yet clipped.

    A guidance weight among the values that the network does not read takes the place of the configured one,
    that of the term without all conditions that can be dropped; other terms stay. `first` is x0_hat with all
    conditions, where it is already there.
    """
    denoise, terms = first or self.x0_hat(read, values), self.guiding_terms()
    weights = [term.weight for term in terms]
    droppable = self.conditions.droppable
    if WEIGHT in values and not self.reads_weight and droppable:
      others = [term for term in terms if term.guide is not None or set(term.without) != set(droppable)]
      terms = (Term(weight=0.0, without=droppable), *others)
      weights = [values[WEIGHT], *(term.weight for term in others)]
    weaker = [(term.guide or self).x0_hat(read, values, term.without) for term in terms]
    denoise = guidance.guided(denoise, weaker, weights, self.schedule, self.interval)
    if self.classifier is not None:
      log_prob = self.classifier.log_prob(read, values)
      denoise = guidance.with_classifier(
        denoise, log_prob, self.classifier.scale, self.schedule, self.interval
      )
    return denoise

  def clip_for_sampling(self, denoise: Denoise) -> Denoise:
    """Returns the denoiser with x0_hat clipped as the samplers want it."""
    if self.clip == 'static' and self.bound is not None:
      return guidance.clip(denoise, -self.bound, self.bound)
    if self.clip == 'dynamic':
      return guidance.threshold(denoise, self.threshold_percentile)
    return denoise

  def denoise(self, read: Read, values: Values) -> Denoise:
    """Returns (y, t) -> x0_hat, guided and clipped, for the samplers."""
    return self.clip_for_sampling(self.guided(read, values))

  def with_unclipped(self, read: Read, values: Values) -> DenoiseBoth:
    """Returns (y, t) -> (x0_hat guided and clipped, the same before it was clipped)."""
    guided = self.guided(read, values)

    def both(y: State, t: Time) -> tuple[State, State]:
      x0_hat = guided(y, t)
      return self.clip_for_sampling(lambda y, t: x0_hat)(y, t), x0_hat

    return both

  def with_fraction(self, read: Read, values: Values) -> DenoiseBoth:
    """Returns (y, t) -> (x0_hat guided and clipped, f of the branch that reads all conditions).

    Guidance is of the mean alone. One pass gives both.
    """

    def both(y: State, t: Time) -> tuple[State, State]:
      x0_hat, fraction = self.x0_hat_and_fraction(read, values)(y, t)
      return self.clip_for_sampling(self.guided(read, values, lambda y, t: x0_hat))(y, t), fraction

    return both

  def x0_hat_and_fraction(self, read: Read, values: Values) -> DenoiseBoth:
    """Returns (y, t) -> (x0_hat, f) as the network says them."""

    def both(y: State, t: Time) -> tuple[State, State]:
      output, fraction = self.outputs(read, y, t, values)
      return gaussian.to_x0(self.prediction, output, y, t, self.schedule), fraction

    return both

  def renamed(self, network: str) -> 'Denoiser':
    """Returns the same denoiser whose network has another name in `read`.

    What guides it is read by its own name behind that one, as '<network>_guide'.
    """
    terms = tuple(
      dataclasses.replace(term, guide=term.guide and term.guide.renamed(f'{network}_{term.guide.network}'))
      for term in self.terms
    )
    classifier = self.classifier and dataclasses.replace(
      self.classifier, network=f'{network}_{self.classifier.network}'
    )
    return dataclasses.replace(self, network=network, terms=terms, classifier=classifier)

  def clip_to_data(self, denoise: Denoise) -> Denoise:
    """Returns the denoiser with x0_hat clipped to the bound of the data, if they have one."""
    return denoise if self.bound is None else guidance.clip(denoise, -self.bound, self.bound)

  def bounded_with_fraction(self, read: Read, values: Values) -> DenoiseBoth:
    """Returns (y, t) -> (x0_hat clipped to the bound of the data, f), without guidance."""
    network = self.x0_hat_and_fraction(read, values)

    def both(y: State, t: Time) -> tuple[State, State]:
      x0_hat, fraction = network(y, t)
      return self.clip_to_data(lambda y, t: x0_hat)(y, t), fraction

    return both

  def losses(
    self, read: Read, y0: State, values: Values, key: jax.Array, *, training: bool
  ) -> Float[Array, ' batch']:
    """Returns the loss of each example at one random time; in training with drops."""
    return self.loss_terms(read, y0, values, key, training=training)['loss']

  def loss_terms(
    self,
    read: Read,
    y0: State,
    values: Values,
    key: jax.Array,
    *,
    training: bool,
    t: Time | None = None,
  ) -> dict[str, Float[Array, ' batch']]:
    """Returns 'loss' of each example, at a time that is drawn or given; of a learned variance its parts too.

    These are 'simple', the weighted denoising loss, and 'bound', T vb_t: its mean over times is the bound in
    bits per dimension but for what is lost at t = 1. Those of the conditions come beside them.
    """
    key_t, key_eps, key_drop, key_dropout = jax.random.split(key, 4)
    t = schedules.sample_time(self.schedule, key_t, y0.shape[0]) if t is None else t
    eps = jax.random.normal(key_eps, y0.shape)
    drop = self.conditions.drop(key_drop, y0.shape[0]) if training else {}
    y = gaussian.q_sample(y0, eps, t, self.schedule)
    output, fraction = self.outputs(read, y, t, values, drop, key_dropout if training else None)
    simple = losses.denoising_loss(self.prediction, output, y0, eps, t, self.schedule, self.loss_weight)
    x0_hat = gaussian.to_x0(self.prediction, output, y, t, self.schedule)
    if fraction is None:
      return self.with_others({'loss': simple}, read, y0, x0_hat, values)
    alone = self.objective == 'bound'
    bound = self.bound_at(y0, x0_hat if alone else jax.lax.stop_gradient(x0_hat), fraction, t)
    loss = bound if alone else simple + self.vlb_weight * bound
    return self.with_others({'loss': loss, 'simple': simple, 'bound': bound}, read, y0, x0_hat, values)

  def with_others(
    self, terms: dict[str, Array], read: Read, y0: State, x0_hat: State, values: Values
  ) -> dict[str, Array]:
    """Returns terms of each example with the perceptual distance and those of the conditions, all in 'loss'.

    The distance is that of an image: of x0_hat clipped, which at high noise is far from one.
    """
    if self.perceptual is not None:
      distance = self.perceptual(read, jnp.clip(x0_hat, -1.0, 1.0), y0)
      terms = {**terms, 'loss': terms['loss'] + distance, 'perceptual': distance}
    return self.conditions.with_losses(terms, values)

  def bound_at(self, y0: State, x0_hat: State, fraction: State, t: Time) -> Float[Array, ' batch']:
    """Returns T vb_t of each example, in bits per dimension; in training x0_hat is not clipped."""
    steps = likelihood.steps_of(self.schedule, likelihood.table_times(self.schedule))
    index = jnp.rint(t * self.schedule.train_steps) - 1
    nats = likelihood.learned_term(steps, y0, x0_hat, fraction, index, of_bytes=self.of_bytes)
    return self.schedule.train_steps * likelihood.bits_per_dimension(nats, y0[0].size)
