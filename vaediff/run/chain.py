"""A stage and those that are sampled before it: what they can be given, and what a sample costs in each."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax


@dataclasses.dataclass
class Spent:
  """What drawing has taken so far, without the stages before.

  Attributes:
    images: that were drawn, rejected candidates too.
    seconds: for them.
    first: seconds of the first batch, in which programs are compiled.
    first_images: of that batch.
  """

  images: int = 0
  seconds: float = 0.0
  first: float = 0.0
  first_images: int = 0

  @contextlib.contextmanager
  def on(self, count: int) -> Iterator[None]:
    """Adds the time of what is done within it, for so many images."""
    started = time.monotonic()
    yield
    taken = time.monotonic() - started
    if not self.images:
      self.first, self.first_images = taken, count
    self.images, self.seconds = self.images + count, self.seconds + taken


def inputs_of(trained: Any) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns what samples of a stage can be given, and what those of the stages before it can, by name.

  Of one name that of the nearest counts. `trained` is `run.trained.Trained`, which imports this module.
  """
  found = dict(trained.experiment.inputs)
  for source in filter(trained.has_maker, trained.experiment.makers):
    found = {**inputs_of(trained.maker(source)), **found}
  return found


def stages_of(trained: Any) -> list[Any]:
  """Returns the stages that a sample goes through, the first first, each once."""
  found = {}
  for source in filter(trained.has_maker, trained.experiment.makers):
    found |= {(one.workdir, one.stage): one for one in stages_of(trained.maker(source))}
  return [*found.values(), trained]


def cost_rows(trained: Any) -> list[dict[str, Any]]:
  """Returns a row for each stage of the chain: evaluations of its network per image, and seconds so far.

  'seconds per image' leaves out the first batch, in which programs are compiled, where there is another.
  """
  rows = []
  for one in stages_of(trained):
    spent = one.spent
    later = spent.images - spent.first_images
    each = (spent.seconds - spent.first) / later if later else None
    rows.append(
      {
        'stage': one.stage,
        'network evaluations per image': one.experiment.num_function_evaluations,
        'images drawn': spent.images,
        'seconds': spent.seconds,
        'of them in the first batch': spent.first,
        'seconds per image': each,
      }
    )
  return rows
