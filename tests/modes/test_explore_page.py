"""The page in a real browser without a screen: Debian's chromium, driven by playwright (pip)."""

import contextlib
import http.client
import io
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from vaediff.run import images

pytest.importorskip('nicegui', reason='the page needs the extra [explore]')
sync_api = pytest.importorskip(
  'playwright.sync_api', reason='the browser is driven by playwright: pip install it'
)
CHROMIUM = shutil.which('chromium')
pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(CHROMIUM is None, reason='apt-get install chromium'),
  pytest.mark.xdist_group('explore'),
]
HERE = pathlib.Path(__file__).parent
SECONDS = 30_000  # Milliseconds that a picture may take.
BEFORE = 'PYTEST_CURRENT_TEST'
"""The page's library takes a process with it for a test of its own."""


def free_port():
  with socket.socket() as one:
    one.bind(('127.0.0.1', 0))
    return one.getsockname()[1]


@contextlib.contextmanager
def serving(command, port, folder):
  """Yields the process of a server that answers; it is interrupted, as by Ctrl-C, at the end."""
  environment = {name: value for name, value in os.environ.items() if name != BEFORE}
  environment['XLA_FLAGS'] = environment['XLA_FLAGS'].replace('device_count=8', 'device_count=1')
  log = folder / 'server.log'
  with open(log, 'w') as file:
    process = subprocess.Popen(
      [sys.executable, *command], stdout=file, stderr=file, env=environment, cwd=HERE.parents[1]
    )
  try:
    for _ in range(600):
      if process.poll() is not None:
        pytest.fail(log.read_text()[-3000:])
      with contextlib.suppress(OSError), socket.create_connection(('127.0.0.1', port), 1):
        break
      time.sleep(0.1)
    yield process
  finally:
    process.send_signal(signal.SIGINT)
    try:
      process.wait(20)
    except subprocess.TimeoutExpired:
      process.kill()


@contextlib.contextmanager
def stage_page(variant, stage, folder):
  """Yields the address of the page of a stage that was never trained."""
  port = free_port()
  with serving([str(HERE / 'explore_server.py'), str(port), str(folder), variant, stage], port, folder):
    yield f'http://localhost:{port}/'


@pytest.fixture(scope='module')
def browser():
  with sync_api.sync_playwright() as driver:
    chromium = driver.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
    yield chromium
    chromium.close()


@pytest.fixture(scope='module')
def address(tmp_path_factory):
  with stage_page('formulation1,label', '', tmp_path_factory.mktemp('run')) as address:
    yield address


class Tab:
  """A tab of the browser that shows the page."""

  def __init__(self, browser, address, name='x0'):
    self.asked, self.name = [], name
    self.page = browser.new_page(viewport={'width': 1360, 'height': 900}, accept_downloads=True)
    self.page.on('request', lambda request: self.asked.append(request.url))
    self.page.goto(address)
    self.settle()

  def at(self, name):
    return self.page.locator(f'[data-testid="{name}"]')

  @property
  def picture(self):
    return self.at(f'picture-{self.name}').get_attribute('src')

  @property
  def status(self):
    return self.at('status').inner_text()

  def settle(self):
    """Waits for a picture that is no longer one that is seen at once."""
    self.page.wait_for_function(
      """() => {
        const status = document.querySelector('[data-testid=status]');
        return status && status.innerText && !status.innerText.startsWith('at once');
      }""",
      timeout=SECONDS,
    )

  def changed(self, before):
    """Waits for another picture, refined, and returns it."""
    self.page.wait_for_function(
      '([name, src]) => document.querySelector(`[data-testid="picture-${name}"]`).src !== src',
      arg=[self.name, before],
      timeout=SECONDS,
    )
    self.settle()
    return self.picture

  def value(self, name):
    return self.at(name).get_attribute('aria-valuenow')

  def drag(self, name, share):
    """Drags a slider to a share of its way and holds it; returns what the page says meanwhile."""
    slider = self.at(name)
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    middle = box['y'] + box['height'] / 2
    self.page.mouse.move(box['x'] + box['width'] / 2, middle)
    self.page.mouse.down()
    said = set()
    for k in range(1, 11):
      self.page.mouse.move(box['x'] + box['width'] * (0.5 + (share - 0.5) * k / 10), middle)
      self.page.wait_for_timeout(60)
      said.add(self.status.split(' ·')[0])
    self.page.mouse.up()
    return said

  def upload(self, content, name='a.png'):
    file = {'name': name, 'mimeType': 'image/png', 'buffer': content}
    self.at('upload-A').locator('input[type=file]').set_input_files(file)

  def message(self):
    self.page.wait_for_function(
      "() => document.querySelector('[data-testid=message]').innerText", timeout=SECONDS
    )
    return self.at('message').inner_text()


@pytest.fixture
def tab(browser, address):
  tab = Tab(browser, address)
  yield tab
  tab.page.close()


def png(value):
  file = io.BytesIO()
  Image.fromarray(value).save(file, 'PNG')
  return file.getvalue()


def test_a_picture_follows_the_slider_and_the_refined_one_follows_it(tab):
  before = tab.picture
  said = tab.drag('direction-z/principal/0', 0.9)
  assert 'at once: VAE alone' in said
  after = tab.changed(before)
  assert tab.status.startswith('refiner, ddim, 6 steps')
  tab.at('reset-principal directions').click()
  assert tab.changed(after) == before
  hosts = {url.split('/')[2].split(':')[0] for url in tab.asked if not url.startswith('data:')}
  assert hosts == {'localhost'}  # no font, script or anything else of another machine


def test_labels_and_rows(tab):
  before = tab.picture
  tab.at('class-label').click()
  tab.page.locator('.q-menu .q-item', has_text='7').click()
  one = tab.changed(before)
  tab.at('shape').get_by_text('row A to B').click()
  row = tab.changed(one)
  size = tab.at('picture-x0').evaluate('image => [image.naturalWidth, image.naturalHeight]')
  assert size == [3 * 130 + 2, 132] and row.startswith('data:image/png')


def test_a_file_is_taken_and_what_is_none_is_refused_on_the_page(tab):
  before = tab.picture
  tab.at('from-A').get_by_text('upload').click()
  assert tab.message() == 'no picture is uploaded yet: choose a file'
  tab.upload(b'#!/bin/sh', '../../evil.sh')
  tab.page.wait_for_function(
    "() => document.querySelector('[data-testid=message]').innerText.includes('is no image')", timeout=SECONDS
  )
  tab.upload(png(np.eye(8, dtype=np.uint8) * 255))
  seen = tab.changed(before)
  assert tab.at('message').inner_text() == '' and tab.at('picture-picture A').count() == 1
  tab.upload(b'\0' * 100_001)
  assert 'at most 100,000 bytes' in tab.message()
  assert tab.picture == seen
  with tab.page.expect_download() as download:
    tab.at('download').click()
  assert download.value.suggested_filename == 'refiner.png'
  with Image.open(download.value.path()) as file:
    assert file.size == (3 * 384, 384)  # the picture, the VAE's, the refined one
    own = np.asarray(file)[:384, :384:48]
    told = json.loads(json.loads(file.text[images.MADE_OF])['the choice'])
  np.testing.assert_array_equal(own[::48], np.eye(8) * 255)
  assert told['ends'][0]['from'] == 'upload'


def test_two_tabs_do_not_disturb_each_other(tab, browser, address):
  other = Tab(browser, address)
  before = tab.picture
  assert other.picture == before
  other.drag('direction-z/principal/1', 0.1)
  moved = other.changed(before)
  tab.drag('direction-z/principal/0', 0.8)
  mine = tab.changed(before)
  assert tab.value('direction-z/principal/1') == '0'
  assert other.picture == moved != mine
  other.page.close()
  tab.at('reset-principal directions').click()
  assert tab.changed(mine) == before


def test_nothing_but_the_page_is_served_and_to_no_one_else(address):
  host = address.split('/')[2]

  def status(path, method='GET', **headers):
    connection = http.client.HTTPConnection('localhost', int(host.split(':')[1]), timeout=20)
    connection.request(method, path, headers={'Host': host, **headers})
    answer = connection.getresponse()
    return answer.status, answer.read()

  assert status('/')[0] == 200
  for path in ('/etc/passwd', '/../etc/passwd', '/..%2f..%2fetc%2fpasswd', '/config.json', '/server.log'):
    found, body = status(path)
    assert found != 200 or b'root:' not in body
    assert b'"stages"' not in body and b'root:' not in body
  assert status('/', Host='evil.example')[0] == 403
  assert status('/', Origin='http://evil.example')[0] == 403
  assert status('/', 'POST', **{'Content-Length': '9999999'})[0] == 413
  with socket.socket() as one:  # and not to other machines
    outside = socket.gethostbyname(socket.gethostname())
    if not outside.startswith('127.'):
      assert one.connect_ex((outside, int(host.split(':')[1]))) != 0


@pytest.mark.parametrize(
  ('variant', 'stage', 'steps'),
  [('unconditional', '', 'refiner, ddim, 6 steps'), ('latent', 'ddgan', 'ddgan, ')],
)
def test_a_run_without_labels_and_a_gan(variant, stage, steps, browser, tmp_path):
  with stage_page(variant, stage, tmp_path) as address:
    tab = Tab(browser, address)
    before = tab.picture
    assert tab.status.startswith(steps)
    assert (
      tab.page.locator('[data-testid^="direction-"]').count() == tab.at('section-Conditions').count() == 0
    )
    assert tab.at('sampler').count() == (not stage)
    tab.drag('seed-noise-A', 0.7)
    assert tab.changed(before) != before
    tab.page.close()


def test_the_mode_serves_a_run_until_it_is_interrupted(trained, browser, tmp_path):
  run, port = trained('digits').copy(tmp_path / 'run'), free_port()
  command = ['-m', 'vaediff.main', f'--workdir={run}', '--mode=explore', f'--config.explore.port={port}']
  with serving(command, port, tmp_path) as process:
    tab = Tab(browser, f'http://localhost:{port}/')
    before = tab.picture
    tab.at('stage').click()
    tab.page.locator('.q-menu .q-item', has_text='vae').click()
    tab.page.wait_for_function(
      "() => document.querySelector('[data-testid=status]').innerText.startsWith('vae')"
    )
    assert tab.at('picture-x0').count() == 0 and tab.at('picture-x0_vae').count() == 1 and before
  assert process.returncode == 130
  said = (tmp_path / 'server.log').read_text()
  assert f'http://localhost:{port}' in said and 'Traceback' not in said
