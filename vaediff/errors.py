"""The one exception for mistakes a user can mend: `main` prints it without a traceback."""


class UserError(ValueError):
  """A mistake in a config, a file or a flag: the message names it, its value, what is allowed, what to do."""
