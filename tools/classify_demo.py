"""Four losses on imbalanced classes: python tools/classify_demo.py [--output docs/results] [--seeds 5] [--steps 800].

Cross entropy (CE) and the focal loss, each with and without class weights, train the same small network from the same
weights on the same batches. Prints precision, recall, macro F1 and calibration with their noise over the seeds, then
what these numbers say, and writes classify_demo.png. Needs scikit-learn, on the CPU less than a minute.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import textwrap
from pathlib import Path

from retina.classify_demo import STEPS, conclusions, describe, draw_figure, format_table, make_problems, run_experiment
from retina.command_line import exit_with_error, file_path


def main() -> int:
    """Exit status: 0 with the path of the picture printed, 2 for a usage error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=file_path, default=Path("docs/results"), help="folder of the picture (%(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=5, help="runs of each loss on each problem (%(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of a run (%(default)s)")
    arguments = parser.parse_args()
    for name in ("seeds", "steps"):
        if getattr(arguments, name) < 1:
            exit_with_error(f"--{name}: given {getattr(arguments, name)}, expected at least 1")
    if importlib.util.find_spec("sklearn") is None:
        exit_with_error("this demonstration needs scikit-learn: pip install scikit-learn")
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=arguments.output).close()
    except OSError as error:
        exit_with_error(f"--output {arguments.output}: not a folder to write to: {error.strerror}")

    results = [run_experiment(problem, arguments.seeds, arguments.steps) for problem in make_problems()]
    for result in results:
        print(f"\n{describe(result.problem)}\n\n{format_table(result.scores)}")
    print("\nWhat the numbers say\n")
    for line in conclusions({result.problem.title: result.scores for result in results}):
        print(textwrap.fill(line, 118, initial_indent="- ", subsequent_indent="  "))
    print(f"\n{draw_figure(results, arguments.output / 'classify_demo.png')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
