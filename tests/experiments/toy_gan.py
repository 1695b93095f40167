"""The denoising GAN on 25 Gaussians in the plane: the stage's own train step, with small MLPs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from vaediff.conditions import Conditions
from vaediff.diffusion import few_steps
from vaediff.experiments import base
from vaediff.experiments.ddgan import Ddgan
from vaediff.models.functional import Model
from vaediff.optim import Optimizer
from vaediff.spaces.pixels import Pixels

MODES = np.array(list(itertools.product(np.linspace(-0.8, 0.8, 5), repeat=2)))
STD = 0.03


class Magnified(Pixels):
  """Four times the pixels, so that a step's noise is of the size of the distance between modes."""

  def encode(self, read, x, key):
    return 4 * x

  def decode_map(self, read, y):
    return y / 4


def data(seed: int, count: int) -> np.ndarray:
  """Returns points of the mixture as images of one pixel with two channels, uint8."""
  rng = np.random.default_rng(seed)
  x = MODES[rng.integers(len(MODES), size=count)] + STD * rng.standard_normal((count, 2))
  return np.round((x + 1) * 127.5).clip(0, 255).astype(np.uint8).reshape(count, 1, 1, 2)


class Mlp(nn.Module):
  """Four layers on all inputs; `size` outputs, as a map of one pixel or, for size 0, as logits."""

  size: int
  width: int = 128

  @nn.compact
  def __call__(self, x, t, other, condition=None, *, deterministic=True):
    time = jax.nn.one_hot(t.astype(jnp.int32), 8)
    h = jnp.concatenate([x.reshape(len(x), -1), other.reshape(len(x), -1), time], axis=-1)
    for k in range(3):
      h = nn.leaky_relu(nn.Dense(self.width, name=f'hidden_{k}')(h), 0.2)
    out = nn.Dense(self.size or 1, name='out')(h)
    return out.reshape(-1, 1, 1, self.size) if self.size else out[:, 0]


def make(num_steps: int, **changes) -> Ddgan:
  """Returns the stage with `num_steps` steps of diffusion."""
  point, time = jax.ShapeDtypeStruct((1, 1, 1, 2), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
  judge = Model(module=Mlp(size=0), inputs=(point, time, point, None))
  adam = optax.adam(3e-4, b1=0.5, b2=0.9)
  settings = {
    'generator': Model(
      module=Mlp(size=2), inputs=(point, time, jax.ShapeDtypeStruct((1, 8), jnp.float32), None)
    ),
    'discriminator': judge,
    'discriminator_float32': judge,
    'optimizer': Optimizer(transform=adam, ema_decay=0.99, ema_warmup=False),
    'optimizer_discriminator': Optimizer(transform=adam, ema_decay=0.0, ema_warmup=False),
    'space': Magnified(shape=(1, 1, 2)),
    'conditions': Conditions(),
    'steps': few_steps.make_steps(num_steps),
    'noise_dim': 8,
    'loss': {'r1_gamma': 0.05, 'r1_every_steps': 4, 'reconstruction': 'none'},
    'num_updates': 1000,
    'flip': False,
    'microbatches': 1,
    'title': 'toy',
  }
  return Ddgan(**{**settings, **changes})


def stable(num_steps: int, num_updates: int) -> Ddgan:
  """Returns the stage with a stable recipe: R1 in every update, no momentum, falling rates."""
  rate = optax.cosine_decay_schedule(1e-3, num_updates, 0.05)
  adam = optax.adam(rate, b1=0.0, b2=0.9)
  return make(
    num_steps,
    loss={'r1_gamma': 0.05, 'r1_every_steps': 1, 'reconstruction': 'none'},
    optimizer=Optimizer(transform=adam, ema_decay=0.995, ema_warmup=False),
    optimizer_discriminator=Optimizer(transform=adam, ema_decay=0.0, ema_warmup=False),
    num_updates=num_updates,
  )


def train(experiment: Ddgan, num_updates: int, batch_size: int, seed: int):
  """Returns the state after so many updates on fresh points; the host chooses the kind of each."""
  images = jnp.asarray(data(seed, 50_000))

  @jax.jit
  def several(state, key):  # one regularised update, then the others, as the loop's host would choose
    for k in range(experiment.loss['r1_every_steps']):
      inner = jax.random.fold_in(key, state.step)
      rows = jax.random.randint(jax.random.fold_in(inner, 1), (batch_size,), 0, len(images))
      kind = experiment.kind_of(k)
      batch = {'image': images[rows]}
      state, _ = experiment.train_step(state, {}, batch, jax.random.fold_in(inner, 2), kind)
    return state

  def body(state, _):
    return several(state, jax.random.key(seed)), None

  state = experiment.init(jax.random.key(seed))
  return jax.jit(lambda s: jax.lax.scan(body, s, None, num_updates // experiment.loss['r1_every_steps'])[0])(
    state
  )


def covered(experiment: Ddgan, state, count: int = 5000, least: float = 0.2) -> tuple[int, float]:
  """Returns how many modes get at least `least` of their share of samples, and the share within 4 std."""
  keys = base.sampling_keys(jax.random.split(jax.random.key(7), count))

  def sample(read, keys):
    return experiment.sample(read, experiment.draw(read, keys, jnp.arange(count)), keys)['x0']

  drawn = jax.jit(sample)(state.eval_params, keys).reshape(-1, 2)
  distance = np.linalg.norm(np.asarray(drawn)[:, None] - MODES, axis=-1)
  near = distance.min(axis=1) < 4 * STD
  counts = np.bincount(distance.argmin(axis=1)[near], minlength=len(MODES))
  return int((counts >= least * count / len(MODES)).sum()), float(near.mean())
