"""Writes files that are complete or absent, also if the process or the machine stops; locks. Never imports torch."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_file(path: Path, keep: Path | None = None) -> Iterator[Path]:
    """Yield a temporary file in the folder of `path`; it replaces `path` on a normal exit and is deleted on an error.

    An existing file at `path` is renamed to `keep` first, if given.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with named_errors(path):
        try:
            yield temporary
            _fsync(temporary)
            if keep is not None and path.exists():
                path.replace(keep)
            temporary.replace(path)
            _fsync(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):  # the first error says more
                temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Give `path` to an error of the system without a file name: one of a write or an fsync has none."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Wait for the lock of a file, which is made, and hold it. A file system without locks is named on stderr."""
    with path.open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            reason = f"{path.parent} cannot be locked ({error.strerror})"
            print(f"{reason}: make sure that only one process writes there", file=sys.stderr)
        yield


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
