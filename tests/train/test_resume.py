"""Kills at random instants, through the harness of benchmarks/."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HARNESS = Path(__file__).parents[2] / "benchmarks/kill_resume.py"


def test_killed_and_resumed_ends_with_the_same_bits() -> None:
    """Five single kills, two of them while a checkpoint is written, and a chain of three; workers change on the way."""
    command = [sys.executable, HARNESS, "--kills", "5", "--chain", "3"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=400)
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.splitlines()[-1] == "6 of 6 equal"
    assert run.stdout.count("killed write") == 2
