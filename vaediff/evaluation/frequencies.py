"""Differences of images at low and at high frequencies. NumPy, uint8 in."""

import numpy as np
from jaxtyping import Float, UInt8

Images = UInt8[np.ndarray, 'examples height width channels']
OfEach = Float[np.ndarray, ' examples']
LOW, HIGH = 'low frequencies', 'high frequencies'


def rms_by_band(a: Images, b: Images, cutoff: float) -> dict[str, OfEach]:
  """Returns the root mean square difference of every pair, pixels in [0, 1]: 'all', `LOW` and `HIGH`.

  Low are the spatial frequencies (u, v) with sqrt(u^2 + v^2) <= cutoff / 2 cycles per pixel, so that `cutoff`
  is the radius over the highest frequency along an axis; the mean is one of them. By Parseval's theorem
  low^2 + high^2 = all^2.
  """
  difference = (b.astype(np.float64) - a) / 255
  height, width = difference.shape[1:3]
  power = np.abs(np.fft.fft2(difference, axes=(1, 2))) ** 2 / (height * width) ** 2
  radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
  low = (radius <= cutoff / 2 + 1e-12)[None, ..., None]
  parts = {'all': power, LOW: power * low, HIGH: power * ~low}
  return {name: np.sqrt(part.sum(axis=(1, 2)).mean(axis=-1)) for name, part in parts.items()}
