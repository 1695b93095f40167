"""Network sizes of the papers: DiffuseVAE's block strings, U-Nets, and transformers.

DiffuseVAE (arXiv:2201.00308), of its official configuration files; Improved DDPM, ADM and latent diffusion.
Block grammar: `RxN` N residual blocks at resolution R; `RdK` one block, then average pooling by K; `RuK`
nearest upsampling by K; `AtB` 1x1 convolution from the width of A to the width of B.
"""


def vae(encoder: str, decoder: str, channels: str, latent_dim: int) -> dict:
  return {
    'encoder_blocks': encoder,
    'decoder_blocks': decoder,
    'encoder_channels': channels,
    'decoder_channels': channels,
    'latent_dim': latent_dim,
  }


_VAE_128 = vae(
  '128x1,128d2,128t64,64x3,64d2,64t32,32x3,32d2,32t16,16x7,16d2,16t8,8x3,8d2,8t4,4x3,4d4,4t1,1x2',
  '1x1,1u4,1t4,4x2,4u2,4t8,8x2,8u2,8t16,16x6,16u2,16t32,32x2,32u2,32t64,64x2,64u2,64t128,128x1',
  '128:64,64:64,32:128,16:128,8:256,4:512,1:1024',
  1024,
)
_VAE_256 = vae(
  '256x3,256d2,256t128,128x3,128d2,128t64,64x5,64d2,64t32,32x7,32d2,32t16,16x9,16d2,16t8,8x7,8d2,8t4,'
  '4x5,4d4,4t1,1x2',
  '1x2,1u4,1t4,4x4,4u2,4t8,8x6,8u2,8t16,16x8,16u2,16t32,32x5,32u2,32t64,64x4,64u2,64t128,128x2,128u2,'
  '128t256,256x2',
  '256:64,128:64,64:64,32:128,16:128,8:256,4:512,1:1024',
  1024,
)

VAE = {
  'cifar10': vae(
    '32x7,32d2,32t16,16x4,16d2,16t8,8x4,8d2,8t4,4x3,4d4,4t1,1x3',
    '1x1,1u4,1t4,4x2,4u2,4t8,8x3,8u2,8t16,16x7,16u2,16t32,32x15',
    '32:64,16:128,8:256,4:256,1:512',
    512,
  ),
  'celeba64': vae(
    '64x7,64d2,64t32,32x4,32d2,32t16,16x7,16d2,16t8,8x3,8d2,8t4,4x3,4d4,4t1,1x2',
    '1x1,1u4,1t4,4x2,4u2,4t8,8x3,8u2,8t16,16x7,16u2,16t32,32x8,32u2,32t64,64x10',
    '64:64,32:128,16:256,8:256,4:256,1:512',
    512,
  ),
  'celebamaskhq128': _VAE_128,
  'ffhq128': _VAE_128,
  'celebahq256': _VAE_256,
  'afhq256': _VAE_256,
}


def unet(channels: int, multipliers: tuple, num_res_blocks: int, attention: tuple, **more) -> dict:
  return {
    'variant': 'openai',
    'channels': channels,
    'channel_multipliers': multipliers,
    'num_res_blocks': num_res_blocks,
    'attention_resolutions': attention,
    'dropout': 0.0,
    **more,
  }


def _iddpm(channels: int, multipliers: tuple, num_res_blocks: int, attention=(16, 8), **more) -> dict:
  """Improved DDPM (arXiv:2102.09672), with the flags of its repository."""
  own = {'num_heads': 4, 'scale_shift_norm': True, **more}
  return unet(channels, multipliers, num_res_blocks, attention, **own)


def _adm(channels: int, multipliers: tuple, num_res_blocks: int, attention=(32, 16, 8), **more) -> dict:
  """ADM (arXiv:2105.05233), with the flags of its repository."""
  own = {'num_heads': 4, 'head_channels': 64, 'scale_shift_norm': True, 'resblock_updown': True, **more}
  return unet(channels, multipliers, num_res_blocks, attention, **own)


UNET = {
  # with diffusion.variance = 'learned'
  'iddpm_cifar10': _iddpm(128, (1, 2, 2, 2), 3, dropout=0.3),
  'iddpm_imagenet64': _iddpm(128, (1, 2, 3, 4), 3),
  'iddpm_imagenet64_class': _iddpm(192, (1, 2, 3, 4), 3),
  'iddpm_upsampler_64_256': _iddpm(192, (1, 1, 2, 2, 4, 4), 2),
  'iddpm_lsun256': _iddpm(128, (1, 1, 2, 2, 4, 4), 2, (16,), num_heads=1, scale_shift_norm=False),
  'adm64': _adm(192, (1, 2, 3, 4), 3, dropout=0.1),
  'adm128': _adm(256, (1, 1, 2, 3, 4), 2, head_channels=0),
  'adm256': _adm(256, (1, 1, 2, 2, 4, 4), 2),
  'adm512': _adm(256, (0.5, 1, 1, 2, 2, 4, 4), 2),
  'adm_upsampler_64_256': _adm(192, (1, 1, 2, 2, 4, 4), 2, head_channels=0),
  # 302.88 M; with the multipliers (1, 1, 2, 2, 4, 4) of today's repository it has 308.84 M
  'adm_upsampler_128_512': _adm(192, (0.5, 1, 1, 2, 2, 4, 4), 2, (32, 16)),
  # DiVAE (arXiv:2206.00386) of codes 16 and 8 times smaller than the image, before what joins them
  'divae_f16': _adm(256, (1, 1, 2, 2, 4), 2, (32, 16)),
  'divae_f8': _adm(256, (1, 1, 2, 4), 2, (32,)),
  # of latents, with a fixed variance: latent diffusion (arXiv:2112.10752)
  'ldm_celeba256': unet(224, (1, 2, 3, 4), 2, (32, 16, 8), head_channels=32),
  # ... with a text or, in its place, one token of a class: conditions.text.how = 'transformer'
  'ldm_txt2img': unet(320, (1, 2, 4, 4), 2, (32, 16, 8), num_heads=8),
  'ldm_imagenet256': unet(192, (1, 2, 3, 5), 2, (32, 16, 8), head_channels=32),
  'stable_diffusion': unet(320, (1, 2, 4, 4), 2, (64, 32, 16), num_heads=8),
  'ldm_lsun_church256': unet(
    192, (1, 2, 2, 4, 4), 2, (32, 16, 8, 4), num_heads=8, scale_shift_norm=True, resblock_updown=True
  ),
}
"""Fields of `config.refiner.model`; those with a half as multiplier are for `models.unet.UNet` itself."""


def _prior(style: str, width: int, num_layers: int, num_heads: int) -> dict:
  return {'style': style, 'width': width, 'num_layers': num_layers, 'num_heads': num_heads}


PRIOR = {
  'taming_1024x24': _prior('gpt', 1024, 24, 16),
  'taming_1408x40': _prior('gpt', 1408, 40, 16),
  'taming_1536x36': _prior('gpt', 1536, 36, 16),
  'taming_1536x48': _prior('gpt', 1536, 48, 24),
  'llamagen_b': _prior('llama', 768, 12, 12),
  'llamagen_l': _prior('llama', 1024, 24, 16),
  'llamagen_xl': _prior('llama', 1280, 36, 20),
  'llamagen_xxl': _prior('llama', 1536, 48, 24),
  'llamagen_3b': _prior('llama', 3200, 24, 32),
}
"""Fields of `config.prior.model`: transformers of taming-transformers and of LlamaGen."""


def _clip(patch: int, embedding_size: int, image: tuple[int, int, int], text: tuple[int, int, int]) -> dict:
  names = ('width', 'num_layers', 'num_heads')
  towers = {'image': dict(zip(names, image, strict=True)), 'text': dict(zip(names, text, strict=True))}
  return {'patch': patch, 'embedding_size': embedding_size, **towers}


CLIP = {
  'vit_l14': _clip(14, 768, (1024, 24, 16), (768, 12, 12)),
  # of images DALL-E 2's, with a causal text tower of 24 blocks of 1024
  'vit_h16': _clip(16, 1024, (1280, 32, 16), (1024, 24, 16)),
}
"""Fields of `config.clip.model`: towers of images and of words."""
EMBEDDING_PRIOR = {
  'dalle2': {'width': 2048, 'num_layers': 24, 'num_heads': 32},
  '20x2048': {'width': 2048, 'num_layers': 20, 'num_heads': 32},  # 32 heads of 64 numbers
}
"""Fields of `config.embedding_prior.model`."""


def tiny_vae(image_size: int) -> dict:
  """A VAE of a few thousand parameters for `debug`, for image sizes 8 and 16."""
  sizes = {
    8: ('8x1,8d2,8t4,4d4,4t1,1x1', '1x1,1u4,1t4,4u2,4t8,8x1', '8:8,4:8,1:16'),
    16: ('16x1,16d4,16t4,4d4,4t1,1x1', '1x1,1u4,1t4,4u4,4t16,16x1', '16:8,4:8,1:16'),
  }
  return vae(*sizes[image_size], 16)
