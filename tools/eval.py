"""Evaluate a detector: python tools/eval.py CONFIG [section.key=value ...] [--checkpoint FILE] [--output DIR].

Prints the twelve COCO numbers and the AP of each class, and writes metrics.json and detections.json (COCO results).
With --time it also measures the milliseconds per image, "milliseconds" in metrics.json. With --report it also writes
report.html: where the AP is lost, how sure it is, at which score to use the detector, and its worst errors.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

from retina.command_line import config_parser, exit_with_error, load_config_or_exit
from retina.config import Config
from retina.config_file import ConfigError
from retina.parent_process import end_with_parent


def main() -> int:
    """Exit status: 0 with the table printed, 1 if data or weights cannot be used or scorers disagree, 2 for usage."""
    parser = config_parser(__doc__)
    parser.add_argument(
        "--checkpoint", type=Path, help="ours or torchvision's; default: best.pt of the run folder, or its last.pt"
    )
    parser.add_argument("--output", type=Path, help="folder to write to; default: the run folder")
    parser.add_argument("--time", action="store_true", help="measure the milliseconds per image at batch 1, too")
    parser.add_argument("--report", action="store_true", help="write report.html, report.json and report/*.csv, too")
    parser.add_argument("--detections", type=Path, help="COCO results to evaluate instead of running a detector")
    parser.add_argument("--end-with-parent", action="store_true", help="end when standard input closes, for ablate.py")
    arguments = parser.parse_intermixed_args()
    if arguments.end_with_parent:
        end_with_parent()
    if arguments.detections and (arguments.checkpoint or arguments.time):
        exit_with_error("--detections FILE needs no detector, so --checkpoint and --time cannot be given with it")
    return evaluate(arguments, load_config_or_exit(arguments.config, arguments.overrides))


def evaluate(arguments: argparse.Namespace, config: Config) -> int:
    """Run the detector, or read its detections; print and write the numbers. Returns the exit status."""
    from tqdm import tqdm  # torch is imported late, so that a usage error is reported at once

    from retina.analysis.page import write_report
    from retina.analysis.report import analyze
    from retina.analysis.results_file import ResultsError, read_results, results_columns
    from retina.atomic_files import write_text
    from retina.data.annotations import DataError
    from retina.data.coco import CocoDataset, read_image
    from retina.device import compile_network, pick_device
    from retina.evaluate import (
        final_evaluation,
        format_metrics,
        inference_on_dataset,
        load_detector,
        measure_latency,
    )
    from retina.model import CheckpointError, WeightsError

    device = pick_device()
    progress = partial(tqdm, unit="batch", disable=not sys.stderr.isatty())
    try:
        dataset = CocoDataset(config.data.val_annotations, config.data.val_images)
        if arguments.detections:
            read_results(arguments.detections, dataset.file)  # refuses what cannot be scored
            results, unreadable, timing = json.loads(arguments.detections.read_text()), {}, {}
            source = str(arguments.detections)
        else:
            categories = list(zip(dataset.category_ids, dataset.names, strict=True))
            model, _, source = load_detector(config, arguments.checkpoint, categories, device)
            if config.train.compile:
                compile_network(model, device)
            print(f"{source}\n{len(dataset.records)} images of {dataset.folder} on {device}")
            results, unreadable = inference_on_dataset(model, dataset, config, device, progress)
            timing = {"milliseconds": measure_latency(model, dataset, config, device)} if arguments.time else {}
    except (ConfigError, DataError, ResultsError, CheckpointError, WeightsError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for reason in unreadable.values():
        print(f"not evaluated: {reason}")
    evaluation, disagreement = final_evaluation(results, dataset, exclude=unreadable)
    metrics = evaluation.metrics | timing
    output = arguments.output or (arguments.detections.parent if arguments.detections else config.run_dir)
    output.mkdir(parents=True, exist_ok=True)
    if not arguments.detections:
        write_text(output / "detections.json", json.dumps(results))
    if arguments.report:
        report = analyze(dataset.file, results_columns(results, dataset.file), unreadable, metrics.get("milliseconds"))
        metrics["score_threshold"] = report.thresholds()
    write_text(output / "metrics.json", json.dumps(metrics, indent=1))
    if timing:
        print(f"{timing['milliseconds']:.1f} ms per image at batch 1, from normalization to NMS, on {device}")
    print(
        f"{format_metrics(metrics)}\n\n{output / 'metrics.json'}\n{arguments.detections or output / 'detections.json'}"
    )
    if arguments.report:
        weights = f" --checkpoint {arguments.checkpoint}" if arguments.checkpoint else ""
        command = f"python tools/predict.py {arguments.config}{weights} IMAGE_OR_FOLDER"
        print(write_report(report, output, dataset.folder, read_image, f"{source}; {dataset.annotations}", command))
    if disagreement:
        print(disagreement, file=sys.stderr)
    return 1 if disagreement else 0


if __name__ == "__main__":
    raise SystemExit(main())
