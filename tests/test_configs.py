"""Every config and variant: described at full size, trained, sampled and restored in debug."""

import ast
import importlib
import itertools
import pathlib
import sys

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from some_slow import some_slow

from vaediff import experiments, modes
from vaediff.errors import UserError
from vaediff.machine import cost
from vaediff.modes import describe, train
from vaediff.run import config as configs
from vaediff.run import students

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
base = importlib.import_module('configs.base')
NAMES = sorted(path.stem for path in (ROOT / 'configs').glob('*.py') if 'def get_config(' in path.read_text())
OWN = [
  ('fashion_mnist', 'idx'),
  ('cifar10', 'large'),
  ('cifar10', 'ddim_unet'),
  ('celeba64', 'crop140'),
  ('celebahq128', 'folder'),
  ('celeba256', 'folder'),
  ('lsun_church256', 'folder'),
  ('fashion_mnist', 'latent'),
  ('cifar10', 'wavelet'),
  ('cifar10', 'latent,light'),
  ('celeba256', 'latent'),
  ('celeba256', 'wavelet'),
  ('celeba256', 'adversarial_refiner'),
  ('lsun_church256', 'latent'),
  ('cifar10', 'guided,distill'),
  ('celeba256', 'adversarial'),
  ('celeba256', 'latent_diffusion'),
  ('cifar10', 'wavelet_diffusion,unconditional'),
  ('digits', 'latent_diffusion,formulation2,z,guided'),
  ('celeba256', 'llamagen_vq16'),
  ('shapes16', 'text,mini'),
  ('shapes16', 'unclip,mini'),
]
SHARED = [name for name in base.VARIANTS if name != 'debug']
LABELLED = ('afhq256', 'cifar10', 'digits', 'emoji64', 'fashion_mnist', 'shapes16', 'shapes32', 'shapes64')
OF_CLASSES = ('label', 'classifier_guided')
OF_CAPTIONS = ('text', 'clip', 'unclip')
CAPTIONED = ('captions256', 'emoji64', 'shapes16', 'shapes32', 'shapes64')
PAIRS = [
  (name, one)
  for name in NAMES
  for one in SHARED
  if (one not in OF_CLASSES or name in LABELLED) and (one not in OF_CAPTIONS or name in CAPTIONED)
]


def made(name, variant=''):
  return importlib.import_module(f'configs.{name}').get_config(variant)


def get(name, variant=''):
  return students.resolve(made(name, variant))


def imports(path):
  """Returns the modules that a file imports; of a package what is imported of it, where that is a module."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      names = {f'{node.module}.{alias.name}' for alias in node.names}
      modules = {name for name in names if (ROOT / f'{name.replace(".", "/")}.py').exists()}
      found |= modules or {node.module}
  return found


def sections(config):
  return {name for name in config if isinstance(config[name], ConfigDict) and 'experiment' in config[name]}


def test_the_configs_are_all_here():
  assert NAMES == [
      'afhq256', 'captions256', 'celeba256', 'celeba64', 'celebahq128', 'cifar10', 'digits', 'emoji64',
      'fashion_mnist', 'ffhq128', 'lsun_church256', 'shapes16', 'shapes32', 'shapes64',
  ]  # fmt: skip


def test_config_files_import_one_way_and_nothing_of_the_program():
  paths = {'.'.join(p.relative_to(ROOT).with_suffix('').parts): p for p in (ROOT / 'configs').rglob('*.py')}
  stages = [name for name in paths if name.startswith('configs.stages.')]
  order = [
    ['configs.presets', 'configs.parts', 'configs.run'],
    ['configs.stages.prior'],
    ['configs.stages.diffusion', 'configs.stages.vae', 'configs.stages.autoencoder', 'configs.stages.text'],
    stages,
    ['configs.stages'],
    ['configs.base', 'configs.gan_small', 'configs.gan_papers'],
    ['configs.code_papers', 'configs.shapes_parts'],
    [f'configs.{name}' for name in NAMES],
  ]
  floors = {}
  for floor, names in enumerate(order):
    floors |= {name: floor for name in names if name not in floors}
  for path in paths.values():
    module = '.'.join(part for part in path.relative_to(ROOT).with_suffix('').parts if part != '__init__')
    for target in imports(path):
      assert target.split('.')[0] in ('configs', 'collections', 'types', 'typing', 'ml_collections'), module
      assert target not in floors or floors[target] < floors[module], f'{module} imports {target}'


@pytest.mark.parametrize(('name', 'variant'), [*((name, '') for name in NAMES), *PAIRS])
def test_a_section_exists_only_where_a_stage_uses_it(name, variant):
  config = made(name, variant)
  students_of = {'consistency', 'adversarial', 'matching'} & set(config.stages)
  template = {'distill'} if students_of else set()  # of the student between a teacher of eps and theirs
  built = {'vqvae'} if variant == 'divae_joint' else set()  # the tokenizer that the refiner trains
  assert sections(config) == {*config.stages, 'classifier', *template, *built}
  assert sections(get(name, variant)) == {*get(name, variant).stages, 'classifier', *built}
  assert config.is_locked


def test_the_sections_of_other_runs_networks_are_there():
  """With a teacher or a VAE of another run the sections say how its networks are built."""
  assert sections(made('digits', 'ddgan,distill')) == {'ddgan', 'distill', 'refiner', 'vae', 'classifier'}
  assert sections(made('digits', 'unconditional,z')) == {'refiner', 'vae', 'classifier'}


@pytest.mark.parametrize('variant', ['debug', 'bfloat16', 'debug,bfloat16'])
@pytest.mark.parametrize(
  'others', ['vq', 'z,distill', 'ddgan', 'adversarial,matching', 'latent_diffusion,light']
)
def test_debug_and_bfloat16_are_the_same_anywhere(variant, others):
  first, last = made('celeba256', f'{variant},{others}'), made('celeba256', f'{others},{variant}')
  for config in (first, last):
    config.name = ''
  assert first == last


def test_bfloat16_reaches_every_network_but_those_that_stay():
  config = get('digits', 'bfloat16,latent,light')
  for stage in ('autoencoder', 'decoder', 'ddgan'):
    assert config[stage].model.dtype == 'bfloat16'
  assert config.ddgan.discriminator.dtype == 'bfloat16'
  assert config.autoencoder.discriminator.dtype == config.classifier.model.dtype == 'float32'
  config = get('digits', 'bfloat16,distill,adversarial')
  assert config.refiner.model.dtype == config.distill_1.model.dtype == 'bfloat16'
  assert config.adversarial.model.dtype == config.adversarial.discriminator.dtype == 'bfloat16'


def test_a_diffusion_decoder_fits_the_tokenizer_of_its_run_in_any_order():
  for others in itertools.permutations(['divae', 'distill', 'guided']):
    config = get('digits', ','.join(others))
    assert config.stages[:2] == ('vqvae', 'refiner') and config.stages[-1] == 'distill_1'
    assert config.refiner.conditions.codes.stage == 'vqvae' and config.refiner.conditions.codes.dropout == 0.1
    assert config.refiner.diffusion.variance == config.refiner.sample.variance == 'learned'
    assert config.refiner.diffusion.condition == 'none'
  assert get('fashion_mnist', 'vqgan,divae').stages == ('vqgan', 'refiner')
  assert get('fashion_mnist', 'divae,vqgan').stages == ('vqgan', 'refiner')
  assert get('digits', 'divae_joint').stages == ('refiner',)
  assert get('digits', 'divae_warm').stages == ('vqvae', 'refiner')


@pytest.mark.parametrize('size', ['', pytest.param(',debug', marks=pytest.mark.slow)])
@pytest.mark.parametrize(
  ('name', 'factor'),
  some_slow([('digits', 2), ('fashion_mnist', 4), ('emoji64', 8), ('celeba256', 8)], 'digits', 'celeba256'),
)
def test_a_diffusion_decoder_has_the_levels_of_its_tokenizer(name, factor, size):
  config = get(name, f'divae{size}')
  model = config.refiner.model
  halvings = len(config.vqvae.model.channel_multipliers) - 1
  assert len(model.channel_multipliers) == halvings + 1 and (size or 2**halvings == factor)
  experiments.build(config, 'refiner')


def test_the_published_diffusion_decoder_has_its_size():
  config = get('celeba256', 'divae')
  experiment = experiments.build(config, 'refiner')
  shapes = jax.eval_shape(experiment.denoiser.model.init, jax.random.key(0))
  added = 9 * 64 * 1024 + 2 * 64 + (1024 + 64) * 1024 + 1024  # of 64 numbers per code, in the middle
  assert cost.num_parameters(shapes) == 296_029_190 + added


def test_variants_may_come_before_the_stage_that_they_are_about():
  for variants in itertools.permutations(['small', 'idx', 'distill']):
    config = made('fashion_mnist', ','.join(variants))
    assert config.distill.train.num_steps == 150 and config.distill.train.batch_size == 32
    assert config.vae.prior.kind == 'gmm' and config.refiner.diffusion.prediction == 'v'
    assert config.evaluate.extractors == ('classifier',)


@pytest.mark.parametrize(
  ('others', 'stages'),
  [
    (('z',), ('autoencoder', 'vae', 'refiner')),
    (('unconditional',), ('autoencoder', 'refiner')),
    (('formulation2', 'guided'), ('autoencoder', 'vae', 'refiner')),
    (('unconditional', 'light'), ('autoencoder', 'decoder', 'refiner')),
    (('unconditional', 'consistency'), ('autoencoder', 'refiner', 'consistency')),
    (('z', 'adversarial'), ('autoencoder', 'vae', 'refiner', 'adversarial')),
    (('unconditional', 'matching', 'vq'), ('autoencoder', 'refiner', 'matching')),
  ],
)
def test_latent_diffusion_goes_with_others_in_any_order(others, stages):
  for variants in itertools.permutations(['latent_diffusion', *others]):
    # `light` and `vq` are about the latents that there are; before any, they mean the denoising GAN's
    before = variants[: variants.index('latent_diffusion')]
    if 'light' in before or 'vq' in before:
      continue
    config = get('digits', ','.join(variants))
    assert config.stages == stages, variants
    assert all(config[stage].space == 'latent' for stage in stages if 'vae' in config[stage])
  assert config.refiner.autoencoder.scaling == 'std' and config.refiner.sample.clip == 'none'


def test_the_last_of_two_spaces_counts():
  assert made('digits', 'latent_diffusion,wavelet_diffusion').stages == ('vae', 'refiner')
  assert made('digits', 'wavelet_diffusion,latent_diffusion').refiner.space == 'latent'
  assert made('digits', 'ddgan,latent_diffusion').stages == ('autoencoder', 'vae', 'refiner')
  assert made('digits', 'latent_diffusion,ddgan').stages == ('ddgan',)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('variant', ['latent_diffusion', 'wavelet_diffusion', ''])
@pytest.mark.parametrize('size', ['', ',debug'])
def test_the_levels_of_the_u_net_fit_its_maps(name, variant, size):
  config = made(name, variant + size)
  side = config.data.image_size
  if variant == 'latent_diffusion':
    side >>= len(config.autoencoder.model.channel_multipliers) - 1
  elif variant:
    side >>= 1
  model = config.refiner.model
  sides = [side >> level for level in range(len(model.channel_multipliers))]
  assert side % 2 ** (len(sides) - 1) == 0 and sides[-1] >= 2
  assert model.attention_resolutions and set(model.attention_resolutions) <= set(sides)


def test_numbers_of_classes():
  known = {name: made(name).data.num_classes for name in NAMES}
  assert known == {
    **dict.fromkeys(NAMES, 0), 'digits': 10, 'fashion_mnist': 10, 'cifar10': 10, 'emoji64': 10, 'afhq256': 3,
    'shapes16': 6, 'shapes32': 6, 'shapes64': 6,
  }  # fmt: skip


def test_labels_are_a_condition_where_classes_are_known():
  for name in NAMES:
    if name in LABELLED:
      config = made(name, 'label,debug')
      assert config.refiner.conditions.label.dropout == 0.1 and config.data.num_classes == 10
    else:
      with pytest.raises(ValueError, match=f'variant label: .* {name!r} has no known classes'):
        made(name, 'label,debug')
  assert 'label' not in made('digits').refiner.conditions
  config = get('digits', 'distill,label,latent_diffusion,unconditional')
  assert config.distill_1.conditions == config.refiner.conditions and 'label' in config.refiner.conditions


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('size', ['', ',debug'])
def test_the_stages_of_a_cascade(name, size):
  """Each doubles the sides, to those of the data; the levels of its U-Net fit its images."""
  config = made(name, 'cascade' + size)
  whole = made(name).data.image_size
  sides = {
    8: (4, 8), 16: (8, 16), 32: (8, 16, 32), 64: (16, 32, 64), 128: (32, 64, 128), 256: (64, 128, 256)
  }[whole]  # fmt: skip
  assert config.stages == ('base', *(f'sr_{side}' for side in sides[1:]))
  before = ''
  for number, stage in enumerate(config.stages):
    section = config[stage]
    assert section.space_factor == 2 ** (len(sides) - 1 - number)
    side = config.data.image_size // section.space_factor
    levels = [side >> level for level in range(len(section.model.channel_multipliers))]
    assert side % 2 ** (len(levels) - 1) == 0 and levels[-1] >= 2
    assert section.model.attention_resolutions and set(section.model.attention_resolutions) <= set(levels)
    assert section.diffusion.condition == 'none'
    conditions = set(section.conditions) - {'vae'}
    assert conditions == ({'low_resolution'} if number else set())
    if number:
      assert section.conditions.low_resolution.stage == before
    before = stage
  configs.validate(config)


def test_a_cascade_goes_with_others_in_any_order():
  for variants in itertools.permutations(['cascade', 'label', 'guided']):
    config = made('emoji64', ','.join(variants))
    assert config.stages == ('base', 'sr_32', 'sr_64') and sections(config) == {*config.stages, 'classifier'}
    assert all(config[stage].conditions.label.dropout == 0.1 for stage in config.stages)
    assert config.sr_64.conditions.low_resolution.dropout == 0.1 and config.base.sample.guidance_weight == 0.5
  config = made('digits', 'guided,cascade')
  assert (config.base.sample.guidance_weight, config.sr_8.sample.guidance_weight) == (0.0, 0.5)
  for stage in config.stages:
    experiments.build(config, stage)
  assert made('digits', 'cascade,unconditional').stages == ('refiner',)
  assert made('digits', 'cascade').sr_8.train == made('digits').refiner.train
  assert made('digits', 'cascade,wavelet_diffusion').stages == ('vae', 'refiner')
  for variant in ('cascade,distill', 'wavelet_diffusion,cascade'):
    with pytest.raises(ValueError, match='variant cascade works in pixels and is not joined with students'):
      made('digits', variant)


def test_a_cascade_of_images_that_cannot_be_halved_is_refused():
  for size in (7, 4, 28, 24, 12):
    with pytest.raises(ValueError, match=f'variant cascade: .* have {size} pixels a side'):
      base.make('mine', {'image_size': size}, {}, 'cascade')
  assert base.make('mine', {'image_size': 16}, {}, 'cascade').stages == ('base', 'sr_16')


def test_what_a_data_set_says_of_one_stage_of_a_cascade_is_applied_last():
  sizes = {
    'refiner': lambda stage: stage.train.update({'num_steps': 5}),
    'sr_32': lambda stage: stage.train.update({'num_steps': 7}),
  }
  config = base.make('mine', {'image_size': 32}, sizes, 'cascade')
  assert [config[stage].train.num_steps for stage in config.stages] == [5, 5, 7]


def test_variants_that_add_a_stage():
  assert base.variants_with('distill') == ['distill'] and base.variants_with('refiner') == []
  assert {'latent', 'latent_diffusion', 'vq'} <= set(base.variants_with('autoencoder'))


@pytest.mark.parametrize('name', some_slow(NAMES, 'cifar10'))
def test_describe_at_full_size_without_data(name, capsys):
  rows = describe.describe(get(name), tuple(get(name).stages))
  assert [row['network'] for row in rows] == ['vae', 'denoiser']
  text = capsys.readouterr().out
  for row in rows:
    assert row['GMACs/image'] > 0 and f'{row["parameters"]:,}' in text
    # Adam keeps two moments and a count; the average is as large as the parameters or not kept
    assert row['optimizer MB'] == pytest.approx(2 * row['parameter MB'], rel=1e-3)
    assert row['EMA MB'] in (0.0, pytest.approx(row['parameter MB']))
  assert 'data: ' in text


@pytest.mark.parametrize(
  ('name', 'stage', 'millions'),
  some_slow([
    ('cifar10', 'vae', 9.243),
    ('celeba64', 'vae', 14.012),
    ('celebahq128', 'vae', 21.098),
    ('celeba256', 'vae', 32.633),
    ('cifar10', 'refiner', 35.75),
    ('celeba64', 'refiner', 82.64),
    ('celebahq128', 'refiner', 95.17),
    ('ffhq128', 'refiner', 87.90),
    ('celeba256', 'refiner', 113.68),
    ('afhq256', 'refiner', 113.68),
  ], 'cifar10'),
)  # fmt: skip
def test_published_parameter_counts_through_the_configs(name, stage, millions):
  experiment = experiments.build(get(name), stage)
  (model,) = experiment.networks.values()
  count = cost.num_parameters(jax.eval_shape(model.init, jax.random.key(0)))
  assert count / 1e6 == pytest.approx(millions, abs=0.006 if stage == 'refiner' else 0.0006)


@pytest.mark.parametrize(
  ('name', 'variant', 'network', 'millions', 'giga_macs'),
  some_slow([
    ('cifar10', 'ddgan', 'generator', 48.4325, '7.034'),
    ('celeba256', 'ddgan', 'generator', 39.7270, '70.41'),
    ('cifar10', 'wavelet', 'generator', 33.3701, '1.667'),
    ('celeba256', 'wavelet', 'generator', 31.4855, '28.42'),
    ('cifar10', 'latent', 'generator', 33.3297, '1.661'),
    ('celeba256', 'latent', 'generator', 48.3667, '27.20'),
    ('lsun_church256', 'latent', 'generator', 61.8582, '8.96'),
    ('cifar10', 'ddgan', 'discriminator', 12.7416, None),
    ('celeba256', 'ddgan', 'discriminator', 27.7372, None),
    ('cifar10', 'wavelet', 'discriminator', 7.6306, None),
    ('celeba256', 'latent', 'discriminator', 17.51, None),
  ],
  ('cifar10', 'ddgan', 'generator', 48.4325, '7.034'),
  ('celeba256', 'latent', 'discriminator', 17.51, None)),
)  # fmt: skip
def test_published_networks_of_the_denoising_gans(name, variant, network, millions, giga_macs):
  model = experiments.build(get(name, variant), 'ddgan').networks[network]
  params = jax.eval_shape(model.init, jax.random.key(0))
  assert cost.num_parameters(params) / 1e6 == pytest.approx(millions, abs=5e-3 if millions == 17.51 else 6e-5)
  if giga_macs:
    macs = cost.macs(lambda params, inputs: model.apply(params, *inputs), params, model.inputs)
    half_a_digit = 0.5 * 10.0 ** -len(giga_macs.split('.')[1])
    assert macs / 1e9 == pytest.approx(float(giga_macs), abs=half_a_digit)


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'variant'), OWN + [pair for pair in PAIRS if pair[0] == 'digits'])
def test_variants_are_described_at_full_size(name, variant):
  config = get(name, variant)
  configs.validate(config)
  rows = describe.describe(config, tuple(config.stages))
  assert list(dict.fromkeys(row['stage'] for row in rows)) == list(config.stages)
  assert all(row['GMACs/image'] > 0 and row['parameters'] > 0 for row in rows)


@pytest.mark.long
@pytest.mark.parametrize(('name', 'variant'), PAIRS)
def test_every_config_with_every_shared_variant_is_described_at_full_size(name, variant):
  test_variants_are_described_at_full_size(name, variant)


def run_debug(name, variant, tmp_path, tasks=('inpaint',)):
  config = get(name, variant)
  config.data.data_dir = str(tmp_path / 'data')
  for stage in config.stages:
    config[stage].train.update({'num_steps': 2, 'grid_every_steps': 2})
  configs.validate(config)
  workdir = tmp_path / 'run'
  summaries = train.run_stages(config, workdir, tuple(config.stages))
  assert [summary['steps'] for summary in summaries] == [2] * len(config.stages)
  assert all(np.isfinite(value) for summary in summaries for value in summary['last'].values())
  again = configs.read(workdir)  # the run describes itself
  assert again == config
  experiment = experiments.build(config, config.stages[-1])
  inputs = experiment.inputs
  # a stage that reads degraded images alone, or has codes, has nothing to make samples of by itself
  seen = {'degraded', 'latents', 'codes', 'codes_0'} & set(inputs)
  wanted = ['reconstructions.png'] if seen else ['samples.png', 'interpolation.png']
  if experiment.handed:  # it draws what others see
    wanted = ['samples.png']
  if not experiment.draws_images:
    wanted = []
  if 'x0_vae' in inputs:
    wanted.append('reconstructions.png')
    for task in tasks:
      again.restore.task = task
      restored = configs.Run(again, workdir, tuple(again.stages))
      last = config[config.stages[-1]]
      if last.experiment == 'ddgan' or last.space == 'latent':  # there nothing given holds in every step
        with pytest.raises(UserError, match="restore.method = 'consistent'"):
          modes.MODES['restore'](restored)
        again.restore.method = 'condition'
      modes.MODES['restore'](restored)
      wanted.append(f'restored-{task}.png')
  for file in wanted:
    with Image.open(workdir / file) as picture:
      assert np.asarray(picture).std() > 0


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_debug_trains_samples_and_restores(name, tmp_path, one_device):
  all_tasks = ('super_resolution', 'denoise', 'inpaint')
  run_debug(name, 'debug', tmp_path, all_tasks if name == 'digits' else all_tasks[:1])


@pytest.mark.slow
@pytest.mark.parametrize('variant', SHARED)
def test_debug_of_every_shared_variant(variant, tmp_path, one_device):
  run_debug('shapes16' if variant in OF_CAPTIONS else 'digits', f'{variant},debug', tmp_path)


def test_clip_comes_before_what_reads_captions_in_any_order():
  assert get('shapes16', 'clip').stages == ('clip',)
  for variants in itertools.permutations(['text', 'clip', 'unconditional']):
    config = get('shapes16', ','.join(variants))
    assert config.stages == ('clip', 'refiner'), variants
    assert config.evaluate.clip.stage == 'clip' and config.clip.text == config.refiner.text
  config = get('emoji64', 'divae,prior,text,clip')
  assert config.stages[0] == 'clip' and config.clip.text == config.prior.text
  with pytest.raises(ValueError, match="variant clip: .* has no captions, data.caption_feature is ''"):
    get('cifar10', 'clip')
  for variant in ('clip', 'text,clip', 'unclip'):
    assert get('digits', variant).data.caption_feature == 'caption'


def test_a_classifier_is_of_the_space_that_it_guides_in_any_order():
  for variants in itertools.permutations(['unconditional', 'latent_diffusion', 'classifier_guided']):
    config = get('digits', ','.join(variants))
    assert config.stages == ('autoencoder', 'noisy_classifier', 'refiner'), variants
    assert config.noisy_classifier.space == 'latent' == config.refiner.space
    assert config.noisy_classifier.autoencoder == config.refiner.autoencoder
    assert config.refiner.sample.classifier.stage == 'noisy_classifier'
  assert get('digits', 'classifier_guided,ddgan').stages == ('ddgan',)
  with pytest.raises(ValueError, match='variant classifier_guided: .*data.num_classes is 0'):
    get('celebahq128', 'classifier_guided')
