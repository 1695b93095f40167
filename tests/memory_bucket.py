"""A store in memory in the place of a real one: `s3://...` of this process."""

from fsspec.implementations.memory import MemoryFileSystem


class Store(MemoryFileSystem):
  """Objects by path; `broken` makes it fail as a lost connection does."""

  cachable = False

  def __init__(self):
    super().__init__()
    self.store, self.pseudo_dirs, self.broken = {}, [''], False

  @classmethod
  def _strip_protocol(cls, path):
    return super()._strip_protocol('/' + path.removeprefix('s3://').lstrip('/'))

  def mkdir(self, path, create_parents=True, **kwargs):
    """A store has no folders but those that objects lie in."""

  def makedirs(self, path, exist_ok=False):
    """See `mkdir`."""

  def _open(self, path, mode='rb', **kwargs):
    self._work()
    return super()._open(path, mode, **kwargs)

  def info(self, path, **kwargs):
    self._work()
    return super().info(path, **kwargs)

  def ls(self, path, detail=True, **kwargs):
    self._work()
    return super().ls(path, detail, **kwargs)

  def cat_file(self, path, *args, **kwargs):
    self._work()
    return super().cat_file(path, *args, **kwargs)

  def _work(self):
    if self.broken:
      raise ConnectionResetError('connection lost')  # an OSError without a number, as of libraries
