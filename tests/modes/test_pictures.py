"""Where pictures go: a folder that is tried before any work, one set of samples, what they were made of."""

import importlib
import json
import os
import pathlib
import sys
import types

import numpy as np
import pytest
from absl import flags
from PIL import Image

from vaediff import main, modes
from vaediff.data.idx import LABEL_NAMES
from vaediff.errors import UserError
from vaediff.modes import (
  edit,
  evaluate,
  export,
  interpolate,
  pictures,
  reconstruct,
  restore,
  sample,
  text_diff,
  vary,
)
from vaediff.run import config as configs
from vaediff.run import draw, images
from vaediff.run import trained as opened

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
WRITING = {
  'sample': sample,
  'reconstruct': reconstruct,
  'interpolate': interpolate,
  'restore': restore,
  'vary': vary,
  'text_diff': text_diff,
  'evaluate': evaluate,
  'export': export,
  'edit': edit,
}


def run_of(tmp_path, out=None):
  workdir = tmp_path / 'run'
  workdir.mkdir(exist_ok=True)
  config = importlib.import_module('configs.digits').get_config('debug')
  return configs.Run(config, workdir, ('vae', 'refiner'), out)


class Trained(opened.Trained):
  """A stage whose image i is one grey, shown beside a lighter one of a VAE."""

  stage, made_of = 'refiner', {'network denoiser': 'ab12', 'seed': '0'}

  def __init__(self, run, **settings):
    self.config, self.workdir = run.config, run.workdir
    self.settings.update({'num_images': 5, 'batch_size': 2, 'save_images': True, **settings})
    self.experiment = types.SimpleNamespace(
      num_groups=0, classes=(), makers=(), classes_of=lambda indices: None
    )
    self.grey, self.broken_at = 0, None

  def draw(self, indices):
    if self.broken_at in indices:
      raise draw.NotFinite(f'image {self.broken_at} is not finite')
    shape = (1, 4, 4, 1)
    value = (indices[:, None, None, None] + self.grey + np.zeros(shape)).astype(np.uint8)
    return {'x0_vae': value + 100, 'x0': value}


def names(folder):
  return sorted(path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file())


def texts(path):
  with Image.open(path) as picture:
    return {key: json.loads(value) for key, value in picture.text.items()}


def greys(folder):
  found = {}
  for path in sorted(folder.glob('*.png')):
    with Image.open(path) as picture:
      found[path.name] = int(np.asarray(picture).max())
  return found


# One set of samples -------------------------------------------------------------------------------

ONE_SET = [f'{index:06d}.png' for index in range(5)]


def test_the_folder_of_samples_holds_one_set(tmp_path):
  run = run_of(tmp_path)
  sample.sample(Trained(run))
  folder = run.workdir / 'samples'
  assert names(folder) == sorted([*ONE_SET, *(f'x0_vae/{name}' for name in ONE_SET)])
  second = Trained(run, with_vae=False, num_images=4)
  second.grey = 50
  sample.sample(second)
  assert greys(folder) == {f'{index:06d}.png': 50 + index for index in range(4)}
  assert names(folder) == ONE_SET[:4]  # neither the fifth image nor those of the VAE
  assert sorted(path.name for path in run.workdir.iterdir()) == ['samples', 'samples.png']


def test_all_that_is_written_says_what_it_was_made_of(tmp_path):
  run = run_of(tmp_path)
  trained = Trained(run, save_npz=True)
  sample.sample(trained)
  for name in ('samples.png', 'samples/000000.png', 'samples/x0_vae/000004.png'):
    assert texts(run.workdir / name) == {'vaediff': trained.made_of}
  with np.load(run.workdir / 'samples.npz', allow_pickle=False) as stored:
    assert sorted(stored.files) == ['provenance', 'x0', 'x0_vae']
    assert json.loads(str(stored['provenance'])) == trained.made_of
    assert stored['x0'][:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
  ('classes', 'opens', 'said'),
  [
    ((4, 2), True, 'rows: 4 Coat, 2 Pullover'),
    ((4, 2), False, 'rows: 4, 2'),
    (range(9), True, 'classes: 0 T-shirt/top, 1 Trouser, 2 Pullover, 3 Dress, 4 Coat'),
  ],
)
def test_a_row_for_each_class_that_is_asked_for(tmp_path, monkeypatch, capsys, classes, opens, said):
  """Number and name of each are printed, and what each image was asked to be lies beside it."""

  def open_source(data, split):
    if not opens:
      raise UserError('there is no data here')
    return types.SimpleNamespace(label_names=LABEL_NAMES['fashion_mnist'])

  monkeypatch.setattr(sample.sources, 'open_source', open_source)
  trained = Trained(run_of(tmp_path), save_npz=True, save_images=False, with_vae=False)
  trained.experiment.num_groups = len(classes)
  trained.experiment.classes_of = lambda indices: np.array(classes)[indices % len(classes)]
  sample.sample(trained)
  out = capsys.readouterr().out.splitlines()
  assert said in out and any('cannot be opened: there is no data here' in line for line in out) != opens
  with np.load(tmp_path / 'run' / 'samples.npz') as stored:
    expected = [4, 2, 4, 2, 4] if len(classes) == 2 else [0, 1, 2, 3, 4]
    assert stored['label'].tolist() == expected and stored['x0'][:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
  with Image.open(tmp_path / 'run' / 'samples.png') as picture:
    shown = np.asarray(picture)[images.GAP + 1 :: 66, images.GAP + 1 :: 66]
  if len(classes) == 2:
    assert shown.tolist() == [[0, 2], [1, 3]]  # images 0 and 2 are of class 4


@pytest.mark.parametrize('broken_at', [0, 4])
def test_a_call_that_fails_leaves_the_old_set_whole(tmp_path, broken_at):
  run = run_of(tmp_path)
  sample.sample(Trained(run))
  before = names(run.workdir)
  second = Trained(run)
  second.grey, second.broken_at = 50, broken_at
  with pytest.raises(draw.NotFinite):
    sample.sample(second)
  assert names(run.workdir) == before
  assert greys(run.workdir / 'samples') == {name: index for index, name in enumerate(ONE_SET)}


@pytest.mark.filterwarnings('ignore:os.fork')  # the child touches files alone
@pytest.mark.parametrize('moment', ['drawing', 'between the two names', 'before the old ones are removed'])
def test_a_kill_leaves_a_whole_set_and_the_next_call_tidies_up(tmp_path, monkeypatch, moment):
  """Nothing is done after a kill: neither the rest nor what a `finally` would do."""
  run = run_of(tmp_path)
  sample.sample(Trained(run))
  pid = os.fork()
  if not pid:
    if moment == 'drawing':
      monkeypatch.setattr(pictures, '_swap', lambda *_: os._exit(9))
    elif moment == 'between the two names':
      rename = os.rename
      monkeypatch.setattr(
        os, 'rename', lambda a, b: os._exit(9) if pathlib.Path(a).name == 'new' else rename(a, b)
      )
    else:
      monkeypatch.setattr(pictures.shutil, 'rmtree', lambda *_, **__: os._exit(9))
    try:
      with pictures.whole_set(run.workdir / 'samples') as folder:
        pictures.write_each(folder, 0, {'x0': np.full((2, 4, 4, 1), 77, np.uint8)}, True, {})
    finally:
      os._exit(1)
  assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
  folder = run.workdir / 'samples'
  if moment == 'between the two names':
    assert greys(run.workdir / '.samples.tmp' / 'old') == dict(zip(ONE_SET, range(5), strict=True))
    with pytest.raises(KeyboardInterrupt), pictures.whole_set(folder):
      raise KeyboardInterrupt  # a call that draws nothing puts them back
  if moment == 'before the old ones are removed':
    assert names(folder) == ONE_SET[:2]
  else:
    assert greys(folder) == dict(zip(ONE_SET, range(5), strict=True))
  third = Trained(run, with_vae=False)
  third.grey = 20
  sample.sample(third)
  assert greys(folder) == {name: 20 + index for index, name in enumerate(ONE_SET)}
  assert names(folder) == ONE_SET and not (run.workdir / '.samples.tmp').exists()


def test_what_a_user_has_put_beside_the_samples_stays(tmp_path):
  run = run_of(tmp_path)
  sample.sample(Trained(run))
  folder = run.workdir / 'samples'
  (folder / 'notes.txt').write_text('mine')
  (folder / 'photos' / 'deep').mkdir(parents=True)
  (folder / 'photos' / 'deep' / '000001.png').write_text('mine')
  (folder / 'photos' / '1.png').write_text('mine')
  sample.sample(Trained(run, num_images=1, with_vae=False))
  assert names(folder) == ['000000.png', 'notes.txt', 'photos/1.png', 'photos/deep/000001.png']


def test_a_link_to_another_disk_stays_one(tmp_path):
  run = run_of(tmp_path)
  (tmp_path / 'big').mkdir()
  (run.workdir / 'samples').symlink_to(tmp_path / 'big', target_is_directory=True)
  sample.sample(Trained(run))
  sample.sample(Trained(run, num_images=2, with_vae=False))
  assert (run.workdir / 'samples').is_symlink() and names(tmp_path / 'big') == ONE_SET[:2]


def test_two_calls_at_once_do_not_mix(tmp_path):
  folder = tmp_path / 'samples'
  with pictures.whole_set(folder) as first:
    (first / 'a').touch()
    with pytest.raises(UserError, match=r'is in use by process \d+ on host .*draws .*/samples'):
      with pictures.whole_set(folder):
        raise AssertionError
  assert names(folder) == ['a']


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
  run = run_of(tmp_path)
  (run.workdir / 'samples').write_text('mine')
  with pytest.raises(UserError, match='samples is no folder.* move it away'):
    sample.sample(Trained(run))
  assert (run.workdir / 'samples').read_text() == 'mine'


# Another folder -----------------------------------------------------------------------------------


def no_work(*_, **__):
  raise AssertionError('work was done before the folder was looked at')


def call(name, run, monkeypatch):
  """Calls a mode whose stage must not be opened, nor chosen."""
  monkeypatch.setattr(WRITING[name], 'stage_of' if name == 'edit' else 'open_last', no_work)
  modes.MODES[name](run)


@pytest.mark.parametrize('name', WRITING)
def test_a_folder_that_cannot_be_written_is_said_before_any_work(tmp_path, monkeypatch, name):
  (tmp_path / 'file').touch()
  run = run_of(tmp_path, tmp_path / 'file' / 'pictures')
  with pytest.raises(UserError, match=r'/file/pictures.* cannot be written: Not a directory.*--out=FOLDER'):
    call(name, run, monkeypatch)
  with pytest.raises(UserError, match='/file.* cannot be written: (Not a directory|File exists)'):
    call(name, run_of(tmp_path, tmp_path / 'file'), monkeypatch)


def test_a_sweep_looks_first_too(tmp_path, monkeypatch):
  (tmp_path / 'file').touch()
  monkeypatch.setattr(evaluate, 'open_last', no_work)
  with pytest.raises(UserError, match='/file/evaluation cannot be written: Not a directory'):
    modes.SWEEPS['evaluate'](run_of(tmp_path, tmp_path / 'file'))


def read_only(*_, **__):
  raise OSError(30, 'Read-only file system')


@pytest.mark.parametrize('name', WRITING)
def test_a_read_only_run_is_said_before_any_work(tmp_path, monkeypatch, name):
  monkeypatch.setattr(pictures.tempfile, 'NamedTemporaryFile', read_only)
  with pytest.raises(UserError, match=r'/run.* cannot be written: Read-only file system\..*--out=FOLDER'):
    call(name, run_of(tmp_path), monkeypatch)


def test_a_full_disk_is_said_before_any_work(tmp_path, monkeypatch):
  class Full:
    def __enter__(self):
      return self

    def write(self, content):
      raise OSError(28, 'No space left on device')

    def __exit__(self, *_):
      return False

  monkeypatch.setattr(pictures.tempfile, 'NamedTemporaryFile', lambda **_: Full())
  with pytest.raises(UserError, match='cannot be written: No space left on device'):
    pictures.out_of(run_of(tmp_path))


def test_nothing_is_made_for_a_run_that_is_not_there(tmp_path):
  run = run_of(tmp_path)
  run.workdir.rmdir()
  assert pictures.out_of(run, 'evaluation') == run.workdir
  assert list(tmp_path.iterdir()) == []


def test_the_folder_is_made_and_left_empty(tmp_path):
  out = tmp_path / 'a' / 'b'
  assert pictures.out_of(run_of(tmp_path, out)) == out and list(out.iterdir()) == []


def test_samples_go_to_another_folder_and_the_run_stays_as_it_is(tmp_path):
  run = run_of(tmp_path, tmp_path / 'elsewhere')
  trained = Trained(run, save_npz=True, with_vae=False)
  sample.sample(trained, run.out)
  assert names(tmp_path / 'elsewhere') == ['samples.npz', 'samples.png', *(f'samples/{n}' for n in ONE_SET)]
  assert list(run.workdir.iterdir()) == []
  trained.stage = 'vae'
  assert pictures.path_of(trained, 'restored', out=run.out) == tmp_path / 'elsewhere' / 'restored-vae.png'
  assert pictures.folder_of(trained) == run.workdir / 'samples-vae'


@pytest.mark.parametrize('mode', sorted(modes.MODES))
def test_modes_that_write_nothing_refuse_another_folder(monkeypatch, mode):
  called = []
  given = {'MODE': mode, 'OUT': 'elsewhere', 'WORKDIR': 'run', 'STAGES': '', 'TOPOLOGY': ''}
  for name, value in given.items():
    monkeypatch.setattr(main, name, types.SimpleNamespace(value=value))
  config = importlib.import_module('configs.digits').get_config('debug')
  monkeypatch.setattr(main, 'CONFIG', types.SimpleNamespace(value=config))
  monkeypatch.setattr(main, 'SWEEP', types.SimpleNamespace(value=False))
  monkeypatch.setattr(main.flags, 'FLAGS', {'verbosity': types.SimpleNamespace(present=True)})
  monkeypatch.setattr(main.distributed, 'join', lambda *_: None)
  monkeypatch.setitem(main.MODES, mode, called.append)
  monkeypatch.setattr(main, 'DISTRIBUTED', types.SimpleNamespace(value='off'))
  if mode in WRITING:
    main.main(['vaediff'])
    assert called[0].out == pathlib.Path('elsewhere') and called[0].workdir == pathlib.Path('run')
    monkeypatch.setattr(main, 'OUT', types.SimpleNamespace(value=''))
    main.main(['vaediff'])
    assert called[1].out is None
  else:
    valid = (
      'sample or reconstruct or interpolate or restore or vary or text_diff or evaluate or export or edit'
    )
    with pytest.raises(UserError, match=f'--out goes with --mode={valid}, not with --mode={mode}'):
      main.main(['vaediff'])
    assert not called


def test_there_is_such_a_flag():
  assert 'out' in flags.FLAGS and tuple(WRITING) == modes.WRITERS
