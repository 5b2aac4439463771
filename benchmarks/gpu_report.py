"""What benchmarks/gpu.py has measured so far: one JSON file of each section, and summary.txt. Never imports torch.

Both are written again after every figure, each as a whole: whatever stops the section, they are complete and hold what
was measured until then.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from retina.atomic_files import write_text

SUMMARY = "summary.txt"


class Report:
    """The file of one section: `status` (running, done, failed, skipped), `rows` of figures, and `text` to read."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path, self.content = path, content
        self.start = time.monotonic() - content["seconds"]
        self.written = 0.0

    @classmethod
    def begin(cls, folder: Path, name: str, machine: dict[str, Any]) -> Report:
        """The report of a section that starts now; it replaces one of an earlier run."""
        content = {
            "section": name, "status": "running", "seconds": 0.0, "error": "", "machine": machine,
            "rows": [], "text": [],
        }  # fmt: skip
        report = cls(folder / f"{name}.json", content)
        report.write()
        return report

    @classmethod
    def read(cls, path: Path) -> Report:
        """The report in the file `path`, to be continued."""
        return cls(path, json.loads(path.read_text(encoding="utf-8")))

    @property
    def seconds(self) -> float:
        """Since the start of the section."""
        return time.monotonic() - self.start

    def say(self, line: str) -> None:
        """Print a line with the elapsed seconds, and keep it."""
        self.keep(line)
        self.write()

    def keep(self, line: str) -> None:
        """Print a line and keep it; the file is written at most once a second, because programs print many."""
        print(f"{self.seconds:5.0f}s {line}", flush=True)
        self.content["text"].append(line)
        if time.monotonic() - self.written > 1:
            self.write()

    def put(self, name: str, **figures: Any) -> None:
        """Add the row `name`, or new figures to it."""
        rows = self.content["rows"]
        row = next((row for row in rows if row["name"] == name), None)
        if row is None:
            row = {"name": name}
            rows.append(row)
        row.update(figures)
        self.write()

    def end(self, status: str, error: str = "") -> None:
        """The last write, with the error that ended the section."""
        self.content |= {"status": status, "error": self.content["error"] + error}
        self.write()

    def write(self) -> None:
        """Write the file of the section and the summary."""
        self.content["seconds"] = round(self.seconds, 1)
        write_text(self.path, json.dumps(self.content, indent=1) + "\n")
        self.written = time.monotonic()
        write_summary(self.path.parent)


def write_summary(folder: Path) -> None:
    """summary.txt: the machine, and of each section its status and its lines."""
    lines = []
    for path in sorted(folder.glob("[0-9]_*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not lines:
            lines += [f"{key}: {value}" for key, value in content["machine"].items()]
        lines += ["", f"=== {content['section']}: {content['status']}, {content['seconds']:.0f} s", *content["text"]]
        lines += content["error"].splitlines()
    write_text(folder / SUMMARY, "\n".join(lines) + "\n")


def run_program(report: Report, command: list[str], limit: float, enough: bool = False) -> None:
    """Run a program and keep what it prints, with a row for its exit status and time.

    After `limit` seconds it is killed with the processes it started. That is an error, except with `enough`: then what
    it printed until there is all that is wanted. Raises RuntimeError for that error and for a bad exit status.
    """
    name = " ".join(Path(part).name if part.startswith("/") else part for part in command)
    report.say(f"$ {name}    (at most {limit:.0f} s)")
    start = time.monotonic()
    stopped = False
    with _process(command) as (process, lines):
        while True:
            try:
                line = lines.get(timeout=max(0.0, start + limit - time.monotonic()))
            except queue.Empty:
                stopped = True
                break
            if line is None:
                break
            report.keep(line)
    seconds = round(time.monotonic() - start, 1)
    report.put(name, seconds=seconds, exit_status=process.returncode, stopped_at_the_limit=stopped)
    report.say(f"{'stopped at its time limit' if stopped else f'exit status {process.returncode}'}, {seconds} s")
    if stopped and not enough:
        raise RuntimeError(f"{name}: stopped at its time limit of {limit:.0f} s")
    if not stopped and process.returncode:
        raise RuntimeError(f"{name}: exit status {process.returncode}")


@contextlib.contextmanager
def _process(command: list[str]) -> Iterator[tuple[subprocess.Popen[str], queue.Queue[str | None]]]:
    """A process with the lines that it prints, then None; at the end it is killed with the processes it started."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line.rstrip())
        process.wait()
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        yield process, lines
    finally:
        kill_group(process)


def kill_group(process: subprocess.Popen[Any]) -> None:
    """Kill a process that leads a session, and every process it started that is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
