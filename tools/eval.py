"""Evaluate a detector: python tools/eval.py CONFIG [section.key=value ...] [--checkpoint FILE] [--output DIR].

Prints the twelve COCO numbers and the AP of each class, and writes metrics.json and detections.json (COCO results).
With --time it also measures the milliseconds per image, "milliseconds" in metrics.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from retina.command_line import config_parser, load_config_or_exit
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
    parser.add_argument("--end-with-parent", action="store_true", help="end when standard input closes, for ablate.py")
    arguments = parser.parse_intermixed_args()
    if arguments.end_with_parent:
        end_with_parent()
    config = load_config_or_exit(arguments.config, arguments.overrides)

    from tqdm import tqdm  # torch is imported late, so that a usage error is reported at once

    from retina.atomic_files import write_text
    from retina.data.annotations import DataError
    from retina.data.coco import CocoDataset
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
    try:
        dataset = CocoDataset(config.data.val_annotations, config.data.val_images)
        categories = list(zip(dataset.category_ids, dataset.names, strict=True))
        model, _, source = load_detector(config, arguments.checkpoint, categories, device)
        if config.train.compile:
            compile_network(model, device)
        print(f"{source}\n{len(dataset.records)} images of {dataset.folder} on {device}")
        results, unreadable = inference_on_dataset(
            model, dataset, config, device, lambda batches: tqdm(batches, unit="batch", disable=not sys.stderr.isatty())
        )
        timing = {"milliseconds": measure_latency(model, dataset, config, device)} if arguments.time else {}
    except (ConfigError, DataError, CheckpointError, WeightsError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for reason in unreadable.values():
        print(f"not evaluated: {reason}")
    evaluation, disagreement = final_evaluation(results, dataset, exclude=unreadable)
    metrics = evaluation.metrics | timing
    output = arguments.output or config.run_dir
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "detections.json", json.dumps(results))
    write_text(output / "metrics.json", json.dumps(metrics, indent=1))
    if timing:
        print(f"{timing['milliseconds']:.1f} ms per image at batch 1, from normalization to NMS, on {device}")
    print(f"{format_metrics(metrics)}\n\n{output / 'metrics.json'}\n{output / 'detections.json'}")
    if disagreement:
        print(disagreement, file=sys.stderr)
    return 1 if disagreement else 0


if __name__ == "__main__":
    raise SystemExit(main())
