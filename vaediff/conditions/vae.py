"""A VAE's image and latent code: what makes a diffusion a DiffuseVAE.

The image x0_vae = decode(z) is concatenated to the state; with Formulation 2 it is also added to it
(`experiments.denoiser`). Where it is noised (`conditions.augmentation`), it is so in the space of the state,
and the shift is what the network reads: the noised image. z enters as a vector. In training z ~ q(z | x), or
its mean; in sampling z is drawn from the prior that belongs to the VAE (Pandey et al. 2022, arXiv:2201.00308,
section 3). In place of z its PCA can be read (`conditions.pca`).
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from vaediff import checks, reads
from vaediff.conditions import augmentation, pca, prior
from vaediff.conditions.base import Condition
from vaediff.data import resize
from vaediff.diffusion import losses
from vaediff.errors import UserError
from vaediff.models.functional import Model
from vaediff.models.ports import Port
from vaediff.spaces import Space, encoders
from vaediff.types import Batch, Given, Image, Keys, Read, Values

IMAGE, CODE = 'x0_vae', 'z'
"""Names of the two inputs, and of the two values."""
FORMULATIONS = ('none', 'formulation1', 'formulation2')
SOURCES = ('sample', 'mean', 'precomputed')
VAE = 'vae'
"""Name of the condition, and of its section among those of the conditions."""
BOUNDS = {'conditions.vae.aug_level': checks.between(0, 1)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class VaeCondition(Condition):
  """x0_vae, z, or both.

  Attributes:
    source: the frozen VAE.
    prior: of its z.
    space: of the state, which x0_vae is brought into.
    image_shape: of x0_vae.
    latent_dim: size of z.
    reads_image: the network reads x0_vae.
    reads_code: it reads z.
    projection: it reads the PCA of z; None = it does not.
    dropout: probability of both learned stand-ins.
    x0_vae_source: 'sample' or 'mean' of q(z | x) at each step of training, or 'precomputed'.
    title: in a table, as 'formulation1+z'.
    of_classes: the priors of the classes, where samples are asked to be of one.
    asked: the classes that they are asked to be of, in turn; () = all.
    noising: of x0_vae, where training has levels above 0.
  """

  source: reads.FromStage
  prior: reads.Measured
  space: Space
  image_shape: tuple[int, int, int]
  latent_dim: int
  reads_image: bool
  reads_code: bool
  dropout: float
  x0_vae_source: str
  title: str
  of_classes: reads.Measured | None = None
  asked: tuple[int, ...] = ()
  noising: augmentation.Noising | None = None
  projection: pca.Projection | None = None

  name = VAE
  reconstructs = True

  @property
  def max_level(self) -> float:
    """Largest level of the noise on the image that is read; 0 without noise."""
    return self.noising.max_level if self.noising else 0.0

  @property
  def model(self) -> Model:
    """Architecture of the VAE."""
    return self.source.model

  @property
  def ports(self) -> Mapping[str, Port]:
    """x0_vae beside the state, in its space, and z, or its PCA, as a vector."""
    droppable, ports = self.dropout > 0, {}
    if self.reads_image:
      ports[IMAGE] = Port(enters='concat', shape=self.space.shape, droppable=droppable)
    if self.reads_code:
      ports[CODE] = Port(enters='vector', shape=(self.latent_dim,), droppable=droppable)
    if self.projection:
      ports[pca.PCA] = self.projection.port(droppable=droppable)
    return ports | (self.noising.ports if self.noising else {})

  @property
  def inputs(self) -> Mapping[str, jax.ShapeDtypeStruct]:
    """z, an image that takes the place of decode(z), and its level and noise."""
    code = {CODE: jax.ShapeDtypeStruct((self.latent_dim,), jnp.float32)}
    image = {IMAGE: jax.ShapeDtypeStruct(self.image_shape, jnp.float32)}
    noise = self.noising.inputs if self.noising else {}
    return code | (image if self.reads_image else {}) | noise

  @property
  def ranges(self) -> Mapping[str, str]:
    """Of z, and of a level and noise."""
    return {CODE: prior.RANGE, **(self.noising.ranges if self.noising else {})}

  @property
  def frozen(self) -> Mapping[str, reads.Reads]:
    """The VAE, its prior, and the PCA that is read."""
    of_classes = {prior.OF_CLASSES: self.of_classes} if self.of_classes else {}
    directions = {pca.PCA: self.projection.source} if self.projection else {}
    return {'vae': self.source, prior.PRIOR: self.prior, **of_classes, **directions}

  @property
  def stored(self) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Both, where they are precomputed; images as bytes."""
    if self.x0_vae_source != 'precomputed':
      return {}
    return {
      IMAGE: jax.ShapeDtypeStruct(self.image_shape, jnp.uint8),
      CODE: jax.ShapeDtypeStruct((self.latent_dim,), jnp.float32),
    }

  @property
  def titles(self) -> Mapping[str, str]:
    """Of x0_vae, where it is shown."""
    return {IMAGE: 'VAE'} if self.reads_image else {}

  def for_training(self) -> 'VaeCondition':
    """Returns the same for all classes."""
    return dataclasses.replace(self, asked=())

  def training_key(self, key: jax.Array) -> jax.Array | None:
    """Returns the key where z is drawn in training."""
    return key if self.x0_vae_source == 'sample' else None

  def observe(self, read: Read, batch: Batch, x: Image, key: jax.Array | None) -> Given:
    """Returns z ~ q(z | x), without a key its mean; or what is stored."""
    if IMAGE in batch:
      return {name: batch[name] for name in (IMAGE, CODE)}
    mean, logvar = self.model.apply(read['vae'], x, method='encode')
    return {CODE: mean if key is None else encoders.draw_latent(mean, logvar, key)}

  def observe_in_training(self, read: Read, batch: Batch, x: Image, key: jax.Array) -> Given:
    """Returns the same, and for each example a level and noise where x0_vae is noised."""
    if not self.noising:
      return super().observe_in_training(read, batch, x, key)
    key_code, key_noise = jax.random.split(key)
    seen = self.observe(read, batch, x, self.training_key(key_code))
    return {**seen, **self.noising.train(key_noise, len(x))}

  def draw(self, read: Read, keys: Keys, indices: Int[Array, ' batch']) -> Given:
    """Returns z of the prior, or of that of a class; a level and noise where x0_vae is noised."""
    pairs = jax.vmap(jax.random.split)(keys) if self.noising else None
    mixture, weights = read[prior.PRIOR], None
    if self.of_classes and read[prior.OF_CLASSES]:
      mixture = dict(read[prior.OF_CLASSES])
      table = jnp.asarray(mixture.pop(prior.CLASS_WEIGHTS))
      rows = jnp.asarray(self.asked or tuple(range(len(table))), jnp.int32)
      weights = table[rows[indices % len(rows)]]
    own = keys if pairs is None else pairs[:, 0]
    code = prior.draw(mixture, own, self.latent_dim, weights)
    return {CODE: code, **({} if pairs is None else self.noising.draw(pairs[:, 1]))}

  def complete(self, read: Read, given: Given) -> Given:
    """Returns x0_vae = decode(z) beside z, unless another image was given."""
    if IMAGE in given:
      return given
    return {**given, IMAGE: self.model.apply(read['vae'], given[CODE], method='decode')}

  def values(self, read: Read, given: Given) -> Values:
    """Returns x0_vae in the space of the state, at its level, and z or its PCA."""
    values = {}
    if self.reads_image:
      values[IMAGE] = self.space.encode(read, given[IMAGE], None)
    if self.noising:
      values[IMAGE] = self.noising.noised(values[IMAGE], given)
      values[self.noising.level_name] = self.noising.levels(given, len(values[IMAGE]))
    if self.reads_code:
      values[CODE] = given[CODE]
    if self.projection:
      values[pca.PCA] = self.projection.of(read, given[CODE])
    return values

  def shown(self, given: Given) -> dict[str, Image]:
    """Returns x0_vae, where the network reads it."""
    return {IMAGE: given[IMAGE]} if self.reads_image else {}

  def nats(self, read: Read, x: Image) -> Values:
    """Returns KL(q(z | x) || N(0, I)) as 'kl'."""
    mean, logvar = self.model.apply(read['vae'], x, method='encode')
    return {'kl': losses.kl_to_standard_normal(mean, logvar)}


def of_classes(condition: VaeCondition, classes: tuple[int, ...]) -> VaeCondition:
  """Returns the condition whose z is of the classes that samples are asked to be of, in turn."""
  of = condition.prior
  measured = prior.measured_of_classes(of.stage, of.workdir)
  return dataclasses.replace(condition, of_classes=measured, asked=classes)


def vae_condition(
  config: ConfigDict,
  stage: str,
  space: Space,
  *,
  reads_code: bool | str = False,
  dropout: float = 0.0,
) -> VaeCondition | None:
  """Returns the VAE condition of a stage; None where it reads neither image nor code.

  Reads `diffusion.condition`, `diffusion.x0_vae_source`, `conditions.vae` where there is one, and the section
  `vae`, which names the VAE. Where `reads_code` is 'pca', `diffusion.pca` says what of z is read.

  Raises:
    UserError: when that is no VAE stage, an image is to be noised that is not read, or more directions of a
      code are to be read than it has.
  """
  section, data = config[stage], config.data
  formulation = section.diffusion.condition
  max_level = section.conditions[VAE].aug_level if VAE in section.conditions else 0.0
  if max_level and formulation == 'none':
    raise UserError(
      f'conditions.vae.aug_level is {max_level}, but the network reads no x0_vae: diffusion.condition is '
      "'none'"
    )
  if formulation == 'none' and not reads_code:
    return None
  named = section.vae
  source = encoders.vae_of(config, named.stage, named.workdir, 'vae.stage')
  latent_dim = config[named.stage].model.latent_dim
  read = {False: '', True: '+z', pca.PCA: '+pca'}[reads_code]
  return VaeCondition(
    source=source,
    prior=prior.measured(named.stage, named.workdir),
    space=space,
    image_shape=resize.image_shape(data),
    latent_dim=latent_dim,
    reads_image=formulation != 'none',
    reads_code=reads_code is True,
    dropout=dropout,
    x0_vae_source=section.diffusion.x0_vae_source,
    title=formulation + read,
    noising=augmentation.noising(
      section, IMAGE, space.shape, max_level, droppable=dropout > 0, field='conditions.vae.aug_level'
    ),
    projection=pca.projection(section, latent_dim) if reads_code == pca.PCA else None,
  )
