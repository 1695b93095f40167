"""Serves the explorer of a stage that was never trained: `explore_server.py PORT FOLDER VARIANT STAGE`.

A program of its own, because a page's library has one server per process.
"""

import pathlib
import sys

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent), str(HERE)]

from vaediff.machine import runtime  # noqa: E402

runtime.start('vaediff.main')

import fresh  # noqa: E402
import numpy as np  # noqa: E402

from vaediff.modes import explore, explore_page  # noqa: E402
from vaediff.modes.explore_drawn import Explorer  # noqa: E402
from vaediff.run import directions  # noqa: E402


def leading(trained, number):
  """Directions that no training images are needed for."""
  return {
    'mean': np.zeros(16, np.float32),
    'directions': np.eye(16, number, dtype=np.float32),
    'deviation': np.full(number, 2, np.float32),
  }


if __name__ == '__main__':
  port, folder, variant, stage = sys.argv[1:]
  steps = {} if stage else {'refiner.sample.num_steps': 6, 'refiner.sample.sampler': 'ddim'}
  directions.leading = leading
  trained = fresh.Fresh(
    variant, pathlib.Path(folder), stage, **steps, **{'explore.max_upload_bytes': 100_000}
  )
  explorer = Explorer(trained.config, pathlib.Path(folder), (trained.stage,), lambda name: trained)
  explore_page.serve(explorer, trained.stage, explore.HOST, int(port), opens=False)
