"""A denoiser whose maps networks of control images are added to, and how strongly.

    maps of the way down and the middle + sum over controls of strength_i residual_i

(Zhang et al. 2023, arXiv:2302.05543). The strength of a map by its depth is even, or `DECAY` to the number of
maps below it (that of the published program without a prompt: 1 at the middle), or the side of the first map
over its own (there "CFG resolution weighting"). Where a control's value is not among the values, or no map
has a strength, the output is that of the network alone.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array
from ml_collections import ConfigDict

from vaediff.diffusion.gaussian import Denoise
from vaediff.errors import UserError
from vaediff.experiments.denoiser import DENOISER, Denoiser, State
from vaediff.models import controlnet, unet_sizes
from vaediff.models.functional import Model
from vaediff.types import Drop, Params, Read, Time, Values

BASE = 'base'
"""Name in `read` of the network that is controlled, as it was trained."""
TUNED = 'tuned'
"""Name in `read` of another, to which a control is transferred."""
DECAY = 0.825
DEPTHS = ('even', 'decay', 'resolution')
BRANCHES = ('both', 'conditional')
"""Of classifier-free guidance: where a control is read."""
WAYS = ('as_is', 'offset')
"""Of a transfer: the control as it was trained, or with what the network has changed by."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Branch:
  """One control.

  Attributes:
    model: (x_t, t, values, hint, drop, words) -> residuals.
    network: its name in `read`.
    value: the name of its image among the values.
    strengths: of its residuals.
  """

  model: Model
  network: str
  value: str
  strengths: tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Controlled(Denoiser):
  """A denoiser and its controls; `network` is `BASE`, or a copy of it whose way up is trained too.

  Attributes:
    branches: the controls, whose residuals are added to each other.
    in_both: weaker branches of guidance read the controls too.
    transfer: of `WAYS`: `TUNED` is read in place of the network; '' = it is not.
  """

  branches: tuple[Branch, ...]
  in_both: bool = True
  transfer: str = ''

  def outputs(
    self,
    read: Read,
    y: State,
    t: Time,
    values: Values,
    drop: Drop = {},  # noqa: B006
    key_dropout: jax.Array | None = None,
  ) -> tuple[State, State | None]:
    """Returns the prediction, and the fraction of a learned variance; dropout is the control's alone."""
    inputs, params = self.inputs(y, t, values, drop), self.controlled(read)
    residuals = self.residuals(read, params, inputs, values, key_dropout)
    return self.parts(self.model.apply(params, *inputs, residuals=residuals))

  def controlled(self, read: Read) -> Params:
    """Returns the parameters of the network that is controlled; its way down and middle have no gradient."""
    if self.transfer:
      return read[TUNED]
    params = read[self.network]
    if self.network != DENOISER:
      return params
    return {
      name: part if controlnet.is_up(name) else jax.lax.stop_gradient(part) for name, part in params.items()
    }

  def residuals(
    self, read: Read, params: Params, inputs: Any, values: Values, key_dropout: jax.Array | None
  ) -> list[Array | None] | None:
    """Returns what is added to the maps of the network, which has `params` and reads `inputs`."""
    x_t, t, own, drop = inputs
    active = [one for one in self.branches if one.value in values and any(one.strengths)]
    words = self.model.apply(params, *inputs, method='words') if active else {}
    total = None
    for branch in active:
      control = read[branch.network]
      if self.transfer == 'offset':
        control = controlnet.moved(control, read[BASE], read[TUNED])
      hint = values[branch.value]
      maps = branch.model.apply(control, x_t, t, own, hint, drop, words, key_dropout=key_dropout)
      scaled = [weighed(x, strength) for x, strength in zip(maps, branch.strengths, strict=True)]
      total = scaled if total is None else [_sum(a, b) for a, b in zip(total, scaled, strict=True)]
    return total

  def x0_hat(self, read: Read, values: Values, without: tuple[str, ...] = ()) -> Denoise:
    """Returns (y, t) -> x0_hat as the network says it, without some of its conditions; see `in_both`."""
    if without and not self.in_both:
      controls = {branch.value for branch in self.branches}
      values = {name: value for name, value in values.items() if name not in controls}
    return super().x0_hat(read, values, without)


def weighed(x: Array, strength: float) -> Array | None:
  """Returns a residual times its strength; None where that is 0."""
  if strength == 0:
    return None
  return x if strength == 1 else strength * x


def _sum(a: Array | None, b: Array | None) -> Array | None:
  if a is None or b is None:
    return b if a is None else a
  return a + b


def strengths_of(section: ConfigDict, module: Any, weight: float = 1.0) -> tuple[float, ...]:
  """Returns the strength of each residual of a control, as its stage's `sample` says, times a weight.

  Args:
    section: of the stage.
    module: the U-Net whose maps they are added to.
    weight: of this control among several.

  Raises:
    UserError: there are not as many strengths as maps.
  """
  sample, sides = section.sample, unet_sizes.map_sides(module)
  last = len(sides) - 1
  given: Sequence[float] = tuple(sample.strengths) or (1.0,) * len(sides)
  if len(given) != len(sides):
    raise UserError(
      f'sample.strengths has {len(given)} numbers; it must have {len(sides)}, one for each map that the way '
      'up of the U-Net reads, the first is that of the first convolution and the last the middle, or be ()'
    )
  rules = {
    'even': [1.0] * len(sides),
    'decay': [DECAY ** (last - i) for i in range(len(sides))],
    'resolution': [sides[0] / side for side in sides],
  }
  whole = weight * sample.strength
  found = [whole * own * rule for own, rule in zip(given, rules[sample.depth], strict=True)]
  return tuple(x if i == last or not section.only_middle else 0.0 for i, x in enumerate(found))
