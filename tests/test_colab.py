"""colab/: the notebooks are stored bare, hold no library code, and run top to bottom in debug settings."""

import copy
import json
import os
import pathlib
import re
import shlex
import sys

import pytest

pytestmark = pytest.mark.xdist_group('colab')  # one worker: the tests share what is dear
COLAB = pathlib.Path(__file__).resolve().parents[1] / 'colab'
NOTEBOOKS = ('train_tpu', 'explore_latents', 'text_to_image')
MAX_LINES = 25
"""A cell longer than this belongs into the package."""
CELL_TIMEOUT = 240
"""Seconds."""


def read(name):
  return json.loads((COLAB / f'{name}.ipynb').read_text(encoding='utf-8'))


def code_cells(notebook):
  return [cell for cell in notebook['cells'] if cell['cell_type'] == 'code']


def source(cell):
  return ''.join(cell['source'])


# As stored --------------------------------------------------------------------------------------


def test_the_folder_holds_these_notebooks():
  assert sorted(path.stem for path in COLAB.glob('*.ipynb')) == sorted(NOTEBOOKS)


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_valid(name):
  nbformat = pytest.importorskip('nbformat', reason='nbformat checks notebooks')
  nbformat.validate(read(name))


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_stripped(name):
  notebook = read(name)
  assert 'widgets' not in notebook['metadata']
  for cell in code_cells(notebook):
    assert cell['outputs'] == []
    assert cell['execution_count'] is None


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_the_hook_has_nothing_to_strip(name):
  nbformat = pytest.importorskip('nbformat')
  nbstripout = pytest.importorskip('nbstripout', reason='the hook that strips outputs')
  notebook = nbformat.from_dict(read(name))
  assert nbstripout.strip_output(copy.deepcopy(notebook), False, False, False) == notebook


def test_the_hook_strips_outputs():
  yaml = pytest.importorskip('yaml')
  repos = yaml.safe_load((COLAB.parent / '.pre-commit-config.yaml').read_text())['repos']
  hooks = {hook['id']: repo for repo in repos for hook in repo['hooks']}
  assert {'nbstripout', 'ruff-check', 'ruff-format'} <= hooks.keys()
  assert all(re.fullmatch(r'v?\d+(\.\d+)+', repo['rev']) for repo in repos)


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_the_first_code_cell_holds_the_parameters(name):
  first, *others = code_cells(read(name))
  assert first['metadata']['tags'] == ['parameters']
  assert not any('parameters' in cell['metadata'].get('tags', ()) for cell in others)
  for parameter in ('SOURCE', 'EXTRA', 'WORKDIR'):
    assert f"{parameter} = os.environ.get('VAEDIFF_NOTEBOOK_{parameter}'" in source(first)


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_no_library_code(name):
  for cell in code_cells(read(name)):
    text = source(cell)
    assert len(text.splitlines()) <= MAX_LINES, text
    assert not re.search(r'^\s*class\s', text, re.MULTILINE), text
    assert not re.search(r'jax\.(jit|grad|vmap)|import (flax|optax)', text), text


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_no_paths_of_a_machine(name):
  text = '\n'.join(source(cell) for cell in read(name)['cells'])
  assert not re.search(r'(?<![\w.])/(home|root|work|tmp|content|Users)\b', text)


# Executed ---------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def execute(tmp_path_factory):
  """Returns a function that runs a notebook in a kernel of this Python and returns it with its outputs."""
  for package in ('nbformat', 'nbclient', 'ipykernel', 'ipywidgets'):
    pytest.importorskip(package, reason=f'the notebooks need {package}: pip install ".[test]"')
  import nbclient
  import nbformat

  folder = tmp_path_factory.mktemp('colab')
  overrides = [f'--config.data.data_dir={folder / "with space"}']
  kernel = {
    'argv': [sys.executable, '-m', 'ipykernel_launcher', '-f', '{connection_file}'],
    'display_name': 'test',
    'language': 'python',
    'env': {
      # one device: eight compile slower
      'XLA_FLAGS': os.environ['XLA_FLAGS'].replace('device_count=8', 'device_count=1'),
      'IPYTHONDIR': str(folder / 'ipython'),
      'MPLCONFIGDIR': str(folder / 'matplotlib'),
      'VAEDIFF_NOTEBOOK_OVERRIDES': shlex.join(overrides),
      'VAEDIFF_NOTEBOOK_TENSORBOARD': '0',  # a server that nobody looks at
      'VAEDIFF_NOTEBOOK_NUM_ENCODED': '32',
    },
  }
  spec = folder / 'jupyter' / 'kernels' / 'vaediff-test' / 'kernel.json'
  spec.parent.mkdir(parents=True)
  spec.write_text(json.dumps(kernel))

  def run(name, config='configs/digits.py:debug', workdir='run'):
    notebook = nbformat.read(COLAB / f'{name}.ipynb', as_version=4)
    nbclient.NotebookClient(
      notebook,
      kernel_name='vaediff-test',
      timeout=CELL_TIMEOUT,
      resources={'metadata': {'path': str(COLAB)}},
    ).execute(
      env={
        **os.environ,
        'VAEDIFF_NOTEBOOK_CONFIG': config,
        'VAEDIFF_NOTEBOOK_WORKDIR': str(folder / workdir),
        'VAEDIFF_NOTEBOOK_CAPTIONS': 'a disc; one gray disc',
      }
    )
    return notebook

  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('JUPYTER_PATH', str(folder / 'jupyter'))
    patch.setenv('JUPYTER_RUNTIME_DIR', str(folder / 'runtime'))
    patch.setenv('JUPYTER_CONFIG_DIR', str(folder / 'config'))
    # relative in a developer's shell, it would be another folder for the kernel
    patch.setenv('JAX_COMPILATION_CACHE_DIR', os.path.abspath(os.environ['JAX_COMPILATION_CACHE_DIR']))
    run.folder, run.workdir = folder, folder / 'run'
    yield run


@pytest.fixture(scope='module')
def trained(execute):
  """The notebook that trains, executed; its run is the other one's."""
  return execute('train_tpu')


def printed(notebook):
  outputs = [output for cell in code_cells(notebook) for output in cell['outputs']]
  return ''.join(output['text'] for output in outputs if output['output_type'] == 'stream')


def pictures(outputs):
  return sum('image/png' in output.get('data', {}) for output in outputs)


@pytest.mark.slow
def test_train(execute, trained):
  workdir, text = execute.workdir, printed(trained)
  assert '1 x cpu (cpu)' in text
  assert 'There is no TPU or GPU here' in text
  assert 'train: 1500 images of 8x8x1, 10 classes' in text
  assert f'tensorboard --logdir {workdir}' in text
  assert 'of them compiling, device: cpu x 1' in text
  assert 'fd_classifier' in text
  curves, samples = code_cells(trained)[-3:-1]
  assert pictures(curves['outputs']) == 1
  assert pictures(samples['outputs']) == 2
  assert (workdir / 'config.json').exists()
  assert list((workdir / 'evaluation').glob('*.json'))


@pytest.mark.slow
def test_explore(execute, trained):
  notebook = execute('explore_latents')
  assert 'digits-debug, stage refiner' in printed(notebook)
  # interact() shows what its function raised and goes on, so that the cell does not fail
  widgets = notebook['metadata']['widgets']['application/vnd.jupyter.widget-state+json']['state'].values()
  outputs = [widget['state']['outputs'] for widget in widgets if widget['model_name'] == 'OutputModel']
  errors = [part for part in sum(outputs, []) if part['output_type'] == 'error']
  assert not errors, errors
  assert [pictures(part) for part in outputs] == [1] * 4  # directions, classes, interpolation, restoration
  assert "'psnr/super_resolution/restored'" in json.dumps(outputs[-1])
  assert (execute.workdir / 'restored-super_resolution.png').exists()


@pytest.mark.slow
def test_text_to_image(execute):
  notebook = execute('text_to_image', 'configs/shapes16.py:text,mini,debug', 'text')
  text = printed(notebook)
  assert 'numbers for the captions' in text  # the tokenizer
  assert 'evaluation/refiner-' in text
  assert sum(pictures(cell['outputs']) for cell in code_cells(notebook)) == 2
  assert (execute.folder / 'text' / 'own-captions' / 'samples.png').exists()
