"""Ablations: python tools/ablate.py configs/ablations/gamma_alpha.yaml [section.key=value ...] [--workers N]

Runs every cell of a study and writes report.html, report.md and results.csv. After a stop or a kill the same command
continues the study. The same command on a second machine, with the same --output folder and --storage URL, takes a part
of the cells.
"""

from __future__ import annotations

import argparse
import signal
import sys
from datetime import timedelta
from pathlib import Path

from retina.atomic_files import file_lock
from retina.command_line import exit_with_error, file_path
from retina.config_file import ConfigError
from retina.shapes.settings import load_settings
from retina.study import DEFAULT_OUTPUT, Study, StudyError, load_study


def main() -> int:
    """Exit status: 0 if every cell is done, 1 if cells failed or the study was stopped, 2 for an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="a YAML file such as those of configs/ablations/")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that come last in every cell"
    )
    parser.add_argument("--base", type=file_path, help="config to vary instead of the study's")
    parser.add_argument("--workers", type=int, help="runs at a time; default: one for each GPU, or one")
    parser.add_argument("--output", type=file_path, default=DEFAULT_OUTPUT, help="folder (%(default)s)")
    parser.add_argument(
        "--storage",
        help="URL of the trial storage: postgresql://, mysql+pymysql://, redis://, sqlite:///; default: a file",
    )
    parser.add_argument(
        "--lease", type=float, default=60, help="seconds without a heartbeat until a run is lost (%(default)s)"
    )
    parser.add_argument("--report", action="store_true", help="only write the report of what is finished")
    parser.add_argument("--dry-run", action="store_true", help="only print the cells and the estimated time")
    arguments = parser.parse_intermixed_args()
    if arguments.workers is not None and arguments.workers < 1:
        exit_with_error(f"--workers {arguments.workers}: expected 1 or more")
    if not arguments.lease >= 1:
        exit_with_error(f"--lease {arguments.lease:g}: expected 1 or more seconds")
    try:
        study = load_study(arguments.study, arguments.base, arguments.overrides, arguments.output)
        if not (arguments.report or arguments.dry_run) and make_missing_data(study):
            # The hashes of the cells contain that of the data.
            study = load_study(arguments.study, arguments.base, arguments.overrides, arguments.output)
        if arguments.report:
            check_data(study)
            from retina.study.trial_storage import check_same_study

            check_same_study(study, arguments.storage)  # the report of other settings would replace it, without cells
            study.folder.mkdir(parents=True, exist_ok=True)
            return 0 if report(study) else 1
        signal.signal(
            signal.SIGTERM, signal.default_int_handler
        )  # clean up as after Ctrl-C, also in the time measurement
        return run(study, arguments)
    except KeyboardInterrupt:
        return 1
    except ConfigError as error:
        exit_with_error(str(error))
    except OSError as error:
        exit_with_error(f"{error.filename or arguments.output}: {error.strerror}")


def run(study: Study, arguments: argparse.Namespace) -> int:
    from retina.study.cells import LEDGER, code_digest
    from retina.study.estimate import check_disk_space, estimate_seconds, measure_step_time
    from retina.study.launch import Machine
    from retina.study.loop import Runner
    from retina.study.trial_storage import TrialStorage

    machine = Machine.detect(arguments.workers, study.devices, Path(__file__).resolve().parent)
    open_cells = [cell for cell in study.cells if not study.is_done(cell)]
    num_cells = len(study.cells)
    num_finished = num_cells - len(open_cells)
    print(f"{study.name}: {num_cells} cells, {num_finished} finished; {machine}", flush=True)
    code = code_digest()
    if other_code := [cell for cell in study.cells if cell.has_other_code(code)]:
        storage = "use a new --storage" if arguments.storage else f"delete {study.folder / LEDGER}"
        print(
            f"{len(other_code)} of them were finished by other or unknown code, and keep their numbers; to run them "
            f"again, delete their folders and {storage}, or give another --output"
        )
    if arguments.dry_run:
        for cell in study.cells:
            finished = "  (finished by other code)" if cell in other_code else "  (finished)"
            print(f"  {cell.key}  {cell.label}{'' if cell in open_cells else finished}")
        if missing := study.missing_data():
            made = all(cell.config.data.shapes for cell in study.cells)
            for settings in {cell.config.data.shapes for cell in study.cells} - {None}:
                load_settings(settings)  # raises for a wrong one
            print("\n".join(missing))
            print("the data is made when the study starts" if made else "the study needs this data to start")
            print("the time, and the keys of the cells, are known when the data is there")
            return 0
    check_data(study)
    if arguments.storage and any(cell.config.train.precision == "auto" for cell in study.cells):
        raise StudyError("machines may choose different precisions: with --storage give train.precision=bf16 or fp32")
    study.folder.mkdir(parents=True, exist_ok=True)
    trial_storage = None if arguments.dry_run else TrialStorage(study, arguments.storage, arguments.lease)
    checkpoint_bytes = 0
    if open_cells:
        seconds = estimate_seconds(study, machine.workers)
        steps = open_cells[0].config.train.steps
        if seconds is None and (arguments.dry_run or steps >= 100):
            step_seconds, checkpoint_bytes = measure_step_time(study, machine)
            cell_time = timedelta(seconds=round(step_seconds * steps))
            print(f"{step_seconds:.3f} s per step, {cell_time} for a cell of {steps} steps, without evaluation")
            seconds = step_seconds * sum(cell.config.train.steps for cell in open_cells) / machine.workers
        if seconds is not None:
            source = f", as long as the {num_finished} finished ones took" if num_finished else ""
            print(f"about {timedelta(seconds=round(seconds))} for {len(open_cells)} cells{source}", flush=True)
        check_disk_space(study, checkpoint_bytes)
    if trial_storage is None:
        return 0
    try:
        finished = Runner(study, trial_storage, machine).run()
    except StudyError:
        report(study)
        raise
    return 0 if report(study) and finished else 1


def make_missing_data(study: Study) -> bool:
    """Make the generated data sets of the cells where they are missing; True if one was made."""
    from retina.shapes import make_missing_shapes

    data_settings = {(data.shapes, data.train_annotations): data for data in (cell.config.data for cell in study.cells)}
    try:
        return sum(make_missing_shapes(data) for data in data_settings.values()) > 0
    except FileExistsError as error:
        raise StudyError(str(error)) from None


def check_data(study: Study) -> None:
    """Raise StudyError for missing data. The names of the cells' folders depend on the annotation files."""
    if missing := study.missing_data():
        raise StudyError("\n".join([*missing, f"the first lines of {study.base} tell how to get the data"]))


def report(study: Study) -> bool:
    """Write the report of the results so far and print its main table; False if it cannot be written."""
    from retina.study.report import terminal_table, write_report

    try:
        with file_lock(study.folder / ".lock"):  # another process of the study may write it too
            paths = write_report(study)
    except OSError as error:
        print(f"no report: {error}", file=sys.stderr)
        return False
    for path in paths:
        print(path)
    print(terminal_table(study))
    return True


if __name__ == "__main__":
    raise SystemExit(main())
