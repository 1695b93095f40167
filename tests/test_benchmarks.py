"""The benchmarks against PyTorch: the same networks, honest statistics, messages that help.

What needs PyTorch or diffusers is skipped without them.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from some_slow import some_slow

from benchmarks import machine, operations, paired, pairing, table
from benchmarks.cases import CASES, select
from vaediff.errors import UserError
from vaediff.experiments import base
from vaediff.machine import cost

ROOT = pathlib.Path(__file__).parent.parent


def flags(**changes):
  values = vars(paired.make_parser('', 'all', 1.0).parse_args([]))
  return argparse.Namespace(**{**values, **changes})


# The same networks -----------------------------------------------------------------------------------


@pytest.fixture
def equality():
  pytest.importorskip('torch')
  pytest.importorskip('diffusers')
  from benchmarks import equality

  return equality


@pytest.mark.parametrize('name', CASES)
def test_with_the_same_weights_the_outputs_agree(name, equality):
  ours, theirs = equality.outputs(name, tiny=True)
  assert ours.shape == theirs.shape
  assert np.abs(ours).max() > 1e-3
  assert equality.difference(ours, theirs) < 1e-4


def test_a_wrong_weight_is_noticed(equality, monkeypatch):
  from benchmarks import weights

  transposed = lambda value: value.transpose(3, 2, 1, 0) if value.ndim == 4 else value.T
  monkeypatch.setattr(weights, '_layout', transposed)
  assert equality.difference(*equality.outputs('unet_small', tiny=True)) > 1e-2


def test_the_gradients_of_the_unet_agree(equality):
  import torch

  from benchmarks import jax_side, weights

  case = CASES['unet_cifar10']
  experiment, params, network = equality.pair('unet_cifar10', tiny=True)
  model = jax_side.model_of(case, experiment)
  inputs = jax_side.inputs_of(case, experiment, model, 2)
  eps = np.random.default_rng(1).normal(size=inputs[0].shape).astype(np.float32)
  arrays = jax.tree.map(jnp.asarray, inputs)
  loss = lambda params: jnp.mean(jnp.square(model.apply(params, *arrays) - eps))
  ours = weights.convert(
    'unet', jax.jit(jax.grad(loss))(params), equality.num_heads(case, case.config(tiny=True))
  )
  output = network(*equality.to_torch(case, inputs))
  (output - torch.from_numpy(eps).permute(0, 3, 1, 2)).square().mean().backward()
  largest = max(np.abs(value).max() for value in ours.values())
  for name, parameter in network.named_parameters():
    expected = weights.fit(ours[name], parameter)
    assert torch.allclose(parameter.grad, expected, rtol=0, atol=1e-4 * largest), name


def test_ddim_draws_the_same_images(equality):
  import torch

  from benchmarks import torch_side

  experiment, params, network = equality.pair('unet_cifar10', tiny=True)
  rng = np.random.default_rng(0)
  shape = (2, *experiment.inputs['noise'].shape)
  noise, x0_vae = (rng.uniform(-1, 1, shape).astype(np.float32) for _ in range(2))
  given = {'noise': noise, 'x0_vae': x0_vae}
  keys = base.sampling_keys(jax.random.split(jax.random.key(0), 2))
  ours = jax.jit(experiment.sample)({'denoiser': params}, given, keys)['x0']
  tensors = (torch.from_numpy(value).permute(0, 3, 1, 2) for value in (noise, x0_vae))
  theirs = torch_side.ddim(network, *tensors, torch_side.Place.of('float32')).permute(0, 2, 3, 1)
  np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-3)


@pytest.mark.parametrize(
  ('name', 'task'), [('unet_small', 'train'), ('unet_small', 'sample'), ('vae_cifar10', 'train')]
)
def test_every_task_runs_on_both_sides(name, task, equality):
  from benchmarks import jax_side, torch_side

  counts = set()
  for side in (jax_side, torch_side):
    built = side.build(name, task, count=2, dtype='float32', tiny=True)
    for _ in range(2):
      built.wait(built.run())
    counts.add(built.parameters)
  assert len(counts) == 1


def test_the_torch_side_needs_no_jax(equality):
  code = (
    'import sys; from benchmarks import operations_torch, torch_side; '
    "sys.exit(any(name == 'jax' or name.startswith('jax.') for name in sys.modules))"
  )
  assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0


OPERATIONS = [
  ('conv3x3', (2, 4, 4, 3, 5, 2)),
  ('group_norm_silu', (2, 4, 4, 8)),
  ('matmul', (6, 3, 5)),
  ('attention', (2, 4, 2, 3)),
  ('fir_down', (2, 4, 4, 3)),
  ('fir_up', (2, 4, 4, 3)),
  ('dropout', (2, 4, 4, 3)),
  ('update', (7,)),
]


@pytest.mark.parametrize(('kind', 'shape'), OPERATIONS)
def test_operations_have_the_same_results_in_shape(kind, shape, equality):
  from benchmarks import operations_jax, operations_torch

  for phase in operations.PHASES[kind]:
    sizes = []
    for side in (operations_jax, operations_torch):
      built = side.build(kind, list(shape), phase, dtype='float32')
      leaves = jax.tree.leaves(built.run())
      sizes.append(sorted(int(np.prod(leaf.shape)) for leaf in leaves))
    if kind != 'update':
      assert sizes[0] == sizes[1], phase


# Without PyTorch -------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', some_slow(CASES, 'unet_cifar10'))
def test_parameter_counts_are_those_of_our_networks(name):
  from benchmarks import jax_side

  case = CASES[name]
  model = jax_side.model_of(case, jax_side.experiment_of(case))
  shapes = jax.eval_shape(lambda key: jax_side.init(case, model, key), jax.random.key(0))
  assert cost.num_parameters(shapes) == case.parameters


@pytest.mark.parametrize('name', some_slow(CASES, 'ncsnpp_cifar10', 'decoder'))
def test_our_side_reads_inputs_of_its_networks_and_gives_images(name):
  from benchmarks import jax_side

  case = CASES[name]
  experiment = jax_side.experiment_of(case, tiny=True)
  model = jax_side.model_of(case, experiment)
  inputs = jax_side.inputs_of(case, experiment, model, 3)
  assert all(len(leaf) == 3 for leaf in jax.tree.leaves(inputs))
  params = jax.eval_shape(lambda key: jax_side.init(case, model, key), jax.random.key(0))
  output = jax.eval_shape(jax_side.forward(case, model), params, *inputs)
  size = case.config(tiny=True).data.image_size
  assert jax.tree.leaves(output)[0].shape[:3] == (3, size, size)


@pytest.mark.parametrize(
  ('name', 'task'),
  some_slow(
    [('unet_small', 'train'), ('unet_small', 'sample'), ('vae_cifar10', 'train')],
    ('unet_small', 'sample'), 'vae_cifar10',
  ),
)  # fmt: skip
def test_every_task_is_one_call_on_our_side(name, task):
  """Traced, not compiled: with PyTorch installed it is also run."""
  from benchmarks import jax_side

  parameters = []

  def build_and_run():
    built = jax_side.build(name, task, count=2, dtype='float32', tiny=True)
    parameters.append(built.parameters)
    return built.run()

  made = jax.eval_shape(build_and_run)
  if task == 'sample':
    assert made.shape == (2, 16, 16, 1)
  else:
    state, metrics = made
    (network,) = state.networks
    assert state.step.shape == metrics['loss'].shape == metrics[f'grad_norm/{network}'].shape == ()
    assert [cost.num_parameters(state.networks[network].params)] == parameters


@pytest.mark.slow
def test_the_operations_of_a_network_hold_its_multiplications():
  from benchmarks import jax_side, operations_jax

  found = operations_jax.operations_of('unet_small', 4)
  total = 0
  for row in found:
    *shape, last = row['shape']
    if row['kind'] == 'conv3x3':
      batch, height, width, inputs, outputs = shape
      total += row['times'] * batch * (height // last) * (width // last) * 9 * inputs * outputs
    elif row['kind'] == 'matmul':
      total += row['times'] * shape[0] * shape[1] * last
    elif row['kind'] == 'attention':
      total += row['times'] * 2 * shape[0] * shape[1] ** 2 * shape[2] * last
  case = CASES['unet_small']
  experiment = jax_side.experiment_of(case)
  model = jax_side.model_of(case, experiment)
  inputs = jax.tree.map(jnp.asarray, jax_side.inputs_of(case, experiment, model, 4))
  params = jax.eval_shape(model.init, jax.random.key(0))
  assert total == cost.macs(model.apply, params, *inputs)


def test_spreads_and_ratios_are_taken_round_by_round():
  sides = {'jax': {'seconds': [1.0, 2.0, 4.0]}, 'torch_eager': {'seconds': [2.0, 3.0, 4.0]}}
  assert table.ratios(sides, 'torch_eager') == [2.0, 1.5, 1.0]
  assert str(table.Spread.of(table.ratios(sides, 'torch_eager'))) == '1.5 [1-2]'
  assert table.ratio(sides, 'torch_compile') == '-'


def test_markdown_is_a_padded_table():
  assert table.markdown(('a', 'bb'), [('ccc', 'd')]) == '| a   | bb |\n| --- | -- |\n| ccc | d  |\n'


class Told:
  """Stands for a worker whose calls take as long as it is told."""

  def __init__(self, times, log, side, fails=False):
    self.times, self.log, self.side, self.fails = iter(times), log, side, fails

  def ask(self, command):
    if self.fails:
      raise pairing.WorkerError('no compiler')
    if 'build' in command:
      return {'parameters': 3, 'first_call_seconds': 9.0, 'seconds': 0.3}
    self.log.append((self.side, command['run']))
    return {'seconds': next(self.times), 'idle_cores': 0.01}


def test_sides_take_turns_and_a_failed_compiler_is_left_out():
  log = []
  workers = {
    'jax': Told([0.1, 0.2], log, 'jax'),
    'torch_eager': Told([0.3, 0.4], log, 'torch_eager'),
    'torch_compile': Told([], log, 'torch_compile', fails=True),
  }
  sides = pairing.measure(workers, {'build': 'networks'}, rounds=2, round_seconds=1.0)
  assert log == [('jax', 4), ('torch_eager', 4), ('torch_eager', 4), ('jax', 4)]
  assert sides['jax']['seconds'] == [0.1, 0.2]
  assert table.seconds(sides['torch_compile']) == 'failed'


def test_a_worker_that_is_gone_is_a_failed_one_to_the_end():
  worker = object.__new__(pairing.Worker)
  worker.side, worker._log = 'torch_compile', tempfile.TemporaryFile('w+')
  worker._process = subprocess.Popen(['true'], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
  worker._process.wait()
  with worker, pytest.raises(pairing.WorkerError):
    worker.ask({'run': 1})
  assert worker._process.stdout.closed and worker._log.closed


def test_a_new_run_keeps_the_other_cases(tmp_path):
  here = {'device': 'A (R) CPU, 2 cores', 'cpu': 'A', 'cores': 2, 'system': 'Linux', 'threads': {}}
  chosen = flags(results=tmp_path)

  def add(name, seconds):
    sides = {
      side: {'seconds': [seconds], 'parameters': 1, 'idle_cores': 0.0} for side in ('jax', 'torch_eager')
    }
    entry = {
      'images': 2,
      'parameters': 1,
      'largest_difference': 1e-6,
      'software': {'jax': '1'},
      'sides': sides,
    }
    paired._add(chosen, here, name, entry)

  add('vae_cifar10/train', 1.0)
  add('unet_small/train', 2.0)
  add('vae_cifar10/train', 3.0)
  path = tmp_path / 'a-cpu-2-cores.json'
  stored = json.loads(path.read_text())['measurements']
  assert list(stored) == ['unet_small/train', 'vae_cifar10/train']
  assert stored['vae_cifar10/train']['sides']['jax']['seconds'] == [3.0]
  text = path.with_suffix('.md').read_text()
  assert '| vae_cifar10/train | 2      | 1          | 3 [3-3] |' in text
  assert 'jax 1: all.' in text


def test_the_summary_names_the_operation_that_costs_most():
  def row(kind, phase, times, ours, theirs):
    sides = {'jax': {'seconds': [ours]}, 'torch_eager': {'seconds': [theirs]}}
    return {'kind': kind, 'phase': phase, 'times': times, 'shape': [1], 'sides': sides}

  rows = [
    row('conv3x3', 'forward', 3, 0.1, 0.2),
    row('conv3x3', 'weight_gradient', 2, 0.5, 0.25),
    row('matmul', 'forward', 1, 9.0, 9.5),
    row('matmul', 'with_gradient', 1, 1.0, 1.125),
    row('fir_up', 'with_gradient', 0, 7.0, 1.0),
  ]
  forward, step = operations.summary(rows).split('### One train step')
  assert 'in all; most of all matmul, forward: -0.5 s' in forward
  assert 'JAX minus PyTorch: +0.075 s in all; most of all conv3x3, weight_gradient: +0.5 s' in step
  assert 'fir_up' not in forward + step


def test_the_cpu_is_named():
  assert machine.cpu_model('processor : 0\nmodel name\t: Intel(R) Xeon(R)\n') == 'Intel(R) Xeon(R)'
  assert machine.slug('Intel(R) Xeon(R) CPU @ 2.50GHz, 2 cores') == 'intel-xeon-cpu-2.50ghz-2-cores'


def test_cases_are_selected_by_name():
  assert list(select('all')) == list(CASES)
  assert select('decoder, unet_small/train') == {'unet_small': ['train'], 'decoder': ['forward']}


@pytest.mark.parametrize(
  ('changes', 'parts'),
  [
    ({'rounds': 0}, ('--rounds', '0', 'at least 1')),
    ({'round_seconds': 0.0}, ('--round_seconds', '0.0', 'above 0')),
    ({'dtype': 'float16'}, ('--dtype', 'float16', 'bfloat16')),
    ({'device': 'tpu'}, ('--device', 'tpu', 'cpu, gpu')),
    ({'sides': 'torch'}, ('--sides', "'torch'", 'torch_eager')),
    ({'sides': 'jax'}, ('--sides', 'torch_eager')),
  ],
)
def test_a_flag_out_of_range_is_named(changes, parts):
  with pytest.raises(UserError) as error:
    paired.check(flags(**changes))
  assert all(part in str(error.value) for part in parts)


@pytest.mark.parametrize('text', ['unet', 'unet_small/encode', 'decoder,vae', ''])
def test_an_unknown_case_is_named_with_those_there_are(text):
  with pytest.raises(UserError, match='--cases') as error:
    select(text)
  assert 'unet_small' in str(error.value)


def test_without_pytorch_the_message_says_what_to_install(monkeypatch):
  monkeypatch.setattr(paired.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r"'torch' is not installed.*pip install -e '\.\[benchmarks\]'"):
    paired.check(flags())


def test_the_wrong_device_is_named():
  abouts = {'jax': {'device': 'cpu'}, 'torch_eager': {'device': 'NVIDIA H100'}}
  with pytest.raises(UserError, match="--device is 'cpu', but torch_eager found 'NVIDIA H100'"):
    machine.describe(abouts, 'cpu')
