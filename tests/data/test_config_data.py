"""What each config does with an image of its data set's real size: it is cropped and resized, never refused.

Sizes, height and width: CelebA aligned 218x178 (Liu et al. 2015), CelebA-HQ 1024 or as TFDS stores it, AFHQ
512, LSUN 256 at its shorter side, CIFAR-10 32, Fashion-MNIST 28, the digits of UCI 8, emoji 64.
"""

import importlib
import json
import pkgutil

import numpy as np
import pytest
from PIL import Image

import configs
from vaediff.data import resize, sources

REAL = {
  ('celeba64', ''): [(218, 178, 3)],
  ('celeba64', 'crop140'): [(218, 178, 3)],
  ('celebahq128', ''): [(128, 128, 3)],
  ('celebahq128', 'folder'): [(1024, 1024, 3), (128, 128, 3)],
  ('ffhq128', ''): [(1024, 1024, 3), (128, 128, 3)],
  ('celeba256', ''): [(256, 256, 3)],
  ('celeba256', 'folder'): [(1024, 1024, 3), (256, 256, 3)],
  ('afhq256', ''): [(512, 512, 3)],
  ('lsun_church256', ''): [(256, 341, 3), (300, 256, 3), (256, 256, 3)],
  ('lsun_church256', 'folder'): [(256, 341, 3), (300, 256, 3), (256, 256, 3)],
  ('cifar10', ''): [(32, 32, 3)],
  ('captions256', ''): [(256, 341, 3), (512, 300, 3)],
  ('captions256', 'stable_diffusion'): [(640, 512, 3)],
  ('captions256', 'stable_diffusion_control'): [(640, 512, 3)],
  ('captions256', 'unclip_vit_h16'): [(256, 341, 3), (224, 224, 3)],
  ('captions256', 'unclip_vit_l14'): [(256, 341, 3), (224, 224, 3)],
  ('captions256', 'clip_vit_b32'): [(256, 341, 3), (224, 224, 3)],
  ('fashion_mnist', ''): [(28, 28, 1)],
  ('fashion_mnist', 'idx'): [(28, 28, 1)],
  ('digits', ''): [(8, 8, 1)],
  **dict.fromkeys((('digits', variant) for variant in ('text', 'clip', 'unclip')), [(8, 8, 1)]),
  ('emoji64', ''): [(64, 64, 3)],
  ('shapes16', ''): [(16, 16, 3)],
  ('shapes16', 'mini'): [(16, 16, 3)],
  ('shapes16', 'look'): [(16, 16, 3)],
  ('shapes32', ''): [(32, 32, 3)],
  ('shapes32', 'look'): [(32, 32, 3)],
  ('shapes64', ''): [(64, 64, 3)],
  ('shapes64', 'look'): [(64, 64, 3)],
}
NO_DATA = (
  'base', 'code_papers', 'gan_papers', 'gan_small', 'modes', 'parts', 'presets', 'run', 'shapes_parts',
)  # fmt: skip
CASES = [(name, variant, size) for (name, variant), sizes in REAL.items() for size in sizes]


def data_of(name, variant):
  return importlib.import_module(f'configs.{name}').get_config(variant).data


def test_every_config_has_a_real_size():
  names = {module.name for module in pkgutil.iter_modules(configs.__path__) if not module.ispkg}
  assert names - set(NO_DATA) == {name for name, _ in REAL}


def test_every_variant_that_changes_the_data_is_here():
  for name in {name for name, _ in REAL}:
    module = importlib.import_module(f'configs.{name}')
    own = vars(module).get('OWN', {'crop140': None} if name == 'celeba64' else {})
    known = [variant for listed, variant in REAL if listed == name]
    plain = data_of(name, '').to_json()
    for variant in own:
      assert variant in known or data_of(name, variant).to_json() == plain, (name, variant)


@pytest.mark.parametrize(('name', 'variant', 'size'), CASES)
def test_an_image_of_the_real_size_fits(name, variant, size):
  data = data_of(name, variant)
  sources._check(data)
  image = np.random.RandomState(0).randint(256, size=size).astype(np.uint8)
  fitted = resize.fit(image, data)
  assert fitted.shape == (data.image_size, data.image_size, data.channels) and fitted.dtype == np.uint8
  assert fitted.std() > 5


@pytest.mark.parametrize(
  ('name', 'variant', 'classes'),
  [
    ('captions256', 'ldm_txt2img', 0),
    ('captions256', '', 2),
    ('lsun_church256', 'folder', 0),
    ('afhq256', '', 0),
  ],
)
def test_a_folder_is_read_as_the_docstring_says(name, variant, classes, tmp_path):
  """Nothing is set but the path: images in one folder or one folder per class, captions in a file beside."""
  names = [f'{f"kind{i % classes}/" if classes else ""}{i}.png' for i in range(20)]
  for i, file in enumerate(names):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    Image.new('RGB', (20, 24), (10 * i, 0, 0)).save(tmp_path / file)
  data = data_of(name, variant)
  data.path = str(tmp_path)
  if data.caption_feature:
    rows = [{'file_name': file, 'caption': f'red {i}'} for i, file in enumerate(names)]
    (tmp_path / 'captions.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  if data.crop == 'none':  # the images of this set are squares
    data.crop = 'center'
  seen = []
  for split, count in (('train', 19), ('eval', 1)):
    source = sources.open_source(data, split)
    assert len(source) == count and source.num_classes == classes
    reds = source.read(np.arange(count))['image'].max(axis=(1, 2, 3)) // 10
    if data.caption_feature:
      assert [f'red {i}' for i in reds] == list(source.captions)
    seen += reds.tolist()
  assert sorted(seen) == list(range(20))


def test_celeba_is_squashed_as_in_the_official_code():
  """The whole image, by PIL's bilinear filter: nothing is cut off."""
  image = np.zeros((218, 178, 3), np.uint8)
  image[:109], image[:, :89, 2] = 100, 200
  expected = np.asarray(Image.fromarray(image).resize((64, 64), Image.Resampling.BILINEAR))
  np.testing.assert_array_equal(resize.fit(image, data_of('celeba64', '')), expected)
  fitted = resize.fit(image, data_of('celeba64', ''))
  assert (fitted[:31, :, 0] == 100).all() and (fitted[33:, :, 0] == 0).all()
  assert (fitted[:, :31, 2] == 200).all()


def test_crop140_takes_the_middle():
  image = np.zeros((218, 178, 3), np.uint8)
  image[39:179, 19:159] = 7
  assert (resize.fit(image, data_of('celeba64', 'crop140')) == 7).all()


def test_splits_of_every_config_share_nothing():
  for (name, variant), _ in REAL.items():
    data = data_of(name, variant)
    train, held_out = data.train_split, data.eval_split
    names = [split.split('[')[0] for split in (train, held_out)]
    assert names[0] != names[1] or (train.split(':')[1].rstrip(']') == held_out.split('[')[1].split(':')[0])
