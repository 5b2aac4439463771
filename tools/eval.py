"""Evaluate a detector: python tools/eval.py CHECKPOINT [section.key=value ...] [--output DIR]

or python tools/eval.py CONFIG [section.key=value ...] [--checkpoint SOURCE]. The checkpoint alone is enough, also as
--checkpoint: it has its config, as has a file of tools/export.py. Prints the twelve COCO numbers and the AP of each
class, and writes them and the scores at which to use the detector to metrics.json, and detections.json (COCO results).
With --time it also measures what an image costs, and adds it to metrics.json: "milliseconds", "gflops", "parameters",
"peak_memory_mb". With --report it also writes report.html: where the AP is lost, how sure it is, at which score to use
the detector, and its worst errors.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retina.command_line import config_parser, exit_with_error, file_path, load_config_or_exit, with_path_errors
from retina.config import Config
from retina.config_file import ConfigError, changed_detector_keys, load_config, override_config
from retina.file_suffixes import EXPORT_SUFFIXES
from retina.parent_process import end_with_parent

if TYPE_CHECKING:
    from retina.analysis.matches import Matches
    from retina.analysis.results_file import Results
    from retina.data.coco import CocoDataset
    from retina.export import ExportedDetector
    from retina.model.weights import Weights


@with_path_errors
def main() -> int:
    """Exit status: 0 with the table printed, 1 if data or weights cannot be used or scorers disagree, 2 for usage."""
    parser = config_parser(__doc__, config_is_optional=True)
    parser.add_argument(
        "--checkpoint",
        type=os.path.expanduser,
        metavar="SOURCE",
        help="a checkpoint, a run folder, COCO_V1, COCO_V2, weights of another framework, or an exported file (.onnx, "
        ".pt2); default: the run of CONFIG",
    )
    parser.add_argument(
        "--output",
        type=file_path,
        help="folder to write to; default: the run folder; of an exported FILE: FILE_eval; of --detections: theirs",
    )
    parser.add_argument("--tta", action="store_true", help="also mirrored and at the sizes of detect.tta_scales: slow")
    parser.add_argument("--time", action="store_true", help="measure milliseconds, operations and memory at batch 1")
    parser.add_argument("--report", action="store_true", help="write report.html, report.json and report/*.csv, too")
    parser.add_argument("--detections", type=file_path, help="COCO results to evaluate instead of running a detector")
    parser.add_argument("--end-with-parent", action="store_true", help="end when standard input closes, for ablate.py")
    arguments = parser.parse_intermixed_args()
    if arguments.end_with_parent:
        end_with_parent()
    file, overrides = arguments.config, arguments.overrides
    if file and "=" in file and not Path(file).exists():  # only overrides were given
        file, overrides = None, [file, *overrides]
    if file and arguments.checkpoint is None and Path(file).suffix not in (".yaml", ".yml"):
        file, arguments.config, arguments.checkpoint = None, None, file
    if file is None and arguments.checkpoint is None:
        exit_with_error("give a CONFIG or a CHECKPOINT")
    if arguments.detections and (arguments.checkpoint or arguments.time or arguments.tta):
        exit_with_error(
            "--detections FILE needs a CONFIG and no detector: a CHECKPOINT, --time and --tta cannot be given with it"
        )
    if arguments.output and arguments.output.exists() and not arguments.output.is_dir():
        exit_with_error(f"--output: {arguments.output} is a file, expected a folder")
    if arguments.tta and arguments.time:
        exit_with_error("--time measures one pass over an image, and --tta makes several; give one of the two")
    if is_exported(arguments.checkpoint) and (arguments.time or arguments.tta):
        exit_with_error("--time and --tta need a checkpoint; benchmarks/export.py measures exported files")
    config = load_config_or_exit(file, overrides) if file else None
    return evaluate(arguments, config, overrides)


def evaluate(arguments: argparse.Namespace, config: Config | None, overrides: list[str]) -> int:
    """Run the detector, or read its detections; print and write the numbers. Returns the exit status.

    Without `config` the settings are those of the checkpoint and the overrides.
    """
    from retina import evaluate as library  # torch is imported late, so that a usage error is reported at once
    from retina.analysis.matches import match_detections
    from retina.analysis.results_file import ResultsError, read_results, results_columns
    from retina.analysis.scoring import confirm, score
    from retina.analysis.thresholds import recommended_scores
    from retina.data.annotations import DataError
    from retina.data.coco import CocoDataset
    from retina.export import ExportedDetector, ExportError
    from retina.model import CheckpointError, WeightsError

    hint = "" if config else "; the settings of the checkpoint name this data, relative to the current folder"
    given = arguments.detections
    source, results, unreadable, cost = str(given), None, {}, {}
    try:
        weights, config, folder = find_detector(arguments, config, overrides)
        dataset = CocoDataset(config.data.val_annotations, config.data.val_images)
        output = arguments.output or folder
        file = weights.file if isinstance(weights, ExportedDetector) else given or weights.source
        check_own_results(output, config, file, arguments.tta)
        if weights:
            make_folder(output)
            source, results, unreadable, cost = run_detector(weights, config, dataset, arguments.tta, arguments.time)
            columns = results_columns(results, dataset.file)
        else:
            columns = read_results(given, dataset.file)
    except DataError as error:
        print(f"error: {error}{hint}", file=sys.stderr)
        return 1
    except (ConfigError, ResultsError, CheckpointError, WeightsError, ExportError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for reason in unreadable.values():
        print(f"not evaluated: {reason}")
    evaluation, disagreement = confirm(score(dataset.file, columns, unreadable), dataset.file, columns, unreadable)
    excluded = {"excluded_images": len(unreadable)} if unreadable else {}
    matches = match_detections(dataset.file, columns, unreadable)
    metrics = evaluation.metrics | cost | excluded | {"score_threshold": recommended_scores(matches)}
    print(f"{library.format_metrics(metrics)}\n")  # before anything is written, which may fail
    try:
        write_results(output, metrics, results)
        print(f"{output / 'metrics.json'}\n{given or output / 'detections.json'}")
        if arguments.report:
            command = predict_command(arguments, weights, config)
            of_report = write_report(output, dataset, columns, matches, metrics, source, command)
            disagreement = "\nERROR: ".join(filter(None, [disagreement, of_report]))
        elif (output / "report.html").exists():
            print(f"{output / 'report.html'} is of an earlier evaluation; --report writes it again")
    except OSError as error:
        print(f"error: --output: {error.filename or output}: {error.strerror}", file=sys.stderr)
        return 1
    except DataError as error:
        print(f"error: --report: {error}", file=sys.stderr)
        return 1
    if disagreement:
        print(f"ERROR: {disagreement}", file=sys.stderr)
    return 1 if disagreement else 0


def find_detector(
    arguments: argparse.Namespace, config: Config | None, overrides: list[str]
) -> tuple[Weights | ExportedDetector | None, Config, Path]:
    """The weights, or None if detections are given; the settings; and the folder to write to without --output."""
    from retina import evaluate as library
    from retina.export import ExportedDetector

    if arguments.detections:
        assert config is not None  # main() asks for a CONFIG or a CHECKPOINT, and takes no CHECKPOINT beside these
        return None, config, arguments.detections.parent
    if is_exported(arguments.checkpoint):
        exported = ExportedDetector(Path(arguments.checkpoint))
        folder = exported.file.parent / f"{exported.file.name}_eval"
        return exported, config or override_config(exported.config, overrides), folder
    known = [config.model.backbone] if config else []  # otherwise the weights say it
    weights = library.find_weights(arguments.checkpoint or library.default_source(config), *known)
    if config:
        return weights, config, config.run_dir
    config = override_config(library.trained_config(weights), overrides)
    return weights, config, folder_of(weights.source) or config.run_dir


def check_own_results(output: Path, config: Config, source: str | Path, tta: bool) -> None:
    """End with a usage error if `output` is the folder of a run with another detector, other settings or other data.

    Its results would be overwritten, and tools/compare.py would take the new ones for those of the run. `source` is
    what is evaluated: a checkpoint, an exported file, or COCO results.
    """
    if not all((output / name).exists() for name in ("config.yaml", "metrics.csv")):  # not the folder of a run
        return
    run = load_config(output / "config.yaml")
    before, after = run.flat(), config.flat()
    data = ("data.val_annotations", "data.val_images")
    changed = [key for key in data if os.path.realpath(before[key]) != os.path.realpath(after[key])]
    different = [f"{key}={after[key]}" for key in (*changed, *changed_detector_keys(run, config))]
    file = Path(source).resolve()
    if file.parent != output.resolve() or (file.suffix != ".pt" and file.name != "detections.json"):
        different.append(str(source))
    if tta:
        different.append("--tta")
    if different:
        exit_with_error(
            f"{output} has the results of its run; for those with {', '.join(different)} give another --output"
        )


def make_folder(output: Path) -> None:
    """Called before the detector runs, so that a wrong --output does not cost an evaluation."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        exit_with_error(f"--output: {error.filename or output}: {error.strerror}")


def write_results(output: Path, metrics: dict[str, Any], results: list[dict[str, Any]] | None) -> None:
    from retina.atomic_files import write_text

    output.mkdir(parents=True, exist_ok=True)
    if results is not None:
        write_text(output / "detections.json", json.dumps(results))
    write_text(output / "metrics.json", json.dumps(metrics, indent=1))


def write_report(
    output: Path,
    dataset: CocoDataset,
    columns: Results,
    matches: Matches,
    metrics: dict[str, Any],
    source: str,
    command: tuple[list[str], str],
) -> str:
    """Write the report. Returns an error message if its numbers differ."""
    from retina.analysis import page  # here, because few evaluations need the figures
    from retina.analysis.report import analyze
    from retina.data.coco import read_image

    analysis = analyze(dataset.file, columns, matches, metrics, metrics.get("milliseconds"))
    description = f"{source}; {dataset.annotations}"
    print(page.write_report(analysis, output, dataset.folder, read_image, description, *command))
    return analysis.disagreement


def run_detector(
    weights: Weights | ExportedDetector, config: Config, dataset: CocoDataset, tta: bool, timed: bool
) -> tuple[str, list[dict[str, Any]], dict[int, str], dict[str, Any]]:
    """The source of the weights, the results, the images that could not be read, and what an image costs if `timed`."""
    from tqdm import tqdm

    from retina import evaluate as library
    from retina.device import compile_network
    from retina.export import ExportedDetector, exported_on_dataset

    progress = partial(tqdm, unit="batch", disable=not sys.stderr.isatty())
    if isinstance(weights, ExportedDetector):
        print(f"{weights.file}: {weights.describe()}\n{len(dataset.records)} images of {dataset.folder}")
        return weights.describe(), *exported_on_dataset(weights, dataset, config, progress), {}
    detector = library.build_detector(weights, config, dataset.categories)
    if config.train.compile:
        compile_network(detector.model, detector.device)
    print(f"{detector.source}\n{len(dataset.records)} images of {dataset.folder} on {detector.device}")
    infer = library.inference_with_tta if tta else library.inference_on_dataset
    results, unreadable = infer(detector.model, dataset, config, detector.device, progress)
    if not timed:
        return detector.source, results, unreadable, {}
    cost = library.measure_cost(detector.model, dataset, config, detector.device)
    print(library.describe_cost(cost, detector.device))
    return detector.source, results, unreadable, cost._asdict()


def predict_command(
    arguments: argparse.Namespace, weights: Weights | ExportedDetector | None, config: Config
) -> tuple[list[str], str]:
    """The words of the command that detects with what was evaluated; or none, and a sentence that says why."""
    from retina import evaluate as library
    from retina.export import ExportedDetector

    if weights is None:
        return [], ""
    if arguments.tta or isinstance(weights, ExportedDetector):
        what = "test-time augmentation" if arguments.tta else "exported files"
        return [], f"No command is given here, because tools/predict.py has no {what}."
    command, candidates = ["python", "tools/predict.py"], []
    with contextlib.suppress(ConfigError):  # weights whose settings are not known
        candidates.append(([weights.source, "IMAGE_OR_FOLDER"], library.trained_config(weights)))
    if arguments.config and Path(arguments.config).exists():
        words = [arguments.config, "IMAGE_OR_FOLDER", "--checkpoint", weights.source]
        candidates.append((words, load_config(arguments.config)))
    changed: list[str] = []
    for words, settings in candidates:
        changed = changed_detector_keys(settings, config)
        if not changed:
            return [*command, *words], ""
    listed = ", ".join(f"{key}={config.flat()[key]}" for key in changed)
    return [], f"The detector was evaluated with {listed}. tools/predict.py takes such settings from a CONFIG only."


def is_exported(checkpoint: str | None) -> bool:
    return checkpoint is not None and Path(checkpoint).suffix in EXPORT_SUFFIXES.values()


def folder_of(source: str) -> Path | None:
    """The folder of a checkpoint; None for weights that are downloaded."""
    path = Path(source)
    if path.is_dir():
        return path
    return path.parent if path.exists() else None


if __name__ == "__main__":
    raise SystemExit(main())
