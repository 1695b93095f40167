"""The U-Net against a second implementation: NumPy, float64, one head and one tap at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from some_slow import some_slow

from vaediff.models.functional import Model
from vaediff.models.ports import Port
from vaediff.models.unet import UNet

SIZE, WIDTH, HEADS, MULTIPLIERS, BLOCKS, ATTENTION = 8, 64, 2, (1, 2, 1), 2, (4,)


def silu(x):
  return x / (1.0 + np.exp(-x))


def conv(layer, x, padding=(1, 1), stride=1):
  kernel = layer['kernel']
  if kernel.ndim == 2:
    return x @ kernel + layer['bias']
  x = np.pad(x, ((0, 0), padding, padding, (0, 0)))
  rows = range(0, x.shape[1] - 2, stride)
  columns = range(0, x.shape[2] - 2, stride)
  y = np.zeros((x.shape[0], len(rows), len(columns), kernel.shape[3]))
  for a, i in enumerate(rows):
    for b, j in enumerate(columns):
      y[:, a, b] = np.tensordot(x[:, i : i + 3, j : j + 3], kernel, axes=3)
  return y + layer['bias']


def norm(layer, x, epsilon):
  channels = x.shape[3]
  size = max(4, channels // 32)
  y = np.empty_like(x)
  for first in range(0, channels, size):
    group = x[..., first : first + size]
    mean = group.mean(axis=(1, 2, 3), keepdims=True)
    deviation = np.sqrt(group.var(axis=(1, 2, 3), keepdims=True) + epsilon)
    y[..., first : first + size] = (group - mean) / deviation
  return y * layer['scale'] + layer['bias']


def residual(p, x, emb, epsilon, film):
  h = conv(p['conv_1'], silu(norm(p['norm_1'], x, epsilon)))
  e = conv(p['emb'], silu(emb))[:, None, None]
  if film:
    half = e.shape[-1] // 2
    h = norm(p['norm_2'], h, epsilon) * (1 + e[..., :half]) + e[..., half:]
  else:
    h = norm(p['norm_2'], h + e, epsilon)
  h = conv(p['conv_2'], silu(h))
  return h + (conv(p['skip'], x) if 'skip' in p else x)


def attention(p, x, epsilon, openai):
  batch, height, width, channels = x.shape
  per_head = channels // HEADS
  h = norm(p['norm'], x, epsilon).reshape(batch, -1, channels)
  gathered = np.empty_like(h)
  for head in range(HEADS):
    own = slice(head * per_head, (head + 1) * per_head)
    if openai:
      start = 3 * per_head * head
      qkv = conv(p['qkv'], h)[..., start : start + 3 * per_head]
      q, k, v = np.split(qkv, 3, axis=-1)
      logits = np.einsum('nqc,nkc->nqk', q / per_head**0.25, k / per_head**0.25)
    else:
      q, k, v = (conv(p[name], h)[..., own] for name in ('query', 'key', 'value'))
      logits = np.einsum('nqc,nkc->nqk', q, k) / np.sqrt(channels)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    gathered[..., own] = weights / weights.sum(axis=-1, keepdims=True) @ v
  return x + conv(p['out'], gathered).reshape(x.shape)


def unet(p, x_t, t, x0_vae, z, openai, film):
  epsilon = 1e-5 if openai else 1e-6
  half = WIDTH // 2
  frequencies = 10_000.0 ** (-np.arange(half) / (half if openai else half - 1))
  angles = (1000.0 * t - 1.0)[:, None] * frequencies
  sin, cos = np.sin(angles), np.cos(angles)
  emb = np.concatenate([cos, sin] if openai else [sin, cos], axis=1)
  emb = conv(p['time_mlp']['dense_1'], silu(conv(p['time_mlp']['dense_0'], emb)))
  emb = emb + conv(p['z_mlp']['dense_1'], silu(conv(p['z_mlp']['dense_0'], z)))

  stack = [conv(p['conv_in'], np.concatenate([x_t, x0_vae], axis=3))]
  size = SIZE
  for level in range(len(MULTIPLIERS)):
    q = p[f'down_{level}']
    for i in range(BLOCKS):
      h = residual(q[f'res_{i}'], stack[-1], emb, epsilon, film)
      if size in ATTENTION:
        h = attention(q[f'attn_{i}'], h, epsilon, openai)
      stack.append(h)
    if level < len(MULTIPLIERS) - 1:
      stack.append(conv(q['down'], stack[-1], padding=(1, 1) if openai else (0, 1), stride=2))
      size //= 2
  q = p['middle']
  h = residual(q['res_0'], stack[-1], emb, epsilon, film)
  h = residual(q['res_1'], attention(q['attn'], h, epsilon, openai), emb, epsilon, film)
  for level in reversed(range(len(MULTIPLIERS))):
    q = p[f'up_{level}']
    for i in range(BLOCKS + 1):
      h = np.concatenate([h, stack.pop()], axis=3)
      h = residual(q[f'res_{i}'], h, emb, epsilon, film)
      if size in ATTENTION:
        h = attention(q[f'attn_{i}'], h, epsilon, openai)
    if level > 0:
      h = conv(q['up'], h.repeat(2, axis=1).repeat(2, axis=2))
      size *= 2
  assert not stack
  return conv(p['conv_out'], silu(norm(p['norm_out'], h, epsilon)))


@pytest.mark.parametrize(('variant', 'film'), some_slow([('openai', True), ('ddim', False)], 'openai'))
def test_the_network_is_the_published_one(variant, film):
  module = UNet(
    variant=variant,
    image_size=SIZE,
    image_channels=2,
    channels=WIDTH,
    channel_multipliers=MULTIPLIERS,
    num_res_blocks=BLOCKS,
    attention_resolutions=ATTENTION,
    num_heads=HEADS,
    dropout=0.5,
    scale_shift_norm=film,
    remat=False,
    dtype='float32',
    ports=(
      ('x0_vae', Port(enters='concat', shape=(SIZE, SIZE, 2))),
      ('z', Port(enters='vector', shape=(3,))),
    ),
  )
  rng = np.random.default_rng(0)
  inputs = (
    rng.normal(size=(2, SIZE, SIZE, 2)),
    np.array([0.001, 0.7]),
    rng.normal(size=(2, SIZE, SIZE, 2)),
    rng.normal(size=(2, 3)),
  )
  x_t, t, x0_vae, z = (jnp.float32(x) for x in inputs)
  arrays = (x_t, t, {'x0_vae': x0_vae, 'z': z})
  inputs_like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
  model = Model(module=module, inputs=inputs_like)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  # Every parameter counts: none is left at the zeros or ones of its initialisation.
  params = jax.tree.map(lambda leaf: jnp.float32(0.1 * rng.normal(size=leaf.shape)), shapes)
  actual = jax.jit(model.apply)(params, *arrays)
  double = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  expected = unet(double, *inputs, openai=variant == 'openai', film=film)
  assert np.abs(expected).max() > 0.1
  np.testing.assert_allclose(actual, expected, atol=2e-5 * np.abs(expected).max())
