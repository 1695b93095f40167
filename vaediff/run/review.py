"""What follows a step that is saved: validation, the best checkpoint, sample grids.

A run that resumes at a step does first what was due there: it may have been ended before it came to it.
"""

import collections
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from vaediff.conditions import control
from vaediff.data import loader
from vaediff.errors import UserError
from vaediff.experiments import controlnet
from vaediff.machine import distributed, sharding
from vaediff.run import best, draw, log, usage
from vaediff.run import config as configs
from vaediff.storage import identity


class Reviewer:
  """Does after each step what is due.

  Args:
    stage: `loop.Stage`.
    key: of the evaluation.
    board: where figures and pictures go.
    start_step: of this process' training; what its log holds of that step is not logged again.
    last: the latest metrics by name; it is updated.
  """

  def __init__(
    self, stage: Any, key: jax.Array, board: log.StageLog, start_step: int, last: dict[str, float]
  ):
    section = stage.config[stage.name]
    self._train, self._board, self._last = section.train, board, last
    self._evaluate = Evaluator(stage, key)
    self._start_step = start_step
    self._keeper = None
    if section.train.best_measure:
      self._keeper = best.Best(
        stage.folder,
        section.train.best_measure,
        _made_of(stage),
        start_step,
        stage.config.checkpoints.check_arrays,
        as_now=lambda meta: _as_now(meta, stage),
      )

  def due(self, step: int) -> bool:
    """Returns whether anything is done after a step."""
    return self._validates(step) or self._compares(step) or self._draws(step)

  def __call__(self, step: int, state: Any, meta: Callable[[int], dict[str, Any]]) -> None:
    """Does what is due after a step; `meta` returns what is stored with a state."""
    found = None
    if self._validates(step):
      if self._was_logged(step, 'val/'):
        self._last.update({name: x for name, x in self._board.logged.items() if name.startswith('val/')})
      else:
        found = self._evaluate(state)
        values = {f'val/{name}': value for name, value in found.items()}
        self._board.scalars(step, values)
        for line in self._evaluate.warnings(found):
          log.say(f'step {step}: {line}')
        self._last.update(values)
    if self._compares(step):  # again after a resume: the save may not have been finished
      value = self._measured(step, state, found)
      if not self._was_logged(step, 'best/'):
        self._board.scalars(step, {f'best/{self._keeper.measure}': value})
      self._keeper.consider(step, state, meta(step), value)
    if self._draws(step):
      try:
        for name, picture in self._evaluate.grids(state).items():
          self._board.picture(step, f'samples/{name}', picture)
      except draw.NotFinite as error:
        log.say(f'no sample grid of step {step}: {error}')

  def _measured(self, step: int, state: Any, found: dict[str, float] | None) -> float:
    """Returns the figure by which the best is kept; nan, never the best, of images that are not finite.

    Args:
      step: of the state.
      state: that is measured.
      found: its validation metrics; None where they were not computed in this call.
    """
    try:
      return self._evaluate.figure(state, self._keeper.measure, found)
    except draw.NotFinite as error:
      log.say(f'no {self._keeper.measure} of step {step}: {error}')
      return float('nan')

  def _validates(self, step: int) -> bool:
    return self._is_due(step, self._train.eval_every_steps)

  def _compares(self, step: int) -> bool:
    return self._keeper is not None and self._is_due(step, self._train.best_every_steps)

  def _draws(self, step: int) -> bool:
    return self._train.grid_every_steps > 0 and self._is_due(step, self._train.grid_every_steps)

  def _is_due(self, step: int, every: int) -> bool:
    return step % every == 0 or step == self._train.num_steps

  def _was_logged(self, step: int, prefix: str) -> bool:
    """Returns whether the run that was ended at this step has logged such figures of it."""
    if step != self._start_step:
      return False
    found = any(name.startswith(prefix) for name in self._board.logged)
    return distributed.agree(found or jax.process_index() > 0)  # the first process has the log

  def wait(self) -> None:
    """Waits for the save of the best under way, and says where it failed."""
    if self._keeper:
      try:
        self._keeper.wait()
      except UserError as error:
        log.say(str(error))

  def close(self) -> None:
    """Waits for the save of the best."""
    if self._keeper:
      self._keeper.close()


SAMPLED_WITH = 'the settings of its samples'
"""Among what the best checkpoint is made of: the digest of how samples are drawn for its figure."""
UNSAID = (('guidance_interval', ()), ('captions', ()))
"""Settings that an earlier version did not have, with what they were."""


def _made_of(stage: Any) -> identity.MadeOf:
  """Returns what the figure by which a stage's best is kept depends on beside the parameters."""
  section = stage.config[stage.name]
  sampled = {SAMPLED_WITH: identity.digest(_of_samples(section.sample))}
  return {**stage.measured_with, **(sampled if _is_of_samples(section.train.best_measure) else {})}


def _as_now(meta: dict[str, Any], stage: Any) -> identity.MadeOf:
  """Returns what a kept checkpoint was made of, as this version says it.

  An earlier one counted the batch size of samples, and how they are drawn also where the figure is of none.
  """
  section, stored = stage.config[stage.name], dict(meta[best.MADE_OF])
  if not _is_of_samples(section.train.best_measure):
    stored.pop(SAMPLED_WITH, None)
    return stored
  size = configs.from_stored(meta['config'])[stage.name].sample.batch_size
  settings = _of_samples(section.sample)
  if stored.get(SAMPLED_WITH) == identity.digest({**settings, 'batch_size': size}):
    stored[SAMPLED_WITH] = identity.digest(settings)
  return stored


def _is_of_samples(measure: str) -> bool:
  """Returns whether samples are drawn for a figure; for validation metrics none are, but for a control's."""
  return not measure.startswith(best.VALIDATION) or measure.removeprefix(best.VALIDATION) in control.METRICS


def _of_samples(settings: Any) -> dict[str, Any]:
  """Returns how a stage is sampled while it trains, of its `sample` section.

  How many images, how many at once, and where they go, does not count, nor does what guides, controls or
  ranks once it is trained; nor does what an earlier version did not say, where there is none: an interval,
  captions.
  """
  without = ('checkpoint', 'num_images', 'batch_size', 'guide', 'classifier', 'rerank', *controlnet.HANDED)
  return {
    name: value
    for name, value in settings.to_dict().items()
    if name not in without and not name.startswith('save_') and (name, value) not in UNSAID
  }


class Evaluator:
  """Validation metrics and sample grids of a stage, each compiled once."""

  def __init__(self, stage: Any, key: jax.Array):
    section = stage.config[stage.name]
    self._stage = stage
    self._where = sharding.batch_sharding(stage.mesh)
    self._batch_size = sharding.round_up(min(section.train.batch_size, len(stage.eval_source)), stage.mesh)
    self._limit, self._grid_images = section.train.eval_images, section.train.grid_images
    self._key = sharding.replicate(key, stage.mesh)
    experiment = stage.experiment
    self._eval_step = jax.jit(
      lambda read, batch, key: (experiment.eval_step(read, batch, key), experiment.counts(read, batch)),
      out_shardings=sharding.replicated(stage.mesh),
    )
    shape, source = stage.eval_source.image_shape, stage.eval_source
    self._draw = draw.Drawer(
      stage.experiment, stage.mesh, stage.config.seed, shape, lambda: source, f'stage {stage.name!r}'
    )

  def __call__(self, state: Any) -> dict[str, float]:
    """Returns the metrics of the evaluation split: means over its examples, and of what is counted in it."""
    totals, counted, count = collections.defaultdict(float), collections.defaultdict(float), 0.0
    total = min(self._limit or len(self._stage.eval_source), len(self._stage.eval_source))
    batches = loader.eval_batches(
      self._stage.eval_source,
      batch_size=self._batch_size,
      limit=self._limit,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      num_threads=self._stage.config.data.num_threads,
      prefetch=self._stage.config.data.prefetch,
    )
    for index, batch in enumerate(batches):
      weight = float(min(self._batch_size, total - index * self._batch_size))  # of all processes
      key = jax.random.fold_in(self._key, index)
      metrics, counts = self._eval_step(
        {**self._stage.frozen, **state.eval_params}, sharding.put_batch(batch, self._where), key
      )
      distributed.beat(f'batch {index} of the evaluation')
      for name, value in jax.device_get(metrics).items():
        totals[name] += float(value) * weight
      for name, value in jax.device_get(counts).items():
        counted[name] += np.asarray(value, np.float64)
      count += weight
    return {**{name: total / count for name, total in totals.items()}, **usage.figures(counted)}

  def warnings(self, metrics: dict[str, float]) -> tuple[str, ...]:
    """Returns what the stage's experiment says of these metrics."""
    return self._stage.experiment.warnings(metrics)

  def figure(self, state: Any, measure: str, found: dict[str, float] | None = None) -> float:
    """Returns a validation metric ('val/loss') or what `Stage.measure` makes of the averaged parameters.

    Args:
      state: that is measured.
      measure: name of the figure.
      found: the metrics of the evaluation split of this state; None = they are computed for one of them.

    Raises:
      UserError: for a validation metric that the stage does not have.
    """
    if not measure.startswith('val/'):
      return self._stage.measure(state.eval_params)
    values = self(state) if found is None else found
    if measure.removeprefix('val/') not in values:
      valid = ', '.join(f'val/{name}' for name in values)
      raise UserError(f'config.{self._stage.name}.train.best_measure is {measure!r}; metrics here: {valid}')
    return values[measure.removeprefix('val/')]

  def grids(self, state: Any) -> dict[str, np.ndarray]:
    """Returns pictures of the first images of a fixed seed, by name."""
    images = self._draw({**self._stage.frozen, **state.eval_params}, np.arange(self._grid_images))
    return {name: draw.as_grid(value) for name, value in images.items()}
