"""TFDS data sets of our own, written as array_record: this needs no TensorFlow, nor does reading.

`Digits` comes with scikit-learn, without a download; `Shapes` is drawn here; `NotoEmoji` reads an unpacked
npm package. Images are handed to TFDS as PIL images: it encodes arrays with TensorFlow, but PIL images
without.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from vaediff.data import paths, shapes
from vaediff.data.resize import on_white
from vaediff.errors import UserError
from vaediff.storage import files, places

DIGIT_NAMES = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')
DIGITS_NUM_TRAIN = 1500
EMOJI_CATEGORIES = (
  'Activities',
  'Animals & Nature',
  'Component',
  'Flags',
  'Food & Drink',
  'Objects',
  'People & Body',
  'Smileys & Emotion',
  'Symbols',
  'Travel & Places',
)
EMOJI_SKIN_TONES = {
  '1F3FB': 'light',
  '1F3FC': 'medium-light',
  '1F3FD': 'medium',
  '1F3FE': 'medium-dark',
  '1F3FF': 'dark',
}
EMOJI_HOW_TO = """Run
  npm pack emoji-datasource-google
  tar -xzf emoji-datasource-google-*.tgz
and set data.path to the folder `package` which the second command makes."""


class Digits(tfds.core.GeneratorBasedBuilder):
  """1,797 handwritten digits, 8x8 grey: 1,500 to train, 297 to test (UCI, in scikit-learn).

  Captions are of the form 'the digit three'.
  """

  VERSION = tfds.core.Version('1.1.0')
  RELEASE_NOTES = {'1.1.0': 'caption'}

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.__doc__,
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(shape=(8, 8, 1)),
          'label': tfds.features.ClassLabel(num_classes=10),
          'caption': tfds.features.Text(),
        }
      ),
      homepage='https://archive.ics.uci.edu/dataset/80',
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
    return {
      'train': self._generate_examples(slice(None, DIGITS_NUM_TRAIN)),
      'test': self._generate_examples(slice(DIGITS_NUM_TRAIN, None)),
    }

  def _generate_examples(self, part: slice) -> Iterator[tuple[int, dict[str, Any]]]:
    from sklearn import datasets  # Only building needs scikit-learn.

    digits = datasets.load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    # RandomState's stream never changes between NumPy versions (NEP 19), so neither do the splits.
    for i in np.random.RandomState(0).permutation(len(images))[part]:
      label = int(digits.target[i])
      caption = f'the digit {DIGIT_NAMES[label]}'
      yield int(i), {'image': Image.fromarray(images[i]), 'label': label, 'caption': caption}


class NotoEmoji(tfds.core.GeneratorBasedBuilder):
  """Google's Noto emoji, 64x64 RGB on white, with category and caption, also in other skin tones.

  A base emoji and its skin tones are in the same split, and so are bases drawn alike (some flags
  and families are one picture under several names); about one such group in ten is in `test`.
  """

  VERSION = tfds.core.Version('1.0.0')
  MANUAL_DOWNLOAD_INSTRUCTIONS = EMOJI_HOW_TO

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.__doc__,
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(shape=(64, 64, 3)),
          'label': tfds.features.ClassLabel(names=list(EMOJI_CATEGORIES)),
          'caption': tfds.features.Text(),
        }
      ),
      homepage='https://github.com/iamcal/emoji-data',
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
    package = pathlib.Path(dl_manager.manual_dir)
    return {split: self._generate_examples(package, split) for split in ('train', 'test')}

  def _generate_examples(self, package: pathlib.Path, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with files.reading(package / 'emoji.json', EMOJI_HOW_TO):
      groups: dict[bytes, str] = {}  # Picture of a base emoji -> the first code that shows it.
      for base in json.loads((package / 'emoji.json').read_text(encoding='utf-8')):
        if not base['has_img_google']:
          continue
        picture = _emoji_file(package, base).read_bytes()
        if emoji_split(groups.setdefault(picture, base['unified'])) != split:
          continue
        if base['category'] not in EMOJI_CATEGORIES:
          raise ValueError(f'the category {base["category"]!r} is none of {EMOJI_CATEGORIES}')
        variants = {'': base, **base.get('skin_variations', {})}
        for tones, variant in variants.items():
          if variant['has_img_google']:
            yield (
              variant['unified'],
              {
                'image': _emoji_image(_emoji_file(package, variant)),
                'label': base['category'],
                'caption': emoji_caption(base['name'], tones),
              },
            )


@dataclasses.dataclass
class ShapesConfig(tfds.core.BuilderConfig):
  """Of `Shapes`.

  Attributes:
    size: pixels a side.
    mini: the small set, of 96 compositions.
  """

  size: int = 32
  mini: bool = False


class Shapes(tfds.core.GeneratorBasedBuilder):
  """One shape on one background, with captions: see `vaediff.data.shapes`; the label is the shape.

  20,000 images to train, 2,000 to test, 2,000 of compositions that neither of these has.
  """

  VERSION = tfds.core.Version('1.1.0')
  RELEASE_NOTES = {'1.1.0': 'caption_look'}
  BUILDER_CONFIGS = [
    ShapesConfig(name='mini', description='96 compositions, 16x16', size=16, mini=True),
    *(ShapesConfig(name=str(size), description=f'{size}x{size}', size=size) for size in (16, 32, 64)),
  ]

  def _info(self) -> tfds.core.DatasetInfo:
    config = self.builder_config
    count = len((shapes.MINI if config.mini else shapes.ALL)[0])
    attributes = {
      name: tfds.features.ClassLabel(names=list(values))
      for name, values in zip(shapes.ATTRIBUTES, shapes.NAMES, strict=True)
    }
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.__doc__,
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(shape=(config.size, config.size, 3)),
          'label': tfds.features.ClassLabel(names=list(shapes.SHAPES[:count])),
          'attributes': attributes,
          'caption': tfds.features.Text(),
          'caption_full': tfds.features.Text(),
          shapes.LOOK: tfds.features.Text(),
        }
      ),
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
    return {split: self._generate_examples(split) for split in shapes.COUNTS}

  def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    config = self.builder_config
    for i in range(shapes.COUNTS[split]):
      scene = shapes.scene(split, i, mini=config.mini)
      yield (
        i,
        {
          'image': Image.fromarray(shapes.render(scene, config.size)),
          'label': scene.attributes[0],
          'attributes': dict(zip(shapes.ATTRIBUTES, scene.attributes, strict=True)),
          'caption': scene.caption,
          'caption_full': scene.caption_full,
          shapes.LOOK: scene.caption_look,
        },
      )


def emoji_split(unified: str) -> str:
  """Returns 'test' for about one code point sequence in ten, else 'train'."""
  return 'test' if int(hashlib.sha256(unified.encode()).hexdigest(), 16) % 10 == 0 else 'train'


def emoji_caption(name: str, tones: str) -> str:
  """Returns e.g. 'baby, dark skin tone', from a name and tones such as '1F3FF' or '1F3FF-1F3FB'."""
  distinct = dict.fromkeys(tones.split('-')) if tones else {}
  return ', '.join([name.lower(), *(f'{EMOJI_SKIN_TONES[t]} skin tone' for t in distinct)])


def check_emoji_package(path: str) -> pathlib.Path:
  """Returns the folder of the unpacked npm package `emoji-datasource-google`.

  Raises:
    UserError: it lacks emoji.json or the images; the message says how to get them.
  """
  package = places.fetched(path, 'data.path')
  for needed in ('emoji.json', 'img/google/64'):
    if not path or not paths.mode_of(package / needed):
      raise UserError(
        f'data.path={path!r} has no {needed}; noto_emoji is built from the npm package'
        f' emoji-datasource-google. {EMOJI_HOW_TO}'
      )
  return package


def _emoji_file(package: pathlib.Path, record: dict[str, Any]) -> pathlib.Path:
  file = package / 'img' / 'google' / '64' / record['image']
  if not file.is_file():
    raise UserError(f'{file} is named in emoji.json but missing. {EMOJI_HOW_TO}')
  return file


def _emoji_image(file: pathlib.Path) -> Image.Image:
  with files.reading(file, EMOJI_HOW_TO), Image.open(file, formats=('PNG',)) as image:
    if image.size != (64, 64):
      raise ValueError(f'it is {image.width}x{image.height} and not 64x64')
    return on_white(image)


OWN_BUILDERS = {'digits': Digits, 'noto_emoji': NotoEmoji, 'shapes': Shapes}
"""Data sets built on demand, by TFDS name."""
