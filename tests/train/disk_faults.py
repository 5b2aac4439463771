"""A disk that fails at a chosen call: it lies below everything that a run writes, its files, folders and renames."""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

NUMBERS = {"full": errno.ENOSPC, "read-only": errno.EROFS}
OPEN = io.open


class Call(NamedTuple):
    """A call that writes. TensorBoard writes in a thread of its own, so calls are numbered for each thread."""

    main_thread: bool
    number: int
    what: str = ""


class Disk:
    """Counts the calls that write below `folder`. From the call `fails_at` on, the disk fails, as `fault` says.

    "full" and "read-only" raise an OSError; a full disk first takes half of the bytes. "removed" moves the folder away,
    and `repair` brings it back.
    """

    def __init__(self, folder: Path, fault: str = "", fails_at: Call | None = None) -> None:
        self.folder, self.fault, self.fails_at = folder, fault, fails_at
        self.away = folder.with_name("away")
        self.calls: list[Call] = []
        self.failing = False

    def call(self, what: str, path: Any = None) -> None:
        """Called before each call that writes. Raises the error of a full or read-only disk, with `path` if given."""
        is_main = threading.current_thread() is threading.main_thread()
        call = Call(is_main, sum(other.main_thread == is_main for other in self.calls), what)
        self.calls.append(call)
        if self.fails_at is not None and call[:2] == self.fails_at[:2]:
            self.failing = True
            if self.fault == "removed":
                os.rename(self.folder, self.away)  # noqa: PTH104  (Path.rename would call this function again)
        may_succeed = self.fault == "removed" or (self.fault == "full" and what.startswith("unlink"))
        if self.failing and not may_succeed:
            raise OSError(NUMBERS[self.fault], os.strerror(NUMBERS[self.fault]), path)

    def repair(self) -> bool:
        """Bring the folder back. Returns whether the run had made a new one in its place, which is deleted."""
        self.failing, self.fails_at = False, None
        made_anew = self.away.exists() and self.folder.exists()
        if made_anew:
            shutil.rmtree(self.folder)
        if self.away.exists():
            self.away.rename(self.folder)
        return made_anew

    def insert(self, patch: pytest.MonkeyPatch) -> None:
        """Put the disk below the functions of Python that write."""
        for function in ("mkdir", "unlink", "replace"):
            patch.setattr(os, function, self._counted(getattr(os, function)))
        patch.setattr(os, "fsync", lambda handle: self.call("fsync"))  # saves the time of the real one
        for module in (io, builtins):
            patch.setattr(module, "open", self._open)

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(path: Any, *args: Any, **kwargs: Any) -> Any:
            if self._is_below(path):
                self.call(f"{function.__name__} {Path(path).name}", path)
            return function(path, *args, **kwargs)

        return counted

    def _is_below(self, path: Any) -> bool:
        return isinstance(path, str | bytes | Path) and Path(os.fsdecode(path)).is_relative_to(self.folder)

    def _open(self, path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if not self._is_below(path) or not set(mode) & set("wax+"):
            return OPEN(path, mode, *args, **kwargs)
        name = Path(os.fsdecode(path)).name
        self.call(f"open {name}", path)
        raw = _File(self, name, os.fsdecode(path), mode.replace("b", "").replace("t", ""))
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding="utf-8")


class _File(io.FileIO):
    def __init__(self, disk: Disk, name: str, path: str, mode: str) -> None:
        self.disk, self.short_name = disk, name
        super().__init__(path, mode)

    def write(self, data: Any) -> int:
        try:
            self.disk.call(f"write {self.short_name}")
        except OSError:
            if self.disk.fault == "full":
                super().write(memoryview(data)[: len(data) // 2])
            raise
        return super().write(data)
