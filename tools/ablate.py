"""Ablations: python tools/ablate.py configs/ablations/gamma_alpha.yaml [section.key=value ...] [--workers N]

Trains every cell of a study and writes report.html, report.md and results.csv. Killed or stopped, the same command goes
on where it was. The same command on a second machine, with the same --output folder and a --storage URL, joins in.
"""

from __future__ import annotations

import argparse
import fcntl
import signal
import sys
from datetime import timedelta
from pathlib import Path

from retina.command_line import exit_with_error
from retina.config_file import ConfigError
from retina.study.cells import Study, StudyError
from retina.study.study_file import load_study


def main() -> int:
    """0 with the report written, 1 if cells failed or it was stopped, 2 for an error before any training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="a YAML file such as those of configs/ablations/")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that come last in every cell"
    )
    parser.add_argument("--base", type=Path, help="configuration to vary instead of the study's")
    parser.add_argument("--workers", type=int, help="trainings at a time; default: one for each GPU, or one")
    parser.add_argument("--output", type=Path, default=Path("runs/ablations"), help="folder (%(default)s)")
    parser.add_argument(
        "--storage", help="ledger: postgresql://, mysql+pymysql://, redis://, sqlite:///; default: a file"
    )
    parser.add_argument(
        "--lease", type=float, default=60, help="seconds of silence until an owner is lost (%(default)s)"
    )
    parser.add_argument("--report", action="store_true", help="only write the report of what is finished")
    parser.add_argument("--dry-run", action="store_true", help="only print the cells and how long they will take")
    arguments = parser.parse_intermixed_args()
    if arguments.workers is not None and arguments.workers < 1:
        exit_with_error(f"--workers {arguments.workers}: expected 1 or more")
    if not arguments.lease >= 1:
        exit_with_error(f"--lease {arguments.lease:g}: expected 1 or more seconds")
    try:
        study = load_study(arguments.study, arguments.base, arguments.overrides, arguments.output)
        if arguments.report:
            check_data(study)
            study.folder.mkdir(parents=True, exist_ok=True)
            report(study)
            return 0
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # cleans up as after Ctrl-C, also during the probe
        return run(study, arguments)
    except KeyboardInterrupt:
        return 1
    except ConfigError as error:
        exit_with_error(str(error))
    except OSError as error:
        exit_with_error(f"{error.filename or arguments.output}: {error.strerror}")


def run(study: Study, arguments: argparse.Namespace) -> int:
    from retina.study.estimate import check_disk_space, estimate_seconds, measure_step_time
    from retina.study.launch import Machine
    from retina.study.loop import Runner
    from retina.study.trial_storage import TrialStorage

    machine = Machine.detect(arguments.workers, study.devices, Path(__file__).resolve().parent)
    waiting = [cell for cell in study.cells if not study.done(cell)]
    print(f"{study.name}: {len(study.cells)} cells, {len(study.cells) - len(waiting)} finished; {machine}", flush=True)
    if arguments.dry_run:
        for cell in study.cells:
            print(f"  {cell.key}  {cell.label}{'' if cell in waiting else '  (finished)'}")
    check_data(study)
    if arguments.storage and any(cell.config.train.precision == "auto" for cell in study.cells):
        raise StudyError("several machines may compute differently: with --storage give train.precision=bf16 or fp32")
    study.folder.mkdir(parents=True, exist_ok=True)
    trial_storage = None if arguments.dry_run else TrialStorage(study, arguments.storage, arguments.lease)
    checkpoint_bytes = 0
    if waiting:
        seconds = estimate_seconds(study, machine.workers)
        steps = waiting[0].config.train.steps
        if seconds is None and (arguments.dry_run or steps >= 100):
            a_step, checkpoint_bytes = measure_step_time(study, machine)
            a_cell = timedelta(seconds=round(a_step * steps))
            print(f"{a_step:.3f} s a step, {a_cell} a cell of {steps} steps, evaluation not counted")
            seconds = a_step * sum(cell.config.train.steps for cell in waiting) / machine.workers
        if seconds is not None:
            print(f"about {timedelta(seconds=round(seconds))} for {len(waiting)} cells", flush=True)
        check_disk_space(study, checkpoint_bytes)
    if trial_storage is None:
        return 0
    try:
        finished = Runner(study, trial_storage, machine).run()
    except StudyError:
        report(study)
        raise
    report(study)
    return 0 if finished else 1


def check_data(study: Study) -> None:
    """Without its annotation files a study does not even know the names of its cells."""
    if missing := study.missing_data():
        raise StudyError("\n".join([*missing, f"{study.base} says in its first lines where they come from"]))


def report(study: Study) -> None:
    """Of what is there now."""
    from retina.study.report import terminal_table, write_report

    try:
        with (study.folder / ".lock").open("w") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)  # another who works on the study may be writing it too
            paths = write_report(study)
    except OSError as error:
        print(f"no report: {error}", file=sys.stderr)
        return
    for path in paths:
        print(path)
    print(terminal_table(study))


if __name__ == "__main__":
    raise SystemExit(main())
