"""Array and container aliases shared by the whole package.

Images are NHWC. On the host they are uint8 in [0, 255]; inside a step they are float32 in [-1, 1]
(`vaediff.data.pixels.to_unit_range` is the only place that scales them).
"""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Bool, Float, Integer, Key, UInt8

Image = Float[Array, 'batch height width channels']
"""A batch of images, float32, in [-1, 1]."""
ImageBytes = UInt8[Array, 'batch height width channels']
"""A batch of images as stored, uint8, in [0, 255]."""
Latent = Float[Array, 'batch latent']
"""A batch of latent codes z of the VAE, unit prior variance."""
Vectors = Float[Array, 'batch features']
"""A batch of vectors that stand for images, such as those of a CLIP stage."""
LatentMap = Float[Array, 'batch latent_height latent_width latent_channels'] | Vectors
"""A batch of two-dimensional latents, or of what else stands for images: wavelets, vectors."""
Time = Float[Array, ' batch']
"""One time t in [0, 1] per example; 0 is data, 1 is noise."""
Keys = Key[Array, ' batch']
"""One PRNG key per example."""
Mask = Bool[Array, ' batch']
Labels = Integer[Array, ' batch']
Scalar = Float[Array, '']

Params = dict[str, Any]
"""Parameters of one network: plain nested dicts of arrays."""
Batch = dict[str, Array]
"""`image` (uint8), `label` (int32); optionally `x0_vae` (uint8), `z` (float32), `mask` (float32)."""
Rows = dict[str, Any]
"""What an update differentiates over: arrays, or dicts of arrays, with one row per example."""
Metrics = dict[str, Array]
"""Scalars by name, already averaged over the batch."""

Read = Mapping[str, Any]
"""What a stage reads, by name: its own networks, those of earlier stages, measurements, published arrays."""
Given = dict[str, Array]
"""What images are made of, as a user hands it over, a row per image: `noise`, and the conditions' inputs."""
Values = dict[str, Array]
"""What a network reads beside its state, by port, a row per image; others repeat, slice and join rows."""
Drop = Mapping[str, Mask]
"""By value: where True its learned stand-in is read. A value that is not named is kept."""
