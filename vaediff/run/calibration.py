"""Records of what a trained denoiser reads when it is sampled: what its quantization is calibrated on.

One record is {y, t, values, step}: the state before Formulation 2's shift, the time, what the network reads
beside them, and the number of the step of the sampler, from noise on. All are of one call, so that y is a
state at t: a released calibration script took y by the steps from noise and t by those from data. They are
drawn by the stage's own sampler (`experiments.recorded`), and are the same for every number of devices.

Two rules say which steps are kept. 'steps' (Q-Diffusion: Li et al. 2023, 2302.04304): evenly spaced ones, the
same of every image. 'normal' (PTQ4DM: Shang et al. 2023, 2211.15736): one of each image, at t ~ N(mean,
std^2) clamped to [0, 1].

They are stored beside the stage, at once or not at all, with the ids of all that they were made of.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from vaediff import checks
from vaediff.errors import UserError
from vaediff.experiments import bounds, recorded
from vaediff.experiments.diffusion import Diffusion
from vaediff.machine import distributed
from vaediff.run import draw, log
from vaediff.run.trained import Trained
from vaediff.storage import files, identity

KINDS = ('steps', 'normal')
BOUNDS = {
  'kind': checks.one_of(KINDS),
  'num_samples': checks.count(1),
  'steps': checks.count(0),
  'mean': checks.between(0, 1),
  'std': checks.at_least(0),
  'seed': checks.seed(),
  'batch_size': bounds.whole(1, bounds.MAX_CALLS),
}
"""Of the section of a calibration."""
MADE_OF = 'made_of'
"""In the file: what the records were made of, as JSON."""
SETTINGS = 'the settings'
"""Among that, what is in the name of the file instead."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Records:
  """Records, a row each.

  Attributes:
    y: states, float32.
    t: their times, float32.
    step: their numbers from noise on, int32.
    values: what the network reads beside them, by name.
  """

  y: Float[np.ndarray, 'records *shape']
  t: Float[np.ndarray, ' records']
  step: Int[np.ndarray, ' records']
  values: dict[str, np.ndarray]

  def __len__(self) -> int:
    return len(self.t)

  def rows(self, index: Any) -> 'Records':
    """Returns some of them."""
    values = {name: value[index] for name, value in self.values.items()}
    return Records(y=self.y[index], t=self.t[index], step=self.step[index], values=values)


def kept_steps(section: ConfigDict, times: Float[np.ndarray, ' steps']) -> Int[np.ndarray, 'images kept']:
  """Returns, for each image that is drawn, the steps of which records are kept.

  Args:
    section: `kind`, `num_samples` and so on.
    times: at which the steps begin.
  """
  if section.kind == 'normal':
    rng = np.random.default_rng(section.seed)
    t = np.clip(rng.normal(section.mean, section.std, section.num_samples), 0.0, 1.0)
    return np.argmin(np.abs(times[None, :] - t[:, None]), axis=1)[:, None].astype(np.int32)
  count = min(section.steps or len(times), len(times))
  steps = np.rint(np.linspace(0, len(times) - 1, count)).astype(np.int32)
  return np.tile(steps, (max(1, section.num_samples // count), 1))


def load(trained: Trained, section: ConfigDict) -> Records:
  """Returns the records that a section asks for, of the stage's file or drawn first.

  Raises:
    UserError: for a stage without a sampler, for bad settings, or when the file is damaged.
    Stale: when they are of another checkpoint than the stage's; names both.
  """
  checks.check(section, BOUNDS, 'config.quantize.calibration.')
  diffusion = trained.experiment.diffusion
  if diffusion is None:
    raise UserError(f'stage {trained.stage!r} has no sampler whose steps could be recorded')
  wanted = made_of(trained)
  path = path_of(trained, section)
  if distributed.agree(path.exists()):
    return read(path, diffusion, wanted)
  found = make(trained, diffusion, section)
  if jax.process_index() == 0:
    files.write_npz(path, {**_arrays(found), MADE_OF: json.dumps(wanted)})
  distributed.wait_for_all(f'wrote {path}')
  return found


def path_of(trained: Trained, section: ConfigDict) -> pathlib.Path:
  """Returns the file of the records: one for each way of sampling and of choosing."""
  asked = {name: value for name, value in section.to_dict().items() if name != 'batch_size'}
  settings = trained.settings.to_dict()
  for name in ('num_images', 'batch_size', 'seed'):
    settings.pop(name, None)
  digest = identity.digest([asked, settings])
  return trained.workdir / trained.stage / f'calibration-{section.kind}-{digest}.npz'


def made_of(trained: Trained) -> dict[str, str]:
  """Returns the ids of the checkpoint and of all that is read beside it."""
  return {name: value for name, value in trained.made_of.items() if name != SETTINGS}


def make(trained: Trained, diffusion: Diffusion, section: ConfigDict) -> Records:
  """Returns records of samples that are drawn, image by image: steps of one image are side by side."""
  kept = kept_steps(section, recorded.times_of(diffusion))
  log.say(f'{trained.stage}: recording {kept.size} states of {len(kept)} samples')
  drawer = trained.with_experiment(recorded.recorded(diffusion))
  parts, size = [], min(section.batch_size, len(kept))
  for indices, num_real in draw.padded_batches(len(kept), size):
    found = drawer.draw(indices, {recorded.KEPT: kept[indices]}, section.seed, handed=True)
    parts.append({name: value[:num_real] for name, value in found.items()})
  whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
  count, per_image = kept.shape
  for name, value in whole.items():
    if name.startswith(recorded.VALUE):
      whole[name] = np.repeat(value, per_image, axis=0)
    else:
      whole[name] = value.reshape(count * per_image, *value.shape[2:])
  return _records(whole)


def read(path: pathlib.Path, diffusion: Diffusion, wanted: identity.MadeOf) -> Records:
  """Returns the records of a file, whose ids and format are compared.

  Raises:
    Damaged: when it is no file of records of this space.
    Stale: when they are of another checkpoint.
  """
  stored = files.read_npz(path)
  with files.reading(path):
    found = json.loads(str(stored.pop(MADE_OF)))
    records = _records(stored)
    _check(records, diffusion)
  identity.compare(
    str(path), found, wanted, f'Remove {path}: records of the stage as it is now are drawn then'
  )
  return records


def _arrays(records: Records) -> dict[str, np.ndarray]:
  named = {recorded.VALUE + name: value for name, value in records.values.items()}
  return {recorded.STATE: records.y, recorded.TIME: records.t, recorded.STEP: records.step, **named}


def _records(arrays: dict[str, np.ndarray]) -> Records:
  own = len(recorded.VALUE)
  values = {name[own:]: value for name, value in arrays.items() if name.startswith(recorded.VALUE)}
  y, t, step = (arrays[name] for name in (recorded.STATE, recorded.TIME, recorded.STEP))
  return Records(y=y, t=t, step=step, values=values)


def _check(records: Records, diffusion: Diffusion) -> None:
  """Raises ValueError where types, shapes or numbers are not those of records."""
  shape = diffusion.space.shape
  if records.y.shape[1:] != shape or records.y.dtype != np.float32:
    raise ValueError(f'its states are {records.y.shape[1:]} {records.y.dtype}, not {shape} float32')
  if records.t.dtype != np.float32 or records.step.dtype != np.int32:
    raise ValueError(f'its times and steps are {records.t.dtype} and {records.step.dtype}')
  every = (records.y, records.step, *records.values.values())
  if any(len(value) != len(records) for value in every):
    raise ValueError('its arrays have different numbers of rows')
  if not all(np.all(np.isfinite(value)) for value in (records.t, *every)):
    raise ValueError('it holds what is not finite')
  if missing := set(diffusion.conditions.ports) - records.values.keys():
    raise ValueError(f'{min(missing)} is missing')
