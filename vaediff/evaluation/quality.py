"""Distances between an image and its reconstruction: squared error, PSNR, SSIM. NumPy, uint8 in."""

import numpy as np
from jaxtyping import Float, UInt8
from scipy import ndimage

Images = UInt8[np.ndarray, 'examples height width channels']

SSIM_SIDE = 11
"""Side of the Gaussian window, in pixels: smaller images have no SSIM."""
SSIM_STD = 1.5
SSIM_STABILISERS = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def mse(a: np.ndarray, b: np.ndarray) -> float:
  """Returns the mean squared difference of uint8 images, with pixels in [0, 1]."""
  return float(np.mean((a.astype(np.float64) - b) ** 2) / 255**2)


def sharpness(images: Images) -> float:
  """Returns the mean over images and channels of the variance of the Laplacian, pixels in [0, 1]."""
  return float(sharpness_of_each(images).mean())


def sharpness_of_each(images: Images) -> Float[np.ndarray, ' examples']:
  """Returns of every image the mean over channels of the variance of the Laplacian, pixels in [0, 1]."""
  pixels = images.astype(np.float64) / 255
  edges = sum(ndimage.correlate1d(pixels, (1, -2, 1), axis=axis, mode='reflect') for axis in (1, 2))
  return edges.var(axis=(1, 2)).mean(axis=-1)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
  """Returns the peak signal-to-noise ratio over all pixels in dB; infinite when they are equal."""
  error = mse(a, b)
  return float('inf') if error == 0 else -10 * float(np.log10(error))


def psnr_of_each(a: Images, b: Images) -> Float[np.ndarray, ' examples']:
  """Returns the PSNR of every pair in dB; infinite where they are equal."""
  errors = np.mean((a.astype(np.float64) - b) ** 2, axis=(1, 2, 3)) / 255**2
  with np.errstate(divide='ignore'):
    return -10 * np.log10(errors)


def ssim_of_each(a: Images, b: Images) -> Float[np.ndarray, ' examples']:
  """Returns the structural similarity of every pair, in [-1, 1].

  Wang et al. 2004, eq. 13: an 11x11 Gaussian window of standard deviation 1.5, population moments, every
  channel by itself, the mean over windows that lie inside the image.

  Raises:
    ValueError: for images smaller than the window.
  """
  if min(a.shape[1:3]) < SSIM_SIDE:
    raise ValueError(f'SSIM needs images of at least {SSIM_SIDE} pixels a side, got {a.shape[1:3]}')
  margin = SSIM_SIDE // 2

  def window(x):
    mean = ndimage.gaussian_filter(x, SSIM_STD, axes=(1, 2), radius=margin)
    return mean[:, margin:-margin, margin:-margin]

  c1, c2 = SSIM_STABILISERS
  values = []
  for x, y in zip(np.array_split(a, -(-len(a) // 64)), np.array_split(b, -(-len(b) // 64)), strict=True):
    x, y = x.astype(np.float64), y.astype(np.float64)
    mean_x, mean_y = window(x), window(y)
    var_x, var_y = window(x * x) - mean_x**2, window(y * y) - mean_y**2
    cov = window(x * y) - mean_x * mean_y
    similarity = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
    similarity /= (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    values.append(similarity.mean(axis=(1, 2, 3)))
  return np.concatenate(values)
