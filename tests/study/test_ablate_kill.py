"""Real runs killed at random, by benchmarks/kill_ablation.py; and the same on a PostgreSQL server."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from study_helpers import MakeStudy, check_race

pytestmark = pytest.mark.slow
BENCHMARK = Path(__file__).parents[2] / "benchmarks/kill_ablation.py"
SERVERS = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))


def run_benchmark(cells: int, *arguments: object) -> None:
    command = [sys.executable, BENCHMARK, "--cells", cells, *arguments]
    run = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=500)
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{cells} of {cells} complete exactly once" in run.stdout
    assert run.stdout.splitlines()[-1] == f"{cells} of {cells} equal"


def test_killed_study_completes_with_the_same_bits() -> None:
    run_benchmark(2, "--workers", 2, "--kills", 3, "--pause", 1)  # a run takes longer, so all kills happen


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The URL of a PostgreSQL server on the loopback interface, which is stopped after the tests."""
    if not SERVERS:
        pytest.skip("no PostgreSQL server: apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    as_owner = []
    if os.getuid() == 0:  # the server refuses to run as root
        shutil.chown(folder, "postgres", "postgres")
        as_owner = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    initdb, postgres = SERVERS[-1], SERVERS[-1].with_name("postgres")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "cwd": folder}
    command = [initdb, "-D", folder / "data", "-U", "retina", "--auth=trust", "--no-sync"]
    subprocess.run([*as_owner, *command], check=True, **quiet)  # type: ignore[call-overload]
    command = [postgres, "-D", folder / "data", "-p", str(port), "-c", "listen_addresses=127.0.0.1"]
    command += ["-c", "unix_socket_directories=", "-c", "fsync=off"]
    process = subprocess.Popen([*as_owner, *command], **quiet)  # type: ignore[call-overload]
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"postgresql://retina@127.0.0.1:{port}/postgres"
    finally:
        process.send_signal(signal.SIGINT)  # "fast": closes the connections
        process.wait(30)
        shutil.rmtree(folder)


def test_two_drivers_with_a_postgresql_storage(server: str) -> None:
    run_benchmark(2, "--drivers", 2, "--workers", 1, "--kills", 3, "--pause", 1, "--storage", server)


def test_of_two_claims_at_the_same_time_on_postgresql(make_study: MakeStudy, server: str) -> None:
    check_race(make_study([0, 1]), server)
