"""The controls on the page of `--mode=explore`, made of what a stage offers; see `explore_page`."""

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

from nicegui import events, ui

from vaediff.errors import UserError
from vaediff.modes import explore_controls as controls
from vaediff.modes import explore_restored, explore_style
from vaediff.modes.explore_drawn import Explorer
from vaediff.modes.explore_wishes import DATA, DRAWN, FOUR, NINE, ONE, ROW, UPLOAD, Choice, Offer

MAX_SEED = 9999
KINDS = {DRAWN: 'drawn', DATA: 'data set', UPLOAD: 'upload'}
SHAPES = {ONE: 'one', FOUR: '4 noises', NINE: '9 noises', ROW: 'row A to B'}
LETTERS = ('A', 'B')


@runtime_checkable
class Visit(Protocol):
  """Who looks at the panel.

  Attributes:
    explorer: what draws.
    choice: what is chosen so far.
  """

  explorer: Explorer
  choice: Choice

  def change(self) -> None:
    """Asks for pictures of what is chosen now."""

  def say(self, text: str) -> None:
    """Shows a message to the visitor."""

  async def in_worker(self, call: Callable[..., Any], *args: Any) -> Any:
    """Returns what a call returns in the thread that draws."""

  async def restore(self, damage: explore_restored.Damage) -> None:
    """Shows picture A restored."""


class Panel:
  """The controls of one visit of one stage.

  Args:
    visit: whose choice they change.
    offer: what can be chosen.
  """

  def __init__(self, visit: Visit, offer: Offer):
    self.visit, self.choice, self.offer = visit, visit.choice, offer

  def build(self) -> None:
    """Builds all controls, in the slot that is open."""
    offer = self.offer
    own = {kind: [one for one in offer.controls if one.kind == kind] for kind in explore_style.KINDS}
    with section('Pictures'):
      self.build_steps()
    for number in (0, 1):
      if number == 0 or offer.ends:
        self.build_end(number, own[controls.CODE] + own[controls.SEED])
    if own[controls.CLASS] or own[controls.NUMBER] or own[controls.CAPTION] or own[controls.PICTURE]:
      with section('Conditions'):
        self.build_conditions(own)
    for group in dict.fromkeys(one.group for one in offer.directions):
      self.build_directions(group)
    if offer.tasks:
      with section('Restoration', closed=True):
        self.build_restoration()
    if offer.notes:
      with section('Not here', closed=True):
        for note in offer.notes:
          ui.label(note).classes('note')

  def build_steps(self) -> None:
    """Builds sampler, steps and the number of pictures."""
    offer = self.offer

    def to(field: str) -> Callable[[Any], None]:
      return lambda event: self.set(field, event.value)

    if offer.samplers:
      with ui.element('div').classes('pair'):
        chosen = select(list(offer.samplers), offer.samplers[0], 'sampler', to('sampler'))
        marked(chosen, 'sampler')
        steps = {number: str(number) for number in sorted(offer.num_steps)}
        marked(select(steps, offer.num_steps[0], 'steps', to('num_steps')), 'steps')
    else:
      ui.label(offer.about).classes('note')

    def shaped(event: Any) -> None:
      if event.value == ROW:
        self.two.set_value(True)  # a row needs both
      self.set('shape', event.value)

    shapes = ui.toggle(SHAPES, value=ONE, on_change=shaped)
    marked(shapes.props('dense no-caps spread unelevated').classes('wide'), 'shape')

  def set(self, field: str, value: Any) -> None:
    """Puts a value into the choice and asks for pictures."""
    setattr(self.choice, field, value)
    self.visit.change()

  def put(self, part: dict[str, Any], name: str, value: Any) -> None:
    """Puts a value into a part of the choice and asks for pictures."""
    part[name] = value
    self.visit.change()

  def build_end(self, number: int, seeded: list[controls.Control]) -> None:
    """Builds the controls of one end: where it comes from, and its seeds."""
    letter, offer, choice = LETTERS[number], self.offer, self.choice

    def changed(**changes: Any) -> None:
      choice.change_end(number, **changes)
      self.visit.change()

    with section(f'Picture {letter}', closed=number > 0):
      if number:
        two = ui.switch('between A and B', value=False, on_change=lambda e: self.set('has_two', e.value))
        self.two = marked(two.props('dense'), 'has-two')
        self.slider('A to B', 'weight', 0, 1, 0.01, 0, lambda value: self.set('weight', value))
      end = choice.ends[number]
      if len(offer.ends) > 1:
        kinds = {kind: KINDS[kind] for kind in offer.ends}
        toggle = ui.toggle(kinds, value=end.kind, on_change=lambda e: changed(kind=e.value))
        marked(toggle.props('dense no-caps spread unelevated').classes('wide'), f'from-{letter}')
      else:
        toggle = None
      if UPLOAD in offer.ends:
        self.build_upload(number, toggle)
      if DATA in offer.ends:
        index = ui.number('number in the data set', value=end.index, min=0, step=1, precision=0)
        index.on_value_change(lambda e: changed(index=max(0, int(e.value or 0))))
        shown_for(marked(index.props('dense outlined'), f'index-{letter}'), toggle, (DATA,))
      if offer.finds_noise:
        put = lambda e: changed(finds_noise=e.value)
        finds = ui.switch('x_T of this picture, by inversion', on_change=put)
        shown_for(marked(finds.props('dense'), f'finds-{letter}'), toggle, (DATA, UPLOAD))
      for control in (one for one in seeded if one.drawn):
        row = self.build_seed(number, control)
        if control.seen:
          shown_for(row, toggle, (DRAWN,))

  def build_seed(self, number: int, control: controls.Control) -> ui.element:
    """Builds the seed of one input; returns its row."""
    choice, name = self.choice, f'seed-{control.name}-{LETTERS[number]}'
    seeds = choice.ends[number].seeds
    start = seeds[control.name] if control.name in seeds else self.default_seed + number
    choice.seed(number, control.name, start)

    def changed(value: float) -> None:
      choice.seed(number, control.name, int(value))
      self.visit.change()

    slider = self.slider(f'seed of {control.title}', name, 0, MAX_SEED, 1, start, changed, is_seed=True)
    return slider.parent_slot.parent

  @property
  def default_seed(self) -> int:
    """The seed of the stage's own samples."""
    return int(self.visit.explorer.config[self.choice.stage].sample.seed) % MAX_SEED

  def build_upload(self, number: int, toggle: Any) -> None:
    """Builds the field that takes a file."""

    async def taken(event: events.UploadEventArguments) -> None:
      uploader.reset()
      try:
        content = await event.file.read()
        image = await self.visit.in_worker(self.visit.explorer.upload, event.file.name, content)
      except UserError as error:
        self.visit.say(str(error))
        return
      self.choice.change_end(number, kind=UPLOAD, image=image)
      self.visit.say('')
      self.visit.change()

    most = self.visit.explorer.settings.max_upload_bytes
    refused = lambda: self.visit.say(f'this file is refused: one file of at most {most:,} bytes is taken')
    uploader = ui.upload(
      label='drop a picture, or +', auto_upload=True, max_file_size=most, on_upload=taken, on_rejected=refused
    )
    marked(uploader.props('flat dense bordered').classes('upload'), f'upload-{LETTERS[number]}')
    shown_for(uploader, toggle, (UPLOAD,))

  def build_conditions(self, own: dict[str, list[controls.Control]]) -> None:
    """Builds classes, numbers, captions, and what a picture can take the place of."""
    chosen, captions = self.choice.chosen, self.choice.captions
    for one in own[controls.CLASS]:
      options = dict(enumerate(one.choices))
      put = lambda e, name=one.name: self.put(chosen, name, e.value)
      marked(select(options, one.start, one.title, put), f'class-{one.name}')
    for one in own[controls.NUMBER]:
      put = lambda value, name=one.name: self.put(chosen, name, float(value))
      if one.most > one.least:
        self.slider(one.title, f'number-{one.name}', one.least, one.most, 0.05, one.start, put)
      else:
        field = ui.number(one.title, value=one.start, on_change=lambda e, put=put: put(e.value or 0))
        marked(field.props('dense outlined'), f'number-{one.name}')
    for one in own[controls.CAPTION]:
      put = lambda e, name=one.name: self.put(captions, name, e.value or '')
      first = one.choices[0] if one.choices else ''
      if first:
        captions[one.name] = first
      field = ui.input(one.title, value=first, autocomplete=list(one.choices), on_change=put)
      marked(field.props('dense outlined debounce=400').classes('wide'), f'caption-{one.name}')
    for one in own[controls.PICTURE]:

      def put(event: Any, name: str = one.name) -> None:
        (self.choice.replaced.add if event.value else self.choice.replaced.discard)(name)
        self.visit.change()

      switch = ui.switch(f'the picture itself in place of {one.title}', on_change=put)
      marked(switch.props('dense'), f'replace-{one.name}')

  def build_directions(self, group: str) -> None:
    """Builds the sliders of a group of directions, and what sets them to 0."""
    found, sliders = [one for one in self.offer.directions if one.group == group], []

    def reset() -> None:
      for slider in sliders:
        slider.set_value(0)

    with section(group.capitalize(), closed=group == controls.OF_CLASSES):
      for one in found:
        put = lambda value, name=one.name: self.put(self.choice.amounts, name, float(value))
        sliders.append(self.slider(one.title, f'direction-{one.name}', -one.most, one.most, 0.05, 0, put))
      button = ui.button('all to 0', on_click=reset).props('flat dense no-caps size=sm')
      marked(button, f'reset-{group}')

  def build_restoration(self) -> None:
    """Builds task, strength and the button that restores picture A."""
    trained = self.visit.explorer.trained(self.offer.stage)
    strengths = explore_restored.strengths_of(trained)

    async def restore() -> None:
      damage = explore_restored.damage_of(
        trained, task.value, float(strength.value or 0), is_there=is_there.value
      )
      await self.visit.restore(damage)

    def offered(name: str) -> None:
      known = strengths[name] if name in strengths else ()
      strength.set_options(list(known), value=known[0] if known else None)
      strength.set_visibility(bool(known))
      is_there.set_visibility(name == 'denoise')

    with ui.element('div').classes('pair'):
      task = marked(
        select(list(self.offer.tasks), self.offer.tasks[0], 'task', lambda e: offered(e.value)), 'task'
      )
      strength = marked(select([0], 0, 'strength', lambda e: None), 'strength')
    is_there = ui.switch('the picture is noisy already').props('dense')
    offered(self.offer.tasks[0])
    button = ui.button('Restore picture A', on_click=restore).props('no-caps unelevated').classes('wide')
    marked(button, 'restore')

  def slider(
    self,
    title: str,
    name: str,
    least: float,
    most: float,
    step: float,
    value: float,
    put: Callable[[float], Any],
    *,
    is_seed: bool = False,
  ) -> ui.slider:
    """Returns a slider with its title to the left and its value to the right; a seed has a die."""
    with ui.element('div').classes('slide seed' if is_seed else 'slide'):
      ui.label(title).classes('name').tooltip(title)
      slider = ui.slider(min=least, max=most, step=step, value=value)
      marked(slider.props('dense'), name)
      label = ui.label(f'{value:g}').classes('value')
      if is_seed:
        roll = lambda: slider.set_value(random.randrange(MAX_SEED))
        marked(ui.button(icon='casino', on_click=roll).props('flat dense round size=sm'), f'roll-{name}')

    def changed(event: events.ValueChangeEventArguments) -> None:
      label.set_text(f'{event.value:g}')
      put(event.value)

    slider.on_value_change(changed)
    return slider


def marked(element: Any, name: str) -> Any:
  """Returns an element that can be found by a name."""
  element.props['data-testid'] = name
  return element


@contextlib.contextmanager
def section(title: str, *, closed: bool = False) -> Iterator[None]:
  """Holds controls under a title that opens and closes them."""
  with marked(ui.expansion(title, value=not closed), f'section-{title}').props('dense').classes('section'):
    with ui.element('div').classes('inside'):
      yield


def select(options: Any, value: Any, title: str, put: Callable[[Any], Any]) -> ui.select:
  """Returns a choice of one."""
  return ui.select(options, value=value, label=title, on_change=put).props('dense outlined options-dense')


def shown_for(element: Any, toggle: Any, kinds: tuple[str, ...]) -> None:
  """Shows an element only where a toggle has one of some values; always where there is none."""
  if toggle is not None:
    element.bind_visibility_from(toggle, 'value', backward=lambda value: value in kinds)
