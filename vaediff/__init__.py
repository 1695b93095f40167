"""vaediff: train, distill, sample and measure models that join VAEs with diffusion, in JAX."""

__version__ = '0.1.0'
