"""One file per experiment: its section with every key, its debug size, and the variants that are about it."""

from configs.stages import (
  adversarial_distillation,
  autoencoder,
  cascade,
  classifier,
  clip,
  consistency,
  control,
  ddgan,
  diffusion,
  distribution_matching,
  divae,
  dvae,
  embedding_prior,
  light_decoder,
  noisy_classifier,
  prior,
  progressive,
  text,
  vae,
  vqgan,
  vqvae,
  vqvae2,
)

BY_NAME = {
  'vae': vae,
  'refiner': diffusion,
  'autoencoder': autoencoder,
  'decoder': light_decoder,
  'vqvae2': vqvae2,
  'ddgan': ddgan,
  'distill': progressive,
  'consistency': consistency,
  'adversarial': adversarial_distillation,
  'matching': distribution_matching,
  **dict.fromkeys(cascade.STAGES, cascade),
  'noisy_classifier': noisy_classifier,
  'vqvae': vqvae,
  'prior': prior,
  'vqgan': vqgan,
  'dvae': dvae,
  'clip': clip,
  **dict.fromkeys(control.STAGES, control),
  'embedding_prior': embedding_prior,
}
"""The file of each stage; names are those of `config.stages`."""
VARIANTS = {
  name: variant
  for module in (*BY_NAME.values(), classifier, divae, text)
  for name, variant in module.VARIANTS.items()
}
"""Those that every config shares, but for `bfloat16` and `debug`."""
