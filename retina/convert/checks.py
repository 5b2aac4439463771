"""What the converters share: reading files with messages that name the file, image sizes, boxes inside of an image."""

from __future__ import annotations

import codecs
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from retina.exif import SWAPS_SIDES, exif_orientation

LISTED = 10  # a message lists so many problems, a note so many names
MIN_SIDE = 1e-3  # in pixels; training computes in float32, where a smaller box has no area
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)  # float() also takes 1_0 and nan


CONVERTED = ", converted from "  # in every description of `info`: tools/convert.py replaces only such files


class Conversion(NamedTuple):
    """What a converter returns."""

    coco: dict[str, Any]  # info, images, annotations, categories
    notes: list[str]  # one line for each change
    images: Path  # the folder that each `file_name` is relative to


def info(title: str, format_name: str) -> dict[str, str]:
    """The `info` of a COCO file."""
    return {"description": f"{title}{CONVERTED}{format_name}"}


def raise_together(problems: list[ValueError | OSError], where: Path) -> None:
    """Raise one error for all problems, if there are any: their count and the first ten."""
    if not problems:
        return
    if len(problems) == 1:
        raise problems[0]
    missing = all(isinstance(problem, FileNotFoundError) for problem in problems)
    first = f", the first {LISTED}" if len(problems) > LISTED else ""
    lines = "".join(f"\n  {problem}" for problem in problems[:LISTED])
    raise (FileNotFoundError if missing else ValueError)(f"{where}: {len(problems)} problems{first}:{lines}")


def shorten(text: str, limit: int = 80) -> str:
    """The text for a message: quoted, control characters escaped, at most `limit` characters of it."""
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}..."


def brief(path: Path) -> str:
    """A path for a message that says where a file was looked for. Damaged data can name files of any length."""
    text = str(path)
    return text if len(text) <= 300 else f"{text[:300]}..."


def first_names(names: list[str]) -> str:
    """The first ten names of a list, for a note."""
    return ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")


def number(text: str) -> float | None:
    """A finite number, or None."""
    value = float(text) if NUMBER.fullmatch(text) else float("inf")
    return value if abs(value) < float("inf") else None


def is_file(path: Path) -> bool:
    """Path.is_file, but False for a name that no file can have: too long, or with a NUL byte."""
    try:
        return path.is_file()
    except PermissionError:
        raise
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Path.is_dir, but False for a name that no folder can have."""
    try:
        return path.is_dir()
    except PermissionError:
        raise
    except (OSError, ValueError):
        return False


def read_bytes(path: Path) -> bytes:
    """Raises ValueError for a folder, a pipe, or a file that cannot be read."""
    if not is_file(path):
        raise ValueError(f"{path}: not a file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None


def read_lines(path: Path) -> list[str]:
    """The lines of a text file without spaces around them, in UTF-8, or in UTF-16 with a byte order mark."""
    content = read_bytes(path)
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # Windows PowerShell writes it
    try:
        text = content.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8: {error.reason} at byte {error.start}") from None
    return [line.strip() for line in text.splitlines()]


def image_size(path: Path, upright: bool) -> tuple[int, int]:
    """(width, height) from the header of an image file; the pixels are not decoded.

    Args:
        path: of the image file.
        upright: the size after the rotation that the file's EXIF tag asks for.

    Raises:
        ValueError: PIL cannot read the file.
    """
    if not is_file(path):
        raise ValueError(f"{path}: not readable as an image: not a file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about large images and damaged EXIF tags
            with Image.open(path) as image:
                width, height = image.size
                swapped = upright and exif_orientation(image) in SWAPS_SIDES
    except Exception as error:  # the readers of PIL raise almost any type for a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: not readable as an image: {reason}") from None
    if width <= 0 or height <= 0:
        raise ValueError(f"{path}: not readable as an image: its size is {width} x {height}")
    return (height, width) if swapped else (width, height)


def clip(
    box: list[float], width: int, height: int, description: str, notes: list[str], unnoted: float = 0.0
) -> list[float] | None:
    """The part of a box (corners) inside of the image; None if it has no area.

    A note says what was dropped, and what was clipped by more than `unnoted` pixels.
    """
    limits = (width, height, width, height)
    clipped = [min(max(value, 0.0), float(limit)) for value, limit in zip(box, limits, strict=True)]
    if clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
        notes.append(f"dropped: {description}, box {format_box(box)}: outside of the {width} x {height} image")
        return None
    if clipped[2] - clipped[0] < MIN_SIDE or clipped[3] - clipped[1] < MIN_SIDE:
        notes.append(f"dropped: {description}, box {format_box(box)}: a side is shorter than {MIN_SIDE} pixels")
        return None
    if max(abs(a - b) for a, b in zip(clipped, box, strict=True)) > unnoted:
        notes.append(
            f"clipped: {description}, box {format_box(box)}: to {format_box(clipped)} in the {width} x {height} image"
        )
    return clipped


def format_box(box: list[float]) -> str:
    return "({})".format(", ".join(f"{value:g}" for value in box))


def add_annotation(
    annotations: list[dict[str, Any]], image_id: int, category_id: int, corners: list[float], crowd: bool = False
) -> None:
    """Append a box, with the next id. The ids count from 1, because 0 means "no match" in pycocotools."""
    x1, y1, x2, y2 = corners
    annotations.append(
        {
            "id": len(annotations) + 1,
            "image_id": image_id,
            "category_id": category_id,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": (x2 - x1) * (y2 - y1),
            "iscrowd": int(crowd),
            "segmentation": [],
        }
    )


def categories_list(names: list[str]) -> list[dict[str, Any]]:
    """The COCO categories. The ids count from 1."""
    return [{"id": index, "name": name} for index, name in enumerate(names, start=1)]


def check_names(names: list[str], where: Path | str) -> None:
    """Raises ValueError unless the names are one or more, not empty and distinct."""
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if not names or repeated or not all(name.strip() for name in names):
        shown = "[" + ", ".join(shorten(name) for name in (repeated or names)[:LISTED]) + "]"
        given = f"more than one of {shown}" if repeated else shown
        raise ValueError(f"{where}: categories must be one or more distinct class names, got {given}")
