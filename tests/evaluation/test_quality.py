"""PSNR and SSIM against their definitions."""

import numpy as np
import pytest

from vaediff.evaluation import quality


def pair(seed=0, shape=(3, 16, 20, 3)):
  rng = np.random.default_rng(seed)
  a = rng.integers(0, 256, shape)
  b = np.clip(a + rng.integers(-40, 41, shape), 0, 255)
  return a.astype(np.uint8), b.astype(np.uint8)


def ssim_written_out(x, y):
  """Wang et al. 2004, eq. 13, window by window, of one channel."""
  offsets = np.arange(-5, 6)
  window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
  window /= window.sum()
  values = []
  for i in range(5, x.shape[0] - 5):
    for j in range(5, x.shape[1] - 5):
      a, b = (v[i - 5 : i + 6, j - 5 : j + 6].astype(float) for v in (x, y))
      ma, mb = (window * a).sum(), (window * b).sum()
      va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
      cov = (window * (a - ma) * (b - mb)).sum()
      c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
      values.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
  return np.mean(values)


def test_ssim_against_its_definition():
  a, b = pair()
  expected = [
    np.mean([ssim_written_out(x[..., c], y[..., c]) for c in range(3)]) for x, y in zip(a, b, strict=True)
  ]
  np.testing.assert_allclose(quality.ssim_of_each(a, b), expected, rtol=1e-9)


def test_ssim_of_equal_images_is_one_and_many_images_are_split():
  a, b = pair(1, (130, 12, 12, 1))
  np.testing.assert_allclose(quality.ssim_of_each(a, a), 1, rtol=1e-12)
  np.testing.assert_allclose(quality.ssim_of_each(a, b)[-1:], quality.ssim_of_each(a[-1:], b[-1:]))


def test_ssim_needs_a_window():
  a, b = pair(0, (2, 8, 8, 1))
  with pytest.raises(ValueError, match='at least 11 pixels'):
    quality.ssim_of_each(a, b)


def test_psnr():
  a, b = np.full((2, 4, 4, 1), 100, np.uint8), np.full((2, 4, 4, 1), 110, np.uint8)
  assert quality.psnr(a, b) == pytest.approx(20 * np.log10(255 / 10))
  np.testing.assert_allclose(quality.psnr_of_each(a, b), 20 * np.log10(255 / 10))
  assert quality.psnr(a, a) == np.inf and np.isinf(quality.psnr_of_each(a, a)).all()
  assert quality.mse(a, b) == pytest.approx((10 / 255) ** 2)
