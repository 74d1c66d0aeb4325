"""What can go wrong in a store, as types a caller can tell apart."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager


class StoreError(RuntimeError):
    """A store cannot do what was asked; the message names the store, the key and what would be accepted."""


class SchemaError(StoreError):
    """The store was written by another version, or for other features, than the reader expects."""


class CorruptEpisodeError(StoreError):
    """An episode's files do not hold what its metadata promises."""


class HeldOutSeedError(StoreError, ValueError):
    """The episode was made from an evaluation or final seed; those never enter replay."""


class StoreFullError(StoreError, OSError):
    """No space left (or a quota or file-size limit was hit) while writing. Committed episodes are untouched."""

    def __init__(self, where: str | os.PathLike[str], doing: str, number: int = errno.ENOSPC):
        super().__init__(
            f"{doing} {os.fspath(where)}: {os.strerror(number)}. Committed episodes are untouched and this episode's "
            "logged steps stay recoverable; free space, then commit again or reopen the store."
        )
        self.errno = number


FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextmanager
def full_disk_is_clear(where: str | os.PathLike[str], doing: str) -> Iterator[None]:
    """Turn ENOSPC, EDQUOT and EFBIG inside the block into :class:`StoreFullError`."""
    try:
        yield
    except StoreFullError:
        raise
    except OSError as error:
        if error.errno in FULL:
            raise StoreFullError(where, doing, error.errno) from error
        raise
