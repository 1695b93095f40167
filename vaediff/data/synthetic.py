"""Made-up images without any file, for debug variants: a coloured disc on a grey gradient."""

import numpy as np

COUNTS = {'train': 256, 'eval': 64}
NUM_CLASSES = 10
NUMBERS = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')


def synthetic_arrays(split: str, size: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the images, uint8 [N, size, size, channels], and int32 labels of 'train' or 'eval'.

  The same on every call and machine; the splits share no image.
  """
  first = 0 if split == 'train' else COUNTS['train']
  examples = [synthetic_image(first + i, size, channels) for i in range(COUNTS[split])]
  return np.stack([image for image, _ in examples]), np.array([k for _, k in examples], np.int32)


def synthetic_caption(label: int) -> str:
  """Returns what a captioned set would say of an image of a class."""
  return f'a disc of hue {NUMBERS[label]} on gray'


def synthetic_image(seed: int, size: int, channels: int) -> tuple[np.ndarray, int]:
  """Returns one image, uint8 [size, size, channels], and its class, which sets the disc's hue."""
  random = np.random.RandomState(seed)
  label = int(random.randint(NUM_CLASSES))
  angle, slope, centre_x, centre_y, radius = random.uniform(size=5) * [2 * np.pi, 1, 0.4, 0.4, 0.15]
  y, x = np.mgrid[:size, :size] / size - 0.5
  gradient = 0.5 + 0.35 * (1 + slope) * (np.cos(angle) * x + np.sin(angle) * y)
  hue = 2 * np.pi * (label / NUM_CLASSES + np.arange(channels) / 3)
  disc = np.hypot(x + 0.2 - centre_x, y + 0.2 - centre_y) < 0.1 + radius
  image = np.where(disc[..., None], 0.5 + 0.5 * np.cos(hue), gradient[..., None])
  return np.round(255 * image).clip(0, 255).astype(np.uint8), label
