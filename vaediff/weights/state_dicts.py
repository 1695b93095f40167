"""The state dict of a published file, whatever it was saved in: names, shapes, and arrays when asked for.

Four layouts of torch.save, and safetensors:

  plain       names -> tensors
  lightning   a checkpoint of PyTorch Lightning: `state_dict` beside callbacks, optimizers, hyper-parameters
  content     the resume file of the denoising GANs: `netG_dict`, `netD_dict`, and the average of the
              generator inside the state of its optimizer; names begin with 'netG_dict.', 'ema.', 'netD_dict.'
  safetensors

'module.' before every name, of networks that were wrapped for several GPUs, is cut off.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from vaediff.errors import UserError
from vaediff.weights import tensors as safetensors_files
from vaediff.weights import torch_container
from vaediff.weights.torch_container import Broken, Container, fields
from vaediff.weights.torch_file import Tensor

GENERATOR, AVERAGE, DISCRIMINATOR = 'netG_dict.', 'ema.', 'netD_dict.'
"""How names of the layout 'content' begin."""
WRAPPED = 'module.'
PLAIN = (bool, int, float, str)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateDict:
  """Tensors by name.

  Attributes:
    path: of the file.
    layout: 'plain', 'lightning', 'content' or 'safetensors'.
    shapes: of the tensors.
    settings: what the file says of how it was made: hyper-parameters, arguments of the program, metadata.
    step: updates done; 0 where the file does not say.
    unread: what else it holds, and is not looked at.
    source: the opened file, or None for safetensors.
    tensors: where the tensors lie.
  """

  path: pathlib.Path
  layout: str
  shapes: Mapping[str, tuple[int, ...]]
  settings: Mapping[str, Any]
  step: int
  unread: tuple[str, ...]
  source: Container | None
  tensors: Mapping[str, Tensor]

  def read(self, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Returns tensors by name, float32.

    Raises:
      UserError: when the file is damaged, or a tensor holds no real numbers or some that are not finite.
    """
    names = list(names)
    if self.source is None:
      found = safetensors_files.load_some(self.path, names)
    else:
      found = self.source.read({name: self.tensors[name] for name in names})
    for name, value in found.items():
      found[name] = np.asarray(value, np.float32)
      if not np.all(np.isfinite(found[name])):
        raise UserError(f'{self.path}: {name} holds numbers that are not finite; fetch it again')
    return found


def opened(path: pathlib.Path) -> StateDict:
  """Returns the state dict of a file.

  Raises:
    UserError: when the file is missing, damaged, of another kind, or holds no tensors; nothing of it is run.
  """
  if path.suffix == '.safetensors':
    shapes, metadata = safetensors_files.load_shapes(path)
    return StateDict(
      path=path, layout='safetensors', shapes=shapes, settings=metadata, step=0, unread=(), source=None,
      tensors={},
    )  # fmt: skip
  container = torch_container.opened(path)
  content = fields(container.content)
  layout, found, used = selected(content)
  broken = {name: value for name, value in found.items() if isinstance(value, Broken)}
  if broken:
    name, value = next(iter(broken.items()))
    raise UserError(f'{path}: the tensor {name} cannot be read: {value.reason}; save plain tensors')
  tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
  if not tensors:
    raise UserError(
      f'{path} holds no tensors where a state dict should be ({layout}), but {shown(content)}; is it another '
      'kind of file?'
    )
  step = content.get('global_step')
  return StateDict(
    path=path,
    layout=layout,
    shapes={name: value.shape for name, value in tensors.items()},
    settings=settings_of(content),
    step=step if isinstance(step, int) and not isinstance(step, bool) else 0,
    unread=tuple(str(name) for name in content if layout != 'plain' and name not in used),
    source=container,
    tensors=tensors,
  )


def selected(content: Mapping[Any, Any]) -> tuple[str, dict[str, Any], tuple[str, ...]]:
  """Returns the layout of what a file holds, its state dict, and the names of what that was taken from."""
  if 'state_dict' in content:
    return 'lightning', unwrapped(fields(content['state_dict'])), ('state_dict',)
  if 'netG_dict' not in content:
    return 'plain', unwrapped(content), ()
  generator = unwrapped(fields(content['netG_dict']))
  found = {f'{GENERATOR}{name}': value for name, value in generator.items()}
  states = fields(fields(content.get('optimizerG')).get('state'))
  for number, name in enumerate(generator):  # there are no buffers: parameters in order
    average = fields(states.get(number)).get('ema')
    if average is not None:
      found[f'{AVERAGE}{name}'] = average
  judge = unwrapped(fields(content.get('netD_dict')))
  found |= {f'{DISCRIMINATOR}{name}': value for name, value in judge.items()}
  return 'content', found, ('netG_dict', 'optimizerG', 'netD_dict')


def unwrapped(state: Mapping[Any, Any]) -> dict[str, Any]:
  """Returns a state dict without the 'module.' that all its names begin with, if they do."""
  named = {str(name): value for name, value in state.items()}
  if named and all(name.startswith(WRAPPED) for name in named):
    return {name.removeprefix(WRAPPED): value for name, value in named.items()}
  return named


def settings_of(content: Mapping[Any, Any]) -> dict[str, Any]:
  """Returns numbers, texts and lists of them that a file says of how it was made."""
  found = {**fields(content.get('hyper_parameters')), **fields(content.get('args'))}
  return {str(name): plain for name, value in found.items() if (plain := _plain(value)) is not None}


def _plain(value: Any) -> Any:
  """Returns a number, a text or a tuple of them; None for anything else."""
  if isinstance(value, PLAIN):
    return value
  if isinstance(value, list | tuple) and all(isinstance(item, PLAIN) for item in value):
    return tuple(value)
  return None


def shown(content: Mapping[Any, Any]) -> str:
  """Returns the first names of what a file holds, for messages."""
  names = [str(name)[:60] for name in list(content)[:5]]
  return ', '.join(names) + (', ...' if len(content) > 5 else '') if names else 'nothing that has names'
