"""A classifier of the data set's labels: its features measure samples of sets that have no published network.

Trained by the cross-entropy with dropout on the features. It draws no images. Of images whose properties are
known (`with_heads`) it learns each of them, by the sum of the cross-entropies; the label is the first.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from vaediff import checks
from vaediff.data import oracle, pixels
from vaediff.experiments import base, bounds
from vaediff.models import classifier as classifier_model
from vaediff.models.functional import Model
from vaediff.optim import Optimizer, make_optimizer
from vaediff.types import Batch, Labels, Metrics, Params, Read

BOUNDS = {
  'model.num_classes': bounds.whole(0, bounds.MAX_WIDTH),
  'model.channels': bounds.whole(1, bounds.MAX_WIDTH),
  'model.num_features': bounds.whole(1, bounds.MAX_WIDTH),
  'model.dropout': checks.below_one(),
  **bounds.optimizers('optim'),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classifier(base.Experiment):
  """The classifier stage; trains the network `classifier`.

  Attributes:
    classifier: the architecture.
    optimizer: its optimizer.
    microbatches: parts that a batch is split into for the gradient.
  """

  classifier: Model
  optimizer: Optimizer
  microbatches: int

  metrics = {'loss': False, 'accuracy': True}
  bounds = BOUNDS

  @classmethod
  def from_config(cls, config: ConfigDict, stage: str) -> 'Classifier':
    """Builds the experiment of `config.<stage>`."""
    base.check(cls, config, stage)
    section, size, channels = config[stage], config.data.image_size, config.data.channels
    return cls(
      classifier=Model(
        module=classifier_model.Classifier(**section.model.to_dict()),
        inputs=(jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32),),
      ),
      optimizer=make_optimizer(section.optim, section.train.num_steps),
      microbatches=section.train.microbatches,
    )

  def with_heads(self, heads: tuple[int, ...]) -> 'Classifier':
    """Returns the same, to learn several properties of so many classes each; () = the label alone."""
    model = dataclasses.replace(self.classifier, module=self.classifier.module.clone(heads=heads))
    return dataclasses.replace(self, classifier=model)

  @property
  def networks(self) -> Mapping[str, Model]:
    """The one network of this stage."""
    return {'classifier': self.classifier}

  def init(self, key: jax.Array) -> base.TrainState:
    """Returns the state at step 0."""
    network = base.init_network(self.classifier, self.optimizer, key)
    return base.TrainState(step=jnp.int32(0), networks={'classifier': network}, extra={})

  def train_step(
    self, state: base.TrainState, frozen: Read, batch: Batch, key: jax.Array, kind: str = ''
  ) -> tuple[base.TrainState, Metrics]:
    """Returns the state after one update of the cross-entropy, and its value and the accuracy."""
    del frozen, kind

    def loss_fn(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
      x = pixels.to_unit_range(batch['image'])
      _, logits = self.classifier.apply(params, x, key_dropout=key)
      values = self.values(logits, batch)
      return jnp.mean(values['loss']), {name: jnp.mean(value) for name, value in values.items()}

    params = state.networks['classifier'].params
    grads, metrics = base.gradients(loss_fn, params, batch, key, self.microbatches)
    state, norms = base.update_one(state, 'classifier', grads, self.optimizer)
    return state, {**metrics, **norms}

  def eval_step(self, read: Read, batch: Batch, key: jax.Array) -> Metrics:
    """Returns cross-entropy (nats) and accuracy."""
    del key
    _, logits = self.classifier.apply(read['classifier'], pixels.to_unit_range(batch['image']))
    values = self.values(logits, batch)
    return {name: base.masked_mean(value, batch['mask']) for name, value in values.items()}

  def values(self, logits: Float[Array, 'batch classes'], batch: Batch) -> Metrics:
    """Returns cross-entropy (nats) and whether the label is right, of each example."""
    heads = self.classifier.module.heads
    asked = batch[oracle.ATTRIBUTES].T if heads else batch['label'][None]
    parts = split(logits, heads)
    losses = [cross_entropy(part, label) for part, label in zip(parts, asked, strict=True)]
    return {
      'loss': sum(losses),
      'accuracy': (jnp.argmax(parts[0], axis=1) == asked[0]).astype(jnp.float32),
    }


def split(logits: Float[Array, 'batch classes'], heads: tuple[int, ...]) -> list[Float[Array, 'batch _']]:
  """Returns the logits of each property; of the label alone, where there are no heads."""
  return jnp.split(logits, np.cumsum(heads)[:-1], axis=1) if heads else [logits]


def cross_entropy(logits: Float[Array, 'batch classes'], label: Labels) -> Float[Array, ' batch']:
  """Returns -log softmax(logits)[label] per example, in nats."""
  return -jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], axis=1)[:, 0]
