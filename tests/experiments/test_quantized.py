"""The experiments of quantized stages: those of their stages, with other networks, and nothing to train."""

import dataclasses
import functools
import importlib

import jax
import pytest
from some_slow import some_slow

from vaediff import experiments, reads
from vaediff.errors import UserError
from vaediff.experiments import quantized, restored
from vaediff.experiments.diffusion import Diffusion
from vaediff.models.quantized import FLOATS, PRODUCTS, WIDE, Quantized
from vaediff.modes import checked, quantize


def made(name, variant, stage, **changes):
  config = importlib.import_module(f'configs.{name}').get_config(variant)
  config.quantize.update(changes)
  checked.complete(config)
  config = quantize.with_stage(config, stage, 'whole')
  return experiments.build(config, stage), experiments.build(config, 'whole'), config


def shapes(model):
  params = jax.eval_shape(model.init, jax.random.key(0))
  return jax.eval_shape(model.apply, params, *model.inputs)


@pytest.mark.parametrize(
  ('variant', 'stage', 'kind', 'networks'),
  some_slow([
    ('debug', 'refiner', 'Diffusion', {'denoiser'}),
    ('distill,debug', 'distill_1', 'Diffusion', {'denoiser'}),
    ('ddgan,debug', 'ddgan', 'Ddgan', {'generator'}),
    ('light,debug', 'decoder', 'LightDecoder', {'decoder'}),
    ('vqvae,prior,debug', 'prior', 'TokenPrior', {'prior'}),
  ], 'debug', 'light,debug', 'vqvae,prior,debug'),
)  # fmt: skip
def test_a_stage_keeps_its_kind_and_the_networks_that_it_draws_with(
  variant, stage, kind, networks, monkeypatch
):
  monkeypatch.setattr(quantized.integers, 'arithmetic', lambda: PRODUCTS)
  floats, whole, _ = made('digits', variant, stage)
  assert type(whole).__name__ == f'Quantized{kind}' and not whole.trainable
  assert whole.networks.keys() == networks
  for name, model in whole.networks.items():
    assert isinstance(model, Quantized) and len(model.layers) > 2
    own, before = shapes(dataclasses.replace(model, arithmetic=lambda: PRODUCTS)), shapes(model.in_floats)
    assert jax.tree.map(lambda x: x.shape, own) == jax.tree.map(lambda x: x.shape, before)
    assert whole.made_of[f'float_{name}'] == (stage, 'latest')
  assert whole.num_function_evaluations == floats.num_function_evaluations
  kept = {name for name, source in whole.frozen.items() if isinstance(source, reads.FromStage)}
  assert 'teacher' not in kept


def test_tables_name_what_it_is_stored_as():
  _, whole, _ = made('digits', 'debug', 'refiner', weights='int4')
  assert isinstance(whole, Diffusion) and whole.columns().method == 'ddim w4a8'
  assert not any(isinstance(model, Quantized) for model in quantized.in_floats(whole).networks.values())


def test_it_says_how_many_of_its_layers_are_too_narrow_to_gain_on_a_cpu(monkeypatch):
  _, whole, _ = made('digits', 'debug', 'refiner')
  layers = len(whole.networks['denoiser'].layers)
  wanted = {PRODUCTS: '', WIDE: f'{layers} of {layers} layers', FLOATS: 'no fast products'}
  for arithmetic, said in wanted.items():
    how = functools.partial(str, arithmetic)
    monkeypatch.setattr(quantized.integers, 'arithmetic', how)
    model = dataclasses.replace(whole.networks['denoiser'], arithmetic=how)
    monkeypatch.setattr(type(whole), 'networks', {'denoiser': model})
    assert any(said in note for note in whole.notes) if said else not any('layers' in x for x in whole.notes)


@pytest.mark.parametrize('correction', ['noise', 'published'])
def test_what_is_made_of_its_fields_keeps_the_correction_of_the_noise(correction):
  _, whole, config = made('digits', 'debug', 'refiner', correction=correction)
  assert whole.noise_correction is None
  config.whole.quantized.correction_rows = 4
  fields = restored.fields_of(experiments.build(config, 'whole'))
  assert fields['noise_correction'].direction == (correction == 'published')


def test_it_is_not_trained():
  _, whole, _ = made('digits', 'debug', 'refiner')
  state = jax.eval_shape(whole.init, jax.random.key(0))
  assert state.networks['denoiser'].opt_state is None
  with pytest.raises(UserError, match='a quantized stage is not trained'):
    whole.train_step(state, {}, {}, jax.random.key(0))


def test_a_section_without_how_it_was_made_is_refused():
  _, _, config = made('digits', 'debug', 'refiner')
  with config.unlocked():
    del config.whole['quantized']
  with pytest.raises(UserError, match="config.whole: it has no section 'quantized'"):
    experiments.build(config, 'whole')
  config.refiner.experiment = 'quantized'
  with pytest.raises(UserError, match='config.refiner: it has no section'):
    experiments.build(config, 'refiner')
