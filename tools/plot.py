"""Pictures of a run: python tools/plot.py CONFIG [section.key=value ...] [--count 8] [--score 0.3].

Writes results.png (losses, learning rate, AP) and detections.png (with the ground truth) into the run folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

from retina.command_line import config_parser, load_config_or_exit, with_path_errors
from retina.plots import plot_detections, plot_run


@with_path_errors
def main() -> int:
    """Exit status: 0 with both paths printed, 1 if the run has nothing to show yet, 2 for a usage error."""
    parser = config_parser(__doc__)
    parser.add_argument("--count", type=int, default=8, help="images in detections.png (%(default)s)")
    parser.add_argument("--score", type=float, default=0.3, help="lowest score to show, 0 to 1 (%(default)s)")
    arguments = parser.parse_intermixed_args()
    config = load_config_or_exit(arguments.config, arguments.overrides)
    from retina.data.coco import read_image  # imports torch: late, so that a usage error is reported at once

    run, annotations, images = config.run_dir, Path(config.data.val_annotations), Path(config.data.val_images)
    try:
        print(plot_run(run, run / "results.png"))
        detections, picture = run / "detections.json", run / "detections.png"
        if not detections.is_file():
            print(f"no detections.png: {run} has no evaluation yet; tools/eval.py {run} makes one", file=sys.stderr)
            return 1
        count, score = arguments.count, arguments.score
        print(plot_detections(annotations, images, detections, picture, read_image, count=count, score=score))
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename or run}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
