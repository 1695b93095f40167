"""Stages that read the vectors of a CLIP stage: that one opened, vectors of captions, the noise of images."""

from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from vaediff import reads
from vaediff.data import words
from vaediff.diffusion.interpolation import unit
from vaediff.errors import UserError
from vaediff.experiments import restored
from vaediff.experiments.base import NOISE
from vaediff.run import draw, same_run, scoring
from vaediff.run.draw import HostArrays
from vaediff.spaces.embeddings import CLIP, EMBEDDING

MOST_NEUTRAL = 1024
"""Captions of the evaluation split whose mean is what no caption in particular says."""


def reads_vectors(trained: Any) -> bool:
  """Returns whether samples of a stage, `run.trained.Trained`, are made of such vectors."""
  return EMBEDDING in trained.experiment.inputs


def sees_vectors(trained: Any) -> bool:
  """Returns whether they are vectors of images: a decoder can be trained on those of captions instead."""
  return reads_vectors(trained) and EMBEDDING in trained.experiment.conditions.seen


def need_vectors(trained: Any, mode: str) -> None:
  """Raises UserError for a stage whose images are not drawn step by step of vectors of images."""
  if not sees_vectors(trained) or trained.experiment.diffusion is None:
    raise UserError(
      f'--mode={mode} needs a diffusion that reads the vector of an image, of a CLIP stage (variant unclip, '
      f"conditions.clip_image.of = 'image'); stage {trained.stage!r} is none. Name one with --stages"
    )


def open_clip(trained: Any) -> Any:
  """Returns the CLIP stage whose vectors a stage reads, or draws."""
  source: reads.FromStage = trained.experiment.frozen[CLIP]
  folder = reads.workdir_of(source, trained.workdir)
  config = trained.config
  if source.workdir:
    config = same_run.with_own_data_places(same_run.stored_config(folder / source.stage), config)
  config = config.copy_and_resolve_references()
  config[source.stage].sample.checkpoint = 'latest'  # the one that the stage reads
  return type(trained)(config, folder, source.stage, trained.mesh)


def vectors_of(clip: Any, captions: list[str]) -> Float[np.ndarray, 'n d']:
  """Returns captions as vectors of unit length by a CLIP stage; raises UserError for one it cannot read."""
  return scoring.Scorer(clip).texts(clip.caption_inputs(captions)[words.TOKENS])


def neutral(clip: Any) -> Float[np.ndarray, ' d']:
  """Returns the mean vector of captions of the evaluation split, of unit length: of none in particular."""
  source = clip.eval_source
  rows = source.read(np.arange(min(MOST_NEUTRAL, len(source))))
  mean = scoring.Scorer(clip).texts(rows[words.TOKENS]).mean(axis=0)
  return unit(mean).astype(np.float32)


def no_words(trained: Any, count: int) -> HostArrays:
  """Returns captions without words for so many samples, where training dropped captions; else {}."""
  conditions = trained.experiment.conditions
  reading = next((one for one in conditions.each if words.TOKENS in one.inputs), None)
  if reading is None or not reading.dropout:
    return {}
  return {name: np.asarray(value) for name, value in trained.caption_inputs([''] * count).items()}


def given_of(trained: Any, image: UInt8[np.ndarray, 'n h w c'], label: np.ndarray) -> HostArrays:
  """Returns what samples are given to be like images: their vectors, no words, and what else is seen."""
  return {**trained.observe(image, label), **no_words(trained, len(image))}


def noise_of(
  trained: Any, image: UInt8[np.ndarray, 'n h w c'], given: HostArrays, num_steps: int
) -> Float[np.ndarray, 'n ...']:
  """Returns the noise of images, given what they are made on, by DDIM inversion (`diffusion.inversion`).

  It is x_T over `sample.temperature`, which samples multiply it by. It is found in batches of the stage's
  sampling batch size.

  Raises:
    UserError: where that is 0.
  """
  finder = trained.with_experiment(restored.inverted(trained.experiment.diffusion, num_steps))
  x0 = image.astype(np.float32) / 127.5 - 1
  return finder.draw_all({**given, restored.ORIGINAL: x0}, handed=True)[NOISE]


def drawn_from(
  trained: Any, given: HostArrays, noise: np.ndarray, num_steps: int, eta: float
) -> UInt8[np.ndarray, 'n h w c']:
  """Returns the images that DDIM makes of noise; with eta = 0 of that of `noise_of` the images again."""
  sampler = trained.with_settings(sampler='ddim', num_steps=num_steps, eta=eta)
  return draw.own_image(sampler.draw_all({**given, NOISE: noise}))
