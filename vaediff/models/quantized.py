"""Quantized networks: the same Flax modules, whose convolutions and linear maps compute with whole numbers.

No network knows of it. While a `Quantized` model is applied, the calls of the layers that are stored as whole
numbers are intercepted (`flax.linen.intercept_methods`). In place of `kernel` their parameters hold

    kernel_q [outputs, *window, inputs] int8, or kernel_q4 uint8, two inputs to a byte

and beside the network's own parameters are `tables`, few arrays for all layers, since each array of a
checkpoint takes a kilobyte more than its numbers:

    kernel_scale, kernel_sum [numbers]           [parts, outputs] of each layer, one behind the other
    input_scale, input_zero [layers, buckets, 2] of the parts of each layer's input
    time_edges [buckets - 1]                     of times, ascending; not there with one bucket

The sums are those of the kernels, for the zero points; `time_edges` the last time of each bucket but the last
one. Beside them may be a `correction` of the output (`models.correction`). See `models.integers`
for the arithmetic. Layers of the time, of z and of classes, the first and the last one stay as they are, as
norms and the softmax do.

The layers are found by `models.observed`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vaediff.models import integers
from vaediff.models.correction import corrected
from vaediff.models.functional import Model
from vaediff.models.observed import CONV, DENSE, Layer, is_layer, subtree, visiting, with_subtree, zeros_of
from vaediff.types import Params

KERNEL, PACKED = 'kernel_q', 'kernel_q4'
SCALE, SUM = 'kernel_scale', 'kernel_sum'
INPUT_SCALE, INPUT_ZERO = 'input_scale', 'input_zero'
EDGES, CORRECTION, TABLES = 'time_edges', 'correction', 'tables'
CONVOLUTIONS, PRODUCTS, WIDE, FLOATS = 'convolutions', 'products', 'wide products', 'floats'
"""How it is computed: convolutions of whole numbers as such, as products, so in wide layers alone, or floats
made of the kernels."""
WIDE_WINDOW, WIDE_ROW = 64, 128
"""Channels from which a layer is wide, of each part of its input: of windows of pixels, of pixels alone.

Measured on an AMD EPYC with AVX512-VNNI, in turns, maps of 4x4 to 32x32, 8 and 64 images: 3x3 kernels of 16
and 32 channels take 1.2 to 2.1 times as long as floats, those of 64 to 256 0.3 to 1.2 times; products of 512
to 16,384 rows of 16 to 64 channels 1.3 to 8 times, of 128 to 512 0.4 to 1.3 times.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantized(Model):
  """A network whose chosen layers are stored as whole numbers, and computed so where that is faster.

  Attributes:
    layers: those.
    bits: of their kernels, 8 or 4.
    quantized_inputs: their inputs are whole numbers too; else kernels are made floats where they are used.
    buckets: of time, each with its own scales of inputs; 1 for a network that has none.
    rows: of the correction of the output; 0 = there is none.
    arithmetic: returns how it is computed, asked for while a program is made; None = 'products'.
  """

  layers: tuple[Layer, ...]
  bits: int
  quantized_inputs: bool
  buckets: int = 1
  rows: int = 0
  arithmetic: Callable[[], str] | None = None

  trainable: ClassVar[bool] = False

  @classmethod
  def of(cls, model: Model, **fields: Any) -> 'Quantized':
    """Returns a network with whole numbers; without time it has one bucket."""
    buckets = fields.pop('buckets') if has_time(model) and fields['quantized_inputs'] else 1
    fields, module = {**fields, 'buckets': buckets}, model.module
    if hasattr(module, 'remat'):  # there is no backward pass, and what it lifts cannot be looked into
      module = module.clone(remat=False)
    return cls(module=module, inputs=model.inputs, entry=model.entry, **fields)

  @property
  def in_floats(self) -> Model:
    """The same network in floats."""
    return Model(module=self.module, inputs=self.inputs, entry=self.entry)

  def init(self, key: jax.Array) -> Params:
    """Returns freshly initialised parameters, rounded; inputs are taken to be in [-1, 1]."""
    ranges = {
      layer.path: jnp.broadcast_to(jnp.array([-1.0, 1.0]), (self.buckets, layer.parts, 2))
      for layer in self.layers
    }
    times = jnp.arange(1, self.buckets) / self.buckets
    correction = None
    if self.rows:
      model = self.in_floats
      outputs = jax.eval_shape(model.apply, model.init(key), *zeros_of(self.inputs)).shape[-1]
      rows = {name: jnp.zeros(self.rows) for name in ('times', 'std')}
      correction = {**rows, **{name: jnp.zeros((self.rows, outputs)) for name in ('gain', 'bias')}}
    # without the barrier compilers round kernels of zeros themselves, in minutes
    params = jax.lax.optimization_barrier(self.in_floats.init(key))
    return self.quantize(params, ranges=ranges, times=times, correction=correction)

  def quantize(
    self,
    params: Params,
    *,
    ranges: Mapping[str, Any] = {},  # noqa: B006
    times: Any = (),
    kernels: Mapping[str, Any] = {},  # noqa: B006
    kernel_scales: Mapping[str, Any] = {},  # noqa: B006
    correction: Mapping[str, Any] | None = None,
  ) -> Params:
    """Returns the stored form of a network's float parameters.

    Args:
      params: of `in_floats`; not changed.
      ranges: (low, high) of the input of each layer [buckets, parts, 2], by path; read with quantized inputs.
      times: the last time of each bucket but the last, ascending [buckets - 1].
      kernels: rounded kernels, int8, by path; those that are missing are rounded to nearest.
      kernel_scales: of those [parts, outputs]; what is missing is of the largest weight.
      correction: of the output: times, std [rows] and gain, bias [rows, channels]; see `models.correction`.
    """
    tree, tables = params, {}
    for layer in self.layers:
      known = dict(subtree(params, layer.path))
      kernel = known.pop('kernel')
      scale = kernel_scales.get(layer.path)
      scale = integers.kernel_scale(kernel, layer.slices, self.bits) if scale is None else jnp.asarray(scale)
      rounded = kernels.get(layer.path)
      if rounded is None:
        rounded = integers.quantize_kernel(kernel, integers.of_inputs(scale, layer.slices), self.bits)
      turned = jnp.moveaxis(jnp.asarray(rounded, jnp.int8), -1, 0)
      stored = {KERNEL: turned} if self.bits == 8 else {PACKED: integers.pack(turned)}
      tree = with_subtree(tree, layer.path, {**known, **stored})
      own = {SCALE: scale.astype(jnp.float32).reshape(-1)}
      if self.quantized_inputs:
        axes = tuple(range(1, turned.ndim))
        sums = [jnp.sum(turned[..., part], axis=axes, dtype=jnp.int32) for part in layer.slices]
        bounds = jnp.asarray(ranges[layer.path], jnp.float32)
        bounds = jnp.concatenate([bounds] * (3 - layer.parts), axis=1)  # of one part twice
        own |= {SUM: jnp.concatenate(sums), INPUT_SCALE: bounds}
      for name, value in own.items():
        tables.setdefault(name, []).append(value)
    tables = {name: jnp.stack(x) if name == INPUT_SCALE else jnp.concatenate(x) for name, x in tables.items()}
    if self.quantized_inputs:
      bounds = tables[INPUT_SCALE]
      tables[INPUT_SCALE], tables[INPUT_ZERO] = integers.affine(bounds[..., 0], bounds[..., 1])
      if self.buckets > 1:  # arrays without numbers cannot be stored
        tables[EDGES] = jnp.asarray(times, jnp.float32).reshape(self.buckets - 1)
    tree = {**tree, TABLES: tables}
    if correction is not None:
      tree[CORRECTION] = {name: jnp.asarray(x, jnp.float32) for name, x in correction.items()}
    return tree

  def stored(self, params: Params) -> dict[str, dict[str, Array]]:
    """Returns what is stored of each layer, by its path, with its part of every table."""
    found, first, tables = {}, 0, params[TABLES]
    for number, layer in enumerate(self.layers):
      count = layer.parts * layer.shape[-1]
      own = {
        name: tables[name][first : first + count].reshape(layer.parts, -1)
        for name in (SCALE, SUM)
        if name in tables
      }
      own |= {name: tables[name][number] for name in (INPUT_SCALE, INPUT_ZERO) if name in tables}
      found[layer.path] = {**subtree(params, layer.path), **own}
      first += count
    return found

  def dequantized(self, params: Params) -> Params:
    """Returns the float parameters that the stored ones stand for."""
    tree = self._in_floats(params, self.layers)
    return {name: value for name, value in tree.items() if name not in (TABLES, CORRECTION)}

  def _in_floats(self, params: Params, layers: Sequence[Layer]) -> Params:
    """Returns the stored parameters with kernels of floats in these layers."""
    tree, by_path = params, self.stored(params)
    for layer in layers:
      stored = by_path[layer.path]
      floats = {name: stored[name] for name in stored if name == 'bias'}
      kernel = _float_kernel(stored, dataclasses.replace(layer, path=''))
      tree = with_subtree(tree, layer.path, {**floats, 'kernel': kernel})
    return tree

  def whole_layers(self) -> tuple[Layer, ...]:
    """Returns the layers whose products are of whole numbers; of the others' kernels floats are made."""
    arithmetic = self.arithmetic() if self.arithmetic else PRODUCTS
    if not self.quantized_inputs or arithmetic == FLOATS:
      return ()
    return tuple(layer for layer in self.layers if arithmetic != WIDE or is_wide(layer))

  def ready(self, params: Params) -> Params:
    """Returns what programs are given of the stored parameters: floats, where each would make those first.

    A sampler's floats are made before its steps, and take their memory while it runs. Made once, for all
    programs, they cost no time in any, and no more memory than that.
    """
    whole = self.whole_layers()
    floats = [layer for layer in self.layers if layer not in whole]
    tree = self._in_floats(params, floats)
    return tree if whole else {name: value for name, value in tree.items() if name != TABLES}

  def apply(
    self,
    params: Params,
    *args: Any,
    method: str | None = None,
    key_dropout: jax.Array | None = None,
    **kwargs: Any,
  ) -> Any:
    """Applies the module (or its named method) to what `quantize` has stored, or `ready` made of it."""
    t = args[1] if len(args) > 1 and has_time(self) else None
    if TABLES in params:
      output = self._apply_stored(params, t, *args, method=method, key_dropout=key_dropout, **kwargs)
    else:
      network = {name: value for name, value in params.items() if name != CORRECTION}
      output = super().apply(network, *args, method=method, key_dropout=key_dropout, **kwargs)
    return corrected(params[CORRECTION], output, t) if CORRECTION in params and method is None else output

  def _apply_stored(self, params: Params, t: Array | None, *args: Any, **kwargs: Any) -> Any:
    """Returns the output for stored parameters, before its correction."""
    arithmetic = self.arithmetic() if self.arithmetic else PRODUCTS
    whole = {layer.path for layer in self.whole_layers()}
    by_path, tables = {layer.path: layer for layer in self.layers}, params[TABLES]
    stored_of = self.stored(params)
    bucket = jnp.searchsorted(tables[EDGES], t, side='left') if whole and self.buckets > 1 else None

    def visit(module: nn.Module, path: str, call: Any, inputs: Any, others: Any) -> Any:
      layer = by_path.get(path)
      if layer is None or not is_layer(module):
        return call(*inputs, **others)
      stored = stored_of[path]
      if 'kernel' in stored:  # `ready` has made it
        return call(*inputs, **others)
      result = (
        _integer_layer(module, layer, stored, inputs[0], bucket, arithmetic)
        if path in whole
        else _float_layer(module, layer, stored, inputs[0])
      )
      if 'bias' not in stored:
        return result
      return result + _of_outputs(stored['bias'], result).astype(result.dtype)

    network = {name: value for name, value in params.items() if name not in (TABLES, CORRECTION)}
    with visiting(visit):
      return super().apply(network, *args, **kwargs)


def ready(model: Model, params: Params) -> Params:
  """Returns the parameters of any network as programs are given them; see `Quantized.ready`."""
  return model.ready(params) if isinstance(model, Quantized) else params


def is_wide(layer: Layer) -> bool:
  """Returns whether CPUs compute it faster with whole numbers than with floats."""
  inputs = min(channels.stop - channels.start for channels in layer.slices)
  window = layer.kind == CONV and layer.shape[:2] != (1, 1)
  return inputs >= (WIDE_WINDOW if window else WIDE_ROW)


def has_time(model: Model) -> bool:
  """Returns whether the second argument of a network is one number for each example."""
  second = model.inputs[1] if len(model.inputs) > 1 else None
  return isinstance(second, jax.ShapeDtypeStruct) and second.shape == (1,) and second.dtype == jnp.float32


def float_kernel(stored: Mapping[str, Array], layer: Layer) -> Float[Array, '*window inputs outputs']:
  """Returns the kernel that whole numbers and scales stand for, float32."""
  whole = jnp.moveaxis(whole_kernel(stored, layer), 0, -1)
  scale = integers.of_inputs(stored[SCALE], layer.slices)
  return whole * scale.reshape((1,) * (whole.ndim - 2) + scale.shape)


_float_kernel = jax.jit(float_kernel, static_argnums=1)
"""Compiled once for all layers of a shape."""


def whole_kernel(stored: Mapping[str, Array], layer: Layer) -> Int[Array, 'outputs *window inputs']:
  """Returns the kernel's whole numbers, int8."""
  return stored[KERNEL] if KERNEL in stored else integers.unpack(stored[PACKED], layer.shape[-2])


def _float_layer(module: nn.Module, layer: Layer, stored: Mapping[str, Array], x: Array) -> Array:
  """Returns the layer's output without its bias, of a kernel that is made here."""
  dtype = module.dtype or jnp.result_type(x, jnp.float32)
  x, kernel = x.astype(dtype), float_kernel(stored, layer).astype(dtype)
  if layer.kind == DENSE:
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
  strides, padding = _window(module, x)
  numbers = ('NHWC', 'HWIO', 'NHWC')
  return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=numbers)


def _integer_layer(
  module: nn.Module,
  layer: Layer,
  stored: Mapping[str, Array],
  x: Array,
  bucket: Int[Array, ' batch'] | None,
  arithmetic: str,
) -> Array:
  """Returns the layer's output without its bias: one product of whole numbers for each part of its input."""
  kernel, strides = whole_kernel(stored, layer), (1, 1)
  if layer.kind == CONV:
    strides, padding = _window(module, x)
  total = 0.0
  for part, channels in enumerate(layer.slices):
    scale, zero = (_of_rows(stored[name][:, part], bucket, x) for name in (INPUT_SCALE, INPUT_ZERO))
    rounded, part_kernel = integers.quantize(x[..., channels], scale, zero), kernel[..., channels]
    if layer.kind == CONV:
      rounded = integers.bordered(rounded, zero, padding)
    if layer.kind == DENSE or layer.shape[:2] == (1, 1) == strides:
      products = integers.product(rounded, part_kernel.reshape(part_kernel.shape[0], -1))
    elif arithmetic in (PRODUCTS, WIDE):
      products = integers.convolution_by_product(rounded, part_kernel, strides)
    else:
      products = integers.convolution(rounded, part_kernel, strides)
    exact = products - zero * _of_outputs(stored[SUM][part], x)
    total = total + exact.astype(jnp.float32) * (scale * _of_outputs(stored[SCALE][part], x))
  return total.astype(module.dtype or jnp.result_type(x, jnp.float32))


def _of_rows(table: Array, bucket: Int[Array, ' batch'] | None, x: Array) -> Array:
  """Returns the entry of a table of buckets for each example, to be broadcast against x."""
  if bucket is None:
    return table[:1].reshape((1,) * x.ndim)
  if bucket.shape[0] != x.shape[0]:
    raise ValueError(f'a layer reads {x.shape[0]} rows, and there are {bucket.shape[0]} times')
  return table[bucket].reshape((-1, *(1,) * (x.ndim - 1)))


def _of_outputs(row: Float[Array, ' outputs'] | Int[Array, ' outputs'], x: Array) -> Array:
  """Returns numbers of the outputs, to be broadcast against maps of the rank of x."""
  return row.reshape((1,) * (x.ndim - 1) + row.shape)


def _window(module: nn.Module, x: Array) -> tuple[tuple[int, int], tuple[tuple[int, int], ...]]:
  """Returns strides, and the border before and after height and width, of a convolution."""
  strides = module.strides if isinstance(module.strides, tuple) else (module.strides or 1,) * 2
  padding = module.padding
  if isinstance(padding, int):
    padding = ((padding, padding),) * 2
  elif not isinstance(padding, str):
    padding = tuple((pair, pair) if isinstance(pair, int) else tuple(pair) for pair in padding)
  return strides, integers.padding_of(padding, x.shape[1:3], module.kernel_size, strides)
