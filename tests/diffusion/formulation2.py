"""The posterior of Formulation 2 in x_t: the reference for what samplers, which work in y_t, do to x_t."""

from vaediff.diffusion import gaussian


def posterior(x0, x_t, x0_vae, s, t, schedule):
  """Returns mean and per-example variance of q(x_s | x_t, x0, x0_vae), for s < t.

  mean = g0 x0 + g1 x_t + (1 - g1) x0_vae with g0, g1 and the variance of `posterior_coefficients`: the exact
  Gaussian posterior of x_t = alpha_t x0 + x0_vae + sigma_t eps (DiffuseVAE, arXiv:2201.00308, whose formula
  has sqrt(alpha_bar_t) in the coefficient of x_t where Bayes' rule gives sqrt(alpha_t), as here).
  """
  g0, g1, variance = gaussian.posterior_coefficients(s, t, schedule)
  g0, g1 = gaussian.per_example(g0, x0), gaussian.per_example(g1, x0)
  return g0 * x0 + g1 * x_t + (1 - g1) * x0_vae, variance
