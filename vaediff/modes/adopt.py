"""`--mode=import`: published networks as the stages of a new run.

The name of the mode is a keyword of Python, and flags of configs are read as Python: the section is `adopt`.
"""

import jax

from vaediff import checks
from vaediff.errors import UserError
from vaediff.modes import checked
from vaediff.run import adopting, log
from vaediff.run.config import Run
from vaediff.run.published.base import BOUNDS, SECTION


def mode(run: Run) -> None:
  """Imports the files of `config.adopt.path`, and says where they are from and what was assumed.

  Raises:
    UserError: for a file or a config that do not fit, or a folder that holds a run; nothing is written then.
  """
  if jax.process_count() > 1:
    raise UserError(f'--mode=import runs in one process, and this job has {jax.process_count()}')
  checks.check(run.config[SECTION], BOUNDS, f'config.{SECTION}.')
  adopting.check_new(run.workdir)
  plan = adopting.planned(run.config, run.stages)
  checked.check(Run(plan.config, run.workdir, tuple(plan.experiments)), 'import')
  adopting.write(plan, run.workdir)
  for stage, record in plan.records.items():
    for source in record['sources']:
      log.say(
        f'{stage}: {source["network"]} of {source["file"]} (sha256 {source["sha256"][:16]}...), '
        f'{source["repository"]}, licence: {source["licence"]}'
      )
    for line in record['assumed']:
      log.say(f'  {line["what"]} = {line["value"]!r}: {line["from"]}')
    for network in record['fresh']:
      log.say(f'  {network} is in no file: it is as training begins')
  log.say(f'wrote {run.workdir}: draw from it with --workdir={run.workdir} --mode=sample')
