"""What an explorer draws: pictures of a wish, which holds all that a visitor has chosen.

A picture is made of two ends, each drawn of seeds or seen in an image, of a weight between them, and of what
is chosen beside: classes, numbers, captions, amounts along directions. Programs are compiled once for each
stage, sampler, number of steps and number of pictures, and nothing else that is chosen is in them.

No library of pages is imported here, and nothing knows of visitors: a wish says it all.
"""

import contextlib
import dataclasses
import json
import pathlib
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vaediff.conditions.weight import WEIGHT
from vaediff.data import pixels, sources, uploads
from vaediff.diffusion import samplers
from vaediff.errors import UserError
from vaediff.experiments import inspected, restored
from vaediff.experiments.base import NOISE, Experiment, InSpace
from vaediff.modes import explore_controls as controls
from vaediff.modes import explore_restored
from vaediff.modes.explore_wishes import DATA, DRAWN, UPLOAD, End, Offer, Shown, Wish, between, whole_picture
from vaediff.run import draw, images
from vaediff.run.draw import HostArrays
from vaediff.run.trained import Trained

STEPS = (1, 2, 4, 8, 16, 25, 50, 100, 250)
"""Offered beside a stage's own."""
AT_ONCE = 4
"""Calls of a network, and fewer, are drawn while one drags."""
KEPT = 256
"""Ends that are kept, of all visitors."""


class Explorer:
  """The stages of a run, opened when they are first looked at; of one thread.

  Args:
    config: of the run.
    workdir: its folder.
    stages: names of those that can be drawn from.
    open_stage: name -> the trained stage.
  """

  def __init__(
    self,
    config: ConfigDict,
    workdir: pathlib.Path,
    stages: tuple[str, ...],
    open_stage: Callable[[str], Trained],
  ):
    self.config, self.workdir, self.stages = config, workdir, stages
    self.settings = config.explore
    self._open, self._kept = open_stage, OrderedDict()
    self._opened, self._programs, self._offers, self._compiled = {}, {}, {}, set()

  # Stages ------------------------------------------------------------------------------------------

  def trained(self, stage: str) -> Trained:
    """Returns a stage as it was trained, but for a guidance weight that is given; opened once.

    Raises:
      UserError: for one that is none of the run, or cannot be opened.
    """
    if stage not in self.stages:
      raise UserError(f'{stage!r} is no stage of {self.workdir} that draws images: {", ".join(self.stages)}')
    if stage not in self._opened:
      trained = self._open(stage)
      self._opened[stage] = trained.with_experiment(inspected.with_free_weight(trained.experiment))
    return self._opened[stage]

  def offer(self, stage: str) -> Offer:
    """Returns what can be chosen of a stage."""
    if stage in self._offers:
      return self._offers[stage]
    trained, settings = self.trained(stage), self.settings
    experiment = trained.experiment
    found, notes = controls.controls_for(trained)
    ways, more = controls.directions_of(
      trained, found, settings.num_directions, settings.deviations, settings.num_encoded
    )
    has_data, why = self._data_of(trained)
    is_free, own = experiment.diffusion is experiment, trained.settings
    tasks, why_not = explore_restored.tasks_of(trained)
    sees = is_free or bool(tasks) or any(one.seen or one.kind == controls.PICTURE for one in found)
    needs_image = any(one.kind == controls.SEEN for one in found) and not trained.draws_alone
    kinds = [*([] if needs_image else [DRAWN]), *([DATA] if sees and has_data else []), *([UPLOAD] * sees)]
    self._offers[stage] = Offer(
      stage=stage,
      controls=found,
      directions=ways,
      samplers=first_of(own.sampler, samplers.SAMPLERS) if is_free else (),
      num_steps=first_of(own.num_steps, STEPS) if is_free else (),
      about=about(trained),
      ends=tuple(kinds),
      finds_noise=is_free,
      tasks=tasks,
      has_quick=self._quick_of(Wish(stage=stage)) is not None,
      notes=tuple(dict.fromkeys((*notes, *more, *why, *why_not))),
    )
    return self._offers[stage]

  def _data_of(self, trained: Trained) -> tuple[bool, tuple[str, ...]]:
    """Returns whether the evaluation split can be opened, and why it cannot."""
    try:
      return len(trained.eval_source) > 0, ()
    except UserError as error:
      return False, (f'without images of the data: {error}',)

  def program(self, wish: Wish) -> Trained:
    """Returns the stage with the sampler and the steps that are asked for; made once.

    Raises:
      UserError: where it cannot be sampled so.
    """
    key = (wish.stage, wish.sampler, wish.num_steps)
    if key not in self._programs:
      trained = self.trained(wish.stage)
      changes = {'sampler': wish.sampler, 'num_steps': wish.num_steps}
      changes = {name: value for name, value in changes.items() if value}
      if changes and trained.experiment.diffusion is not trained.experiment:
        raise UserError(f'stage {wish.stage!r} knows its own steps alone: {about(trained)}')
      if any(trained.settings[name] != value for name, value in changes.items()):
        other = trained.with_settings(**changes)
        trained = other.with_experiment(inspected.with_free_weight(other.experiment))
      self._programs[key] = trained
    return self._programs[key]

  # What a picture is made of ------------------------------------------------------------------------

  def given(self, wish: Wish) -> HostArrays:
    """Returns what the pictures of a wish are made of, a row each; what is not there the stage sees to."""
    offer = self.offer(wish.stage)
    made = [self._end(wish, end) for end in wish.ends]
    given = made[0] if len(made) == 1 else between(*made, wish.weights)
    count = len(wish.weights)
    for control in offer.controls:
      if control.kind in (controls.CLASS, controls.NUMBER):
        value = wish.chosen[control.name] if control.name in wish.chosen else control.start
        dtype = np.int32 if control.kind == controls.CLASS else np.float32
        given[control.name] = np.full(count, value, dtype)
    given |= {name: np.repeat(value, count, axis=0) for name, value in self._told(wish).items()}
    return controls.moved(given, offer.directions, wish.amounts)

  def _told(self, wish: Wish) -> HostArrays:
    """Returns the caption of a wish as the stage reads it, a row; {} where there is none."""
    names = [one.name for one in self.offer(wish.stage).controls if one.kind == controls.CAPTION]
    written = [wish.captions[name] for name in names if name in wish.captions]
    return self.trained(wish.stage).caption_inputs(written[:1]) if written else {}

  def _end(self, wish: Wish, end: End) -> HostArrays:
    """Returns what the pictures of one end are made of."""
    found = self._start(wish, end)
    if end.kind == DRAWN:
      return found
    count = len(wish.weights)
    image, _ = self.image_of(wish.stage, end)
    repeated = lambda value: np.repeat(value, count, axis=0)
    found |= {name: repeated(value) for name, value in self._seen(wish.stage, end, image).items()}
    if end.finds_noise:
      found[NOISE] = repeated(self._noise_of(wish, end, image))
    in_unit_range = np.asarray(pixels.to_unit_range(jnp.asarray(image[None])))
    known = {one.name for one in self.offer(wish.stage).controls if one.kind == controls.PICTURE}
    return found | {name: repeated(in_unit_range) for name in known & set(wish.replaced)}

  def _start(self, wish: Wish, end: End) -> HostArrays:
    """Returns what seeds draw: one row for all pictures, unless they vary."""
    stage, count = wish.stage, len(wish.weights)
    offer, trained = self.offer(stage), self.trained(stage)
    names = [one.name for one in offer.controls if one.drawn and one.kind in (controls.SEED, controls.CODE)]
    alone = NOISE not in names
    found = {}
    for name in names:
      seed = end.seeds[name] if name in end.seeds else trained.settings.seed
      varies = wish.varies and (alone or name == NOISE)
      rows = np.arange(count) if varies else np.zeros(count, np.int32)
      drawn = self._keep((stage, DRAWN, seed, rows.tobytes()), lambda s=seed, r=rows: self._draw(stage, s, r))
      found[name] = drawn[name]
    return found

  def _draw(self, stage: str, seed: int, rows: np.ndarray) -> HostArrays:
    """Returns what a seed draws for images with these indices."""
    trained, key = self.trained(stage), (stage, 'start')
    if key not in self._programs:
      experiment = trained.experiment

      def start(read: Any, seed: jax.Array, rows: jax.Array) -> Any:
        return experiment.draw(read, draw.image_keys(seed, rows, experiment.depth), rows)

      self._programs[key] = jax.jit(start)
    return jax.device_get(self._programs[key](trained.read, np.int32(seed), rows.astype(np.int32)))

  def image_of(self, stage: str, end: End) -> tuple[np.ndarray, int]:
    """Returns the image of an end, uint8 [size, size, channels], and its class; 0 where it has none.

    Raises:
      UserError: for an end without an image.
    """
    if end.kind == UPLOAD:
      if end.image is None:
        raise UserError('no picture is uploaded yet: choose a file')
      return end.image, 0
    source = self.trained(stage).eval_source
    batch = source.read(np.array([end.index % len(source)]))
    return batch[sources.IMAGE][0], int(batch[sources.LABEL][0])

  def _seen(self, stage: str, end: End, image: np.ndarray) -> HostArrays:
    """Returns what the stage sees in the image of an end, of what has no control of its own."""
    named = [one.name for one in self.offer(stage).controls if one.kind in (controls.CODE, controls.SEEN)]
    observe = lambda: self.trained(stage).observe(image[None], np.zeros(1, np.int32))
    found = self._keep((stage, *end.key), observe)
    return {name: found[name] for name in named if name in found}

  def _noise_of(self, wish: Wish, end: End, image: np.ndarray) -> np.ndarray:
    """Returns the x_T [1, ...] that the image of an end is made of, with what is chosen of classes."""
    key = (wish.stage, NOISE, wish.sampler, wish.num_steps)
    if key not in self._programs:
      if not self.offer(wish.stage).finds_noise:
        raise UserError(f'stage {wish.stage!r} is no diffusion whose noise could be found in an image')
      program = self.program(wish)
      found = restored.inverted(program.experiment, program.settings.num_steps)
      self._programs[key] = program.with_experiment(found)
    original = np.asarray(pixels.to_unit_range(jnp.asarray(image[None])))
    of_one = dataclasses.replace(wish, weights=(0.0,), ends=(dataclasses.replace(end, finds_noise=False),))
    given = self.given(dataclasses.replace(of_one, amounts={}, replaced=()))
    seen = tuple((name, value.tobytes()) for name, value in given.items() if name != NOISE)

    def find() -> HostArrays:
      one, program = np.arange(1), self.program(wish)
      fed = program.inputs_from_makers(one, given, program.settings.seed)
      whole = {**fed, **given, restored.ORIGINAL: original}
      return self._programs[key].draw(one, whole, handed=True)

    return self._keep((*key, *end.key, seen), find)[NOISE]

  def _keep(self, key: tuple, make: Callable[[], HostArrays]) -> HostArrays:
    """Returns what was made under a key before, or makes it."""
    if key not in self._kept:
      self._kept[key] = make()
    self._kept.move_to_end(key)
    while len(self._kept) > KEPT:
      self._kept.popitem(last=False)
    return self._kept[key]

  # Pictures ----------------------------------------------------------------------------------------

  def draw(self, wish: Wish) -> Shown:
    """Returns the pictures of a wish, as they are.

    Raises:
      UserError: for what the stage cannot draw.
    """
    return self._shown(wish, self.program(wish), is_quick=False)

  def quick(self, wish: Wish) -> Shown | None:
    """Returns what can be seen of a wish at once, None where nothing can: see `_quick_of`."""
    program = self._quick_of(wish)
    return None if program is None else self._shown(wish, program, is_quick=True)

  def _quick_of(self, wish: Wish) -> Trained | None:
    """Returns what draws at once something like a stage's samples; None where it is the stage itself.

    In this order: a student that takes few steps and the same inputs; the images that stand beside the
    samples, such as a VAE's; the stage in few steps of DDIM.
    """
    key = ('quick', wish.stage, wish.sampler, wish.num_steps)
    if key in self._programs:
      return self._programs[key]
    program = self.program(wish)
    experiment, found = program.experiment, None
    if experiment.num_function_evaluations > AT_ONCE:
      found = self._student_of(wish.stage, experiment)
      if found is None and isinstance(experiment, InSpace) and experiment.titles and experiment.diffusion:
        found = program.with_experiment(inspected.conditions_only(experiment.diffusion))
      if found is None and experiment.diffusion is experiment:
        found = self.program(dataclasses.replace(wish, sampler='ddim', num_steps=AT_ONCE))
    self._programs[key] = found
    return found

  def _student_of(self, stage: str, experiment: Experiment) -> Trained | None:
    """Returns the quickest student whose samples take the same inputs, but for a guidance weight."""
    students = [name for name in self.stages if 'teacher' in self.config[name]]
    steps = {name: self.config[name].sample.num_steps for name in students}
    quick = [name for name in sorted(steps, key=lambda name: (steps[name], name)) if steps[name] <= AT_ONCE]
    for name in quick:
      with contextlib.suppress(UserError):  # one that cannot be opened is not there
        other = self.trained(name)
        if name != stage and other.experiment.inputs.keys() ^ experiment.inputs.keys() <= {WEIGHT}:
          return other
    return None

  def _shown(self, wish: Wish, program: Trained, *, is_quick: bool) -> Shown:
    """Returns what a program draws of a wish."""
    started, count = time.perf_counter(), len(wish.weights)
    rows = np.arange(count) if wish.varies else np.zeros(count, np.int32)
    drawn = program.draw(rows, self.given(wish), self.seed_of(wish))
    looked_at = self._looked_at(wish)
    titles = {**program.experiment.titles, **{name: name for name in looked_at}}
    is_alone = isinstance(program.experiment, inspected.ConditionsOnly)
    return Shown(
      images={**looked_at, **drawn},
      titles={name: titles[name] if name in titles else 'sample' for name in (*looked_at, *drawn)},
      what=f'{", ".join(titles[name] for name in drawn)} alone' if is_alone else about(program),
      seconds=time.perf_counter() - started,
      is_new=self._is_new(program, count),
      is_quick=is_quick,
      wish=wish,
      program=program,
    )

  def _is_new(self, *key: Any) -> bool:
    """Returns whether a program, of so many pictures or a damage, was never used before."""
    known, key = self._compiled, (id(key[0]), *key[1:])
    found = key not in known
    known.add(key)
    return found

  def _looked_at(self, wish: Wish) -> HostArrays:
    """Returns the images that single pictures are seen in, as they are."""
    ends = {f'picture {letter}': end for letter, end in zip('AB', wish.ends, strict=False)}
    images_of = {name: end for name, end in ends.items() if end.kind != DRAWN and len(wish.weights) == 1}
    return {name: self.image_of(wish.stage, end)[0][None] for name, end in images_of.items()}

  def seed_of(self, wish: Wish) -> int:
    """Returns the seed of what the steps of a sampler draw: that of the noise at the start."""
    seeds = wish.ends[0].seeds
    return seeds[NOISE] if NOISE in seeds else self.trained(wish.stage).settings.seed

  def restore(self, wish: Wish, damage: explore_restored.Damage) -> Shown:
    """Returns the image of the first end of a wish, what is left of it, and that restored.

    Raises:
      UserError: for an end without an image, or what the stage cannot restore.
    """
    started, program = time.perf_counter(), self.program(wish)
    image, _ = self.image_of(wish.stage, wish.ends[0])
    numbers = [one.name for one in self.offer(wish.stage).controls if one.kind == controls.CLASS]
    label = wish.chosen[numbers[0]] if numbers and numbers[0] in wish.chosen else 0
    found = explore_restored.restored(
      program, damage, image, int(label), self.seed_of(wish), self._programs, self._told(wish)
    )
    return Shown(
      images=found,
      titles={name: name for name in found},
      what=f'{about(program)}, {damage.degradation.task}',
      seconds=time.perf_counter() - started,
      is_new=self._is_new(program, damage),
      is_quick=False,
      wish=wish,
      program=program,
    )

  def made_of(self, shown: Shown) -> dict[str, str]:
    """Returns what pictures say of themselves in their file: networks, and all that was chosen."""
    wish = shown.wish
    ends = [
      {'from': end.kind, 'index': end.index, 'seeds': dict(end.seeds), 'finds noise': end.finds_noise}
      for end in wish.ends
    ]
    asked = {name: getattr(wish, name) for name in ('weights', 'chosen', 'captions', 'amounts', 'replaced')}
    choice = json.dumps({'ends': ends, **asked})
    return {**shown.program.made_of, 'drawn by': shown.what, 'the choice': choice}

  def png(self, shown: Shown) -> bytes:
    """Returns what is shown as a PNG file that says what it was made of."""
    return images.png(whole_picture(shown), self.made_of(shown))

  def upload(self, name: str, content: bytes) -> np.ndarray:
    """Returns the image of a file, uint8 [size, size, channels]; see `uploads.read`."""
    limits = {field: self.settings[f'max_upload_{field}'] for field in ('bytes', 'pixels')}
    return uploads.read(
      name, content, self.config.data, max_bytes=limits['bytes'], max_pixels=limits['pixels']
    )


def about(trained: Trained) -> str:
  """Returns which stage draws, and how."""
  settings, calls = trained.settings, trained.experiment.num_function_evaluations
  if trained.experiment.diffusion is not None:
    steps = settings.num_steps
    return f'{trained.stage}, {settings.sampler}, {steps} step{"s" * (steps > 1)}'
  return f'{trained.stage}, {calls} step{"s" * (calls > 1)}' if calls else trained.stage


def first_of(own: Any, all_of_them: Any) -> tuple:
  """Returns choices, a stage's own first."""
  return (own, *(one for one in all_of_them if one != own))
