"""Runs a command without starting a process, which would import torch again; lists what an import loads; takes away the
permission to read a folder."""

from __future__ import annotations

import contextlib
import importlib
import io
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def run_main(tool: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Call main() of tools/`tool`; returns the exit status, the standard output and the standard error."""
    module = importlib.import_module(f"retina_tools.{tool.removesuffix('.py')}")
    command = [tool, *map(str, arguments)]
    output, errors = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", command)
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
                status = module.main()
    except SystemExit as stop:
        assert isinstance(stop.code, int), "a command exits with a number"
        status = stop.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return subprocess.CompletedProcess(command, status, output.getvalue(), errors.getvalue())


def loaded_by(module: str, candidates: set[str]) -> str:
    """Which of the candidates the import of `module` loads, in a process of its own, as a sorted list."""
    code = f"import sys, {module}; print(sorted({candidates!r} & set(sys.modules)))"
    command = [sys.executable, "-c", code]
    root = Path(__file__).parents[1]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout.strip()


def without_permission(function: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    """os.stat or os.scandir as for a user who may not look into `folder`: the tests may run as root, who may."""

    def refusing(path: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(path, str | Path) and folder in (Path(path), *Path(path).parents):
            raise PermissionError(13, "Permission denied", str(path))
        return function(path, *arguments, **options)

    return refusing
