"""Export a trained detector as one file: python tools/export.py CHECKPOINT --format onnx|torch --output FILE

onnx: runs in onnxruntime, and elsewhere. torch: a package of torch (.pt2), compiled for this kind of processor; it is
faster, and --precision bf16 and --calibrate DIR (int8) make it faster still. docs/export.md shows how to run the files.

The file takes uint8 RGB images (N, H, W, 3). It normalizes and resizes them, and returns the detections after NMS in
pixels of the images it was given. Without --size and --batch it takes any; with a fixed size it runs faster. The file
is run on images and compared with the checkpoint in PyTorch. If boxes differ by more than 0.1 px or scores by more
than 0.001, nothing is written (bf16, int8: the difference is printed).
"""

from __future__ import annotations

import argparse
import sys

from retina.command_line import exit_with_error, file_path, with_path_errors
from retina.file_suffixes import EXPORT_SUFFIXES


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, a run folder, COCO_V1, COCO_V2")
    parser.add_argument("--format", required=True, choices=list(EXPORT_SUFFIXES))
    parser.add_argument("--output", required=True, type=file_path, metavar="FILE", help="ends in .onnx or .pt2")
    parser.add_argument(
        "--size", type=side, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of the images, or any; default: any any"
    )
    parser.add_argument("--batch", type=int, metavar="N", help="images at once; default: any number (int8: 1)")
    parser.add_argument("--no-resize", action="store_true", help="the images have the size for the network already")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16: torch only (%(default)s)")
    parser.add_argument(
        "--calibrate",
        type=file_path,
        metavar="DIR",
        help="int8, torch only: images of --size from the training set; 64 of them are used",
    )
    parser.add_argument(
        "--images",
        type=file_path,
        metavar="DIR",
        help="to compare on; default: those of --calibrate or of the checkpoint's data",
    )
    arguments = parser.parse_args()
    if arguments.output.suffix != EXPORT_SUFFIXES[arguments.format]:
        exit_with_error(
            f"--output: given {arguments.output}, expected a name that ends in {EXPORT_SUFFIXES[arguments.format]}"
        )
    if arguments.batch is not None and arguments.batch < 1:
        exit_with_error(f"--batch: given {arguments.batch}, expected at least 1")
    if arguments.format == "onnx" and (arguments.precision != "fp32" or arguments.calibrate):
        exit_with_error(
            "--precision bf16 and --calibrate need --format torch: onnxruntime is not faster with them here"
        )
    if arguments.calibrate and arguments.precision != "fp32":
        exit_with_error("--calibrate makes an int8 file; leave --precision out")
    if arguments.calibrate and None in (arguments.size or [None]):
        exit_with_error("--calibrate: an int8 file takes images of one size; give --size HEIGHT WIDTH")
    for folder in (arguments.calibrate, arguments.images):
        if folder and not folder.is_dir():
            exit_with_error(f"{folder}: no such folder of images")
    return arguments


def side(text: str) -> int | None:
    """Of an image in pixels; None for any."""
    if text == "any":
        return None
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"given {text}, expected a number of pixels, at least 1, or any")
    return int(text)


@with_path_errors
def main() -> int:
    """Exit status: 0 with the file written, 1 if it cannot be or differs from the checkpoint, 2 for a usage error."""
    arguments = parse_arguments()

    from retina.config_file import ConfigError  # torch is imported late, so that a usage error is reported at once
    from retina.export import ExportError, InputShape, Job, export
    from retina.model import CheckpointError, WeightsError

    job = Job(
        arguments.checkpoint,
        arguments.format,
        arguments.output,
        InputShape(arguments.batch or (1 if arguments.calibrate else None), *(arguments.size or (None, None))),
        not arguments.no_resize,
        "int8" if arguments.calibrate else arguments.precision,
        arguments.calibrate,
        arguments.images,
    )
    try:
        found = export(job)
    except (ExportError, ConfigError, CheckpointError, WeightsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{found.describe()}\n{job.output}: {job.output.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
