"""What an autoencoder's section must hold beyond bounds, and what is said of it before it trains."""

from ml_collections import ConfigDict

from vaediff.errors import UserError
from vaediff.models.functional import Model


def check(config: ConfigDict, stage: str, model: Model) -> None:
  """Raises UserError where images do not fit the networks, or the adversarial loss would never begin."""
  section, size, factor = config[stage], config.data.image_size, model.module.factor
  if size % factor:
    raise UserError(
      f'data.image_size is {size}, but {len(section.model.channel_multipliers)} levels '
      f'(model.channel_multipliers) need a multiple of {factor}, such as {size - size % factor or factor}'
    )
  if not section.loss.adversarial_weight > 0:
    return
  layers, loss, end = section.discriminator.num_layers, section.loss, section.train.num_steps
  if size < 3 * 2**layers:
    raise UserError(
      f'discriminator.num_layers is {layers}, which needs images of {3 * 2**layers} pixels a side, and '
      f'data.image_size is {size}: take {max((size // 3).bit_length() - 1, 0)} layers, or '
      'loss.adversarial_weight = 0 for none'
    )
  if loss.adversarial_start_step >= end:
    raise UserError(
      f'loss.adversarial_start_step is {loss.adversarial_start_step}, but train.num_steps is {end}: the '
      f'adversarial loss, whose loss.adversarial_weight is {loss.adversarial_weight:g}, would never begin. '
      f'Start at {end // 2}, or set loss.adversarial_weight to 0'
    )


def notes_of(section: ConfigDict) -> tuple[str, ...]:
  """Returns what is said when training starts: nothing multiplies a rate, and when the players begin."""
  size, rate = section.train.batch_size, section.optim.learning_rate
  notes = (f'learning rate {rate:g}, whatever the batch: of {size} images, {rate / size:.3g} for each',)
  if section.loss.adversarial_weight > 0:
    weighs = section.loss.adversarial_start_step
    learns = min(section.loss.discriminator_start_step, weighs)
    notes += (f'the discriminator learns from update {learns} on, and weighs from update {weighs} on',)
  return notes
