"""Ablations: python tools/ablate.py configs/ablations/gamma_alpha.yaml [section.key=value ...] [--workers N]

Trains every cell of a study and writes report.html, report.md and results.csv. Killed or stopped, the same command goes
on where it was. The same command on a second machine, with the same --output folder and a --storage URL, joins in.
"""

from __future__ import annotations

import argparse
import json
import signal
from datetime import timedelta
from pathlib import Path

from retina.config import ConfigError, fail
from retina.files import write_text
from retina.study import Study, load_study


def main() -> int:
    """0 with the report written, 1 if cells failed or it was stopped, 2 for an error before any training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="a YAML file such as those of configs/ablations/")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that come last in every cell"
    )
    parser.add_argument(
        "--base", type=Path, help="configuration to vary instead of the study's: base/shapes_large.yaml"
    )
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
        fail(f"--workers {arguments.workers}: expected 1 or more")
    if not arguments.lease >= 1:
        fail(f"--lease {arguments.lease:g}: expected 1 or more seconds")
    try:
        study = load_study(arguments.study, arguments.base, arguments.overrides, arguments.output)
        if arguments.report:
            return report(study)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # cleans up as after Ctrl-C, also during the probe
        return run(study, arguments)
    except KeyboardInterrupt:
        return 1
    except ConfigError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or arguments.output}: {error.strerror}")


def run(study: Study, arguments: argparse.Namespace) -> int:
    from retina.ablate import Ledger, Machine, Runner, check_space, estimate, probe
    from retina.study import StudyError

    tools = Path(__file__).resolve().parent
    machine = Machine.find(arguments.workers, study.devices)
    waiting = [cell for cell in study.cells if not study.done(cell)]
    print(f"{study.name}: {len(study.cells)} cells, {len(study.cells) - len(waiting)} finished; {machine}", flush=True)
    if arguments.dry_run:
        for cell in study.cells:
            print(f"  {cell.key}  {cell.label}{'' if cell in waiting else '  (finished)'}")
    if missing := study.missing_data():
        raise StudyError("\n".join([*missing, f"{study.base} says in its first lines where they come from"]))
    study.folder.mkdir(parents=True, exist_ok=True)
    ledger = None if arguments.dry_run else Ledger(study, arguments.storage, arguments.lease)
    checkpoint_bytes = 0
    if waiting:
        seconds = estimate(study, machine.workers)
        steps = waiting[0].config.train.steps
        if seconds is None and (arguments.dry_run or steps >= 100):
            a_step, checkpoint_bytes = probe(study, machine, tools)
            a_cell = timedelta(seconds=round(a_step * steps))
            print(f"{a_step:.3f} s a step, {a_cell} a cell of {steps} steps, evaluation not counted")
            seconds = a_step * sum(cell.config.train.steps for cell in waiting) / machine.workers
        if seconds is not None:
            print(f"about {timedelta(seconds=round(seconds))} for {len(waiting)} cells", flush=True)
        check_space(study, checkpoint_bytes)
    if ledger is None:
        return 0
    runner = Runner(study, ledger, machine, tools)
    try:
        finished = runner.run()
    finally:
        write_text(study.folder / "failed.json", json.dumps(runner.given_up))
        report(study)
    return 0 if finished else 1


def report(study: Study) -> int:
    """Of what is there now; failed.json says which cells the last run gave up, and why."""
    from retina.report import terminal_table, write_report

    failed = study.folder / "failed.json"
    for path in write_report(study, json.loads(failed.read_text(encoding="utf-8")) if failed.exists() else {}):
        print(path)
    print(terminal_table(study))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
