"""Everything that is measured on a CUDA card, by one command.

    python benchmarks/gpu.py [--output runs/gpu] [--only training inference ...]          (make gpu)
    python benchmarks/gpu.py --device cpu                            a rehearsal of every line, with tiny sizes

Sections, in this order:
1. tests: the CUDA tests; outputs, loss and detections compared with torchvision's RetinaNet on the card
2. kernels: the focal loss and the matching (focal_loss.py, assign.py), then the sweep of the focal kernel
3. training: R50-FPN, 800x800, batch 16, beside torchvision and beside the network without loss and matching
4. loader: loader.py
5. inference: with and without NMS, batch 16 and 32, beside torchvision
6. job: runs that are killed and resumed, with evaluation, compared in every bit (kill_resume.py)

Each section writes one file, 1_tests.json to 6_job.json, and all together summary.txt, after every figure: what was
measured stays if the command is cut off. Each section runs in a process of its own, or starts programs, with a time
limit. One that fails stops no other; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_report import Report, kill_group, run_program

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = ("tests", "kernels", "training", "loader", "inference", "job")
TEST_FILES = [
    "tests/test_cuda.py", "tests/losses/test_focal_triton.py", "tests/losses/test_focal_triton_blocks.py",
    "tests/test_assign.py", "tests/test_detect.py",
]  # fmt: skip
SECTION_SECONDS = 170  # the time limit of a measurement, far above what it takes
REHEARSAL_FACTOR = 5  # for all time limits; a CPU may be busy
# For a training run of kill_resume.py that uses the tensor cores and takes a few seconds.
JOB_SETTINGS = [
    "model.backbone=resnet18", "model.base_channels=64", "model.channels=128", "model.head_convs=2",
    "data.short_side=[256,320]",
]  # fmt: skip


def main() -> int:
    """Exit status: 0, or 1 if a section failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="SECTION")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # also for the programs that are started
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ["PYTHONUNBUFFERED"] = "1"
    folder = arguments.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    machine = describe_machine(arguments.device)
    print(f"{machine['card']}, torch {machine['torch']}; results in {folder}", flush=True)
    start = time.monotonic()
    statuses = {}
    for number, name in enumerate(SECTIONS, 1):
        if name in arguments.only:
            print(f"\n=== {number} {name}, after {time.monotonic() - start:.0f} s", flush=True)
            statuses[name] = run_section(name, folder, f"{number}_{name}", machine, arguments.device == "cpu")
    print(f"\n{time.monotonic() - start:.0f} s: " + ", ".join(f"{name} {status}" for name, status in statuses.items()))
    return int(any(status == "failed" for status in statuses.values()))


def describe_machine(device: str) -> dict[str, Any]:
    """Card, versions, date and commit. Ends the program without the device."""
    code = (  # in another process: this one stays without torch, and takes no memory of the card
        "import json, torch, torchvision; cuda = torch.cuda.is_available();"
        "card = torch.cuda.get_device_properties(0) if cuda else None;"
        "print(json.dumps({'card': card.name if card else 'no card, CPU',"
        "'memory_gib': round(card.total_memory / 2**30, 1) if card else None,"
        "'torch': torch.__version__, 'torchvision': torchvision.__version__, 'cuda': torch.version.cuda,"
        "'cudnn': torch.backends.cudnn.version() if cuda else None}))"
    )
    found: dict[str, Any] = json.loads(
        subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()[-1]
    )
    if device == "cuda" and not found["memory_gib"]:
        sys.exit("no CUDA device found: --device cpu rehearses the measurements on the CPU")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    return found | {
        "python": platform.python_version(),
        "machine": f"{platform.node()}, {os.cpu_count()} cores",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit.strip() or "unknown",
    }


def run_section(name: str, folder: Path, file_name: str, machine: dict[str, Any], rehearsal: bool) -> str:
    """Run a section to its end, whatever happens in it; returns its status."""
    report = Report.begin(folder, file_name, machine)
    programs: dict[str, Callable[[Report, bool], None]] = {
        "tests": run_tests, "kernels": run_kernels, "loader": run_loader, "job": run_job
    }  # fmt: skip
    try:
        if name in programs:
            programs[name](report, rehearsal)
        else:
            run_measurement(name, report, rehearsal)
        if report.content["status"] == "running":
            report.end("done")
    except Exception:
        traceback.print_exc()
        report.end("failed", traceback.format_exc())
    status: str = report.content["status"]
    return status


def run_measurement(name: str, report: Report, rehearsal: bool) -> None:
    """Run gpu_<name>.py on the file of the report, in a process of its own: it may crash or hang."""
    command = [sys.executable, str(ROOT / f"benchmarks/gpu_{name}.py"), str(report.path)]
    limit = SECTION_SECONDS * (REHEARSAL_FACTOR if rehearsal else 1)
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)  # it ends when the pipe closes
    try:
        status = process.wait(limit)
        problem = f"exit status {status}" if status else ""
    except subprocess.TimeoutExpired:
        problem = f"stopped at the time limit of {limit} s"
    finally:
        kill_group(process)
    report.content = Report.read(report.path).content
    if problem:
        raise RuntimeError(f"gpu_{name}.py: {problem}")


def run_programs(report: Report, steps: list[Callable[[], None]]) -> None:
    """Each step even if one before it failed; raises RuntimeError at the end if one did."""
    errors = []
    for step in steps:
        try:
            step()
        except RuntimeError as error:
            errors.append(str(error))
            report.say(str(error))
    if errors:
        raise RuntimeError("; ".join(errors))


def run_tests(report: Report, rehearsal: bool) -> None:
    """The comparison with torchvision on the device, then the tests that need CUDA."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=", *TEST_FILES]
    if rehearsal:
        report.say("rehearsal: the tests are collected and not run")
        command += ["-qq", "--collect-only"]
    else:
        command += ["-q"]
        if importlib.util.find_spec("xdist"):
            command += ["-n", str(min(8, os.cpu_count() or 1))]
    run_programs(
        report,
        [lambda: run_measurement("parity", report, rehearsal), lambda: run_program(report, command, 240)],
    )


def run_kernels(report: Report, rehearsal: bool) -> None:
    """The benchmarks of both kernels. They time CUDA kernels: the rehearsal reads their options and prints the help."""
    focal, assign = ([sys.executable, str(ROOT / "benchmarks" / name)] for name in ("focal_loss.py", "assign.py"))
    focal += ["--device", "cuda", "--rounds", "3"]
    if rehearsal:
        report.say("rehearsal: no kernel is timed")
        steps = [lambda: run_program(report, [*focal, "--sweep", "--help"], 60)]
        steps += [lambda: run_program(report, [*assign, "--help"], 60)]
    else:
        steps = [lambda: run_program(report, focal, 60), lambda: run_program(report, assign, 30)]
        steps += [lambda: run_program(report, [*focal, "--sweep"], 50, enough=True)]
    run_programs(report, steps)


def run_loader(report: Report, rehearsal: bool) -> None:
    """The benchmark of the loader, without options; the rehearsal prints its help."""
    program = ROOT / "benchmarks/loader.py"
    if not program.exists():
        report.say("skipped: this checkout has no benchmarks/loader.py")
        report.end("skipped")
        return
    run_program(report, [sys.executable, str(program), *(["--help"] if rehearsal else [])], 120)


def run_job(report: Report, rehearsal: bool) -> None:
    """Killed and resumed runs."""
    command = [sys.executable, str(ROOT / "benchmarks/kill_resume.py"), "--seed", "1"]
    if rehearsal:
        command += ["--kills", "1", "--chain", "0", "train.steps=6", "train.eval_every=3"]
    else:
        command += ["--kills", "6", "--chain", "2", "--seconds", "60", "--precision", "bf16", *JOB_SETTINGS]
    run_program(report, command, 150 * (REHEARSAL_FACTOR if rehearsal else 1))


if __name__ == "__main__":
    raise SystemExit(main())
