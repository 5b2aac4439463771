"""Writes files that are complete or absent, also if the process or the machine stops. Never imports torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path: Path, keep: Path | None = None) -> Iterator[Path]:
    """Yield a temporary file in the folder of `path`; it replaces `path` on a normal exit and is deleted on an error.

    An existing file at `path` is renamed to `keep` first, if given.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        _fsync(temporary)
        if keep is not None and path.exists():
            path.replace(keep)
        temporary.replace(path)
        _fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


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
