"""metrics.jsonl neither repeats nor loses a line."""

import errno
import json
import os
import time

import jax
import jax.numpy as jnp
import pytest

from vaediff.errors import UserError
from vaediff.run import log


def steps(folder):
  return [json.loads(line)['step'] for line in (folder / 'metrics.jsonl').read_text().splitlines()]


def test_resuming_drops_what_came_after_the_checkpoint_and_a_cut_off_line(tmp_path):
  board = log.StageLog(tmp_path, 'vae', 0, 10)
  for step in range(1, 6):
    board.scalars(step, {'loss': float(step)})
  board.close()
  with open(tmp_path / 'metrics.jsonl', 'a') as file:
    file.write('{"stage": "vae", "st')  # a kill in the middle of a line
  board = log.StageLog(tmp_path, 'vae', 3, 10)
  assert steps(tmp_path) == [1, 2, 3]
  board.scalars(4, {'loss': 0.5})
  board.close()
  assert steps(tmp_path) == [1, 2, 3, 4]
  last = json.loads((tmp_path / 'metrics.jsonl').read_text().splitlines()[-1])
  assert last == {'stage': 'vae', 'step': 4, 'loss': 0.5}


def test_tensorboard_reads_the_events(tmp_path):
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

  board = log.StageLog(tmp_path, 'vae', 0, 2)
  board.scalars(1, {'loss/kl': 2.5})
  board.flush()
  board.close()
  events = EventAccumulator(str(tmp_path / 'tensorboard'))
  events.Reload()
  (event,) = events.Scalars('loss/kl')
  assert (event.step, event.value) == (1, 2.5)


def test_duration():
  assert log.duration(3725.4) == '1:02:05'


def test_the_clock_tells_waiting_from_work():
  clock = log.Clock()
  with clock.waiting('input'):
    time.sleep(0.06)
  with clock.paused():
    time.sleep(0.2)
  time.sleep(0.06)
  lap = clock.lap()
  assert 0.1 < lap['seconds'] < 0.2 and 0.3 < lap['waiting']['input'] < 0.7
  assert lap['waiting']['checkpoint'] == 0 and clock.lap()['waiting']['input'] == 0


def test_a_trace_of_some_steps(tmp_path, capsys):
  profile = log.Profile(tmp_path, (2, 3))
  for step in range(1, 6):
    profile.before(step)
    profile.after(step, jax.jit(lambda x: x + 1)(jnp.float32(step)))
  profile.close()
  assert len(list((tmp_path / 'tensorboard').rglob('*.xplane.pb'))) == 1
  assert capsys.readouterr().out.count('wrote a trace of steps 2 to 3') == 1


@pytest.mark.parametrize('steps', [(1,), (3, 2), (0, 2), (1, 2, 3)])
def test_profile_steps_that_are_none(tmp_path, steps):
  with pytest.raises(UserError, match='train.profile_steps must be'):
    log.Profile(tmp_path, steps)


def test_values_that_are_not_finite_are_left_out_of_the_json(tmp_path):
  board = log.StageLog(tmp_path, 'vae', 0, 2)
  board.scalars(1, {'loss': float('nan'), 'skipped_updates': 1.0})
  board.close()
  assert json.loads((tmp_path / 'metrics.jsonl').read_text()) == {
    'stage': 'vae', 'step': 1, 'skipped_updates': 1.0,
  }  # fmt: skip


LINES = (
  b'{"stage": "vae", "step": 2, "loss": 1.0}\n',
  b'{"stage": "vae", "step": 3, "loss": 0.5, "images_per_second": 9.0}\n',
)


@pytest.mark.parametrize(
  'foreign',
  [
    b'[1, 2]\n',
    b'3\n',
    b'null\n',
    b'"text"\n',
    b'true\n',
    b'{"loss": 1.0}\n',
    b'{"step": "4"}\n',
    b'{"step": 4.5}\n',
    b'{"step": true}\n',
    b'{"step": NaN}\n',
    b'\xff\xfe\x00 no text\n',
    b'\n',
    b'not json\rat all\n',
    b'[' * 100_000 + b'\n',
    b'{"step": ' + b'9' * 5000 + b'}\n',
    b'\x00' * 4096 + b'\n',
  ],
)
def test_a_line_that_is_no_metrics_stays_as_it_is(tmp_path, foreign, capsys):
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(LINES[0] + foreign + LINES[1] + b'{"stage": "vae", "step": 4, "loss": 1.0}\n')
  log.StageLog(tmp_path, 'vae', 3, 10).close()
  assert path.read_bytes() == LINES[0] + foreign + LINES[1]
  assert f'{path}: 1 lines are no metrics of a step' in capsys.readouterr().out


@pytest.mark.parametrize(
  'torn', [b'{"stage": "vae", "st', b'\x00\x00\x00', b'\xff', b'{"stage": "vae", "step": 4}']
)
def test_the_torn_last_line_is_dropped(tmp_path, torn):
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(b''.join(LINES) + torn)
  log.StageLog(tmp_path, 'vae', 3, 10).close()
  assert path.read_bytes() == b''.join(LINES)


def test_a_whole_last_line_whose_end_was_cut_off_is_kept(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(b''.join(LINES).rstrip())
  log.StageLog(tmp_path, 'vae', 3, 10).close()
  assert path.read_bytes() == b''.join(LINES)


def test_what_is_logged_of_the_step_to_go_on_from_stays_and_is_told(tmp_path):
  """An evaluation comes after the save of its step: whoever goes on there must know whether it was done."""
  board = log.StageLog(tmp_path, 'vae', 0, 10)
  for step in (1, 2):
    board.scalars(step, {'loss': 1.0, 'images_per_second': 5.0})
    board.scalars(step, {'val/loss': 2.0, 'val/mse': 1.0})
    board.scalars(step, {'best/fd_classifier': 3.0})
    board.scalars(step, {'best/fd_classifier': float('nan')})
  board.scalars(3, {'loss': 1.0})
  board.close()
  board = log.StageLog(tmp_path, 'vae', 2, 10)
  board.close()
  assert board.logged == {
    'loss': 1.0, 'images_per_second': 5.0, 'val/loss': 2.0, 'val/mse': 1.0, 'best/fd_classifier': 3.0,
  }  # fmt: skip
  lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert lines == [
    {'stage': 'vae', 'step': 1, 'loss': 1.0, 'images_per_second': 5.0},
    {'stage': 'vae', 'step': 1, 'val/loss': 2.0, 'val/mse': 1.0},
    {'stage': 'vae', 'step': 1, 'best/fd_classifier': 3.0},
    {'stage': 'vae', 'step': 1},
    {'stage': 'vae', 'step': 2, 'loss': 1.0, 'images_per_second': 5.0},
    {'stage': 'vae', 'step': 2, 'val/loss': 2.0, 'val/mse': 1.0},
    {'stage': 'vae', 'step': 2, 'best/fd_classifier': 3.0},
    {'stage': 'vae', 'step': 2},
  ]


def test_a_file_that_needs_no_change_is_not_written(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(b''.join(LINES))
  before = path.stat()
  log.StageLog(tmp_path, 'vae', 3, 10).close()
  after = path.stat()
  assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def make_folder(path):
  path.mkdir(parents=True)


def make_pipe(path):
  path.parent.mkdir(parents=True)
  os.mkfifo(path)


def make_file(path):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.touch()


@pytest.mark.parametrize(
  ('place', 'make', 'message'),
  [
    ('vae/metrics.jsonl', make_folder, r'metrics.jsonl is no file; move it away'),
    ('vae/metrics.jsonl', make_pipe, r'metrics.jsonl is no file; move it away'),
    ('vae', make_file, r'/vae cannot be written: File exists'),
    ('vae/tensorboard', make_file, r'tensorboard cannot be written: Not a directory'),
  ],
)
def test_what_cannot_be_written_is_named(tmp_path, place, make, message):
  make(tmp_path / place)
  with pytest.raises(UserError, match=message):
    log.StageLog(tmp_path / 'vae', 'vae', 0, 10)


def full(*_):
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_names_the_file_and_closing_says_nothing_more(tmp_path):
  board = log.StageLog(tmp_path, 'vae', 0, 10)
  os.dup2(os.open('/dev/full', os.O_WRONLY), board._file.fileno())
  with pytest.raises(UserError, match='metrics.jsonl cannot be written: No space left on device'):
    board.scalars(1, {'loss': 1.0})
  board.close()


def test_a_full_disk_while_the_metrics_are_made_durable(tmp_path, monkeypatch):
  board = log.StageLog(tmp_path, 'vae', 0, 10)
  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(UserError, match='metrics.jsonl cannot be written: No space left on device'):
    board.flush()
  board.close()


@pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning')
def test_events_that_cannot_be_written_do_not_hang_the_run(tmp_path, monkeypatch, capsys):
  board = log.StageLog(tmp_path, 'vae', 0, 100)
  monkeypatch.setattr(type(board._board.file_writer.event_writer._ev_writer), 'write_event', full)
  with pytest.raises(UserError, match='tensorboard could not be written'):
    for step in range(1, 100):
      board.scalars(step, {f'loss_{k}': 1.0 for k in range(8)})
      time.sleep(0.05)
  board.close()
  assert 'tensorboard is not complete' in capsys.readouterr().out
