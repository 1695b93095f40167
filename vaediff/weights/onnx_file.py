"""ONNX: a function of arrays as a file that onnxruntime runs alone, in floats or in whole numbers.

`jax2onnx` writes the operations; onnxruntime folds what is constant. Its linear maps are Einsums then, which
quantizers do not know: as MatMul they are the same products. Whole numbers of 8 bits are onnxruntime's own
static quantization (QDQ: the operations of floats stay, between a rounding and its reverse, and onnxruntime
joins them), for it refuses convolutions of whole numbers that come of XLA.

None of these packages is imported before a function is called: they are the extra `[onnx]`.
"""

import contextlib
import importlib.util
import logging
import pathlib
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from vaediff.errors import UserError

PACKAGES = ('jax2onnx', 'onnx', 'onnxruntime')
OUTPUT = 'images'
"""Name of what the graph returns."""
FEW = 8
"""Below as many channels on a side a convolution stays in floats: the first and the last of a network."""
QUANTIZED = ('Conv', 'MatMul')
"""Operations whose kernels become whole numbers; the products of attention have none."""
LINEAR = re.compile(r'(\w+),(\w)(\w)->(\w+)')
"""An Einsum that may be a linear map of the last axis."""
Arrays = Mapping[str, np.ndarray]
Runner = Callable[[Arrays], np.ndarray]


def check_installed() -> None:
  """Raises UserError where the packages of the extra `[onnx]` are not installed."""
  missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
  if missing:
    raise UserError(
      f'config.export.format is onnx, which takes {", ".join(PACKAGES)}; not installed: '
      f"{', '.join(missing)}. Install them with: pip install -e '.[onnx]'"
    )


def convert(function: Callable[..., jax.Array], inputs: Mapping[str, jax.ShapeDtypeStruct]) -> Any:
  """Returns the ModelProto of a function.

  Args:
    function: of arrays in the order of `inputs`, without loops.
    inputs: names, shapes and types of its arguments.

  Raises:
    UserError: when an operation has no form in ONNX.
  """
  with quiet():
    import jax2onnx

    try:
      return jax2onnx.to_onnx(
        function,
        [jax.ShapeDtypeStruct(struct.shape, struct.dtype) for struct in inputs.values()],
        input_names=list(inputs),
        output_names=[OUTPUT],
      )
    except Exception as error:  # it raises almost anything for what it does not know
      lines = str(error).strip().splitlines() or [type(error).__name__]
      raise UserError(f'jax2onnx cannot convert this sampler: {lines[0]}') from error


def simplified(model: Any) -> Any:
  """Returns a graph whose constants are folded and whose linear maps are MatMul."""
  import onnx
  import onnxruntime

  options = onnxruntime.SessionOptions()
  # more than the basic ones are of this processor, and no longer ONNX
  options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
  options.log_severity_level = 3
  with tempfile.TemporaryDirectory() as folder, quiet():
    path = pathlib.Path(folder) / 'folded.onnx'
    options.optimized_model_filepath = str(path)
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=['CPUExecutionProvider'])
    model = onnx.load(str(path))
  kernels = {tensor.name: tensor for tensor in model.graph.initializer}
  for node in model.graph.node:
    if node.op_type == 'Einsum' and is_linear(equation_of(node)) and node.input[1] in kernels:
      node.op_type = 'MatMul'
      del node.attribute[:]
  share(model)
  used = {node.domain for node in model.graph.node}
  kept = [opset for opset in model.opset_import if opset.domain in used]
  del model.opset_import[:]
  model.opset_import.extend(kept)
  return model


def equation_of(node: Any) -> str:
  """Returns what an Einsum computes."""
  return next(attribute.s.decode() for attribute in node.attribute if attribute.name == 'equation')


def is_linear(equation: str) -> bool:
  """Returns whether an equation is a linear map of the last axis, as 'abc,cd->abd'."""
  match = LINEAR.fullmatch(equation.replace(' ', ''))
  if not match:
    return False
  rows, within, out, result = match.groups()
  return rows[-1] == within and out not in rows and result == rows[:-1] + out and len(set(rows)) == len(rows)


def share(model: Any) -> None:
  """Keeps one of constants that are equal: the kernels of a network that is called in every step."""
  first, renamed, kept = {}, {}, []
  for tensor in model.graph.initializer:
    content = type(tensor)()
    content.CopyFrom(tensor)
    content.ClearField('name')
    found = first.setdefault(content.SerializeToString(deterministic=True), tensor.name)
    if found == tensor.name:
      kept.append(tensor)
    else:
      renamed[tensor.name] = found
  for node in model.graph.node:
    for number, name in enumerate(node.input):
      node.input[number] = renamed.get(name, name)
  kept = [type(tensor).FromString(tensor.SerializeToString()) for tensor in kept]
  del model.graph.initializer[:]
  model.graph.initializer.extend(kept)


def in_float(model: Any) -> list[str]:
  """Returns the names of the operations that stay as they are: convolutions of few channels."""
  shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
  found = []
  for node in model.graph.node:
    shape = shapes.get(node.input[1]) if node.op_type == 'Conv' else None
    if shape and min(shape[:2]) < FEW:
      found.append(node.name)
  return found


def quantized(model: Any, batches: Iterator[Arrays], *, reduce_range: bool) -> Any:
  """Returns a graph whose kernels are int8, a scale for each channel, and whose products read uint8.

  Args:
    model: a simplified one.
    batches: what its inputs are, of samples: the ranges of all that is read are measured on them.
    reduce_range: kernels have 7 bits, for processors whose products of bytes saturate.
  """
  import onnx
  from onnxruntime import quantization

  class Reader(quantization.CalibrationDataReader):
    def get_next(self) -> Arrays | None:
      return next(batches, None)

  copy = type(model)()
  copy.CopyFrom(model)
  with tempfile.TemporaryDirectory() as folder, quiet():
    path = pathlib.Path(folder) / 'quantized.onnx'
    quantization.quantize_static(
      copy,
      str(path),
      Reader(),
      quant_format=quantization.QuantFormat.QDQ,
      op_types_to_quantize=list(QUANTIZED),
      per_channel=True,
      reduce_range=reduce_range,
      activation_type=quantization.QuantType.QUInt8,
      weight_type=quantization.QuantType.QInt8,
      nodes_to_exclude=in_float(model),
      extra_options={'MatMulConstBOnly': True},
    )
    return onnx.load(str(path))


def stored(model: Any, about: Mapping[str, str]) -> bytes:
  """Returns the file of a graph, with what it is about as its metadata; checked by onnx."""
  import onnx

  model.producer_name = 'vaediff'
  del model.graph.value_info[:]  # shapes of all between, which are found again: a tenth of a small file
  onnx.helper.set_model_props(model, dict(about))
  onnx.checker.check_model(model)
  return model.SerializeToString(deterministic=True)


def metadata(content: bytes) -> dict[str, str]:
  """Returns what a file says of itself."""
  import onnx

  return {prop.key: prop.value for prop in onnx.load_from_string(content).metadata_props}


def runner(content: bytes, num_threads: int) -> Runner:
  """Returns what runs a file by onnxruntime on the processor: arrays by name -> images."""
  import onnxruntime

  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = num_threads
  options.log_severity_level = 3
  session = onnxruntime.InferenceSession(content, options, providers=['CPUExecutionProvider'])
  return lambda given: session.run([OUTPUT], dict(given))[0]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Lets no warning of these packages through: of plugins for what is not installed, of advice."""
  before = logging.root.manager.disable
  logging.disable(logging.ERROR)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      yield
  finally:
    logging.disable(before)
