"""`--mode=edit`: a picture changed by a caption, as a strip from the picture to what the caption says.

Imagic (Kawar et al. 2022, arXiv:2210.09276): the vectors of the caption are optimised to show the picture,
the denoiser is tuned to it at these, and samples are drawn between them and the caption's own. All is written
to `edits/<name>/` in the run's folder, or that of `--out`; the run's own files stay as they are. The same
edit at other etas trains nothing.
"""

import copy
import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from vaediff import checks
from vaediff.conditions.embedding import EMBEDDING, ETA, LEAST_ETA, MOST_ETA
from vaediff.data import folder as folder_reader
from vaediff.data import resize, shapes, sources
from vaediff.errors import UserError
from vaediff.evaluation import edits, report
from vaediff.experiments import bounds
from vaediff.experiments.base import NOISE
from vaediff.experiments.denoiser import DENOISER
from vaediff.experiments.edit import DIFFUSION, EDIT_FINETUNE, check_editable, sampled_as
from vaediff.experiments.extended import FIRST
from vaediff.machine import sharding
from vaediff.modes import edit_training, pictures
from vaediff.modes.edit_training import Picture
from vaediff.run import captions, checkpoint, draw, images, log, scoring
from vaediff.run.config import Run
from vaediff.run.trained import Trained
from vaediff.storage import files

FOLDER = 'edits'
"""In the run's folder, or that of `--out`: a folder for each edit."""
STRIP, IMAGES, FIGURES = 'strip', 'images', 'edit.json'
"""What an edit's folder has beside its stages."""
SIZES = {
  'num_steps': checks.count(1),
  'batch_size': checks.count(1),
  'learning_rate': checks.inside_or_at(0, 1),
}
BOUNDS = {
  'name': checks.file_name(or_empty=True),
  'etas': bounds.several(
    bounds.number(LEAST_ETA, MOST_ETA),
    f'numbers in [{LEAST_ETA:g}, {MOST_ETA}], as (0.0, 0.5, 1.0): 0 shows the picture, 1 is the caption',
  ),
  'num_images': checks.count(1),
  'num_seeds': checks.count(1),
  **{f'{part}.{field}': bound for part in (EMBEDDING, 'finetune') for field, bound in SIZES.items()},
}

Score = Callable[[np.ndarray, str], float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
  """One edit that is asked for.

  Attributes:
    image: the picture, uint8, of the size of the run's data.
    caption: what it is to show.
    title: what its folder is called, before what it is made of.
  """

  image: Picture
  caption: str
  title: str


def mode(run: Run) -> None:
  """Edits a picture, or evaluation images, with the last stage.

  Raises:
    UserError: for a setting that is none, a picture that cannot be read, a caption with unknown words, a
      stage that is not trained or cannot be edited with.
  """
  if jax.process_count() > 1:
    raise UserError(f'--mode=edit runs in one process, and this job has {jax.process_count()}')
  out = pictures.out_of(run) / FOLDER
  stage, settings = stage_of(run), run.config.edit
  check(run, stage)
  checkpoint.latest_folder(run.workdir / stage)
  asked = [picture_of(run)] if settings.image else list(of_evaluation(run))
  check_captions(run, stage, asked)
  score = ranking(run, stage)
  found = [edit(run, stage, one, out, score) for one in asked]
  if not settings.image:
    say_summary(found, out)


def stage_of(run: Run) -> str:
  """Returns the last stage that is a diffusion which reads captions; where there is none, the last."""
  able = [name for name in run.stages if run.config[name].experiment == DIFFUSION]
  able = [name for name in able if captions.length_of(run.config, name)]
  return (able or run.stages)[-1]


def check(run: Run, stage: str) -> None:
  """Raises UserError where the settings are none, or the stage is none that can be edited with."""
  settings = run.config.edit
  checks.check(settings, BOUNDS, 'config.edit.')
  check_editable(sampled_as(run.config, stage, run.config[stage].sample), run.config, stage)
  if settings.image and not settings.caption.strip():
    raise UserError("config.edit.caption is '': write what the picture is to show")
  if settings.caption and not settings.image:
    raise UserError(
      f'config.edit.caption is {settings.caption!r}, and config.edit.image names no picture: give the file '
      'that is to be changed, or leave both empty for evaluation images'
    )
  choice = run.config[stage].sample.checkpoint
  if choice != 'latest':
    raise UserError(
      f'config.{stage}.sample.checkpoint is {choice!r}, and an edit begins at the latest checkpoint: set it '
      "to 'latest'"
    )
  if settings.num_seeds > 1 and not settings.clip.stage:
    raise UserError(
      f'config.edit.num_seeds is {settings.num_seeds}: which of them is best says a CLIP stage, and '
      "config.edit.clip.stage is ''. Name one, or draw 1"
    )


def picture_of(run: Run) -> Asked:
  """Returns the edit of the file `edit.image`, cropped and resized as the images of the data are.

  Raises:
    UserError: when it cannot be read, or does not fit as `data.crop` and `data.resize` say.
  """
  data, path = run.config.data, pathlib.Path(run.config.edit.image)
  if not path.is_file():
    raise UserError(f'config.edit.image is {run.config.edit.image!r}, where there is no file')
  image = folder_reader.decode(path, data.channels, formats=None)
  height, width, _ = image.shape
  try:
    fitted = resize.fit(image, data)
  except UserError as error:
    raise UserError(f'config.edit.image, {path}: {error}') from error
  if fitted.shape != image.shape:
    log.say(
      f'{path}: {width}x{height} pixels, made {data.image_size}x{data.image_size} as the images of the data '
      f'are: data.crop={data.crop!r}, data.resize={data.resize!r}'
    )
  return Asked(image=fitted, caption=run.config.edit.caption, title=path.stem)


def of_evaluation(run: Run) -> Iterator[Asked]:
  """Yields edits of the first evaluation images of shapes: one attribute of each is another.

  Raises:
    UserError: for other data, of which nothing says what could be changed.
  """
  data = run.config.data
  if not shapes.is_named(data):
    raise UserError(
      "config.edit.image is '': name the picture that is to be changed. Evaluation images are taken of the "
      f'data set shapes alone, and these data are {data.name or data.source}'
    )
  source, mini = sources.open_source(data, 'eval'), shapes.is_mini(data)
  read = source.read(np.arange(min(run.config.edit.num_images, len(source))))[sources.IMAGE]
  known = edits.reader_of(data, data.image_size).read(read).attributes.tolist()
  for number, image in enumerate(read):
    attributes = edits.with_one_changed(known[number], number, mini=mini)
    yield Asked(image=image, caption=shapes.in_words(attributes), title=f'eval-{number:04d}')


def check_captions(run: Run, stage: str, asked: Sequence[Asked]) -> None:
  """Raises UserError for a caption with a word that the stage does not know, or one that is too long."""
  tokenizer = captions.tokenizer_of(run.config, stage, run.workdir / stage)
  field = 'config.edit.caption' if run.config.edit.image else 'the captions of the evaluation images'
  tokenizer.encode([one.caption for one in asked], captions.length_of(run.config, stage), field)


def edit(run: Run, stage: str, asked: Asked, out: pathlib.Path, score: Score | None) -> edits.Edited:
  """Trains an edit as far as it is not trained, writes its pictures and figures, and prints these.

  Args:
    run: what is asked for.
    stage: whose network is edited.
    asked: the edit.
    out: folder of all edits.
    score: of a strip and a caption, by which one of several is kept.
  """
  config = edit_training.config_of(run.config, stage, run.workdir, asked.image, asked.caption)
  name = run.config.edit.name
  if name and not run.config.edit.image:
    name = f'{name}-{asked.title}'
  folder = out / (name or edit_training.name_of(config, asked.title))
  log.say(f'{folder.name}: {asked.caption}')
  mesh = sharding.make_mesh(config.mesh)
  with files.lock(folder, '--mode=edit'):
    edit_training.train_edit(config, folder, asked.image, mesh)
    trained = Trained(config, folder, EDIT_FINETUNE, mesh)
    return write(run, trained, asked, score)


def write(run: Run, trained: Trained, asked: Asked, score: Score | None) -> edits.Edited:
  """Draws the strip of a trained edit, writes and prints what it shows; returns that."""
  etas, data = tuple(run.config.edit.etas), run.config.data
  image = trained.as_drawn(asked.image[None])[0]
  number, strip = best_strip(trained, asked, etas, run.config.edit.num_seeds, score)
  before = strip_of(untuned(trained), asked.image, etas, number)[0]
  found = edits.edited(etas, strip, before, image, read_by_oracle(data, image, asked.caption))
  titles = ['picture', *(f'eta {eta:g}' for eta in etas)]
  whole = images.captioned(np.concatenate([image[None], strip]), len(titles), titles)
  images.write_png(trained.workdir / f'{STRIP}.png', whole, trained.made_of)
  with pictures.whole_set(trained.workdir / IMAGES) as folder:
    for eta, one in zip(etas, strip, strict=True):
      # a number of that many digits: so those of an earlier call go
      images.write_png(folder / f'{round(1000 * eta):0{pictures.DIGITS}d}.png', one, trained.made_of)
    images.write_png(folder / 'picture.png', image)
  rows = edits.rows_of(found)
  log.say(report.table(rows))
  log.say(f'rmse at eta {etas[0]:g} before the denoiser was tuned: {found.rmse_before:.4f}')
  stored = {'caption': asked.caption, 'seed': trained.settings.seed, 'number': number, 'rows': rows}
  stored |= {'rmse_before': found.rmse_before, 'made_of': trained.made_of}
  files.write_json(trained.workdir / FIGURES, stored)
  log.say(f'wrote {trained.workdir / STRIP}.png')
  return found


def read_by_oracle(data: ConfigDict, image: Picture, caption: str) -> edits.Asked | None:
  """Returns what the caption asks for of the picture; None, which is said, where the oracle reads neither."""
  try:
    return edits.asked_for(data, image, caption)
  except UserError as error:
    log.say(f'nothing is read out of the images: {error}')
    return None


def untuned(trained: Trained) -> Trained:
  """Returns the edit with the denoiser as it was before it was tuned; the compiled sampler is the same."""
  other = copy.copy(trained)
  other.read = {**trained.read, DENOISER: trained.read[FIRST]}
  return other


def strip_of(trained: Trained, image: Picture, etas: Sequence[int | float], number: int) -> np.ndarray:
  """Returns an image for each eta, all from the noise of the same sample, uint8.

  Args:
    trained: the edit.
    image: the picture; what else the network reads of an image, such as a VAE's, is of this one.
    etas: of the images.
    number: of the sample, whose noise it is.
  """
  count = len(etas)
  noise = trained.draw_inputs(np.array([number]), trained.settings.seed)[NOISE]
  seen = {**trained.observe(image[None], np.zeros(1, np.int32)), NOISE: noise}
  given = {name: np.repeat(value, count, axis=0) for name, value in seen.items()}
  drawn = trained.draw(np.full(count, number), {**given, ETA: np.asarray(etas, np.float32)})
  return draw.own_image(drawn)


def best_strip(
  trained: Trained, asked: Asked, etas: Sequence[int | float], num_seeds: int, score: Score | None
) -> tuple[int, np.ndarray]:
  """Returns the number of the sample whose strip has the largest score, of equal ones the first; and it.

  Of one seed nothing is compared, and `score` may be None.
  """
  strips = [strip_of(trained, asked.image, etas, number) for number in range(num_seeds)]
  if num_seeds == 1:
    return 0, strips[0]
  scores = [score(strip, asked.caption) for strip in strips]
  best = int(np.argmax(scores))
  shown = ' '.join(f'{one:.3f}' for one in scores)
  log.say(f'{scoring.CLIP_OWN} of the strips: {shown}; no. {best} is kept')
  return best, strips[best]


def ranking(run: Run, stage: str) -> Score | None:
  """Returns (strip, caption) -> the mean cosine of the images and the caption; None for one seed.

  Raises:
    UserError: where `edit.clip` names no CLIP stage, or one that does not fit.
  """
  if run.config.edit.num_seeds == 1:
    return None
  reader = Trained(run.config, run.workdir, stage, sharding.make_mesh(run.config.mesh))
  scorer = scoring.open_scorer(reader, run.config.edit.clip, 'config.edit.clip')

  def score(strip: np.ndarray, caption: str) -> float:
    (ids,) = reader.caption_inputs([caption]).values()
    return float(np.mean(scorer.cosines(strip, np.repeat(scorer.texts(ids), len(strip), axis=0))))

  return score


def say_summary(found: Sequence[edits.Edited], out: pathlib.Path) -> None:
  """Prints, and writes as `edits.json`, how often the attribute that was to change has, and all else not."""
  rows, figures = edits.summary(found)
  log.say(f'{len(found)} evaluation images, one attribute of each changed; shares of them, and mean rmse')
  log.say(report.table(rows))
  for name, value in figures.items():
    log.say(f'{name} {value:.4g}')
  stored = [{name: value for name, value in vars(one).items()} for one in found]
  report.write_json(out / f'{FOLDER}.json', {'rows': rows, 'figures': figures, 'edits': stored})
  log.say(f'wrote {out / FOLDER}.json')
