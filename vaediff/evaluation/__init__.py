"""Figures of trained networks: feature networks, distances between sets of images, tables and plots.

Imports jax, numpy and the rest of the package below `experiments`; nothing in `models` or `diffusion` knows
of it. Everything that compares two sets of numbers is float64 on the host.
"""
