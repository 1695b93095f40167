"""What an explorer draws: what is chosen is seen, nothing else changes, and nothing is compiled for it."""

import io
import json
import pathlib
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from vaediff.errors import UserError
from vaediff.experiments import restored
from vaediff.machine import sharding
from vaediff.modes import explore_controls as controls
from vaediff.modes import explore_restored
from vaediff.modes.explore_drawn import Explorer
from vaediff.modes.explore_wishes import DATA, DRAWN, UPLOAD, Choice, End
from vaediff.run import directions, images

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import fresh  # noqa: E402

pytestmark = pytest.mark.xdist_group('explorer')  # one worker: the tests share what is dear
STEPS = {'refiner.sample.num_steps': 6, 'refiner.sample.sampler': 'ddim'}
ARRAYS = {
  'mean': np.zeros(16, np.float32),
  'directions': np.eye(16, 2, dtype=np.float32),
  'deviation': np.float32([2, 1]),
}


def explorer_of(variant, folder, stage='', **changes):
  """An explorer of one stage that was never trained, and the stage."""
  with pytest.MonkeyPatch.context() as patch:
    make = sharding.make_mesh
    patch.setattr(sharding, 'make_mesh', lambda config: make(config, jax.devices()[:1]))
    trained = fresh.Fresh(variant, folder, stage, **changes)
  found = Explorer(trained.config, folder, (trained.stage,), lambda name: trained)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(directions, 'leading', lambda trained, number: ARRAYS)
    found.offer(trained.stage)
  return found, trained


@pytest.fixture(scope='module')
def opened(tmp_path_factory):
  return explorer_of('formulation1', tmp_path_factory.mktemp('run'), **STEPS)


@pytest.fixture(scope='module')
def compiled():
  """Returns compiled(call) -> how often something was traced or compiled in a call."""
  events, is_on = [], []
  listen = lambda name, seconds, **_: events.append(name) if is_on and '/compile/' in name else None
  jax.monitoring.register_event_duration_secs_listener(listen)

  def compiled(call):
    events.clear()
    is_on.append(True)
    call()
    is_on.clear()
    return len(events)

  return compiled


def end_of(kind=DRAWN, z=0, noise=0, **more):
  return End(kind=kind, seeds={'z': z, 'noise': noise}, **more)


def choice_of(**changes):
  return Choice(stage='refiner', ends=[end_of(), end_of(z=1, noise=2)], **changes)


def test_what_is_offered(opened):
  offer = opened[0].offer('refiner')
  assert offer.ends == (DRAWN, DATA, UPLOAD) and offer.has_quick and offer.finds_noise
  assert offer.samplers[0] == 'ddim' and {'ddpm', 'heun'} < set(offer.samplers)
  assert offer.num_steps[0] == 6 and 50 in offer.num_steps
  assert offer.tasks == ('super_resolution', 'inpaint', 'denoise')
  assert any('images with colours' in note for note in offer.notes)
  groups = [one.group for one in offer.directions]
  assert groups.count(controls.PRINCIPAL) == 2 and groups.count(controls.OF_CLASSES) == 10


def test_a_seed_is_that_of_the_samples_of_the_run(opened):
  """The picture of a seed is image 0 of `--mode=sample` with it; at once one sees the VAE's."""
  explorer, trained = opened
  wanted = trained.draw(np.arange(1), seed=7)
  choice = choice_of()
  for name in ('z', 'noise'):
    choice.seed(0, name, 7)
  shown, quick = explorer.draw(choice.wish()), explorer.quick(choice.wish())
  assert list(shown.images) == ['x0_vae', 'x0'] and shown.titles == {'x0_vae': 'VAE', 'x0': 'refined'}
  for name, value in wanted.items():
    np.testing.assert_allclose(shown.images[name], value, atol=1)  # of two programs
  assert list(quick.images) == ['x0_vae'] and quick.is_quick and quick.what == 'VAE alone'
  np.testing.assert_allclose(quick.images['x0_vae'], wanted['x0_vae'], atol=1)
  assert shown.what == 'refiner, ddim, 6 steps'


def test_moving_what_can_be_moved_compiles_nothing(opened, compiled):
  explorer, _ = opened
  choice = choice_of(has_two=True)

  def see():
    explorer.quick(choice.wish())
    explorer.draw(choice.wish())

  see()
  choice.change_end(1, kind=DATA, index=3)
  see()

  def move():
    for k in range(3):
      choice.seed(0, 'z', 10 + k)
      choice.seed(1, 'noise', 20 + k)
      choice.amounts |= {'z/principal/0': 0.3 * k, 'z/class/3': -0.1 * k}
      choice.weight = 0.2 * k
      choice.change_end(1, index=4 + k)
      see()

  assert compiled(move) == 0
  choice.shape = 'four'
  assert explorer.draw(choice_of().wish()).is_new is False
  assert compiled(see) > 0  # which shows that it is counted
  assert compiled(see) == 0


@pytest.mark.slow
def test_directions_ends_and_pictures_change_what_they_should(opened):
  explorer, trained = opened
  choice = choice_of()
  before = explorer.given(choice.wish())
  choice.amounts['z/principal/1'] = -2.0
  moved = explorer.given(choice.wish())
  np.testing.assert_allclose(moved['z'] - before['z'], -2 * ARRAYS['directions'][None, :, 1], atol=1e-6)
  np.testing.assert_array_equal(moved['noise'], before['noise'])
  choice = choice_of(has_two=True, shape='row', num_points=3)
  row = explorer.given(choice.wish())
  ends = [explorer.given(Choice(stage='refiner', ends=[end, End()]).wish()) for end in choice.ends]
  np.testing.assert_allclose(row['z'][[0, 2]], np.concatenate([end['z'] for end in ends]), atol=1e-6)
  np.testing.assert_allclose(row['z'][1], (ends[0]['z'][0] + ends[1]['z'][0]) / 2, atol=1e-6)
  choice = choice_of(shape='four')
  four = explorer.given(choice.wish())
  assert (four['z'] == four['z'][:1]).all() and len(np.unique(four['noise'][:, 0, 0, 0])) == 4
  data, labels = trained.eval_images(6)
  seen = explorer.given(Choice(stage='refiner', ends=[end_of(DATA, index=5), End()]).wish())
  same = explorer.given(Choice(stage='refiner', ends=[end_of(UPLOAD, image=data[5]), End()]).wish())
  np.testing.assert_allclose(seen['z'], trained.observe(data[5:], labels[5:])['z'], atol=1e-5)
  np.testing.assert_array_equal(same['z'], seen['z'])
  np.testing.assert_array_equal(seen['noise'], before['noise'])
  replaced = Choice(
    stage='refiner', ends=[end_of(UPLOAD, image=data[5]), End()], replaced={'x0_vae', 'label'}
  )
  given = explorer.given(replaced.wish())
  np.testing.assert_allclose(given['x0_vae'][0], data[5] / 127.5 - 1, atol=1e-6)
  assert 'label' not in given


def test_visitors_change_nothing_of_each_other(opened):
  """Whoever asks between, and for what, the same wish gives the same picture."""
  explorer, _ = opened
  mine, other = choice_of(), choice_of()
  mine.amounts['z/principal/0'] = 1.0
  wish = mine.wish()
  before = explorer.draw(wish).images['x0']
  other.seed(0, 'z', 99)
  other.amounts['z/principal/0'] = -1.0
  assert not np.array_equal(explorer.draw(other.wish()).images['x0'], before)
  np.testing.assert_array_equal(explorer.draw(wish).images['x0'], before)


def test_a_file_says_what_it_was_made_of(opened):
  explorer, _ = opened
  choice = choice_of(has_two=True)
  shown = explorer.quick(choice.wish())
  with Image.open(io.BytesIO(explorer.png(shown))) as file:
    assert file.size == (384, 384)
    made_of = json.loads(file.text[images.MADE_OF])
  assert made_of['network'] == 'none' and made_of['drawn by'] == 'VAE alone'
  told = json.loads(made_of['the choice'])
  assert [end['seeds'] for end in told['ends']] == [{'z': 0, 'noise': 0}, {'z': 1, 'noise': 2}]


def test_what_cannot_be_is_said(opened):
  explorer, _ = opened
  with pytest.raises(UserError, match='no picture is uploaded yet'):
    explorer.draw(Choice(stage='refiner', ends=[End(kind=UPLOAD), End()]).wish())
  with pytest.raises(UserError, match="'../vae' is no stage of .*: refiner"):
    explorer.offer('../vae')
  with pytest.raises(UserError, match='is no image'):
    explorer.upload('a.png', b'no')


@pytest.mark.slow
def test_a_picture_is_restored_and_its_known_pixels_are_kept(opened):
  explorer, trained = opened
  data, _ = trained.eval_images(4)
  damage = explore_restored.damage_of(trained, 'inpaint', 0.5)
  wish = Choice(stage='refiner', ends=[end_of(UPLOAD, image=data[3]), End()]).wish()
  shown = explorer.restore(wish, damage)
  picture, left, restored = shown.images.values()
  np.testing.assert_array_equal(picture[0], data[3])
  inside = np.zeros((8, 8), bool)
  inside[2:6, 2:6] = True
  np.testing.assert_array_equal(restored[0][~inside], data[3][~inside])
  assert not np.array_equal(left[0], data[3])
  noisy = explore_restored.damage_of(trained, 'denoise', 0.2, is_there=True)
  np.testing.assert_array_equal(list(explorer.restore(wish, noisy).images.values())[1][0], data[3])
  with pytest.raises(UserError, match='factor must be'):
    explore_restored.damage_of(trained, 'super_resolution', 3)


@pytest.mark.slow
def test_the_noise_of_a_picture_makes_it_again(tmp_path):
  """By inversion, also where a run has no code and no labels; a VAE's image alone does not."""
  explorer, trained = explorer_of('unconditional', tmp_path, **{**STEPS, 'refiner.sample.clip': 'none'})
  offer = explorer.offer('refiner')
  assert offer.ends == (DRAWN, DATA, UPLOAD) and not offer.directions
  assert [one.kind for one in offer.controls] == [controls.SEED]
  data, _ = trained.eval_images(2)
  apart = {}
  for finds in (False, True):
    end = End(kind=UPLOAD, image=data[1], finds_noise=finds)
    again = explorer.draw(Choice(stage='refiner', num_steps=50, ends=[end, End()]).wish()).images['x0']
    apart[finds] = np.abs(again[0].astype(float) - data[1]).mean()
  assert apart[True] < 0.5 * apart[False]
  quick = explorer.quick(Choice(stage='refiner', num_steps=50).wish())
  assert quick.what == 'refiner, ddim, 4 steps'


@pytest.mark.slow
def test_the_noise_of_a_picture_is_found_on_the_images_of_the_stages_before(tmp_path, monkeypatch):
  """Those that samples are drawn on, and none that is observed of the evaluation split."""
  settings = {'sr_8.sample.num_steps': 4, 'sr_8.sample.sampler': 'ddim', 'sr_8.sample.clip': 'none'}
  explorer, trained = explorer_of('cascade', tmp_path, **settings)
  end = End(kind=UPLOAD, image=trained.eval_images(1)[0][0])
  wish = Choice(stage='sr_8', ends=[end, End()]).wish()
  given = {name: value for name, value in explorer.given(wish).items() if name != 'low'}
  monkeypatch.setattr(explorer, 'given', lambda wish: given)  # as where a stage before it is trained
  found, asked = [], []
  for grey in (0.5, -0.5):
    low = np.full((1, 4, 4, 1), grey, np.float32)
    fed = lambda self, indices, given, seed, low=low: asked.append((len(indices), seed)) or {'low': low}
    monkeypatch.setattr(type(trained), 'inputs_from_makers', fed)
    program = explorer.program(wish)
    explorer._kept.clear()
    found.append(explorer._noise_of(wish, end, end.image))
    finder = program.with_experiment(restored.inverted(program.experiment, program.settings.num_steps))
    original = {restored.ORIGINAL: end.image[None].astype(np.float32) / 127.5 - 1}
    expected = finder.draw(np.arange(1), {**given, 'low': low, **original}, handed=True)['noise']
    np.testing.assert_allclose(found[-1], expected, rtol=1e-4, atol=1e-5)
  assert np.abs(found[0] - found[1]).max() > 1e-3
  assert asked[0] == (1, trained.settings.seed)


@pytest.mark.slow
def test_a_guidance_weight_is_no_part_of_the_program(tmp_path, compiled):
  explorer, trained = explorer_of('formulation1,label', tmp_path, **STEPS, **{
    'refiner.conditions.label.dropout': 0.1,
  })  # fmt: skip
  by_name = {one.name: one for one in explorer.offer('refiner').controls}
  assert by_name['guidance'].most == controls.MAX_WEIGHT and len(by_name['label'].choices) == 10
  choice = choice_of(chosen={'label': 3, 'guidance': 0.0})
  plain = explorer.draw(choice.wish()).images['x0']

  def move():
    for label, weight in ((3, 1.0), (4, 2.5), (3, 1.5)):
      choice.chosen |= {'label': label, 'guidance': weight}
      choice.found = explorer.draw(choice.wish()).images['x0']

  assert compiled(move) == 0
  given = {**trained.draw_inputs(np.arange(1), 0), 'label': np.full(1, 3, np.int32)}
  np.testing.assert_allclose(plain, trained.draw(np.arange(1), given)['x0'], atol=1)
  other = trained.with_settings(guidance_weight=1.5)
  np.testing.assert_allclose(choice.found, other.draw(np.arange(1), given)['x0'], atol=1)
  assert np.abs(choice.found.astype(int) - plain).max() > 2


@pytest.mark.slow
@pytest.mark.parametrize(('variant', 'stage'), [('latent', 'ddgan'), ('', 'vae'), ('divae', '')])
def test_a_gan_a_vae_and_a_decoder_of_codes_are_drawn(variant, stage, tmp_path):
  explorer, trained = explorer_of(variant, tmp_path, stage)
  offer = explorer.offer(trained.stage)
  assert bool(offer.samplers) == (variant == 'divae')
  choice = Choice(stage=trained.stage, ends=[End(kind=offer.ends[0]), End()])
  one = explorer.draw(choice.wish())
  name = list(one.images)[-1]
  if variant == 'divae':
    assert offer.ends == (DATA, UPLOAD)
    choice.change_end(0, index=2)
  else:
    assert offer.ends[0] == DRAWN and explorer.quick(choice.wish()) is None  # it is quick itself
    for control in offer.controls:
      choice.seed(0, control.name, 5)
  assert not np.array_equal(explorer.draw(choice.wish()).images[name], one.images[name])


@pytest.mark.slow
def test_a_student_of_one_step_is_seen_at_once(tmp_path):
  with pytest.MonkeyPatch.context() as patch:
    make = sharding.make_mesh
    patch.setattr(sharding, 'make_mesh', lambda config: make(config, jax.devices()[:1]))
    teacher = fresh.Fresh('distill', tmp_path, 'refiner', **STEPS)
    students = [name for name in teacher.config.stages if 'teacher' in teacher.config[name]]
    least = min(students, key=lambda name: teacher.config[name].sample.num_steps)
    student = fresh.Fresh('distill', tmp_path, least)
  stages = {'refiner': teacher, least: student}
  explorer = Explorer(teacher.config, tmp_path, tuple(stages), stages.__getitem__)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(directions, 'leading', lambda trained, number: ARRAYS)
    explorer.offer('refiner')
  choice = choice_of()
  quick = explorer.quick(choice.wish())
  assert quick.what.startswith(f'{least}, ') and list(quick.images) == ['x0_vae', 'x0']
  np.testing.assert_allclose(quick.images['x0'], student.draw(np.zeros(1, int), seed=0)['x0'], atol=1)
  assert explorer.offer(least).samplers == () and explorer.quick(Choice(stage=least).wish()) is None
  with pytest.raises(UserError, match='knows its own steps alone'):
    explorer.draw(Choice(stage=least, num_steps=8).wish())
