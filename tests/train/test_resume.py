"""Runs killed at random times and resumed, by benchmarks/kill_resume.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
BENCHMARK = Path(__file__).parents[2] / "benchmarks/kill_resume.py"


def test_killed_and_resumed_ends_with_the_same_bits() -> None:
    """Five runs killed once, two of them during a checkpoint write, and one killed three times."""
    command = [sys.executable, BENCHMARK, "--kills", "5", "--chain", "3"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=400)
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.splitlines()[-1] == "6 of 6 equal"
    assert run.stdout.count("killed write") == 2
