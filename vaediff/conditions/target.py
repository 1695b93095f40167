"""The class that a classifier guides to: given and drawn as a label, and read by no denoiser."""

import dataclasses
from collections.abc import Mapping

from ml_collections import ConfigDict

from vaediff.conditions.label import Label
from vaediff.errors import UserError
from vaediff.models.ports import Port


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target(Label):
  """A label without a port: it is among the values, and the network does not read it."""

  title = ''

  @property
  def ports(self) -> Mapping[str, Port]:
    """No ports: the network does not read it."""
    return {}


def target(config: ConfigDict) -> Target:
  """Returns the classes of the data set as what is guided to.

  Raises:
    UserError: for a data set whose classes are not known.
  """
  if config.data.num_classes < 2:
    raise UserError(
      'sample.classifier needs a data set with classes: data.num_classes is '
      f'{config.data.num_classes}, it must be at least 2'
    )
  return Target(num_classes=config.data.num_classes, dropout=0.0)
