"""benchmarks/gpu.py without a card: its rehearsal, and that what was measured stays when something stops it."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
COMMAND = [sys.executable, str(BENCHMARKS / "gpu.py"), "--device", "cpu", "--output"]


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def import_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("gpu")


@pytest.mark.slow
def test_the_rehearsal_runs_every_section(tmp_path: Path) -> None:
    run = subprocess.run([*COMMAND, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    contents = {path.stem: read(path) for path in sorted(tmp_path.glob("*.json"))}
    assert [name[2:] for name in contents] == ["tests", "kernels", "training", "loader", "inference", "job"]
    assert {content["status"] for content in contents.values()} <= {"done", "skipped"}
    for name in ("3_training", "5_inference"):
        rows = [row for row in contents[name]["rows"] if "images_per_second" in row]
        assert len(rows) == (6 if name == "3_training" else 5)
        assert all(len(row["ms_of_rounds"]) == 2 for row in rows)
    assert "1 of 1 equal" in contents["6_job"]["text"]
    assert len(list(tmp_path.iterdir())) <= 8  # the device machine gives no more files back


@pytest.mark.slow
def test_what_was_measured_stays_after_a_kill(tmp_path: Path) -> None:
    process = subprocess.Popen([*COMMAND, str(tmp_path), "--only", "training"], stdout=subprocess.DEVNULL)
    path, summary = tmp_path / "3_training.json", tmp_path / "summary.txt"
    try:
        while not summary.exists() or "images/s" not in summary.read_text():  # the summary is written last
            assert process.poll() is None, "it ended before its first figure"
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    time.sleep(0.5)  # the process of the section is killed when the pipe from its parent closes
    content = read(path)
    assert content["status"] == "running"
    assert content["machine"]["torch"] and content["machine"]["commit"]
    row = content["rows"][0]
    assert row["name"] == "retina eager" and row["images_per_second"] > 0
    assert row["name"] in summary.read_text()


def test_a_failing_section_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = import_gpu(monkeypatch)

    def fail(report: Any, rehearsal: bool) -> None:
        report.put("a figure", ms=1.5)
        raise ValueError("broken on purpose")

    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTHONPATH", "PYTHONUNBUFFERED"):
        monkeypatch.setenv(name, "1")  # main sets them; the old values come back after the test
    monkeypatch.setattr(gpu, "describe_machine", lambda device: {"card": "none", "torch": "none"})
    monkeypatch.setattr(gpu, "run_kernels", fail)
    monkeypatch.setattr(gpu, "run_job", lambda report, rehearsal: report.say("the job ran"))
    monkeypatch.setattr(sys, "argv", [*COMMAND[1:], str(tmp_path), "--only", "kernels", "job"])
    assert gpu.main() == 1
    failed, job = read(tmp_path / "2_kernels.json"), read(tmp_path / "6_job.json")
    assert failed["status"] == "failed" and "broken on purpose" in failed["error"]
    assert failed["rows"] == [{"name": "a figure", "ms": 1.5}]
    assert job["status"] == "done" and job["text"] == ["the job ran"]
    summary = (tmp_path / "summary.txt").read_text()
    assert "broken on purpose" in summary and "the job ran" in summary


def test_a_program_is_stopped_at_its_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = import_gpu(monkeypatch)
    report = gpu.Report.begin(tmp_path, "1_tests", {})
    code = "import time; print('before', flush=True); time.sleep(600)"
    with pytest.raises(RuntimeError, match="stopped at its time limit"):
        gpu.run_program(report, [sys.executable, "-c", code], 1)
    gpu.run_program(report, [sys.executable, "-c", code], 1, enough=True)
    with pytest.raises(RuntimeError, match="exit status 3"):
        gpu.run_program(report, [sys.executable, "-c", "raise SystemExit(3)"], 60)
    assert read(report.path)["text"].count("before") == 2
