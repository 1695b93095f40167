"""The error of a quantized denoiser, measured step by step and taken out of the sampler (PTQD, 2305.10657).

At the same state a quantized network says q where the network itself says f. Over the elements of a step

    q = (1 + k) f + b_c + r,    f_hat = (q - b_c) / (1 + k),

with k >= 0 the part that is correlated with f, b_c a bias of each channel, and r what is left: noise of
standard deviation (1 + k) std. k and b_c are the least squares of all of them at once, so that b_c is of the
residual; the published code takes it of q - f and counts k f twice. f is the network's own output, x0, eps or
v, and the conversion to x0_hat follows.

What is left of the error is in x0_hat too, so that a step y_s = keep y + current x0_hat + noise n has noise
of variance noise^2 + (current std_x0)^2. The sampler therefore adds less:

    noise'^2 = max(0, noise^2 - (current std_x0)^2),

which leaves the marginal of y_s as it was. In eps of DDIM it is sigma'^2 = max(0, sigma^2 - m^2 std^2) with
m = sqrt(1 - alpha_bar_s - sigma^2) - sqrt(alpha_bar_s (1 - alpha_bar_t) / alpha_bar_t). The published code
puts sigma' also into the direction sqrt(1 - alpha_bar_s - sigma'^2) of eps_hat: what is not added is then
kept of the state's own noise, and the excess stays; that is `direction`. Without noise, as in DDIM with eta
0, none of this acts.

DDIM that keeps the network's own eps reads x0_hat twice, clipped and, in `unclipped`, as it was. The error is
in both, so what counts is the sum of their coefficients, as if nothing were clipped; the direction, of eps
alone, is in that of the second.

All of it is in y, so it is the same for both formulations. Imports jax, numpy and this folder only.
"""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vaediff.diffusion.gaussian import check_prediction
from vaediff.diffusion.schedules import Schedule

Columns = Mapping[str, Float[np.ndarray, ' rows']]
"""Of a sampler's table, by name, on the host: `time`, `keep`, `current`, `noise` and what else it has."""
CORRECTIONS = ('none', 'mean', 'noise', 'published')
"""Of the output alone, of the noise too, and of the direction as well, as the published code does."""
MARGINAL = 1e-6
"""Rows whose variance, given x0, is that of the marginal within this, are taken to be drawn from it."""


Table = Mapping[str, Array | np.ndarray]
"""`times` [rows] in any order, `gain` k and `bias` b_c [rows, channels], and `std` [rows] of what is left."""


def fit(
  outputs: Float[np.ndarray, 'batch *shape channels'], quantized: Float[np.ndarray, 'batch *shape channels']
) -> tuple[float, Float[np.ndarray, ' channels'], float]:
  """Returns (k, b_c, std) of the outputs of two networks at the same states, in float64.

  The slope is clamped to k >= 0 and the rest follows from the clamped one. It is 0 where the outputs do not
  vary within a channel.

  Raises:
    ValueError: when the two have different shapes.
  """
  if outputs.shape != quantized.shape:
    raise ValueError(f'outputs of shapes {outputs.shape} and {quantized.shape} are not of the same states')
  channels = outputs.shape[-1]
  f = np.asarray(outputs, np.float64).reshape(-1, channels)
  error = np.asarray(quantized, np.float64).reshape(-1, channels) - f
  f_mean, error_mean = f.mean(axis=0), error.mean(axis=0)
  centred = f - f_mean
  varies = np.sum(centred**2)
  slope = max(0.0, np.sum(centred * (error - error_mean)) / varies) if varies > 0 else 0.0
  bias = error_mean - slope * f_mean
  left = error - slope * f - bias
  return float(slope), bias, float(np.sqrt(np.mean(left**2)) / (1 + slope))


def stacked(
  times: Float[np.ndarray, ' rows'], rows: list[tuple[float, np.ndarray, float]], others: int = 0
) -> dict[str, np.ndarray]:
  """Returns the table of the rows that `fit` gave at these times, float32.

  The network's `others` last channels, which are no prediction but say its variance, are left as they are.
  """
  slope, bias, std = (np.asarray(column, np.float64) for column in zip(*rows, strict=True))
  gain = np.broadcast_to(slope[:, None], bias.shape)
  gain, bias = (np.pad(column, ((0, 0), (0, others))) for column in (gain, bias))
  table = {'times': times, 'gain': gain, 'bias': bias, 'std': std}
  return {name: np.asarray(column, np.float32) for name, column in table.items()}


def none(times: Float[np.ndarray, ' rows'], channels: int) -> dict[str, np.ndarray]:
  """Returns the table that corrects nothing: with it every sampler's result is bit-equal."""
  return stacked(times, [(0.0, np.zeros(channels), 0.0)] * len(times))


def std_of_x0(
  table: Table, prediction: str, schedule: Schedule, times: Float[np.ndarray, ' times']
) -> Float[Array, ' times']:
  """Returns the standard deviation of the error that is left in x0_hat at times on the host.

  x0 = (y - sigma eps) / alpha = alpha y - sigma v, so it is that of the row nearest in time, times 1, sigma /
  alpha or sigma. It is of the network alone: guidance by a weight makes more of it.

  Raises:
    UserError: if `prediction` is not 'x0', 'eps' or 'v'.
  """
  check_prediction(prediction)
  alpha, sigma = schedule.alpha(times), schedule.sigma(times)
  factor = {'x0': np.ones_like(sigma), 'eps': sigma / alpha, 'v': sigma}[prediction]
  apart = jnp.asarray(table['times'])[None, :] - jnp.asarray(times, jnp.float32)[:, None]
  row = jnp.argmin(jnp.abs(apart), axis=1)
  return jnp.asarray(factor, jnp.float32) * jnp.asarray(table['std'])[row]


def less_noise(
  schedule: Schedule,
  std: Callable[[Float[np.ndarray, ' rows']], Float[Array, ' rows']],
  *,
  direction: bool = False,
) -> Callable[[Columns], dict[str, Array]]:
  """Returns what changes a sampler's table: (columns) -> those that are others, float32.

  Where the table has a learned variance, which differs from pixel to pixel, the error is taken out of the
  largest that it can be, so that never more is taken than there is.

  Args:
    schedule: of the sampler.
    std: of the error of x0_hat, by the times of the rows.
    direction: of the published code; see the module's docstring.
  """

  def change(columns: Columns) -> dict[str, Array]:
    time, keep, current, noise = (columns[name] for name in ('time', 'keep', 'current', 'noise'))
    of_x0_hat = current + columns['unclipped'] if 'unclipped' in columns else current
    widest = noise * np.exp(0.5 * columns['log_high']) if 'log_high' in columns else noise
    noisy = widest > 0
    # of what is added, the share that the error has added already; exactly 0 for an error of 0
    ratio = np.abs(of_x0_hat) / np.where(noisy, widest, 1.0)
    share = jnp.where(noisy, jnp.minimum(jnp.square(jnp.asarray(ratio, jnp.float32) * std(time)), 1.0), 0.0)
    changed = {'noise': jnp.asarray(noise, jnp.float32) * jnp.sqrt(1 - share)}
    if not direction:
      return changed
    alpha, sigma = schedule.alpha(time), schedule.sigma(time)
    kept = keep * sigma
    total = (of_x0_hat + alpha * keep) ** 2 + kept**2 + noise**2
    turns = (np.abs(total - 1) < MARGINAL) & (kept > 0) & ('log_high' not in columns)
    gain = np.where(turns, (noise / np.where(turns, kept, 1.0)) ** 2, 0.0)
    of_eps = 'unclipped' if 'unclipped' in columns else 'current'
    keep, before, gain, alpha = (jnp.asarray(x, jnp.float32) for x in (keep, columns[of_eps], gain, alpha))
    more = keep * jnp.sqrt(1 + share * gain)
    return {**changed, 'keep': more, of_eps: before - alpha * (more - keep)}

  return change
