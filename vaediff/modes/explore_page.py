"""The page of `--mode=explore`: controls to the left (`explore_panel`), pictures to the right.

These two files alone know NiceGUI. It was chosen because all that a browser needs comes with its package (no
font or script of another machine, no account, nothing sent home), because a page is built anew for each
visit, in Python, so that what a stage offers becomes its controls, and because it answers over one web
socket, fast enough to drag a slider.

Each visit, which is a tab of a browser, has a choice of its own. One thread draws for all, a picture at a
time and of each visit only what it asked for last, so that visits wait for each other but change nothing of
each other.
"""

import asyncio
import base64
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from nicegui import app, background_tasks, ui

from vaediff.errors import UserError
from vaediff.modes import explore_style
from vaediff.modes.explore_drawn import Explorer
from vaediff.modes.explore_guard import Guard
from vaediff.modes.explore_panel import Panel, marked
from vaediff.modes.explore_restored import Damage
from vaediff.modes.explore_wishes import DRAWN, Choice, Shown, picture
from vaediff.run import images

CONNECTION = 60.0
"""Seconds that a browser has to open its web socket."""
REST = 0.15
"""Seconds without a change after which the whole picture is drawn."""


def serve(explorer: Explorer, first: str, host: str, port: int, *, opens: bool) -> None:
  """Serves the page until the process is interrupted.

  Args:
    explorer: what draws.
    first: the stage that is shown first.
    host: of this machine alone.
    port: to listen at.
    opens: a browser is opened.
  """
  worker = ThreadPoolExecutor(1, 'draws')
  app.add_middleware(Guard, max_bytes=explorer.settings.max_upload_bytes)

  @ui.page('/', title=f'{explorer.workdir.name}: explore', response_timeout=60)
  async def page() -> None:
    await Visit(explorer, worker).open(first)

  ui.run(
    host=host, port=port, show=opens, reload=False, tailwind=False, favicon='🔭',
    show_welcome_message=False, uvicorn_logging_level='error', access_log=False,
  )  # fmt: skip
  worker.shutdown(wait=False, cancel_futures=True)
  raise KeyboardInterrupt  # nothing else ends it, and the server may keep that for itself


class Visit:
  """One tab: its choice, its controls, and what it shows."""

  def __init__(self, explorer: Explorer, worker: ThreadPoolExecutor):
    self.explorer, self.worker = explorer, worker
    self.choice = Choice(stage='')
    self.wanted, self.done, self.is_following = None, None, False
    self.shown, self.parts = None, {}

  async def open(self, stage: str) -> None:
    """Builds the page."""
    ui.add_css(explore_style.CSS)
    ui.colors(primary=explore_style.ACCENT)
    with ui.element('div').classes('top'):
      ui.label('vaediff').classes('brand')
      ui.label(self.explorer.workdir.name).classes('run')
      ui.space()
      select = ui.select(list(self.explorer.stages), value=stage, on_change=lambda e: self.enter(e.value))
      marked(select.props('dense outlined options-dense dark'), 'stage').classes('stage')
    with ui.element('div').classes('both'):
      self.panel = ui.element('div').classes('panel')
      with ui.element('div').classes('canvas'):
        self.pictures = ui.element('div').classes('pictures')
        with ui.element('div').classes('line'):
          self.spinner = ui.spinner(size='18px').classes('spin')
          self.status = marked(ui.label('').classes('status'), 'status')
        self.message = marked(ui.label('').classes('message'), 'message')
        with ui.element('div').classes('line'):
          button = ui.button('Download PNG', icon='download', on_click=self.download)
          marked(button.props('outline no-caps color=grey-4'), 'download')
    # the empty page goes out first: it does not wait for what is drawn for others
    await ui.context.client.connected(timeout=CONNECTION)
    await self.enter(stage)

  async def enter(self, stage: str) -> None:
    """Shows another stage; seeds and pictures stay."""
    try:
      offer = await self.in_worker(self.explorer.offer, stage)
    except UserError as error:
      self.say(str(error))
      return
    before = self.choice
    self.choice = Choice(stage=stage, num_points=self.explorer.settings.num_points)
    for number, end in enumerate(before.ends):
      kind = end.kind if end.kind in offer.ends else (offer.ends or (DRAWN,))[0]
      self.choice.change_end(number, kind=kind, image=end.image, index=end.index, seeds=end.seeds)
    self.panel.clear()
    with self.panel:
      Panel(self, offer).build()
    self.change()

  # Drawing -----------------------------------------------------------------------------------------

  async def in_worker(self, call: Callable[..., Any], *args: Any) -> Any:
    """Returns what a call returns in the one thread that draws."""
    return await asyncio.get_running_loop().run_in_executor(self.worker, call, *args)

  def change(self) -> None:
    """Asks for pictures of what is chosen now."""
    self.wanted = self.choice.wish()
    if not self.is_following:
      self.is_following = True
      background_tasks.create(self.follow(), name='follow')

  async def follow(self) -> None:
    """Draws what is wanted until it is shown: at once what can be, and the rest when nothing changes."""
    try:
      while self.wanted is not self.done:
        wish = self.wanted
        fits = await self.attempt(self.explorer.quick, wish)
        await asyncio.sleep(REST)
        if wish is self.wanted:
          if fits:  # else it would be refused again, over what was said since
            await self.attempt(self.explorer.draw, wish)
          self.done = wish
    finally:
      self.is_following = False

  async def attempt(self, call: Callable[..., Shown | None], *args: Any) -> bool:
    """Shows what a call draws, or says why it cannot; returns whether it could."""
    self.spinner.set_visibility(True)
    could = False
    try:
      shown = await self.in_worker(call, *args)
      if shown is not None:
        self.say('')
        self.show(shown)
      could = True
    except UserError as error:
      self.refuse(str(error))
    except Exception:
      logging.exception('a picture could not be drawn')
      self.refuse('This could not be drawn: the terminal says why.')
    self.spinner.set_visibility(False)
    return could

  def show(self, shown: Shown) -> None:
    """Shows pictures; those that are not among what is seen at once stay, dimmed, so that nothing jumps."""
    self.shown = shown
    names = list(shown.images)
    if shown.is_quick:
      names += [name for name in self.parts if name not in names]
    if set(self.parts) != set(names):
      self.lay_out(names)
    is_row = len(set(shown.wish.weights)) > 1
    switch(self.pictures, 'rows', is_row)
    for name, (image, title) in self.parts.items():
      switch(image, 'stale', name not in shown.images)
      if name not in shown.images:
        continue
      content = base64.b64encode(images.png(picture(shown.images[name], is_row=is_row))).decode()
      image.props['src'] = f'data:image/png;base64,{content}'
      image.update()
      title.set_text(shown.titles[name])
    switch(self.pictures, 'quick', shown.is_quick)
    what = 'at once: ' if shown.is_quick else ''
    once = ', compiled for the first time' if shown.is_new else ''
    self.status.set_text(f'{what}{shown.what} · {shown.seconds:.2f} s{once}')

  def lay_out(self, names: list[str]) -> None:
    """Makes room for pictures of these names; those that were there before stay what they were."""
    before, self.parts = self.parts, {}
    told = {name: (image.props['src'], title.text) for name, (image, title) in before.items()}
    self.pictures.clear()
    with self.pictures:
      for name in names:
        src, text = told[name] if name in told else ('', '')
        with ui.element('figure'):
          image = marked(ui.element('img'), f'picture-{name}')
          image.props['src'] = src
          self.parts[name] = (image, ui.label(text).classes('title'))

  def say(self, text: str) -> None:
    """Shows a message in place of the last one."""
    self.message.set_text(text)

  def refuse(self, text: str) -> None:
    """Says why there is no picture, and dims those of before."""
    self.say(text)
    for image, _ in self.parts.values():
      switch(image, 'stale', True)

  async def restore(self, damage: Damage) -> None:
    """Shows picture A, what is left of it, and that restored."""
    await self.attempt(self.explorer.restore, self.choice.wish(), damage)

  async def download(self) -> None:
    """Hands over what is shown, as a PNG file that says what it was made of."""
    if self.shown is not None:
      content = await self.in_worker(self.explorer.png, self.shown)
      ui.download.content(content, f'{self.shown.wish.stage}.png', 'image/png')


def switch(element: ui.element, name: str, is_on: bool) -> None:
  """Gives an element a class of the style, or takes it away."""
  if is_on:
    element.classes(add=name)
  else:
    element.classes(remove=name)
