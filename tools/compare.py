"""Is B better than A? python tools/compare.py RUN_A RUN_B, or for several seeds --a RUN RUN ... --b RUN RUN ...

A RUN is a run folder with detections.json, or a file in COCO's results format (with --annotations FILE). Prints the AP
of both, the difference by metric and class with its 95 % interval, and what follows. Writes comparison.html with the
images that changed most, comparison.json, comparison.csv and images.csv.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from retina.command_line import exit_with_error, file_path, with_path_errors
from retina.plural import plural

MAX_CLASSES = 30  # in the terminal


@with_path_errors
def main() -> int:
    """Exit status: 0 with the table printed, whatever it says; 1 if another scorer gives other numbers; 2 if the runs
    cannot be compared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=file_path, metavar="RUN", help="A and B")
    parser.add_argument(
        "--a", nargs="+", type=file_path, metavar="RUN", default=[], help="trainings that differ in the seed"
    )
    parser.add_argument("--b", nargs="+", type=file_path, metavar="RUN", default=[], help="those of the other side")
    parser.add_argument("--annotations", type=file_path, metavar="FILE", help="default: as in the runs' config.yaml")
    parser.add_argument(
        "--images", type=file_path, metavar="FOLDER", help="for the pictures; default: as for --annotations"
    )
    parser.add_argument(
        "--output", type=file_path, default=Path("runs/compare"), help="folder to write to (%(default)s)"
    )
    arguments = parser.parse_args()
    a, b = arguments.a, arguments.b
    if arguments.runs and (a or b):
        exit_with_error(f"{arguments.runs[0]}: give RUN_A RUN_B, or --a RUN ... --b RUN ..., not both")
    if len(arguments.runs) == 2:
        a, b = arguments.runs[:1], arguments.runs[1:]
    if not a or not b:
        given = plural(len(arguments.runs), "run")
        if not arguments.runs:
            given = f"{plural(len(a), 'run')} for --a and {len(b)} for --b"
        exit_with_error(f"given {given}; expected RUN_A RUN_B, or at least one run for each of --a and --b")

    from retina.analysis.compared_runs import compare_runs, rows_of  # late, so that a usage error is reported at once
    from retina.analysis.comparison_page import write_comparison
    from retina.analysis.comparison_text import HEAD, describe_sides, limits, table_rows, verdict
    from retina.analysis.results_file import ResultsError
    from retina.analysis.runs import read_runs, repeated_run
    from retina.config_file import ConfigError
    from retina.data.annotations import DataError
    from retina.data.coco import read_image
    from retina.plots.document import Table, to_text

    if repeated := repeated_run([*a, *b]):
        exit_with_error(f"{repeated} is given twice; each run counts once, and on one side")
    try:
        comparison = compare_runs(read_runs([a, b], arguments.annotations, arguments.images))
    except (ConfigError, DataError, ResultsError) as error:
        exit_with_error(str(error))
    rows = rows_of(comparison)
    classes = sum(row["kind"] == "class" for row in rows)
    print("\n".join(describe_sides(comparison)))
    print(to_text(Table(HEAD, table_rows(rows[: len(rows) - max(classes - MAX_CLASSES, 0)]))))
    if classes > MAX_CLASSES:
        print(f"... and {classes - MAX_CLASSES} less frequent classes")
    print("\n".join(["", verdict(comparison), *limits(comparison), ""]))
    try:
        print(write_comparison(comparison, arguments.output, read_image))
    except OSError as error:
        exit_with_error(f"--output: {arguments.output}: {error.strerror}")
    if comparison.disagreement:
        print(f"ERROR: {comparison.disagreement}", file=sys.stderr)
    return 1 if comparison.disagreement else 0


if __name__ == "__main__":
    raise SystemExit(main())
