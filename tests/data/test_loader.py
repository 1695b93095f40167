import itertools

import numpy as np
import pytest

from vaediff.data import loader
from vaediff.data.sources import ArraySource
from vaediff.errors import UserError

COUNT = 50


@pytest.fixture
def source():
  images = np.arange(COUNT, dtype=np.uint8)[:, None, None, None].repeat(2, 1).repeat(2, 2)
  labels = np.arange(COUNT, dtype=np.int32) % 7
  return ArraySource(images=images, labels=labels, label_names=(), num_classes=7)


def train(source, **changes):
  arguments = dict(batch_size=8, seed=3, start_step=0, num_threads=0, prefetch=0) | changes
  return loader.train_batches(source, **arguments)


def take(batches, count):
  return [batch['index'] for batch in itertools.islice(batches, count)]


def test_batch_contents_belong_together(source):
  extra = {'z': np.arange(COUNT, dtype=np.float32)[:, None] * 10}
  batches = train(source, extra=extra)
  for _ in range(10):
    batch = next(batches)
    assert {k: (v.dtype.name, v.shape) for k, v in batch.items()} == {
      'image': ('uint8', (8, 2, 2, 1)),
      'label': ('int32', (8,)),
      'index': ('int32', (8,)),
      'z': ('float32', (8, 1)),
    }
    np.testing.assert_array_equal(batch['image'][:, 1, 0, 0], batch['index'])
    np.testing.assert_array_equal(batch['label'], batch['index'] % 7)
    np.testing.assert_array_equal(batch['z'][:, 0], batch['index'] * 10)


def test_every_epoch_covers_all_in_another_order(source):
  order = np.concatenate(take(train(source), 25)).reshape(4, COUNT)
  assert (np.sort(order) == np.arange(COUNT)).all()
  assert len({tuple(epoch) for epoch in order}) == 4
  assert take(train(source, seed=4), 1)[0].tolist() != order[0, :8].tolist()


def test_more_than_an_epoch_per_batch(source):
  order = np.concatenate(take(train(source, batch_size=75), 2))
  assert (np.sort(order.reshape(3, COUNT)) == np.arange(COUNT)).all()


@pytest.mark.parametrize('process_count', [1, 2, 4])
@pytest.mark.parametrize('num_threads', [0, 3])
def test_same_order_for_any_number_of_processes(source, process_count, num_threads):
  whole = take(train(source), 15)
  parts = [
    take(
      train(
        source,
        process_index=i,
        process_count=process_count,
        num_threads=num_threads,
        prefetch=3,
      ),
      15,
    )
    for i in range(process_count)
  ]
  assert all(len(part[0]) == 8 // process_count for part in parts)
  np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


@pytest.mark.parametrize('num_threads', [0, 2])
def test_resuming_is_exact(source, num_threads):
  """Also in another epoch, and with other process counts before and after."""
  unbroken = take(train(source), 30)
  first = train(source, num_threads=num_threads, prefetch=num_threads)
  np.testing.assert_array_equal(take(first, 11), unbroken[:11])
  assert first.position == 11  # Not what the threads have read ahead.
  halves = [train(source, start_step=first.position, process_index=i, process_count=2) for i in range(2)]
  rest = [take(half, 19) for half in halves]
  np.testing.assert_array_equal(np.concatenate(rest, axis=1), unbroken[11:])
  assert halves[0].position == 30


def test_far_position_is_reached_at_once(source):
  batches = train(source, start_step=10**9)
  assert len(next(batches)['index']) == 8 and batches.position == 10**9 + 1


@pytest.mark.parametrize('limit', [0, 11, 80])
@pytest.mark.parametrize('process_count', [1, 2])
def test_eval_is_one_ordered_pass(source, limit, process_count):
  parts = [
    list(loader.eval_batches(source, batch_size=8, limit=limit, process_index=i, process_count=process_count))
    for i in range(process_count)
  ]
  count = min(limit or COUNT, COUNT)
  assert all(len(part) == -(-count // 8) for part in parts)
  batches = [
    {name: np.concatenate([part[name] for part in step]) for name in step[0]}
    for step in zip(*parts, strict=True)
  ]
  assert all(batch['image'].shape == (8, 2, 2, 1) for batch in batches)
  mask = np.concatenate([batch['mask'] for batch in batches])
  index = np.concatenate([batch['index'] for batch in batches])
  assert mask.dtype == np.float32 and mask.sum() == count
  np.testing.assert_array_equal(index[mask == 1], np.arange(count))
  np.testing.assert_array_equal(index[mask == 0], count - 1)


def test_eval_with_threads_and_extra(source):
  extra = {'z': np.arange(COUNT)}
  batches = loader.eval_batches(source, batch_size=20, num_threads=2, prefetch=2, extra=extra)
  np.testing.assert_array_equal(np.concatenate([batch['z'] for batch in batches])[:COUNT], np.arange(COUNT))


def test_mistakes(source):
  with pytest.raises(UserError, match='batch_size=9 .* number of processes, 2'):
    train(source, batch_size=9, process_count=2)
  with pytest.raises(ValueError, match='49 rows for 50'):
    train(source, extra={'z': np.zeros(49)})
  with pytest.raises(ValueError, match='reserved'):
    train(source, extra={'label': np.zeros(50)})
