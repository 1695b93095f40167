"""Are they the same networks? Our random weights in PyTorch's networks: counts and outputs are compared.

    python -m benchmarks.equality --cases=all

Every weight is drawn at random, also those that start at zero or one, so that each of them counts; outputs
are compared on a CPU in float32. It runs in a process of its own, before any time is taken.
"""

import argparse
import json
import sys
from typing import Any

from vaediff.machine import runtime

if __name__ == '__main__':
  runtime.set_environment()

import jax
import numpy as np
import torch

from benchmarks import jax_side, torch_networks, weights
from benchmarks.cases import CASES, Case, select
from vaediff.errors import UserError
from vaediff.experiments.base import Experiment
from vaediff.machine import cost

TOLERANCE = 1e-4
"""Largest difference of two outputs over the largest output."""


def random_params(shapes: Any) -> Any:
  """Returns parameters of these shapes: kernels of variance 1 / fan-in, the rest near their usual start."""
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    values = rng.normal(size=leaf.shape).astype(np.float32)
    if leaf.ndim > 1:
      return values / np.float32(np.sqrt(np.prod(leaf.shape[:-1])))
    return np.float32(path[-1].key == 'scale') + np.float32(0.1) * values

  return jax.tree_util.tree_map_with_path(draw, shapes)


def num_heads(case: Case, config: Any) -> int:
  """Returns the heads of the U-Net's attention; 1 for the other networks."""
  return config.refiner.model.num_heads if case.network == 'unet' else 1


def to_torch(case: Case, inputs: list[Any]) -> list[torch.Tensor]:
  """Returns our inputs of a forward pass as PyTorch's network reads them."""

  def convert(value: np.ndarray) -> torch.Tensor:
    tensor = torch.from_numpy(np.array(value))
    return tensor.permute(0, 3, 1, 2) if tensor.ndim == 4 else tensor

  if case.network == 'unet':
    x_t, t, values = inputs
    images = [convert(x_t), convert(values['x0_vae'])]
    return [torch.cat(images, dim=1), torch.round(1000 * convert(t) - 1).long()]
  return [convert(value) for value in inputs]


def pair(name: str, *, tiny: bool = False) -> tuple[Experiment, Any, torch.nn.Module]:
  """Returns the experiment, random parameters, and PyTorch's network with the same parameters.

  Raises:
    UserError: the two do not have as many parameters as `Case.parameters` says.
  """
  case = CASES[name]
  config, experiment = case.config(tiny=tiny), jax_side.experiment_of(case, tiny=tiny)
  model = jax_side.model_of(case, experiment)
  params = random_params(jax.eval_shape(lambda key: jax_side.init(case, model, key), jax.random.key(0)))
  network = torch_networks.build(case, config).eval()
  counts = {cost.num_parameters(params), torch_networks.num_parameters(network)}
  counts |= set() if tiny else {case.parameters}
  if len(counts) > 1:
    raise UserError(f'case {name}: the networks, or cases.py, disagree on the parameters: {sorted(counts)}')
  weights.copy(case.network, params, num_heads(case, config), network)
  return experiment, params, network


def outputs(name: str, *, count: int = 2, tiny: bool = False) -> tuple[np.ndarray, np.ndarray]:
  """Returns our output and PyTorch's for the same weights and inputs, both NHWC."""
  case = CASES[name]
  experiment, params, network = pair(name, tiny=tiny)
  model = jax_side.model_of(case, experiment)
  inputs = jax_side.inputs_of(case, experiment, model, count)
  ours = jax.jit(jax_side.forward(case, model))(params, *inputs)
  with torch.inference_mode():
    if case.network == 'vae':  # reads and returns [-1, 1]; a reconstruction from the mean
      x = to_torch(case, inputs)[0] * 0.5 + 0.5
      theirs = decode_mean(network, x) * 2.0 - 1.0
    else:
      theirs = network(*to_torch(case, inputs))
  return np.asarray(ours), theirs.permute(0, 2, 3, 1).numpy()


def decode_mean(network: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
  """Returns the VAE's reconstruction with z = mean."""
  latent_dim = network.encoder_heads['mean'].out_features
  return network(x, torch.zeros(x.shape[0], latent_dim))[0]


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
  """Returns the largest difference over the largest of our values."""
  return float(np.abs(ours - theirs).max() / np.abs(ours).max())


def main() -> None:
  """Prints one JSON object: case -> parameters and largest difference; status 2 if one is above 1e-4."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--cases', default='all')
  results = {}
  try:
    for name in select(parser.parse_args().cases):
      results[name] = {'parameters': CASES[name].parameters, 'largest_difference': difference(*outputs(name))}
  except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
  print(json.dumps(results, indent=2))
  wrong = [name for name, result in results.items() if not result['largest_difference'] < TOLERANCE]
  if wrong:
    print(f'{", ".join(wrong)}: with the same weights the outputs differ by > {TOLERANCE}', file=sys.stderr)
    sys.exit(2)


if __name__ == '__main__':
  main()
