"""Network sizes of the papers: DiffuseVAE's block strings (arXiv:2201.00308, official configuration files).

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


def tiny_vae(image_size: int) -> dict:
  """A VAE of a few thousand parameters for `debug`, for image sizes 8 and 16."""
  sizes = {
    8: ('8x1,8d2,8t4,4d4,4t1,1x1', '1x1,1u4,1t4,4u2,4t8,8x1', '8:8,4:8,1:16'),
    16: ('16x1,16d4,16t4,4d4,4t1,1x1', '1x1,1u4,1t4,4u4,4t16,16x1', '16:8,4:8,1:16'),
  }
  return vae(*sizes[image_size], 16)
