"""Detect on images: python tools/predict.py CHECKPOINT_OR_CONFIG IMAGE_OR_FOLDER ... [--output DIR] [--score 0.3].

Folders are searched with all folders in them, also linked ones, but not hidden ones and the output folder. Files
with other endings than those of images are counted; an image given by its own name may have any ending. Writes each
image with its boxes drawn, and predictions.json: a COCO file with the images, their detections as annotations (with
"score") and the categories, which annotation tools can import. Its file names are relative to the folder that has all
inputs. A file or folder that cannot be read is named at the end; the others are done. Only what an earlier call wrote
is replaced: a drawing gets a number beside another file of its name.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retina.analysis.thresholds import ScoreThresholds, score_thresholds
from retina.command_line import exit_with_error, file_path, load_config_or_exit, with_path_errors
from retina.config_file import ConfigError
from retina.data.annotations import distinct_names
from retina.file_search import images_in
from retina.file_suffixes import IMAGE_SUFFIXES
from retina.plural import plural

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from retina.evaluate import Detector, ImageDetections

PREDICTIONS = "predictions.json"
DESCRIPTION = "detections of "  # its info.description begins with it: only such a file is replaced
SOFTWARE = "retina tools/predict.py"  # in each drawing, for the same reason
SMALLEST_SCORE = 1e-6  # a detector takes scores above 0 only


@with_path_errors
def main() -> int:
    """Exit status: 0 with all images written, 1 if an image or a folder could not be read, an image could not be
    written or the weights cannot be used, 2 for a usage error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "detector",
        type=os.path.expanduser,
        metavar="CHECKPOINT_OR_CONFIG",
        help="a checkpoint, a run folder, COCO_V1, COCO_V2; or the YAML file of a run, with its best.pt or last.pt",
    )
    parser.add_argument("inputs", nargs="+", type=file_path, metavar="IMAGE_OR_FOLDER")
    parser.add_argument(
        "--checkpoint",
        type=os.path.expanduser,
        metavar="SOURCE",
        help="with a CONFIG: these weights, not those of its run",
    )
    parser.add_argument(
        "--output", type=file_path, default=Path("predictions"), help="folder to write to (%(default)s)"
    )
    parser.add_argument(
        "--score",
        type=os.path.expanduser,
        default="0.3",
        help="show those above it (%(default)s), or metrics.json of eval.py",
    )
    arguments = parser.parse_intermixed_args()
    is_config = Path(arguments.detector).suffix in (".yaml", ".yml")
    config = load_config_or_exit(arguments.detector) if is_config else None
    if arguments.checkpoint and config is None:
        exit_with_error("--checkpoint needs a CONFIG before the images; a checkpoint alone takes its place")
    thresholds = score_thresholds_or_exit(arguments.score)
    files, root, unsearched = find_images(arguments.inputs, arguments.output)
    check_output(arguments.output, files, root, [path for path in arguments.inputs if path.is_dir()])

    from retina.atomic_files import write_text  # torch is imported late, so that a usage error is reported at once
    from retina.evaluate import default_source, load
    from retina.model import CheckpointError, WeightsError

    try:
        source = arguments.detector if config is None else arguments.checkpoint or default_source(config)
        detector = load(source, config)
    except (CheckpointError, ConfigError, WeightsError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(detector.source)
    check_classes(thresholds, arguments.score, detector)
    try:
        images, results, unreadable = detect(detector, files, root, arguments.output, thresholds)
        contents = coco_file(detector.source, images, results, detector.categories)
        arguments.output.mkdir(parents=True, exist_ok=True)
        write_text(arguments.output / PREDICTIONS, json.dumps(contents, indent=1))
    except OSError as error:
        print(f"error: --output: {error.filename or arguments.output}: {error.strerror}", file=sys.stderr)
        return 1
    print(arguments.output / PREDICTIONS)
    if unreadable:
        print(f"{len(unreadable)} of {len(files)} files could not be read:", *unreadable, sep="\n", file=sys.stderr)
    for reason in unsearched:
        print(reason, file=sys.stderr)
    return 1 if unreadable or unsearched else 0


def detect(
    detector: Detector, files: list[Path], root: Path, output: Path, thresholds: ScoreThresholds
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    """Draw the objects of each file; returns the images and results as COCO entries, and what could not be read."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from retina.data.annotations import DataError
    from retina.data.coco import read_image
    from retina.plots import draw_boxes

    taken = {file.resolve() for file in files}
    mark = PngInfo()
    mark.add_text("Software", SOFTWARE)
    images: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    unreadable = []
    for file in files:
        try:
            image = read_image(file)
        except DataError as error:
            unreadable.append(str(error))
            continue
        found = detect_above(detector, image, thresholds)
        drawn = draw_boxes(Image.fromarray(image), found.boxes.tolist(), found.names, found.scores.tolist())
        name = file.relative_to(root)
        path = free_path(output / name.with_suffix(".png"), taken)
        taken.add(path.resolve())
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.save(path, pnginfo=mark)
        images.append(
            {"id": len(images) + 1, "file_name": name.as_posix(), "width": drawn.width, "height": drawn.height}
        )
        results += found.coco_results(len(images))
        print(f"{path}: {plural(len(found), 'object')}")
    return images, results, unreadable


def detect_above(detector: Detector, image: NDArray[np.uint8], thresholds: ScoreThresholds) -> ImageDetections:
    """The objects of each class above its threshold."""
    scores = thresholds.of(distinct_names(detector.categories))
    below_usual = min(scores) < detector.config.detect.score_threshold
    found = detector(image, score=max(min(scores), SMALLEST_SCORE) if below_usual else None)
    found_scores = found.scores.double()  # a threshold lies between two scores, perhaps of neighboring float32 numbers
    return found.where(found_scores > found_scores.new_tensor(scores)[found.labels])


def check_classes(thresholds: ScoreThresholds, given: str, detector: Detector) -> None:
    """Exit if the file of --score has thresholds for none of the detector's classes; name those that it lacks."""
    names = distinct_names(detector.categories)
    missing = thresholds.missing(names)
    if len(missing) == len(names):
        known = ", ".join([*list(thresholds.per_class)[:5], *["..."] * (len(thresholds.per_class) > 5)])
        exit_with_error(f"--score {given}: its thresholds are for other classes ({known}) than the detector's")
    if missing:
        listed = ", ".join([*missing[:5], *["..."] * (len(missing) > 5)])
        print(f"--score {given}: no threshold for {listed}; {thresholds.all} is used", file=sys.stderr)


def find_images(inputs: list[Path], output: Path) -> tuple[list[Path], Path, list[str]]:
    """The files, the folder that has all inputs, and the folders that could not be searched, with the reasons.

    Exits if there is no file. Says how many files of the folders are left out because of their ending.

    A folder for the output that is in a folder of images is not searched: it has the results of an earlier call.
    """
    if missing := [str(path) for path in inputs if not path.exists()]:
        exit_with_error(f"no such image or folder: {', '.join(missing)}")
    inputs = [path.resolve() if path.is_dir() else path.parent.resolve() / path.name for path in inputs]
    files = {path: None for path in inputs if path.is_file()}  # without repetitions, in order
    folders = [path for path in inputs if path.is_dir()]
    found = images_in(*folders, without=None if output.resolve() in folders else output)
    files |= dict.fromkeys(found.files)
    if found.others:
        print(found.others, file=sys.stderr)
    if not files:
        reasons = "".join(f"\n{reason}" for reason in found.unreadable)
        exit_with_error(f"no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in {', '.join(map(str, inputs))}{reasons}")
    root = os.path.commonpath([path if path.is_dir() else path.parent for path in inputs])
    return list(files), Path(root), found.unreadable


def check_output(output: Path, files: list[Path], root: Path, folders: list[Path]) -> None:
    """Exit if `output` cannot be a folder or has another program's predictions.json, or if a later search of `folders`
    would find the drawings.

    A folder for the output that is in a folder of images is not searched.
    """
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not existing.is_dir():
        exit_with_error(f"--output: {existing} is a file, expected a folder")
    if (output / PREDICTIONS).exists() and not is_own_file(output / PREDICTIONS):
        exit_with_error(
            f"--output: {output / PREDICTIONS} exists and is not a file that this command wrote; give another folder, "
            f"such as {output / 'predictions'}"
        )
    to_search = {folder.resolve() for folder in folders} - set(output.resolve().parents)
    places = {output.resolve() / file.relative_to(root).parent for file in files}
    if searched := {folder for place in places for folder in (place, *place.parents)} & to_search:
        exit_with_error(
            f"--output: drawings would be written between the images in {min(searched)}, and a later call would take "
            f"them for images; give another folder, such as {output / 'predictions'}"
        )


def score_thresholds_or_exit(given: str) -> ScoreThresholds:
    """`score_thresholds`, but an error is printed and the process exits with status 2."""
    try:
        return score_thresholds(given)
    except ValueError as error:
        exit_with_error(f"--score: {error}")


def is_own_file(predictions: Path) -> bool:
    """Whether an existing predictions.json is of this command."""
    try:
        description = json.loads(predictions.read_bytes())["info"]["description"]
        return isinstance(description, str) and description.startswith(DESCRIPTION)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def is_drawing(file: Path) -> bool:
    """Whether an existing file is a drawing of this command."""
    from PIL import Image

    if not file.is_file():  # to open a pipe would be to wait forever
        return False
    try:
        with Image.open(file) as image:
            return image.info.get("Software") == SOFTWARE
    except Exception:  # the readers of PIL raise almost any type for a damaged file
        return False


def free_path(path: Path, taken: set[Path]) -> Path:
    """`path`, or the first of path_2, path_3, ... that is not in `taken` (the inputs and the files already written).

    A file that exists is none of them, unless it is a drawing of an earlier call.
    """
    number, free = 1, path
    while free.resolve() in taken or (free.exists() and not is_drawing(free)):
        number += 1
        free = path.with_stem(f"{path.stem}_{number}")
    return free


def coco_file(
    source: str, images: list[dict[str, Any]], results: list[dict[str, Any]], categories: list[tuple[int, str]]
) -> dict[str, Any]:
    """The contents of a COCO file with the results as annotations."""
    annotations = [
        {"id": number, **result, "area": result["bbox"][2] * result["bbox"][3], "iscrowd": 0, "segmentation": []}
        for number, result in enumerate(results, 1)
    ]
    return {
        "info": {"description": f"{DESCRIPTION}{source}"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": category, "name": name} for category, name in categories],
    }


if __name__ == "__main__":
    raise SystemExit(main())
