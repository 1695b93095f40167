"""`--mode=edit`: what it writes and leaves alone, what goes on and is not done twice, what is refused."""

import hashlib
import importlib
import json
import pathlib
import sys

import jax
import numpy as np
import pytest
from conftest import make_one_device
from PIL import Image

from vaediff.data import shapes, sources
from vaediff.errors import UserError
from vaediff.experiments.edit import EDIT_EMBEDDING, EDIT_FINETUNE
from vaediff.machine import sharding
from vaediff.modes import edit, edit_training, train
from vaediff.run import checkpoint, students
from vaediff.run import config as configs
from vaediff.run.config import Run
from vaediff.run.trained import Trained

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
CAPTION = 'a disc of hue three on gray'


def config_of(variant='text,debug', **changes):
  config = importlib.import_module('configs.shapes16').get_config(variant)
  config.update_from_flattened_dict({'edit.caption': CAPTION, **changes})
  return students.resolve(config)


def picture(folder, size=16, mode='RGB', name='picture.png'):
  path = folder / name
  Image.fromarray(np.arange(size * size * 3, dtype=np.uint8).reshape(size, size, 3)).convert(mode).save(path)
  return str(path)


@pytest.fixture(scope='module')
def text_run(once):
  """The folder of a run whose stage reads captions, trained for an update; nothing but the stage is made."""
  pytest.importorskip('sentencepiece')

  def make(folder):
    config = config_of(**{
      'refiner.train.num_steps': 1, 'refiner.train.grid_every_steps': 0, 'refiner.train.eval_images': 8,
      'data.data_dir': str(folder / 'data'),
    })  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
      make_one_device(patch)
      images = {split: sources.open_source(config.data, split) for split in ('train', 'eval')}
      mesh = sharding.make_mesh(config.mesh)
      built = importlib.import_module('vaediff.experiments').build(config, 'refiner')
      train.train_stage(built, config, folder / 'run', 'refiner', images, mesh)
      configs.save(config, folder / 'run')

  return once('text-run-for-edits', make) / 'run'


def asked(workdir, out, **changes):
  config = configs.read(workdir)
  config.update_from_flattened_dict(
    {'edit.caption': CAPTION, 'edit.finetune.num_steps': 2, 'refiner.sample.num_steps': 2, **changes}
  )
  return Run(config, workdir, ('refiner',), out)


def hashes(folder):
  return {
    path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(folder.rglob('*'))
    if path.is_file()
  }


def params_of(folder, stage, network):
  config = configs.read(folder)
  trained = Trained(config, folder, stage, sharding.make_mesh(config.mesh))
  return jax.device_get(trained.read[network])


@pytest.mark.slow
def test_an_edit_changes_nothing_of_the_run_and_is_trained_once(text_run, tmp_path, one_device, capsys):
  run, before = asked(text_run, tmp_path, **{'edit.image': picture(tmp_path)}), hashes(text_run)
  edit.mode(run)
  assert hashes(text_run) == before
  (folder,) = (tmp_path / 'edits').iterdir()
  assert folder.name.startswith('picture-')
  names = {path.name for path in folder.iterdir()}
  assert {EDIT_EMBEDDING, EDIT_FINETUNE, 'strip.png', 'images', 'edit.json', 'config.json'} <= names
  shown = ['000000.png', '000500.png', '001000.png', 'picture.png']
  assert sorted(path.name for path in (folder / 'images').iterdir()) == shown
  stored = json.loads((folder / 'edit.json').read_text())
  assert [row['eta'] for row in stored['rows']] == [0, 0.5, 1] and stored['caption'] == CAPTION
  with Image.open(folder / 'images' / 'picture.png') as found:
    np.testing.assert_array_equal(np.asarray(found), np.arange(768, dtype=np.uint8).reshape(16, 16, 3))
  assert 'rmse at eta 0 before the denoiser was tuned' in capsys.readouterr().out

  # the same edit, looked at elsewhere
  kept = hashes(folder / EDIT_FINETUNE)
  run.config.edit.etas = (0.0, 1.5)
  edit.mode(run)
  assert hashes(folder / EDIT_FINETUNE) == kept and len(list((tmp_path / 'edits').iterdir())) == 1
  assert sorted(path.name for path in (folder / 'images').iterdir()) == [shown[0], '001500.png', shown[3]]
  assert 'edit_finetune: complete, skipped' in capsys.readouterr().out


@pytest.mark.slow
def test_an_edit_that_was_stopped_ends_as_one_that_was_not(text_run, tmp_path, one_device):
  image = picture(tmp_path)
  in_parts, whole = tmp_path / 'parts', tmp_path / 'whole'
  for count in (1, 3):
    changes = {'edit.image': image, 'edit.name': 'one', 'edit.finetune.num_steps': count}
    edit.mode(asked(text_run, in_parts, **changes))
  edit.mode(asked(text_run, whole, **changes))
  ends = [params_of(out / 'edits' / 'one', EDIT_FINETUNE, 'denoiser') for out in (in_parts, whole)]
  jax.tree.map(np.testing.assert_array_equal, *ends)
  lines = (in_parts / 'edits' / 'one' / EDIT_FINETUNE / 'metrics.jsonl').read_text().splitlines()
  steps = [json.loads(line)['step'] for line in lines]
  assert steps == sorted(steps) and steps[-1] == 3

  with pytest.raises(UserError, match="edit_embedding.edit.caption is 'a disc of hue three on gray' there"):
    edit.mode(asked(text_run, whole, **changes, **{'edit.caption': 'a disc of hue four on gray'}))


def refused(message, tmp_path, workdir=None, **changes):
  run = Run(config_of(**changes), workdir or tmp_path / 'run', ('refiner',), tmp_path / 'out')
  with pytest.raises(UserError, match=message):
    edit.mode(run)
  assert not (tmp_path / 'out' / 'edits').exists()


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'edit.etas': (0.0, 1.6)}, r'config.edit.etas must be numbers in \[0, 1.5\].*got \(0.0, 1.6\)'),
    ({'edit.etas': (-0.1,)}, r'config.edit.etas must be numbers in \[0, 1.5\]'),
    ({'edit.etas': ()}, r'config.edit.etas must be numbers in \[0, 1.5\]'),
    ({'edit.name': 'a/b'}, "config.edit.name is 'a/b'"),
    (
      {'refiner.sample.checkpoint': '8', 'edit.image': 'there.png'},
      "sample.checkpoint is '8', and an edit begins at the latest",
    ),
    ({'edit.finetune.num_steps': 0}, 'config.edit.finetune.num_steps must be >= 1'),
    ({'edit.embedding.learning_rate': 0.0}, r'config.edit.embedding.learning_rate must be in \(0, 1\]'),
    ({'edit.image': 'there.png', 'edit.caption': ' '}, 'config.edit.caption is .*write what the picture'),
    ({'edit.num_seeds': 8, 'edit.image': 'there.png'}, 'edit.num_seeds is 8: .*config.edit.clip.stage'),
    ({}, "config.edit.caption is 'a disc.*config.edit.image names no picture"),
    ({'edit.image': 'there.png'}, 'no checkpoint in .*refiner/checkpoints: train that stage first'),
  ],
)
def test_settings_that_are_none_are_refused_by_name(tmp_path, changes, message):
  refused(message, tmp_path, **changes)


def test_a_picture_is_made_one_of_the_data(tmp_path, capsys, monkeypatch):
  run = Run(config_of(), tmp_path, ('refiner',))
  run.config.edit.image = picture(tmp_path, mode='L', name='grey.gif')
  one = edit.picture_of(run)
  assert one.image.shape == (16, 16, 3) and one.title == 'grey' and not np.ptp(one.image, axis=-1).any()
  run.config.edit.image = picture(tmp_path, 20, name='large.tiff')
  with pytest.raises(UserError, match="config.edit.image, .*large.tiff: the image is 20x20.*image_size=16"):
    edit.picture_of(run)
  run.config.data.update({'crop': 'center', 'resize': 'box', 'channels': 1})
  assert edit.picture_of(run).image.shape == (16, 16, 1)
  assert "made 16x16 as the images of the data are: data.crop='center'" in capsys.readouterr().out
  for name, message in (('none.png', 'where there is no file'), ('text.png', 'text.png cannot be read')):
    (tmp_path / 'text.png').write_text('no picture')
    run.config.edit.image = str(tmp_path / name)
    with pytest.raises(UserError, match=message):
      edit.picture_of(run)


def test_the_name_is_that_of_the_file_and_of_all_that_training_depends_on(tmp_path, monkeypatch):
  image, own = np.zeros((16, 16, 3), np.uint8), {'id': 'a'}
  monkeypatch.setattr(checkpoint, 'identity_of', lambda folder: own['id'])

  def name(image=image, caption=CAPTION, title='my cat', **changes):
    config = edit_training.config_of(config_of(**changes), 'refiner', tmp_path, image, caption)
    return edit_training.name_of(config, title)

  first = name()
  assert first.startswith('my_cat-') and first == name(**{'edit.etas': (0.3,), 'refiner.sample.seed': 7})
  others = [name(image + 1), name(caption='a disc'), name(title='dog')]
  others.append(name(**{'edit.finetune.num_steps': 9}))
  own['id'] = 'b'
  assert len({first, *others, name()}) == 6


def test_evaluation_images_are_those_of_shapes(tmp_path, monkeypatch):
  with pytest.raises(UserError, match="config.edit.image is ''.*these data are shapes/16"):
    list(edit.of_evaluation(Run(config_of(), tmp_path, ('refiner',))))
  config = config_of('text,mini')
  config.edit.num_images = 3
  scenes = [shapes.scene('test', i, mini=True) for i in range(9)]
  source = sources.ArraySource(
    images=shapes.images('test', range(9), 16, mini=True), labels=np.zeros(9, np.int32), label_names=(),
    num_classes=3,
  )  # fmt: skip
  monkeypatch.setattr(sources, 'open_source', lambda data, split: source)
  found = list(edit.of_evaluation(Run(config, tmp_path, ('refiner',))))
  assert [one.title for one in found] == ['eval-0000', 'eval-0001', 'eval-0002']
  for number, (one, scene) in enumerate(zip(found, scenes, strict=False)):
    np.testing.assert_array_equal(one.image, source.images[number])
    assert (shapes.told(one.caption) != scene.attributes).sum() == 1


def test_the_stage_is_the_last_that_can_be_edited_with(tmp_path):
  config = config_of('text,distill,debug')
  assert config.stages[-1] == 'distill_2' or config.stages[-1].startswith('distill')
  assert edit.stage_of(Run(config, tmp_path, tuple(config.stages))) == 'refiner'
  assert edit.stage_of(Run(config, tmp_path, config.stages[-1:])) == config.stages[-1]


def test_of_several_strips_the_one_that_fits_best_is_kept(monkeypatch, capsys):
  strips = {0: np.zeros((2, 4, 4, 3), np.uint8), 1: np.full((2, 4, 4, 3), 9, np.uint8)}
  monkeypatch.setattr(edit, 'strip_of', lambda trained, image, etas, number: strips[number % 2])
  one = edit.Asked(image=strips[0][0], caption='a disc', title='one')
  score = lambda strip, caption: float(strip.mean()) + len(caption)
  number, strip = edit.best_strip(object.__new__(Trained), one, (0.0, 1.0), 4, score)
  assert number == 1 and strip is strips[1]
  assert 'of the strips: 6.000 15.000 6.000 15.000; no. 1 is kept' in capsys.readouterr().out
  assert edit.best_strip(object.__new__(Trained), one, (0.0, 1.0), 1, None)[0] == 0
