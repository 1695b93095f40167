"""What a stage says of itself in a table of several runs."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
  """What a table of several runs says of one.

  Attributes:
    condition: what the samples are conditioned on.
    sampler: how they are drawn.
    method: what names its line in a plot.
    steps: of the sampler.
    guidance: its weight.
  """

  condition: str
  sampler: str
  method: str
  steps: int
  guidance: float
