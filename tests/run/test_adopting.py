"""What an import decides and refuses."""

import pathlib
import shutil

import numpy as np
import published
import pytest
import torch_files

from vaediff import experiments
from vaediff.errors import UserError
from vaediff.modes import adopt
from vaediff.run import adopting, students
from vaediff.run.config import Run
from vaediff.run.published import exported, gan
from vaediff.run.published.diffusevae import named_condition
from vaediff.weights import state_dicts

UNET = 'diffusevae_unet_ddim/small_cond'


def planned(name, path=None, **changes):
  config = published.config_of(name, path, **changes)
  return adopting.planned(config, tuple(config.stages))


def file_named(path):
  """Returns a file of which nothing matters but its name."""
  return state_dicts.StateDict(
    path=pathlib.Path(path),
    layout='plain',
    shapes={},
    settings={},
    step=0,
    unread=(),
    source=None,
    tensors={},
  )


def assumed(plan, stage):
  return {line['what']: (line['value'], line['from']) for line in plan.records[stage]['assumed']}


def test_what_is_not_in_the_file_is_said():
  plan = published.planned(published.STAGE2)
  found = assumed(plan, 'refiner')
  assert found['model.num_heads'] == (2, 'config.adopt.num_heads')
  assert found['model.attention_resolutions'][0] == (8,)
  assert found['diffusion.condition'] == ('formulation1', 'the config')
  assert found['sample.recompute_eps'][0] is False and not plan.config.refiner.sample.recompute_eps
  (source,) = plan.records['refiner']['sources']
  assert source['repository'] == 'kpandey008/DiffuseVAE' and source['licence'] == 'MIT'
  assert source['file'] == 'diffusevae_stage2_lightning14.pt' and len(source['sha256']) == 64
  assert plan.config.adopt.path == ''


@pytest.mark.slow
def test_content_has_both_players_and_says_how_it_was_made():
  plan = published.planned('ddgan_content/content')
  model = plan.config.ddgan.model
  assert (model.channels, model.channel_multipliers, model.latent_dim, model.mapping_dim) == (
    8,
    (1, 2),
    10,
    16,
  )
  assert plan.config.ddgan.discriminator.group_order == 'strided'
  assert plan.records['ddgan']['fresh'] == [] and plan.steps == {'ddgan': 3}
  found = assumed(plan, 'ddgan')
  assert found['model.bounded'] == (True, 'arguments in the file')
  assert plan.config.ddgan.optim.schedule == 'constant'


def test_groups_of_a_discriminator_are_as_published():
  plan = planned('ddgan_content/content', **{'ddgan.discriminator.group_size': 2})
  assert plan.config.ddgan.discriminator.group_size == 4
  said = (4, 'as published; the config said 2')
  assert assumed(plan, 'ddgan')['discriminator.group_size'] == said


@pytest.mark.slow
def test_images_are_as_large_as_the_arguments_in_the_file_say():
  name = 'ddgan_content/content'
  assert planned(name, **{'data.image_size': 16}).config.data.image_size == 8
  with pytest.raises(UserError, match=r'network for images of 8 pixels .* data.image_size = 16'):
    planned(name, **{'data.image_size': 16, 'adopt.sizes': 'config'})


@pytest.mark.slow
def test_raw_weights_are_sampled_where_they_are_asked_for():
  plan = planned('ddgan_content/content', **{'adopt.weights': 'raw'})
  raw = published.flat(published.planned('ddgan_content/content').networks['ddgan']['generator'].params)
  found = published.flat(plan.networks['ddgan']['generator'].average)
  for path, value in raw.items():
    np.testing.assert_array_equal(found[path], value)


@pytest.mark.slow
def test_students_get_what_their_teacher_got_of_the_file():
  config = students.resolve(published.config_of(UNET, more='distill'))
  plan = adopting.planned(config, tuple(config.stages))
  taught = [stage for stage in plan.config.stages if 'teacher' in plan.config[stage]]
  assert len(taught) > 1 and list(plan.experiments) == ['refiner']
  fields = ('channels', 'channel_multipliers', 'attention_resolutions', 'num_heads', 'variant')
  for stage in taught:
    for field in fields:
      assert plan.config[stage].model[field] == plan.config.refiner.model[field]
    experiments.build(plan.config, stage)
  assert plan.config.refiner.model.channels == 16 != config.refiner.model.channels


@pytest.mark.parametrize(
  ('name', 'says'),
  [
    ('ddpmv2-cifar10_rework_form1_12thJuly_sota_nheads=8_dropout=0.3-epoch=2000.ckpt', 'formulation1'),
    ('diffvae_chq256_form2_loss=0.0361.ckpt', 'formulation2'),
    ('ddpmv2-cifar10_rework_uncond_x.ckpt', 'none'),
    ('transform1.ckpt', ''),
    ('form1_form2.ckpt', ''),
  ],
)
def test_names_of_files(tmp_path, name, says):
  assert named_condition(file_named(tmp_path / name)) == says


# Files that do not fit ------------------------------------------------------------------------------


@pytest.fixture
def changed(tmp_path):
  """Returns changed(name, edit) -> a file with the tensors of a fixture after edit(tensors)."""

  def changed(name, edit, file='x.pt'):
    found = published.tensors_of(published.file_of(name))
    edit(found)
    torch_files.write(tmp_path / file, {'state_dict': found})
    return tmp_path / file

  return changed


def renamed(found):
  found['temb.dense.7.weight'] = found.pop('temb.dense.1.weight')


def reshaped(found):
  found['conv_out.bias'] = np.zeros(5, np.float32)


@pytest.mark.parametrize(
  ('edit', 'message'),
  [
    (
      renamed,
      r"holds DiffuseVAE's U-Net 'ddim' that does not fit config.refiner: temb.dense.1.weight is missing",
    ),
    (reshaped, r'conv_out.bias has shape \(5,\), and \(3,\) is expected'),
    (lambda found: found.pop('mid.attn_1.k.bias'), r'mid.attn_1.k.bias is missing. Name the config'),
    (lambda found: found.update(extra=np.ones(2)), r'holds extra, which no network here has a place for'),
    (lambda found: found.pop('conv_in.weight'), r'holds no network that has a place here. Known are: Diff'),
    (lambda found: found.update({'label_emb.weight': np.ones(2)}), 'is of a class-conditional U-Net'),
  ],
)
def test_a_tensor_that_is_missing_or_another_is_named(changed, edit, message):
  with pytest.raises(UserError, match=message):
    planned(UNET, changed(UNET, edit))


@pytest.mark.parametrize(
  ('name', 'changes', 'message'),
  [
    (UNET, {'adopt.sizes': 'config'}, 'network with model.channels = 16, and config.refiner.model.channels'),
    (published.STAGE1, {'adopt.sizes': 'config'}, "model.encoder_blocks = '16x1,16d2,16t8"),
    (UNET, {'adopt.check_groups': True}, 'a group norm of 16 channels. The published code always has 32'),
    (UNET, {'refiner.diffusion.condition': 'none'}, 'x_t and the image of a VAE, .* variant formulation1'),
    (UNET, {'refiner.diffusion.prediction': 'v'}, "prediction is 'v'; the published networks have 'eps'"),
    (UNET, {'refiner.vae.workdir': ''}, "reads stage 'vae', which no file fills: name its file too"),
    (UNET, {'stages': ('vae',)}, "U-Net 'ddim'; the stages vae have no such network"),
    ('ddgan_content/content', {'ddgan.space': 'wavelet'}, 'reads 3 channels and gives 3; .* maps have 12'),
    (UNET, {'adopt.path': ''}, '--mode=import needs the file to import: --config.adopt.path'),
  ],
)  # fmt: skip
def test_a_config_that_is_another_is_refused(name, changes, message):
  with pytest.raises(UserError, match=message):
    planned(name, **changes)


@pytest.mark.slow
def test_a_name_that_contradicts_the_config_is_refused(tmp_path):
  path = shutil.copy(published.file_of(UNET), tmp_path / 'ddpm_form2_nheads=2.pt')
  with pytest.raises(UserError, match=r"says 'formulation2' by its name, and .*condition is 'formulation1'"):
    planned(UNET, path)
  changes = {'adopt.formulation': 'formulation1', 'adopt.num_heads': 0, 'refiner.model.num_heads': 4}
  plan = planned(UNET, path, **changes)
  assert plan.config.refiner.diffusion.condition == 'formulation1'
  assert assumed(plan, 'refiner')['model.num_heads'] == (2, "the file's name; the config said 4")


def test_the_cifar_files_of_lddgan_are_recognised(changed):
  config = published.config_of('ddgan_content/content', **{'data.image_size': 256})
  fields = {'latent_dim': 50, 'inputs': 4, 'channels': 128, 'channel_multipliers': (1, 2, 2)}
  with pytest.raises(UserError, match="is LDDGAN's generator of CIFAR-10 .* 256 pixels. The links of its"):
    gan.check_mislink(file_named('netG_950.pth'), config, fields)
  gan.check_mislink(file_named('x.pth'), config, {**fields, 'latent_dim': 100})


@pytest.mark.parametrize(
  ('name', 'size', 'order'),
  [
    ('cifar10', 32, 'pytorch_wavelets'),
    ('celeb_a_hq/256', 256, 'wavecnet'),
    ('celeb_a_hq/512', 512, 'pytorch_wavelets'),
    ('lsun/church_outdoor', 256, 'pytorch_wavelets'),
  ],
)
def test_the_published_order_of_bands(name, size, order):
  config = published.config_of('ddgan_content/content', **{'data.image_size': size, 'data.name': name})
  assert gan.published_order(config) == order


def test_a_mistake_leaves_no_folder_and_a_run_is_not_written_over(tmp_path):
  config, workdir = published.config_of(UNET, published.file_of(published.STAGE1)), tmp_path / 'run'
  config.adopt.sizes = 'config'
  with pytest.raises(UserError, match='model.encoder_blocks'):
    adopt.mode(Run(config, workdir, tuple(config.stages)))
  assert not list(tmp_path.iterdir())
  workdir.mkdir()
  (workdir / 'config.json').write_text('{}')
  with pytest.raises(UserError, match=r'is not empty: an import makes a new run'):
    adopt.mode(Run(config, workdir, tuple(config.stages)))
  assert (workdir / 'config.json').read_text() == '{}'


# Autoencoders ---------------------------------------------------------------------------------------

VQ = 'ldm_autoencoder_vq/vq'


def params_of(plan):
  return published.flat(plan.networks['autoencoder']['autoencoder'].average)


def test_an_autoencoder_without_attention_in_the_middle_adds_zeros_there(changed):
  def without(found):
    for name in [name for name in found if '.mid.attn_1.' in name]:
      del found[name]

  path = changed(VQ, without)
  plan = planned(VQ, path)
  params = params_of(plan)
  for half in ('encoder', 'decoder/body'):
    assert np.all(params[f'{half}/middle/attn/norm/scale'] == 1)
    assert not any(np.any(params[f'{half}/middle/attn/{part}/kernel']) for part in ('query', 'out'))
  family = exported.family_of(plan.config, 'autoencoder', 'autoencoder')
  made = exported.official(plan.config, 'autoencoder', family, params)
  assert set(made) == set(published.tensors_of(path))


def test_codes_are_compared_as_published_and_none_of_length_1_are_exported():
  plan = planned(VQ, **{'autoencoder.model.normalized_codes': True})
  assert not plan.config.autoencoder.model.normalized_codes
  said = (False, 'as published; the config said True')
  assert assumed(plan, 'autoencoder')['model.normalized_codes'] == said
  family = exported.family_of(plan.config, 'autoencoder', 'autoencoder')
  plan.config.autoencoder.model.normalized_codes = True
  message = r"autoencoder.model.normalized_codes is True: .* takes them as they are .*names = 'vaediff'"
  with pytest.raises(UserError, match=message):
    exported.official(plan.config, 'autoencoder', family, params_of(plan))


@pytest.mark.parametrize(
  ('name', 'stage', 'network'), [(UNET, 'refiner', 'denoiser'), (VQ, 'autoencoder', 'autoencoder')]
)
def test_narrow_networks_are_not_exported_under_published_names(name, stage, network):
  """As an import refuses them; one of the groups of this package can be, where that is said."""
  plan = planned(name)
  family, params = exported.family_of(plan.config, stage, network), plan.networks[stage][network].average
  assert exported.official(plan.config, stage, family, published.flat(params))
  plan.config.adopt.check_groups = True
  message = (
    rf'config.{stage}.model.channels is 16, .* group norm of 16 channels. .* 32 from 128 channels on, '
    r".*config.export.names = 'vaediff'; .*--config.adopt.check_groups=False"
  )
  with pytest.raises(UserError, match=message):
    exported.official(plan.config, stage, family, published.flat(params))


@pytest.mark.slow
def test_an_autoencoder_inside_a_latent_diffusion_model(changed):
  def inside(found):
    for name in list(found):
      found[f'first_stage_model.{name}'] = found.pop(name)
    found |= {
      'model.diffusion_model.out.weight': np.ones(2),
      'betas': np.ones(3),
      'scale_factor': np.ones(()),
    }

  params, wanted = params_of(planned(VQ, changed(VQ, inside))), params_of(published.planned(VQ))
  for path, value in wanted.items():
    np.testing.assert_array_equal(params[path], value)


@pytest.mark.slow
def test_the_average_of_an_autoencoder_is_what_is_kept(changed):
  def averaged(found):
    for name in list(found):
      found[f'model_ema.{name.replace(".", "")}'] = found[name] + 1
    found |= {'model_ema.decay': np.ones(()), 'loss.logvar': np.ones(())}

  plan = planned(VQ, changed(VQ, averaged))
  params, before = params_of(plan), params_of(published.planned(VQ))
  for path, value in before.items():
    np.testing.assert_allclose(params[path], value + 1, rtol=1e-6)
  assert plan.config.autoencoder.loss.codebook == 'gradient'
