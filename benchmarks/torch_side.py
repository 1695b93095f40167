"""What the PyTorch workers run: the same tasks as `jax_side`, written as one writes them in PyTorch.

- forward: `inference_mode`, the network in `eval` mode.
- train: bytes to floats, flips, time and noise, loss, backward; for the U-Net clipping to norm 1 (foreach);
  fused Adam; for the U-Net the parameter average in one foreach call. The gradient's norm is computed in both
  cases, because this project's step reports it.
- sample: DDIM as a plain loop under `inference_mode`, coefficients computed beforehand.

`compiled` is `torch.compile` in its default mode, of the network (with the VAE's draw of z); the backward
pass is compiled with it. bfloat16 is autocast over float32 parameters. On GPUs networks and images are
channels-last, cuDNN picks algorithms by trying them, and float32 products may use TF32, as JAX's do there by
default.

Must not import JAX: a process with the thread pools of both would measure neither.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import nn

from benchmarks import torch_networks
from benchmarks.cases import CASES, SAMPLING_STEPS, Case

TRAIN_STEPS = 1000
"""Times of the schedule that the U-Nets are trained on; betas are linear from 1e-4 to 0.02."""


@dataclasses.dataclass(frozen=True)
class Built:
  """A measurement that is ready to run; see `jax_side.Built`."""

  run: Callable[[], Any]
  wait: Callable[[Any], Any]
  parameters: int


@dataclasses.dataclass(frozen=True)
class Place:
  """Where and in which type the arithmetic runs."""

  device: torch.device
  dtype: torch.dtype

  @classmethod
  def of(cls, dtype: str) -> 'Place':
    """Returns the first GPU if there is one, else the CPU, and sets what PyTorch needs to be fast there."""
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    if device.type == 'cuda':
      torch.backends.cudnn.benchmark = True
      torch.set_float32_matmul_precision('high')
    return cls(device, getattr(torch, dtype))

  def put(self, value: nn.Module | torch.Tensor) -> Any:
    """Returns a network or an array on the device, in the layout that is fast there."""
    is_map = isinstance(value, nn.Module) or value.ndim == 4
    if self.device.type == 'cuda' and is_map:
      return value.to(self.device, memory_format=torch.channels_last)
    return value.to(self.device)

  def arithmetic(self) -> contextlib.AbstractContextManager:
    """Returns the context in which networks run."""
    if self.dtype == torch.float32:
      return contextlib.nullcontext()
    return torch.autocast(self.device.type, self.dtype)

  def wait(self, _: Any) -> None:
    """Waits for the device."""
    if self.device.type == 'cuda':
      torch.cuda.synchronize()


def describe_device() -> str:
  """Returns the name of the device that PyTorch runs on; 'cpu' for any CPU."""
  return torch.cuda.get_device_name(0) if torch.cuda.is_available() else 'cpu'


def alphas_bar() -> np.ndarray:
  """Returns alpha_bar at the times 1/1000 ... 1 (Ho et al. 2020, 2006.11239), float64."""
  return np.cumprod(1.0 - np.linspace(1e-4, 0.02, TRAIN_STEPS))


def build(
  name: str, task: str, *, count: int, dtype: str, compiled: bool = False, tiny: bool = False
) -> Built:
  """Returns a measurement of `count` images."""
  torch.manual_seed(0)
  case, place = CASES[name], Place.of(dtype)
  config = case.config(tiny=tiny)
  network = place.put(torch_networks.build(case, config))
  network.train(task == 'train')
  call = torch.compile(network) if compiled else network
  if task == 'train':
    make = _train_unet if case.network == 'unet' else _train_vae
    run = make(network, call, config, place, count)
  elif task == 'sample':
    run = _sample(call, config, place, count)
  else:
    run = _forward(case, call, config, place, count)
  return Built(run, place.wait, torch_networks.num_parameters(network))


def to_unit_range(image: torch.Tensor, flip: torch.Tensor | None) -> torch.Tensor:
  """Returns bytes as floats in [-1, 1], mirrored where `flip` [batch, 1, 1, 1] is True."""
  x = image.float() / 127.5 - 1.0
  return x if flip is None else torch.where(flip, x.flip(3), x)


def inputs_of(case: Case, config: ConfigDict, count: int) -> list[torch.Tensor]:
  """Returns random inputs of a forward pass."""
  size, channels, section = config.data.image_size, config.data.channels, config[case.stage].model
  match case.network:
    case 'unet':
      return [torch.randn(count, 2 * channels, size, size), torch.randint(0, TRAIN_STEPS, (count,))]
    case 'ncsnpp':
      index = torch.randint(0, 4, (count,)).float()
      return [torch.randn(count, channels, size, size), index, torch.randn(count, section.latent_dim)]
    case 'decoder':
      side = size >> (len(section.channel_multipliers) - 1)
      return [torch.randn(count, section.latent_channels, side, side)]
    case _:
      return [torch.rand(count, channels, size, size), torch.randn(count, section.latent_dim)]


def _forward(case: Case, call: Any, config: ConfigDict, place: Place, count: int) -> Callable[[], Any]:
  inputs = [place.put(value) for value in inputs_of(case, config, count)]

  def run():
    with torch.inference_mode(), place.arithmetic():
      return call(*inputs)

  return run


def _images(config: ConfigDict, place: Place, count: int) -> torch.Tensor:
  size, channels = config.data.image_size, config.data.channels
  return place.put(torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8))


def _adam(network: nn.Module, optim: ConfigDict) -> torch.optim.Adam:
  betas = (optim.b1, optim.b2)
  return torch.optim.Adam(
    network.parameters(), lr=optim.learning_rate, betas=betas, eps=optim.eps, fused=True
  )


def _train_unet(
  network: nn.Module, call: Any, config: ConfigDict, place: Place, count: int
) -> Callable[[], Any]:
  optim, parameters = config.refiner.optim, list(network.parameters())
  adam = _adam(network, optim)
  average = [parameter.detach().clone() for parameter in parameters]
  alpha_bar = torch.tensor(alphas_bar(), dtype=torch.float32, device=place.device)[:, None, None, None]
  alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
  image, image_vae = _images(config, place, count), _images(config, place, count)

  def run():
    adam.zero_grad(set_to_none=True)
    flip = None
    if config.refiner.train.flip:
      flip = torch.rand(count, 1, 1, 1, device=place.device) < 0.5
    x0, x0_vae = to_unit_range(image, flip), to_unit_range(image_vae, flip)
    index = torch.randint(0, TRAIN_STEPS, (count,), device=place.device)
    eps = torch.randn_like(x0)
    x_t = alpha[index] * x0 + sigma[index] * eps
    with place.arithmetic():
      eps_hat = call(torch.cat([x_t, x0_vae], dim=1), index)
    loss = (eps_hat.float() - eps).square().mean()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, optim.clip_norm, foreach=True)
    adam.step()
    with torch.no_grad():
      torch._foreach_lerp_(average, parameters, 1.0 - optim.ema_decay)
    return loss

  return run


def _train_vae(
  network: nn.Module, call: Any, config: ConfigDict, place: Place, count: int
) -> Callable[[], Any]:
  adam, parameters = _adam(network, config.vae.optim), list(network.parameters())
  image, latent_dim, beta = _images(config, place, count), config.vae.model.latent_dim, config.vae.loss.beta

  def run():
    adam.zero_grad(set_to_none=True)
    x = image.float() / 255.0
    with place.arithmetic():
      x_hat, mean, logvar = call(x, torch.randn(count, latent_dim, device=place.device))
    kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum()
    loss = (x - x_hat.float()).square().sum() + beta * kl
    loss.backward()
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters], foreach=True)
    adam.step()
    return loss, norm

  return run


def sampling_table() -> list[tuple[int, float, float, float, float]]:
  """Returns (step index, alpha, sigma, keep, current) per DDIM step on the uniform grid.

  x_s = keep x_t + current x0_hat, with x0_hat = (x_t - sigma eps_hat) / alpha (Song et al. 2021, 2010.02502).
  """
  index = np.rint(np.linspace(TRAIN_STEPS, 0, SAMPLING_STEPS + 1)).astype(int)
  alpha_bar = np.append(1.0, alphas_bar())[index]
  alpha, sigma = np.sqrt(alpha_bar), np.sqrt(1.0 - alpha_bar)
  keep = sigma[1:] / sigma[:-1]
  current = alpha[1:] - alpha[:-1] * keep
  return [
    (int(index[k]) - 1, *map(float, (alpha[k], sigma[k], keep[k], current[k]))) for k in range(SAMPLING_STEPS)
  ]


def ddim(call: Any, x: torch.Tensor, x0_vae: torch.Tensor, place: Place) -> torch.Tensor:
  """Returns images in [-1, 1] drawn from the noise x."""
  with torch.inference_mode(), place.arithmetic():
    for index, alpha, sigma, keep, current in sampling_table():
      times = torch.full((x.shape[0],), index, device=x.device)
      eps_hat = call(torch.cat([x, x0_vae], dim=1), times).float()
      x0_hat = ((x - sigma * eps_hat) / alpha).clamp(-1.0, 1.0)
      x = keep * x + current * x0_hat
  return x.clamp(-1.0, 1.0)


def _sample(call: Any, config: ConfigDict, place: Place, count: int) -> Callable[[], Any]:
  shape = (count, config.data.channels, config.data.image_size, config.data.image_size)
  noise, x0_vae = place.put(torch.randn(shape)), place.put(2 * torch.rand(shape) - 1)
  return lambda: ddim(call, noise, x0_vae, place)
