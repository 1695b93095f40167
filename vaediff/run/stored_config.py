"""A config file for `--workdir` alone: `get_config(workdir)` reads the config stored in a run."""

from vaediff.run import config


def get_config(workdir: str):
  """Returns the config that the run in `workdir` was trained with."""
  return config.read(workdir)
