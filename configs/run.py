"""A run while its config is made: which stages it has, and their sections, made when a stage is added."""

from collections.abc import Callable, Mapping
from types import ModuleType

from ml_collections import ConfigDict

Edit = Callable[[ConfigDict], None]
"""Changes one section."""


class Run:
  """Lives only while a config is made; what is left is a plain ConfigDict.

  A stage's section is made when the stage is added: its experiment's defaults, then the data set's sizes,
  then what variants have asked for before, in their order. A section that is made stays as it is when another
  variant takes its stage out: if a third brings the stage back, no edit is lost.

  Attributes:
    config: what all runs have: `stages`, `data`, `evaluate`, ...; sections of stages join it at the end.
  """

  config: ConfigDict

  def __init__(self, config: ConfigDict, modules: Mapping[str, ModuleType], sizes: Mapping[str, Edit]):
    """`modules` are the files of `configs/stages` by stage, `sizes` those of the data set."""
    self.config = config
    self._modules = modules
    self._edits = {stage: [edit] for stage, edit in sizes.items()}
    self._made = {}
    self._at_end = []

  def section(self, stage: str) -> ConfigDict:
    """Returns the section of a stage; it need not be one of the run: a student reads its teacher's."""
    if stage not in self._made:
      self._made[stage] = self._modules[stage].section().lock()
      for edit in self._edits.get(stage, ()):
        edit(self._made[stage])
    return self._made[stage]

  def like(self, stage: str, other: str) -> ConfigDict:
    """Makes the section of a stage a copy of that of another; what is said of it alone is applied after."""
    self._made[stage] = self.section(other).copy_and_resolve_references().lock()
    return self._made[stage]

  def apply(self, stage: str) -> None:
    """Applies again what sizes and variants have asked for of a section that was made anew."""
    for edit in self._edits.get(stage, ()):
      edit(self._made[stage])

  def only(self, *stages: str) -> tuple[ConfigDict, ...]:
    """Makes these the stages of the run; returns their sections."""
    self.config.stages = stages
    return tuple(self.section(stage) for stage in stages)

  def add(self, stage: str) -> ConfigDict:
    """Appends a stage; returns its section."""
    return self.only(*self.config.stages, stage)[-1]

  def edit(self, stage: str, edit: Edit) -> None:
    """Changes the section of a stage: now, or when it is made, which may be never."""
    if stage in self._made:
      edit(self._made[stage])
    else:
      self._edits.setdefault(stage, []).append(edit)

  def edit_all(self, edits: Mapping[str, Edit]) -> None:
    """As `edit`, by stage."""
    for stage, edit in edits.items():
      self.edit(stage, edit)

  def in_space(self, space: str) -> dict[str, ConfigDict]:
    """Returns the sections made so far that diffuse in this space, by stage."""
    return {name: made for name, made in self._made.items() if 'space' in made and made.space == space}

  def need_classes(self, variant: str) -> None:
    """Raises ValueError where the data set has no classes, or it is not known how many."""
    if not self.config.data.num_classes:
      raise ValueError(
        f'variant {variant}: the data set of config {self.config.name!r} has no known classes, '
        'data.num_classes is 0'
      )

  def at_end(self, function: Callable[['Run'], None]) -> None:
    """Calls the function once all variants are applied, for what depends on the sizes of several stages."""
    self._at_end.append(function)

  def finish(self) -> dict[str, ConfigDict]:
    """Returns the sections of the stages in use, by stage: those of the run, and those that they read."""
    for function in self._at_end:
      function(self)
    used, waiting = {}, list(self.config.stages)
    while waiting:
      stage = waiting.pop(0)
      if stage not in used:
        used[stage] = self.section(stage)
        reads = getattr(self._modules[stage], 'reads', None)
        waiting += reads(used[stage]) if reads else ()
    return used
