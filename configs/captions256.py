"""Text to image on a folder of images with captions, 256x256 RGB, at the sizes of latent diffusion.

    python -m vaediff.main --config=configs/captions256.py:ldm_txt2img --mode=describe
    python -m vaediff.main --config=configs/captions256.py:ldm_txt2img --config.data.path=DIR

Data: DIR with images, in subfolders or not, and one `captions.jsonl` or `metadata.csv` in DIR itself, whose
column `caption` says what they show (docs/words.md). Any size; the shorter side cropped square, then resized.
5 % of the images, in a fixed shuffled order, are held out for evaluation.

`ldm_txt2img`: latent diffusion's text to image (arXiv:2112.10752) in latents of 32x32x4: 872,300,484
parameters, and a text tower of its width and depth, trained with it. `stable_diffusion`: the network of
Stable Diffusion 1, 859,520,964 parameters, in 64x64x4 of images of 512 pixels, with a tower of the width and
depth of the one that was frozen there, trained here. Betas are those of latent diffusion's smaller networks,
to 0.0195; these two had 0.00085 .. 0.012. Without a variant it is
DiffuseVAE with the settings of CelebA-HQ.

`stable_diffusion_control`: the same, and the published control of it, 361,279,120 parameters
(docs/control.md).

`unclip`: DALL-E 2 on these images, with the published settings of its prior. `unclip_vit_h16`: its prior
alone, 24 blocks of 2,048, of a CLIP of the size of ViT-H/16. `unclip_vit_l14`: 20 blocks of 32 heads of 64,
of one of the size of ViT-L/14: 1,022 million parameters.

`clip`: CLIP of the size of ViT-B/32 on these images. `clip_vit_b32`: the published one, 151,277,313
parameters, on images of 224 pixels.

Hardware, hours and figures: not yet measured.
"""

from configs import base, gan_papers, parts, presets
from configs.stages import clip, control, diffusion, embedding_prior, text

DATA = {
  'source': 'image_folder',
  'name': 'captions256',
  'image_size': 256,
  'train_split': 'train[:95%]',
  'eval_split': 'train[95%:]',
  'caption_feature': 'caption',
  'crop': 'center',
  'resize': 'bilinear',
  'materialize': False,
  'num_threads': 16,
}
SUBWORDS = {'kind': 'subword', 'vocab_size': 30_522, 'length': 77}
TOWERS = {
  'ldm_txt2img': {'width': 1280, 'num_layers': 32, 'num_heads': 20},
  'stable_diffusion': {'width': 768, 'num_layers': 12, 'num_heads': 12},
}
"""Of words, by network of `presets.UNET`."""


def _vae(stage):
  stage.model.update(presets.VAE['celebahq256'])
  stage.train = parts.train(400_000, 64, flip=True)


def _refiner(stage):
  stage.model.update({'channel_multipliers': (1, 1, 2, 2, 4, 4), 'attention_resolutions': (16,)})
  stage.optim.learning_rate = 2e-5
  stage.train = parts.train(500_000, 64)  # captions say left and right
  stage.sample.batch_size = 16


def _text(run):
  """As the shared one, in pieces of words: of any text."""
  text.text(run, **SUBWORDS)
  if 'vae' in run.config.stages:  # its image would say what captions are to say
    diffusion.unconditional(run)


def _published(run, name):
  run.edit('autoencoder', gan_papers.kl_f8)
  diffusion.unconditional(run)
  diffusion.published_latent_diffusion(run, presets.UNET[name])
  _text(run)
  run.section('refiner').conditions.text.update({**TOWERS[name], 'how': 'transformer'})


def _txt2img(run):
  _published(run, 'ldm_txt2img')


def _stable_diffusion(run):
  run.config.data.image_size = 512
  _published(run, 'stable_diffusion')


def _stable_diffusion_control(run):
  """The published control of Stable Diffusion 1: 361,279,120 parameters, of 512x512 RGB edges."""
  _stable_diffusion(run)
  control.control(run)
  section = run.section('control')
  section.hint.update(control.PUBLISHED)
  section.control.channels = 3


def _clip(run):
  """ViT-B/32, by the tokenizer of the diffusions; alone on images of its size, with one on those of that."""
  clip.clip(run, **SUBWORDS)


def _vit_b32(run):
  """CLIP of the published sizes: 151,277,313 parameters, on images of 224 pixels."""
  run.config.data.image_size = 224
  clip.clip(run, kind='subword', vocab_size=49_408, length=77)


def _unclip(run):
  """As the shared one, by the tokenizer of the diffusions."""
  embedding_prior.unclip(run, **SUBWORDS)


def _published_prior(run, towers, prior):
  """A CLIP stage and the prior of its vectors, on images of 224 pixels."""
  run.config.data.image_size = 224
  run.edit('clip', lambda stage: stage.model.update(towers))
  run.edit('embedding_prior', lambda stage: stage.model.update(prior))
  run.only('clip', 'embedding_prior')


def _vit_h16(run):
  _published_prior(run, presets.CLIP['vit_h16'], presets.EMBEDDING_PRIOR['dalle2'])


def _vit_l14(run):
  _published_prior(run, presets.CLIP['vit_l14'], presets.EMBEDDING_PRIOR['20x2048'])


SIZES = {'vae': _vae, 'refiner': _refiner}
OWN = {
  'text': _text,
  'ldm_txt2img': _txt2img,
  'stable_diffusion': _stable_diffusion,
  'stable_diffusion_control': _stable_diffusion_control,
  'clip': _clip,
  'clip_vit_b32': _vit_b32,
  'unclip': _unclip,
  'unclip_vit_h16': _vit_h16,
  'unclip_vit_l14': _vit_l14,
}


def get_config(variant: str = ''):
  return base.make('captions256', DATA, SIZES, variant, own=OWN)
