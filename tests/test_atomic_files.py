"""Locks of files, also where the file system has none."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from retina import atomic_files
from retina.atomic_files import file_lock


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    number = errno.ENOSYS

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(atomic_files.fcntl, "lockf", fail)
    with file_lock(tmp_path / ".lock"):
        expected = (
            f"{tmp_path} cannot be locked (Function not implemented): make sure that only one process writes there"
        )
        assert capsys.readouterr().err.strip() == expected
    number = errno.EIO
    with pytest.raises(OSError, match="Input/output error"), file_lock(tmp_path / ".lock"):
        pass


def test_a_lock_is_held_until_the_end(tmp_path: Path) -> None:
    read, write = os.pipe()
    with file_lock(tmp_path / ".lock"):
        child = os.fork()
        if not child:
            with file_lock(tmp_path / ".lock"):
                os.write(write, b"second")
            os._exit(0)
        os.set_blocking(read, False)
        with pytest.raises(BlockingIOError):
            os.read(read, 6)
    os.waitpid(child, 0)
    assert os.read(read, 6) == b"second"
