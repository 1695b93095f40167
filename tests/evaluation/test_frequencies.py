"""Differences by frequency against waves, whose power is known."""

import numpy as np
import pytest

from vaediff.evaluation.frequencies import HIGH, LOW, rms_by_band


def wave(cycles_down, cycles_across, size=32, amplitude=50):
  rows, columns = np.indices((size, size)) / size
  value = 128 + amplitude * np.cos(2 * np.pi * (cycles_down * rows + cycles_across * columns))
  return np.round(value).astype(np.uint8)[None, ..., None]


FLAT = np.full((1, 32, 32, 1), 128, np.uint8)


@pytest.mark.parametrize(
  ('down', 'across', 'band'),
  [(0, 2, LOW), (4, 0, LOW), (2, 3, LOW), (3, 3, HIGH), (0, 5, HIGH), (16, 0, HIGH)],
)
def test_a_wave_is_in_the_band_of_its_radius(down, across, band):
  """Cut at 0.25 of the highest frequency, 0.125 cycles per pixel: radius 4 of 32 pixels."""
  found = rms_by_band(FLAT, wave(down, across), 0.25)
  other = {LOW: HIGH, HIGH: LOW}[band]
  rms = 50 / 255 * (1.0 if down == 16 else 0.5**0.5)
  assert found['all'][0] == pytest.approx(rms, rel=0.01)
  assert found[band][0] == pytest.approx(rms, rel=0.01)
  assert found[other][0] < 0.02 * rms


def test_bands_add_up_and_all_is_the_root_mean_square():
  a, b = np.random.default_rng(0).integers(0, 256, (2, 5, 8, 12, 3)).astype(np.uint8)
  found = rms_by_band(a, b, 0.5)
  whole = np.sqrt(np.mean(((a.astype(float) - b) / 255) ** 2, axis=(1, 2, 3)))
  np.testing.assert_allclose(np.hypot(found[LOW], found[HIGH]), found['all'], rtol=1e-10)
  np.testing.assert_allclose(found['all'], whole, rtol=1e-10)


def test_equal_images_have_no_difference():
  assert all(value == 0 for found in rms_by_band(FLAT, FLAT, 0.25).values() for value in found)
