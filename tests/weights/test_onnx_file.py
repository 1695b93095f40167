"""Functions as ONNX files: the same numbers in onnxruntime; what is missing is named."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff.errors import UserError
from vaediff.weights import onnx_file


def test_what_is_not_installed_is_named_with_the_line_that_installs_it(monkeypatch):
  found = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if 'onnx' in name else found(name))
  with pytest.raises(UserError, match=r"not installed: jax2onnx, onnx, .*pip install -e '\.\[onnx\]'"):
    onnx_file.check_installed()
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: True)
  onnx_file.check_installed()


@pytest.mark.parametrize(
  ('equation', 'linear'),
  [
    ('abcd,de->abce', True),
    ('abc, cd -> abd', True),
    ('ab,bc->ac', True),
    ('abc,dc->abd', False),  # the kernel is transposed
    ('abcd,be->acde', False),
    ('abc,cd->adb', False),
    ('abcd,abde->abce', False),  # a batch of matrices
    ('aa,ab->ab', False),
  ],
)
def test_an_einsum_that_is_a_linear_map_of_the_last_axis(equation, linear):
  assert onnx_file.is_linear(equation) == linear


def network(x, kernel, matrix):
  """A convolution, and the same linear map twice."""
  numbers = ('NHWC', 'HWIO', 'NHWC')
  y = jax.nn.silu(jax.lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=numbers))
  return (y @ matrix) @ matrix


@pytest.mark.slow
def test_a_graph_computes_what_the_function_does_in_floats_and_in_whole_numbers():
  for package in onnx_file.PACKAGES:
    pytest.importorskip(package)
  rng = np.random.default_rng(0)
  kernel, matrix = rng.normal(size=(3, 3, 8, 16)) / 8, rng.normal(size=(16, 16)) / 4
  kernel, matrix = kernel.astype(np.float32), matrix.astype(np.float32)
  function = lambda x: network(x, jnp.asarray(kernel), jnp.asarray(matrix))
  struct = jax.ShapeDtypeStruct((2, 6, 6, 8), jnp.float32)
  graph = onnx_file.simplified(onnx_file.convert(function, {'x': struct}))
  operations = [node.op_type for node in graph.graph.node]
  assert 'Einsum' not in operations and operations.count('MatMul') == 2
  shapes = [tuple(tensor.dims) for tensor in graph.graph.initializer]
  assert shapes.count((16, 16)) == 1 and shapes.count((16, 8, 3, 3)) == 1  # equal ones are one
  assert {opset.domain for opset in graph.opset_import} == {''}

  content = onnx_file.stored(graph, {'weights': 'float32'})
  assert onnx_file.metadata(content)['weights'] == 'float32'
  batches = [{'x': rng.normal(size=struct.shape).astype(np.float32)} for _ in range(4)]
  wanted = [np.asarray(function(batch['x'])) for batch in batches]
  run = onnx_file.runner(content, 1)
  for batch, image in zip(batches, wanted, strict=True):
    np.testing.assert_allclose(run(batch), image, atol=1e-5)

  whole = onnx_file.quantized(graph, iter(batches), reduce_range=False)
  kernels = {tensor.name: tensor for tensor in whole.graph.initializer if len(tensor.dims) in (2, 4)}
  assert {tensor.data_type for tensor in kernels.values()} == {3}  # INT8
  run = onnx_file.runner(onnx_file.stored(whole, {}), 1)
  error = np.concatenate([run(batch) - image for batch, image in zip(batches, wanted, strict=True)])
  # a step of 1/255 of eight standard deviations is off by 0.9 % of one, and there are three, and kernels
  assert 0 < error.std() < 0.04 * np.std(wanted)

  reduced = onnx_file.quantized(graph, iter(batches), reduce_range=True)
  of_reduced = [tensor for tensor in reduced.graph.initializer if len(tensor.dims) == 4]
  numbers = np.frombuffer(of_reduced[0].raw_data, np.int8)
  assert abs(numbers.astype(int)).max() <= 64  # 7 bits


@pytest.mark.slow
def test_convolutions_of_few_channels_stay_in_floats():
  onnx = pytest.importorskip('onnx')
  weights = {'first': (32, 2, 3, 3), 'middle': (32, 32, 3, 3), 'last': (1, 32, 3, 3)}
  nodes = [onnx.helper.make_node('Conv', ['x', name], [name + '_y'], name=name) for name in weights]
  tensors = [
    onnx.numpy_helper.from_array(np.zeros(shape, np.float32), name) for name, shape in weights.items()
  ]
  graph = onnx.helper.make_graph(nodes, 'graph', [], [], tensors)
  assert onnx_file.in_float(onnx.helper.make_model(graph)) == ['first', 'last']


@pytest.mark.slow
def test_an_operation_without_a_form_in_onnx_is_an_error_of_the_user():
  pytest.importorskip('jax2onnx')
  struct = jax.ShapeDtypeStruct((2, 2), jnp.float32)
  function = lambda x: jax.pure_callback(np.sin, struct, x)
  with pytest.raises(UserError, match='jax2onnx cannot convert this sampler: '):
    onnx_file.convert(function, {'x': struct})
