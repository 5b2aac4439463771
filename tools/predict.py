"""Detect on images: python tools/predict.py CONFIG --checkpoint FILE IMAGE_OR_FOLDER ... [--output DIR] [--score 0.3].

Writes each image with its boxes drawn, and predictions.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from retina.analysis.thresholds import LowestScores, lowest_scores
from retina.command_line import exit_with_error, load_config_or_exit
from retina.config_file import ConfigError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}


def main() -> int:
    """Exit status: 0 with an image written, 1 if none could be or the weights cannot be used, 2 for a usage error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="the configuration that the checkpoint was trained with")
    parser.add_argument("inputs", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER")
    parser.add_argument("--checkpoint", type=Path, help="default: best.pt of the run folder, or its last.pt")
    parser.add_argument("--output", type=Path, default=Path("predictions"), help="folder to write to (%(default)s)")
    parser.add_argument(
        "--score", default="0.3", help="lowest to show (%(default)s), or metrics.json of eval.py --report"
    )
    arguments = parser.parse_intermixed_args()
    config = load_config_or_exit(arguments.config)
    lowest = lowest_scores_or_exit(arguments.score)
    if missing := [str(path) for path in arguments.inputs if not path.exists()]:
        exit_with_error(f"no such image or folder: {', '.join(missing)}")
    files = [file for path in arguments.inputs for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    if not (files := [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES or file in arguments.inputs]):
        exit_with_error(f"no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in {', '.join(map(str, arguments.inputs))}")

    import torch  # imported late, so that a usage error is reported at once
    from PIL import Image

    from retina.atomic_files import write_text
    from retina.data.annotations import DataError
    from retina.data.coco import read_image
    from retina.detect import Detections
    from retina.device import pick_device
    from retina.evaluate import detections_to_dict, load_detector, predict
    from retina.model import CheckpointError, WeightsError
    from retina.plots import draw_boxes

    device = pick_device()
    try:
        model, categories, source = load_detector(config, arguments.checkpoint, None, device)
    except (CheckpointError, ConfigError, WeightsError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(source)
    scores = torch.tensor(lowest.of([name for _, name in categories]))
    arguments.output.mkdir(parents=True, exist_ok=True)
    inputs, written = {file.resolve() for file in files}, set()
    entries = []
    for file in files:
        try:
            image = read_image(file)
        except DataError as error:
            print(f"skipped: {error}", file=sys.stderr)
            continue
        detections = predict(model, image, config, device)
        kept = detections.scores >= scores[detections.labels]
        detections = Detections(*(part[kept] for part in detections))
        names = [categories[label][1] for label in detections.labels.tolist()]
        drawn = draw_boxes(Image.fromarray(image), detections.boxes.tolist(), names, detections.scores.tolist())
        path = free_path(arguments.output / f"{file.stem}.png", written | inputs)
        written.add(path.resolve())
        drawn.save(path)
        entries.append(detections_to_dict(file, detections, categories))
        print(f"{path}: {len(names)} objects")
    write_text(arguments.output / "predictions.json", json.dumps(entries, indent=1))
    print(arguments.output / "predictions.json")
    return 0 if entries else 1


def lowest_scores_or_exit(given: str) -> LowestScores:
    """`lowest_scores`, but an error is printed and the process exits with status 2."""
    try:
        return lowest_scores(given)
    except ValueError as error:
        exit_with_error(f"--score: {error}")


def free_path(path: Path, taken: set[Path]) -> Path:
    """`path`, or the first of path_2, path_3, ... that is not in `taken` (the inputs and the files already written)."""
    number, free = 1, path
    while free.resolve() in taken:
        number += 1
        free = path.with_stem(f"{path.stem}_{number}")
    return free


if __name__ == "__main__":
    raise SystemExit(main())
