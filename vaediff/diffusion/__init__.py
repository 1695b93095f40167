"""The mathematics of diffusion: pure functions and frozen dataclasses on arrays.

Everything is written in the shifted state y_t = alpha_t x0 + sigma_t eps, with t in [0, 1], 0 data
and 1 noise, and alpha_t^2 + sigma_t^2 = 1. Formulation 1 has x_t = y_t and Formulation 2 has
x_t = y_t + x0_vae (DiffuseVAE, arXiv:2201.00308), so one path serves both.

Imports jax, numpy, `vaediff.types` and `vaediff.errors`; never flax, configs, data or models.
"""
