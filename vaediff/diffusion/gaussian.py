"""Forward marginals, posteriors and conversions between what a network predicts.

All in the shifted state y_t = alpha_t x0 + sigma_t eps. Formulation 1 has x_t = y_t, Formulation 2
has x_t = y_t + x0_vae (DiffuseVAE, arXiv:2201.00308): y_t of either is plain DDPM started at x0, so
the shift appears only where a network reads x_t.

    v = alpha_t eps - sigma_t x0,    x0 = alpha_t y_t - sigma_t v,    eps = sigma_t y_t + alpha_t v

Imports jax, numpy, `vaediff.types` and `vaediff.errors` only.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Array, Float, Shaped

from vaediff.diffusion.schedules import Schedule, TimeLike
from vaediff.errors import UserError
from vaediff.types import Time

PREDICTIONS = ('x0', 'eps', 'v')

Denoise = Callable[[Float[Array, 'batch *shape'], Time], Float[Array, 'batch *shape']]
"""denoise(y_t, t) -> x0_hat: network, condition, prediction type and formulation in one."""
DenoiseBoth = Callable[
  [Float[Array, 'batch *shape'], Time], tuple[Float[Array, 'batch *shape'], Float[Array, 'batch *shape']]
]
"""The same, and beside x0_hat a second map: what a learned variance or an unclipped eps_hat is made of."""


def per_example(
  value: Shaped[Array, ' batch'], like: Float[Array, 'batch *shape']
) -> Shaped[Array, 'batch *ones']:
  """Returns one value per example with the singleton axes that broadcast it over `like`."""
  return value.reshape(value.shape + (1,) * (like.ndim - 1))


def check_prediction(prediction: str) -> None:
  """Returns nothing; raises UserError unless `prediction` is 'x0', 'eps' or 'v'."""
  if prediction not in PREDICTIONS:
    raise UserError(f'prediction must be one of {list(PREDICTIONS)}, got {prediction!r}')


def q_sample(
  x0: Float[Array, 'batch *shape'],
  eps: Float[Array, 'batch *shape'],
  t: Time,
  schedule: Schedule,
) -> Float[Array, 'batch *shape']:
  """Returns y_t = alpha_t x0 + sigma_t eps, a draw of q(y_t | x0) (arXiv:2006.11239, eq. 4)."""
  return per_example(schedule.alpha(t), x0) * x0 + per_example(schedule.sigma(t), x0) * eps


def posterior_coefficients(
  s: TimeLike, t: TimeLike, schedule: Schedule
) -> tuple[TimeLike, TimeLike, TimeLike]:
  """Returns (g0, g1, variance) of q(y_s | y_t, x0) = N(g0 x0 + g1 y_t, variance I), for any s < t.

  DDPM (arXiv:2006.11239) eqs. 6-7, with beta_{t|s} = 1 - alpha_bar_t / alpha_bar_s in place of
  beta_t:

      g0 = alpha_s beta_{t|s} / sigma_t^2,    g1 = (alpha_t / alpha_s) sigma_s^2 / sigma_t^2,
      variance = beta_{t|s} sigma_s^2 / sigma_t^2.

  On the host (NumPy s and t) in float64. At alpha_bar_s = 1 it is the point mass at x0: (1, 0, 0).
  """
  alpha_s, beta = schedule.alpha(s), schedule.beta(s, t)
  ratio = (schedule.sigma(s) / schedule.sigma(t)) ** 2
  return alpha_s * beta / schedule.sigma(t) ** 2, schedule.alpha(t) / alpha_s * ratio, beta * ratio


def log_variances(
  schedule: Schedule, times: Float[np.ndarray, ' times']
) -> tuple[Float[np.ndarray, ' steps'], Float[np.ndarray, ' steps']]:
  """Returns (log beta~, log beta) of the steps of a decreasing grid: the ends of a learned variance.

  Improved DDPM (arXiv:2102.09672, eq. 15) has log Sigma = f log beta + (1 - f) log beta~, with the fraction f
  from the network. beta and beta~ are those of the grid in use: of beta_{t|s} and of the posterior of
  `posterior_coefficients`. The posterior of the step onto t = 0 has no variance; there log beta~ is that of
  the step before it, and log beta where there is none.
  """
  t, s = times[:-1], times[1:]
  log_high = np.log(schedule.beta(s, t))
  with np.errstate(divide='ignore'):
    log_low = np.log(posterior_coefficients(s, t, schedule)[2])
  if times[-1] == 0:
    log_low[-1] = log_low[-2] if len(t) > 1 else log_high[-1]
  return log_low, log_high


def posterior(
  x0: Float[Array, 'batch *shape'],
  y_t: Float[Array, 'batch *shape'],
  s: Time,
  t: Time,
  schedule: Schedule,
) -> tuple[Float[Array, 'batch *shape'], Float[Array, ' batch']]:
  """Returns mean and variance of q(y_s | y_t, x0) for s < t; see `posterior_coefficients`."""
  g0, g1, variance = posterior_coefficients(s, t, schedule)
  return per_example(g0, x0) * x0 + per_example(g1, x0) * y_t, variance


def target(
  prediction: str,
  x0: Float[Array, 'batch *shape'],
  eps: Float[Array, 'batch *shape'],
  t: Time,
  schedule: Schedule,
) -> Float[Array, 'batch *shape']:
  """Returns what the network is trained to output: x0, eps, or v = alpha_t eps - sigma_t x0.

  v is that of Salimans & Ho 2022, section 4 (arXiv:2202.00512).

  Raises:
    UserError: if `prediction` is not 'x0', 'eps' or 'v'.
  """
  check_prediction(prediction)
  if prediction == 'x0':
    return x0
  if prediction == 'eps':
    return eps
  return per_example(schedule.alpha(t), x0) * eps - per_example(schedule.sigma(t), x0) * x0


def to_x0(
  prediction: str,
  output: Float[Array, 'batch *shape'],
  y_t: Float[Array, 'batch *shape'],
  t: Time,
  schedule: Schedule,
) -> Float[Array, 'batch *shape']:
  """Returns x0_hat implied by the network's output at y_t.

  From eps it divides by alpha_t, which multiplies the network's error by 157 at t = 1 of the linear
  table.

  Raises:
    UserError: if `prediction` is not 'x0', 'eps' or 'v'.
  """
  check_prediction(prediction)
  if prediction == 'x0':
    return output
  alpha, sigma = per_example(schedule.alpha(t), y_t), per_example(schedule.sigma(t), y_t)
  if prediction == 'eps':
    return (y_t - sigma * output) / alpha
  return alpha * y_t - sigma * output


def to_eps(
  prediction: str,
  output: Float[Array, 'batch *shape'],
  y_t: Float[Array, 'batch *shape'],
  t: Time,
  schedule: Schedule,
) -> Float[Array, 'batch *shape']:
  """Returns eps_hat implied by the network's output at y_t.

  From x0 it divides by sigma_t, so t > 0.

  Raises:
    UserError: if `prediction` is not 'x0', 'eps' or 'v'.
  """
  check_prediction(prediction)
  if prediction == 'eps':
    return output
  alpha, sigma = per_example(schedule.alpha(t), y_t), per_example(schedule.sigma(t), y_t)
  if prediction == 'x0':
    return (y_t - alpha * output) / sigma
  return sigma * y_t + alpha * output


def to_v(
  prediction: str,
  output: Float[Array, 'batch *shape'],
  y_t: Float[Array, 'batch *shape'],
  t: Time,
  schedule: Schedule,
) -> Float[Array, 'batch *shape']:
  """Returns v_hat implied by the network's output at y_t.

  From x0 it divides by sigma_t, from eps by alpha_t.

  Raises:
    UserError: if `prediction` is not 'x0', 'eps' or 'v'.
  """
  check_prediction(prediction)
  if prediction == 'v':
    return output
  alpha, sigma = per_example(schedule.alpha(t), y_t), per_example(schedule.sigma(t), y_t)
  if prediction == 'x0':
    return (alpha * y_t - output) / sigma
  return (output - sigma * y_t) / alpha
