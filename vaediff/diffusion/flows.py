"""Steps of the probability-flow ODE and of the reverse SDE as numbers.

    y_s = keep y_t + current x0_hat + noise n

On the host in float64, for every interval of a grid of times. The step onto t = 0 is x0_hat itself.

Imports numpy, `vaediff.diffusion.grids` and `vaediff.diffusion.schedules` only.
"""

import numpy as np
from jaxtyping import Float

from vaediff.diffusion.grids import Times
from vaediff.diffusion.schedules import Schedule

Column = Float[np.ndarray, ' rows']


def ode_coefficients(schedule: Schedule, times: Times) -> tuple[Column, Column]:
  """Returns (keep, current) of the Euler steps of d(y / sigma) / d(alpha / sigma) = x0_hat.

  The probability-flow ODE (Song et al. 2021, arXiv:2011.13456), finite at t = 1; its Euler step is
  DDIM. Times may also increase, from above 0: then it is DDIM inversion.
  """
  alpha, sigma = schedule.alpha(times), schedule.sigma(times)
  keep = sigma[1:] / sigma[:-1]
  current = alpha[1:] - alpha[:-1] * keep
  if times[-1] == 0:
    keep[-1], current[-1] = 0.0, 1.0
  return keep, current


def sde_coefficients(schedule: Schedule, times: Times) -> tuple[Column, Column, Column]:
  """Returns (keep, current, noise) of the Euler-Maruyama steps of the reverse SDE.

  With beta dt = -d log alpha_bar_t the forward SDE is dy = -beta/2 y dt + sqrt(beta) dw, and backwards
  (Song et al. 2021, arXiv:2011.13456, eq. 6)

      dy = (-beta/2 y - beta score) dt + sqrt(beta) dw,    score = (alpha_t x0_hat - y) / sigma_t^2.

  A step from t to s has B = log alpha_bar_s - log alpha_bar_t, the integral of beta, and all else at t:

      y_s = (1 + B/2 - B / sigma_t^2) y_t + B alpha_t / sigma_t^2 x0_hat + sqrt(B) n.

  It is of first order in B, which is 10 over the whole linear table: it needs hundreds of steps.
  """
  log_alpha_bar = schedule.log_alpha_bar(times)
  b = np.diff(log_alpha_bar)
  alpha, variance = schedule.alpha(times[:-1]), schedule.sigma(times[:-1]) ** 2
  keep, current, noise = 1 + b / 2 - b / variance, b * alpha / variance, np.sqrt(b)
  if times[-1] == 0:
    keep[-1], current[-1], noise[-1] = 0.0, 1.0, 0.0
  return keep, current, noise
