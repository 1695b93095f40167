"""metrics.jsonl neither repeats nor loses a line."""

import json
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
