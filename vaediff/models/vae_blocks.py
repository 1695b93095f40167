"""The block strings of the VAE as data: parsing, checking, and the list of layers they stand for.

Pure functions on strings and integers, without arrays; the grammar is in `vaediff.models.vae`.
"""

import collections
import dataclasses
import re

from vaediff.errors import UserError

LARGEST, LARGEST_WIDTH = 4096, 2**16
"""Of a block string's numbers, and of channels: a million layers are a slip, and a hang."""
GRAMMAR = (
  'allowed: RxN (N residual blocks at resolution R), R (one block), RdK (block, then average '
  'pooling by K >= 2), RuK (nearest upsampling by K >= 2), AtB (1x1 convolution from the '
  f'channels of A to those of B); no number above {LARGEST}'
)
_TOKEN = re.compile(r'(?P<resolution>[1-9]\d*)(?:(?P<kind>[xdut])(?P<value>[1-9]\d*))?')
_CHANNEL = re.compile(r'(?P<resolution>[1-9]\d*):(?P<channels>[1-9]\d*)')


@dataclasses.dataclass(frozen=True)
class Step:
  """One token of a block string.

  Attributes:
    kind: 'x', 'd', 'u' or 't', as in the grammar.
    resolution: R, or A of `AtB`.
    value: N, K, or B of `AtB`.
    token: the text, for messages.
  """

  kind: str
  resolution: int
  value: int
  token: str


@dataclasses.dataclass(frozen=True)
class Layer:
  """One layer of an encoder or decoder.

  Attributes:
    kind: 'residual', 'project', 'pool', 'upsample', 'stem' or 'head'.
    name: kind, resolution of its input and a running number: the name of the submodule.
    value: kernel size, output channels, then a factor for the other four, in the order of `kind`.
  """

  kind: str
  name: str
  value: int


@dataclasses.dataclass(frozen=True)
class VaePlan:
  """The layers of a VAE.

  Attributes:
    image_size: side of the image in pixels.
    first_channels: output channels of the encoder's first convolution.
    encoder: layers from there to resolution 1.
    decoder: layers from z as a map of resolution 1 to the last convolution.
  """

  image_size: int
  first_channels: int
  encoder: tuple[Layer, ...]
  decoder: tuple[Layer, ...]


def parse_blocks(text: str, *, field: str) -> tuple[Step, ...]:
  """Returns the steps of a block string.

  Raises:
    UserError: a token is not in the grammar; the message names `field` and the token.
  """
  steps = []
  for token in (part.strip() for part in text.split(',')):
    match = _TOKEN.fullmatch(token)
    resampling = match is not None and match['kind'] in ('d', 'u')
    numbers = [int(match[name] or 1) for name in ('resolution', 'value')] if match else []
    if match is None or max(numbers) > LARGEST or (resampling and numbers[1] < 2):
      raise UserError(f"{field}: '{token}' is not a step; {GRAMMAR}.")
    steps.append(
      Step(
        kind=match['kind'] or 'x',
        resolution=int(match['resolution']),
        value=int(match['value'] or 1),
        token=token,
      )
    )
  return tuple(steps)


def parse_channels(text: str, *, field: str) -> dict[int, int]:
  """Returns the number of channels of each resolution.

  Raises:
    UserError: an entry is not `R:C` with C at least 2 (a block halves C), or a resolution comes
      twice.
  """
  channels = {}
  for entry in (part.strip() for part in text.split(',')):
    match = _CHANNEL.fullmatch(entry)
    if match is None or not 2 <= int(match['channels']) <= LARGEST_WIDTH:
      raise UserError(
        f"{field}: '{entry}' is not an entry; allowed: R:C, resolution and channels, C >= 2 and at most "
        f'{LARGEST_WIDTH}.'
      )
    resolution = int(match['resolution'])
    if resolution in channels:
      raise UserError(f"{field}: '{entry}' gives resolution {resolution} a second time; keep one.")
    channels[resolution] = int(match['channels'])
  return channels


def plan_layers(
  steps: tuple[Step, ...],
  channels: dict[int, int],
  *,
  fields: tuple[str, str],
  first_resolution: int,
  last_resolution: int,
  dense_stem: bool = False,
) -> tuple[Layer, ...]:
  """Returns the layers that the steps stand for, after checking that they fit together.

  Args:
    steps: from `parse_blocks`.
    channels: from `parse_channels`; the input has the channels of `first_resolution`.
    fields: names of the config fields of the blocks and the channels, for messages.
    first_resolution: resolution of the input.
    last_resolution: resolution that the steps must reach.
    dense_stem: a learned map instead of repetition where a step upsamples from resolution 1, and
      instead of the mean where one pools to it.

  Raises:
    UserError: a step's resolution or channels are not those that reach it, a pooling factor does
      not divide, a resolution has no channels, or the steps end at the wrong resolution.
  """
  _require_channels(channels, fields, first_resolution, steps[0])
  resolution, width = first_resolution, channels[first_resolution]
  count = collections.Counter()
  plan = []

  def add(kind: str, value: int) -> None:
    key = f'{kind}{resolution}'
    plan.append(Layer(kind, f'{key}_{count[key]}', value))
    count[key] += 1

  for step in steps:
    _check_step(step, channels, fields, resolution, width)
    if step.kind in 'xd':
      for _ in range(step.value if step.kind == 'x' else 1):
        add('residual', 1 if resolution == 1 else 3)
    if step.kind == 'd':
      reaches_one = resolution == step.value
      add('head' if dense_stem and reaches_one else 'pool', step.value)
      resolution //= step.value
    elif step.kind == 'u':
      add('stem' if dense_stem and resolution == 1 else 'upsample', step.value)
      resolution *= step.value
    elif step.kind == 't':
      width = channels[step.value]
      add('project', width)
  if resolution != last_resolution:
    raise UserError(f'{fields[0]} ends at resolution {resolution}; it must end at {last_resolution}.')
  return tuple(plan)


def plan_vae(
  *,
  encoder_blocks: str,
  decoder_blocks: str,
  encoder_channels: str,
  decoder_channels: str,
  latent_dim: int,
  dense_stem: bool,
) -> VaePlan:
  """Returns the layers of both halves; the encoder's first step has the image's size.

  Raises:
    UserError: a string is malformed or does not fit the others; the message names `model.<field>`.
  """
  encoder_fields = ('model.encoder_blocks', 'model.encoder_channels')
  decoder_fields = ('model.decoder_blocks', 'model.decoder_channels')
  encoder_steps = parse_blocks(encoder_blocks, field=encoder_fields[0])
  decoder_steps = parse_blocks(decoder_blocks, field=decoder_fields[0])
  encoder_widths = parse_channels(encoder_channels, field=encoder_fields[1])
  decoder_widths = parse_channels(decoder_channels, field=decoder_fields[1])
  if decoder_widths.get(1) != latent_dim:
    raise UserError(
      f'{decoder_fields[1]} gives resolution 1 {decoder_widths.get(1, "no")} channels, but z '
      f"enters there and model.latent_dim is {latent_dim}; write '1:{latent_dim}'."
    )
  image_size = encoder_steps[0].resolution
  encoder = plan_layers(
    encoder_steps,
    encoder_widths,
    fields=encoder_fields,
    first_resolution=image_size,
    last_resolution=1,
    dense_stem=dense_stem,
  )
  decoder = plan_layers(
    decoder_steps,
    decoder_widths,
    fields=decoder_fields,
    first_resolution=1,
    last_resolution=image_size,
    dense_stem=dense_stem,
  )
  return VaePlan(image_size, encoder_widths[image_size], encoder, decoder)


def _check_step(
  step: Step, channels: dict[int, int], fields: tuple[str, str], resolution: int, width: int
) -> None:
  """Raises UserError unless the step can follow a map of this resolution and width."""
  where = f"{fields[0]}: '{step.token}'"
  at = step.value if step.kind == 't' else step.resolution
  if at != resolution:
    raise UserError(
      f'{where} is at resolution {at}, but the map has resolution {resolution} there; a step at '
      f'resolution {resolution} must come next.'
    )
  _require_channels(channels, fields, at, step)
  _require_channels(channels, fields, step.resolution, step)
  if step.kind != 'u' and channels[step.resolution] != width:
    raise UserError(
      f'{where} takes {channels[step.resolution]} channels, but the map has {width} there; '
      f"change them with a step 'At{resolution}' first, A the resolution whose channels it has."
    )
  if step.kind == 'd' and resolution % step.value:
    raise UserError(f'{where} pools by {step.value}, which does not divide {resolution}.')


def _require_channels(channels: dict[int, int], fields: tuple[str, str], resolution: int, step: Step) -> None:
  """Raises UserError unless the resolution has channels."""
  if resolution not in channels:
    raise UserError(
      f"{fields[1]} has no entry for resolution {resolution}, which '{step.token}' of "
      f"{fields[0]} needs; it has {', '.join(map(str, channels))}. Add '{resolution}:C'."
    )
