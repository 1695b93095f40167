"""Samples that are compared with their captions by a CLIP stage: which is kept, and what is refused."""

import importlib
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff.data import words
from vaediff.errors import UserError
from vaediff.evaluation import id_counts, retrieval
from vaediff.machine import sharding
from vaediff.modes import train
from vaediff.run import captions, checkpoint, draw, scoring
from vaediff.run.trained import Trained
from vaediff.storage import identity

pytest.importorskip('sentencepiece')
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))


def test_the_best_candidate_of_each_row_is_kept_and_of_equal_ones_the_first():
  scores = np.array([[1.0, 5.0, np.nan], [3.0, 5.0, 2.0], [2.0, 4.0, 1.0]])
  candidate = lambda number: {
    'before': np.full((3, 2), number), 'x0': np.full((3, 1, 1, 1), number, np.uint8)
  }  # fmt: skip
  found = scoring.best_of(candidate, lambda image: scores[int(image[0, 0, 0, 0])].copy(), 3)
  np.testing.assert_array_equal(found['x0'].ravel(), [1, 0, 0])
  np.testing.assert_array_equal(found['before'][:, 1], [1, 0, 0])


def test_captions_of_another_length_are_padded_and_never_cut():
  tokens = np.array([[2, 5, 3, 0]])
  np.testing.assert_array_equal(scoring.fitted(tokens, 6), [[2, 5, 3, 0, 0, 0]])
  np.testing.assert_array_equal(scoring.fitted(tokens, 3), [[2, 5, 3]])
  with pytest.raises(UserError, match='a caption has 3 tokens, .* reads 2'):
    scoring.fitted(tokens, 2)


def test_the_key_of_a_candidate_is_folded_into_that_of_its_image():
  rows = jnp.array([3, 5])
  image = jax.random.fold_in(jax.random.key(7), 5)
  wanted = draw.sampling_keys(jax.random.fold_in(image, 2)[None])
  found = draw.image_keys(7, rows, candidate=2)
  for one, other in zip(found, wanted, strict=True):
    np.testing.assert_array_equal(jax.random.key_data(one)[1:], jax.random.key_data(other))
  assert (jax.random.key_data(found.noise) != jax.random.key_data(draw.image_keys(7, rows).noise)).any()


def trained(once, variant, stages):
  """Returns the config and the folder of a run, two updates of each stage, one of them CLIP."""

  def config_of(folder):
    config = importlib.import_module('configs.shapes16').get_config(variant)
    config.data.data_dir = str(folder / 'data')
    for stage in config.stages:
      config[stage].train.update({'num_steps': 2, 'grid_every_steps': 0})
    return config

  def make(folder):
    with pytest.MonkeyPatch.context() as patch:
      make_mesh = sharding.make_mesh
      patch.setattr(sharding, 'make_mesh', lambda config: make_mesh(config, jax.devices()[:1]))
      patch.setattr(train, 'first_images', lambda *run: {})
      config = config_of(folder)
      assert config.stages == stages and config.evaluate.clip.stage == 'clip'
      train.run_stages(config, folder / 'run', config.stages)

  folder = once(f'scoring-{variant}', make)
  return config_of(folder), folder / 'run'


@pytest.fixture(scope='module')
def run(once):
  """A diffusion that reads captions, after CLIP."""
  return trained(once, 'text,clip,debug', ('clip', 'refiner'))


def opened(run, **changes):
  config, workdir = run
  config = config.copy_and_resolve_references()
  config.update_from_flattened_dict(changes)
  return Trained(config, workdir, 'refiner', sharding.make_mesh(config.mesh, jax.devices()[:1]))


@pytest.mark.slow
def test_the_sample_that_fits_its_caption_best_is_kept(run):
  ranks = {'refiner.sample.rerank.stage': 'clip', 'refiner.sample.rerank.candidates': 3}
  plain, ranked = opened(run), opened(run, **ranks)
  indices = np.arange(4)
  scorer = ranked.scorer(ranked.settings.rerank, 'field')
  texts = scorer.texts(scoring.tokens_of(ranked, indices, {}))
  drawn = [plain.draw(indices, candidate=k)['x0'] for k in range(3)]
  scores = np.stack([scorer.cosines(image, texts) for image in drawn])
  assert (np.abs(scores) <= 1 + 1e-6).all() and len({image.tobytes() for image in drawn}) == 3
  wanted = np.stack(drawn)[scores.argmax(axis=0), np.arange(4)]
  np.testing.assert_array_equal(ranked.draw(indices)['x0'], wanted)
  np.testing.assert_array_equal(ranked.draw(indices[2:])['x0'], wanted[2:])  # whatever the batch
  assert (plain.draw(indices)['x0'] != wanted).any()
  name = "the CLIP stage 'clip'"
  assert ranked.made_of[name] == checkpoint.identity_of(plain.workdir / 'clip') and name not in plain.made_of
  first, *_ = checkpoint.finished_steps(plain.workdir / 'clip' / checkpoint.FOLDER)
  by_first = opened(run, **ranks, **{'clip.sample.checkpoint': str(first)})
  assert by_first.made_of[name] == checkpoint.identity_of(plain.workdir / 'clip', first)
  figures = retrieval.figures(plain)
  assert set(figures) == {'clip_own', 'clip_own_others'}
  assert -1 <= figures['clip_own'].value <= 1 and figures['clip_own'].floor_n == 8
  clip = Trained(plain.config, plain.workdir, 'clip', plain.mesh)
  found = retrieval.figures(clip)
  assert found['recall_5'].value >= found['recall_1'].value > 0
  assert not clip.draws_alone
  (path,) = (plain.workdir / 'clip').glob('embedding-*.npz')
  vectors = scoring.Scorer(clip).images(
    clip.images('train').read(np.arange(len(clip.images('train'))))['image']
  )
  stored = np.load(path)
  np.testing.assert_allclose(stored['mean'], vectors.mean(axis=0), atol=1e-5)
  np.testing.assert_allclose(stored['std'], vectors.std(axis=0), atol=1e-5)


@pytest.mark.slow
def test_candidates_of_codes_are_those_of_the_prior_too(once):
  run = trained(once, 'divae,prior,text,clip,debug', ('clip', 'vqvae', 'prior', 'refiner'))
  plain = opened(run)
  ranked = opened(run, **{'refiner.sample.rerank.stage': 'clip', 'refiner.sample.rerank.candidates': 2})
  indices, name = np.arange(3), 'codes'
  ids = [plain.inputs_from_makers(indices, {}, 0, candidate) for candidate in (None, 0, 1)]
  assert all((one[name] != other[name]).any() for one, other in zip(ids, [*ids[1:], ids[0]], strict=True))
  prior = Trained(plain.config, plain.workdir, 'prior', plain.mesh)  # its own decoder has the same ids
  np.testing.assert_array_equal(ids[0][name], prior.draw(indices, {}, 0, handed=True)[name])
  scorer = ranked.scorer(ranked.settings.rerank, 'field')
  texts = scorer.texts(scoring.tokens_of(ranked, indices, {}))
  drawn = [plain.draw(indices, candidate=k)['x0'] for k in range(2)]
  scores = np.stack([scorer.cosines(image, texts) for image in drawn])
  wanted = np.stack(drawn)[scores.argmax(axis=0), indices]
  np.testing.assert_array_equal(ranked.draw(indices)['x0'], wanted)


@pytest.mark.slow
def test_nats_of_a_prior_by_captions_of_images_half_the_split_away(once):
  run = trained(once, 'divae,prior,text,clip,debug', ('clip', 'vqvae', 'prior', 'refiner'))
  refiner = opened(run, **{'prior.sample.batch_size': 24})  # the last batch is not full
  prior = Trained(refiner.config, refiner.workdir, 'prior', refiner.mesh)
  prior.params = {
    name: jax.tree.map(lambda leaf: 3 * leaf, params) for name, params in prior.params.items()
  }  # two updates leave captions little to say
  prior.read = {**prior.read, **prior.params}
  source, count = prior.eval_source, len(prior.eval_source)
  assert count % 24
  rows, keys = jax.device_put(source.read(np.arange(count))), jax.random.split(jax.random.key(0), 1)
  tokens = sum(int(np.prod(struct.shape)) for struct in prior.experiment.handed.values())

  def nats(batch):
    terms = prior.experiment.bound(prior.read, batch, keys, 0)
    return sum(np.asarray(part, np.float64) for part in terms.values()) / tokens

  own = nats(rows)
  other = nats({**rows, words.TOKENS: jnp.roll(rows[words.TOKENS], -(count // 2), axis=0)})
  found = id_counts.figures(prior)
  assert found['nats_per_token'].value == pytest.approx(own.mean(), rel=1e-4)
  assert found['nats_per_token/captions of others'].value == pytest.approx(other.mean(), rel=1e-4)
  rise = found['nats_per_token/rise by captions of others']
  assert abs((other - own).mean()) > 1e-4 and rise.n == count
  assert rise.value == pytest.approx((other - own).mean(), abs=1e-5)


@pytest.mark.slow
def test_what_cannot_rank_is_refused(run, tmp_path):
  config, workdir = run
  names_refiner = {'refiner.sample.rerank.stage': 'refiner'}
  with pytest.raises(UserError, match="sample.rerank.stage is 'refiner', which is no CLIP stage"):
    opened(run, **names_refiner)
  trained = opened(
    run, **{'refiner.sample.rerank.stage': 'clip', 'refiner.sample.rerank.workdir': str(tmp_path)}
  )
  with pytest.raises(
    UserError, match=f"config.refiner.sample.rerank names the stage 'clip' of {tmp_path}, where"
  ):
    trained.draw(np.arange(2))
  other = opened(run, **{'refiner.sample.rerank.stage': 'clip'})
  path = workdir / 'refiner' / captions.FILE
  kept = path.read_bytes()
  reader = opened(run)
  clip = Trained(config, workdir, 'clip', reader.mesh)
  scoring.check_tokenizer(reader, clip)
  try:
    words.save(words.train(['gray disc'], 'word', 64), path)
    with pytest.raises(identity.Stale, match='tokenizer'):
      other.draw(np.arange(2))
  finally:
    path.write_bytes(kept)
