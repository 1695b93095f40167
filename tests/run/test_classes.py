"""Classes by name: what a command line hands over becomes the numbers that programs know."""

import importlib
import pathlib
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from vaediff.data.idx import LABEL_NAMES
from vaediff.errors import UserError
from vaediff.modes import checked
from vaediff.run import classes
from vaediff.run import config as configs

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
CLOTHES = LABEL_NAMES['fashion_mnist']
FIELD = 'config.refiner.sample.labels'


@pytest.mark.parametrize(
  ('given', 'expected'),
  [
    ('3,7', (3, 7)),
    ('(3,7)', (3, 7)),
    ('3', (3,)),
    ('()', ()),
    ('Bag', (8,)),
    ('Bag,Coat', (8, 4)),
    ("'Bag','Ankle boot'", (8, 9)),
    ('Ankle_boot,3', (9, 3)),
    ('ankle_boot,t-shirt/top', (9, 0)),
    ('03', (3,)),
  ],
)
def test_what_the_command_line_hands_over(monkeypatch, given, expected):
  """The parser of tuples, as `--config.refiner.sample.labels=...` reaches it."""
  values = flags.FlagValues()
  argv = ['vaediff', f'--config={ROOT}/configs/fashion_mnist.py:label', f'--{FIELD}={given}']
  monkeypatch.setattr(sys, 'argv', argv)  # where ml_collections looks for overrides
  config_flags.DEFINE_config_file('config', flag_values=values)
  values(argv)
  labels = values.config.refiner.sample.labels
  assert isinstance(labels, tuple)
  assert classes.numbers(labels, CLOTHES, FIELD) == expected


@pytest.mark.parametrize(
  ('names', 'given', 'message'),
  [
    (CLOTHES, ('Hat',), f"{FIELD} has 'Hat', which is no class of this data set; those are 0 T-shirt/top"),
    (CLOTHES, ('Bag,Hat',), f"{FIELD} has 'Hat', which"),
    (CLOTHES, ('',), f"{FIELD} has '', which"),
    (CLOTHES, ('²',), f"{FIELD} has '²', which"),
    ((), ('Bag',), f"{FIELD} has 'Bag', but the classes of this data set have no names; give numbers"),
  ],
)  # fmt: skip
def test_an_unknown_name_is_refused_with_those_that_there_are(names, given, message):
  with pytest.raises(UserError) as error:
    classes.numbers(given, names, FIELD)
  assert str(error.value).startswith(message)


def test_a_name_is_what_it_says_and_may_hold_a_comma():
  names = ('7', 'tench, Tinca tinca', 'BAG', 'bag')
  assert classes.numbers(('tench, Tinca tinca', '7', 'bag', 'BAG'), names, FIELD) == (1, 0, 3, 2)
  assert classes.numbers(('tench, tinca tinca', 7), names, FIELD) == (1, 7)


def test_classes_as_text():
  assert classes.listed(CLOTHES, (3, 7)) == '3 Dress, 7 Sneaker'
  assert classes.listed(('0', '1'), (1, 0)) == '1, 0' and classes.listed((), (4,)) == '4'
  many = classes.listed(tuple(f'n{i}' for i in range(60)))
  assert many.startswith('0 n0, 1 n1') and many.endswith('49 n49, ... (60 in all)')


def digits(variant, labels):
  config = importlib.import_module('configs.digits').get_config(f'{variant},debug')
  config.refiner.sample.labels = labels
  checked.complete(config)
  return configs.Run(config, pathlib.Path('nowhere'), tuple(config.stages))


def test_names_are_looked_up_before_anything_is_built(tmp_path, one_device):
  run = digits('unconditional,label', ('3,7', '0'))
  run.config.data.data_dir = str(tmp_path)
  built = checked.check(run, 'sample')
  assert run.config.refiner.sample.labels == (3, 7, 0) and built['refiner'].classes == (3, 7, 0)


@pytest.mark.parametrize(
  ('variant', 'labels', 'message'),
  [
    ('unconditional,label', (10,), r'refiner: sample.labels must be classes .* 0 ... 9 .*got \(10,\)'),
    ('unconditional,label', (-1,), r'refiner: sample.labels must be numbers of classes'),
    ('unconditional,label', (True,), r'refiner: sample.labels must be numbers of classes'),
    ('unconditional', (3,), r'refiner: sample.labels must be \(\) in a stage that reads no label, got'),
  ],
)  # fmt: skip
def test_classes_that_cannot_be_asked_for(one_device, variant, labels, message):
  with pytest.raises(UserError, match=message):
    checked.check(digits(variant, labels), 'sample')


def test_labels_asked_of_a_set_without():
  config = importlib.import_module('configs.celeba64').get_config('unconditional')
  config.refiner.sample.labels = (1,)
  with pytest.raises(UserError, match=r'reads no label, of a data set without known classes .*is 0\), got'):
    checked.build(config, 'refiner')
