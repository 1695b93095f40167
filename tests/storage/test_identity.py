"""Identity by content: sums that notice one bit wherever an array lies, and what does not belong together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vaediff.machine import digests
from vaediff.storage import identity

RNG = np.random.default_rng(0)
ARRAYS = (
  RNG.standard_normal((3, 5, 7)).astype(np.float32),
  RNG.integers(0, 256, (4, 3), np.uint8),
  np.asarray(jnp.asarray(RNG.standard_normal((5, 2)), jnp.bfloat16)),
  np.array(7, np.int32),
  RNG.integers(0, 2, 9).astype(bool),
  RNG.standard_normal((0, 3)).astype(np.float32),
)


@pytest.mark.parametrize('value', ARRAYS, ids=lambda value: f'{value.dtype}{value.shape}')
def test_every_single_bit_changes_the_sum(value):
  whole = identity.sum_of(value)
  assert whole == identity.sum_of(value.copy()) and 0 <= whole < 2**64
  for bit in range(8 * value.nbytes):
    content = bytearray(value.tobytes())
    content[bit // 8] ^= 1 << bit % 8
    assert identity.sum_of(np.frombuffer(content, value.dtype).reshape(value.shape)) != whole


def test_the_sums_of_parts_are_that_of_the_whole():
  value = ARRAYS[0]
  for axis in range(value.ndim):
    cut = value.shape[axis] // 2
    first, second = np.split(value, [cut], axis)
    begin = tuple(cut if k == axis else 0 for k in range(value.ndim))
    assert (identity.sum_of(first) + identity.sum_of(second, begin)) % 2**64 == identity.sum_of(value)
    assert identity.sum_of(np.flip(value, axis)) != identity.sum_of(value)


def test_a_digest_of_a_state_does_not_depend_on_the_devices():
  state = {'networks': {'vae': {'params': {'kernel': np.arange(64, dtype=np.float32).reshape(16, 4)}}}}
  mesh = jax.make_mesh((4, 2), ('data', 'fsdp'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  found = [digests.of_parts(state)]
  for axes in ((), ('data',), ('data', 'fsdp'), (('data', 'fsdp'),)):
    where = NamedSharding(mesh, PartitionSpec(*axes))
    found.append(digests.of_parts(jax.device_put(state, where)))
  assert all(each == found[0] for each in found) and set(found[0]) == {'networks/vae/params'}
  other = {'networks': {'vae': {'params': {'kernel': np.arange(64, dtype=np.int32).reshape(16, 4)}}}}
  assert digests.of_parts(other) != found[0]


def test_digests_of_json_and_of_bytes():
  assert identity.digest({'a': 1, 'b': (2, 3)}) == identity.digest({'b': [2, 3], 'a': 1})
  assert identity.digest({'a': 1}) != identity.digest({'a': 1.5})
  assert identity.of_parts([b'ab', b'c']) == identity.of_parts([b'a', b'bc']) != identity.of_parts([b'abd'])
  assert len(identity.digest(None)) == identity.DIGITS


def test_what_does_not_belong_together_is_named():
  identity.compare('x', {'a': '1'}, {'a': '1'}, 'Do it anew')
  with pytest.raises(identity.Stale, match='x was made of b 2, which is 3 now: the two do not .* Do it anew'):
    identity.compare('x', {'a': '1', 'b': '2'}, {'a': '1', 'b': '3'}, 'Do it anew')
  with pytest.raises(identity.Stale, match='x was made of b none, which is 3 now'):
    identity.compare('x', {}, {'b': '3'}, 'Do it anew')
