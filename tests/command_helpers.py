"""Shared by the tests of tools/: runs a command without starting a process, which would import torch again."""

from __future__ import annotations

import contextlib
import importlib
import io
import signal
import subprocess

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
