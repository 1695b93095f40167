"""Per-example losses: the Gaussian KL, the VAE's squared error, and the weighted denoising loss.

A denoising loss is an SNR-weighted squared error of x0_hat, whatever the network predicts. At fixed
y_t the errors are proportional, with SNR = alpha_t^2 / sigma_t^2:

    |x0_hat - x0|^2 = |eps_hat - eps|^2 / SNR = |v_hat - v|^2 / (SNR + 1)

so the weight is moved into prediction space in log space and the loss taken there: no division by a
small alpha_t or sigma_t, and eps with 'snr' is exactly DDPM's simple loss, v with 'v' exactly the v
loss.

Imports jax, numpy, `vaediff.types` and `vaediff.errors` only.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vaediff.diffusion import gaussian
from vaediff.diffusion.schedules import Schedule
from vaediff.errors import UserError
from vaediff.types import Image, Latent, Time

MIN_SNR_GAMMA = 5.0

LOG_WEIGHTS = {
  'constant': jnp.zeros_like,  # 1
  'snr': lambda logsnr: logsnr,  # SNR: DDPM's simple loss, arXiv:2006.11239 eq. 14
  'truncated_snr': lambda logsnr: jnp.maximum(logsnr, 0.0),  # max(SNR, 1), arXiv:2202.00512
  'min_snr': lambda logsnr: jnp.minimum(logsnr, np.log(MIN_SNR_GAMMA)),  # arXiv:2303.09556
  'v': jax.nn.softplus,  # SNR + 1, arXiv:2202.00512
}
"""log of the weight of |x0_hat - x0|^2, as a function of logsnr_t."""


def kl_to_standard_normal(mean: Latent, logvar: Latent) -> Float[Array, ' batch']:
  """Returns KL(N(mean, exp(logvar)) || N(0, I)) per example, in nats, summed over z.

  Kingma & Welling 2013, appendix B (arXiv:1312.6114).
  """
  return 0.5 * jnp.sum(mean**2 + jnp.expm1(logvar) - logvar, axis=-1)


def squared_error_sum(x: Image, x_hat: Image) -> Float[Array, ' batch']:
  """Returns |x - x_hat|^2 per example, summed over pixels and channels, pixels in [0, 1].

  The reconstruction term of DiffuseVAE's VAE: minus the log-likelihood, up to a constant, of a
  Gaussian of variance 1/2. The images passed in are in [-1, 1], hence a factor 1/4.
  """
  return 0.25 * jnp.sum((x - x_hat) ** 2, axis=(1, 2, 3))


def prediction_weight(prediction: str, weight: str, logsnr: Float[Array, ' batch']) -> Float[Array, ' batch']:
  """Returns the factor of the squared error of `prediction` that equals `weight` in x0-space.

  Args:
    prediction: 'x0', 'eps' or 'v'.
    weight: a name in `LOG_WEIGHTS`.
    logsnr: finite, in nats.

  Raises:
    UserError: for an unknown prediction or weight; the message lists the valid ones.
  """
  gaussian.check_prediction(prediction)
  if weight not in LOG_WEIGHTS:
    raise UserError(f'loss.weight must be one of {sorted(LOG_WEIGHTS)}, got {weight!r}')
  log_weight = LOG_WEIGHTS[weight](logsnr)
  if prediction == 'eps':
    log_weight -= logsnr
  elif prediction == 'v':
    log_weight -= jax.nn.softplus(logsnr)
  return jnp.exp(log_weight)


def denoising_loss(
  prediction: str,
  output: Float[Array, 'batch *shape'],
  x0: Float[Array, 'batch *shape'],
  eps: Float[Array, 'batch *shape'],
  t: Time,
  schedule: Schedule,
  weight: str,
) -> Float[Array, ' batch']:
  """Returns weight(SNR) |x0_hat - x0|^2 per example, averaged over pixels and channels.

  Args:
    prediction: what `output` is: 'x0', 'eps' or 'v'.
    output: the network's output at y_t = alpha_t x0 + sigma_t eps.
    x0: the clean image.
    eps: the noise in y_t.
    t: in (0, 1].
    schedule: gives SNR at t.
    weight: a name in `LOG_WEIGHTS`; it weighs the error of x0, so plain MSE of eps is 'snr', of v
      is 'v'.

  Raises:
    UserError: for an unknown prediction or weight; the message lists the valid ones.
  """
  factor = prediction_weight(prediction, weight, schedule.logsnr(t))
  error = output - gaussian.target(prediction, x0, eps, t, schedule)
  return factor * jnp.mean(error**2, axis=tuple(range(1, error.ndim)))
