"""Check the data of a config before hours of training: python tools/check_data.py CONFIG [section.key=value ...].

Reads both annotation files as the training would, opens every image, and prints findings with what they do to the
training, how the anchors fit the objects, and settings to try. docs/data.md explains every finding. Writes nothing
beside the data.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from retina.command_line import config_parser, exit_with_error, file_path, load_config_or_exit, with_path_errors


@with_path_errors
def main() -> int:
    """Exit status: 0 without errors in the data, 1 with errors, 2 if the check cannot run."""
    parser = config_parser(__doc__)
    pixels = parser.add_mutually_exclusive_group()
    pixels.add_argument("--pixels", action="store_true", default=None, help="decode every image (default below 20,000)")
    pixels.add_argument("--no-pixels", dest="pixels", action="store_false", help="read only the headers of the images")
    parser.add_argument(
        "--html", type=file_path, metavar="FILE", help="also write the result as one page with pictures"
    )
    arguments = parser.parse_intermixed_args()
    config = load_config_or_exit(arguments.config, arguments.overrides)
    for key in ("train_annotations", "val_annotations"):
        if not Path(getattr(config.data, key)).is_file():
            exit_with_error(
                f"data.{key}: no file {getattr(config.data, key)}; data/README.md says how to get each data set"
            )
    if arguments.html is not None and not arguments.html.parent.is_dir():
        exit_with_error(f"--html: no folder {arguments.html.parent}")

    if arguments.html is not None and arguments.html.exists() and not is_page(arguments.html):
        exit_with_error(f"--html: {arguments.html} exists and is not a page; give another name")

    from tqdm import tqdm  # late, as torch, so that a usage error is reported at once

    from retina.check import check_data, format_check, write_page

    def progress(iterable: Iterable[Any], total: int) -> Iterable[Any]:
        return tqdm(iterable, "images", total, unit=" images", file=sys.stderr, disable=None)

    check = check_data(config, arguments.pixels, progress)
    if arguments.html is not None:
        try:
            write_page(check, arguments.html)
        except OSError as error:
            exit_with_error(f"--html: {arguments.html}: {error.strerror}")
    try:
        print(format_check(check) + (f"\n\n{arguments.html}" if arguments.html else ""), flush=True)
    except BrokenPipeError:  # the reader, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1 if check.count("error") else 0


def is_page(file: Path) -> bool:
    """Whether an existing file is an HTML page, which may be replaced, and not a file of the user."""
    return file.is_file() and file.read_bytes()[:15] == b"<!DOCTYPE html>"


if __name__ == "__main__":
    raise SystemExit(main())
