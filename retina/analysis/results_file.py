"""Reads detections in COCO's results format into columns, and refuses what cannot be scored."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import msgspec
import numpy as np
from numpy.typing import NDArray

from retina.data.annotations import Annotations, Int64, find_ids, with_whole_numbers

MAX_ERRORS = 5  # that a message lists


class ResultsError(ValueError):
    """Detections that cannot be scored. The message names the file, the entries and what is expected."""


class _Entry(msgspec.Struct, gc=False):
    image_id: Int64
    category_id: Int64
    bbox: tuple[float, float, float, float]
    score: float


class Results(NamedTuple):
    """N detections in the order of the file."""

    images: NDArray[np.int64]  # (N,) position of the image in the annotations
    labels: NDArray[np.int64]  # (N,) position of the category
    boxes: NDArray[np.float64]  # (N, 4) xywh in pixels of the original image
    scores: NDArray[np.float64]  # (N,)


def read_results(path: Path, annotations: Annotations) -> Results:
    """Read a results file such as detections.json.

    Raises:
        ResultsError: the file is missing or is not in COCO's results format; an image or a category is not in
            `annotations`; a score or a coordinate is NaN or infinite.
    """
    try:
        content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")  # the byte order mark of some Windows programs
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read: {error.strerror}") from None
    if not content.strip():
        raise ResultsError(f"{path}: the file is empty; detections that found nothing are the list []")
    try:
        entries = msgspec.json.decode(content, type=list[_Entry])
    except msgspec.ValidationError as error:
        try:
            entries = _convert(msgspec.json.decode(content))
        except msgspec.DecodeError:
            _refuse(path, content, error)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        _refuse(path, content, error)
    return _columns(str(path), entries, annotations)


def results_columns(entries: Sequence[dict[str, Any]], annotations: Annotations) -> Results:
    """The same for a list of results in memory. Raises ResultsError, too."""
    try:
        structs = _convert(entries)
    except msgspec.ValidationError as error:
        raise ResultsError(f"detections: {error}") from None
    return _columns("detections", structs, annotations)


def _convert(entries: Any) -> list[_Entry]:
    try:
        return msgspec.convert(entries, list[_Entry])
    except msgspec.ValidationError:
        if not isinstance(entries, list):
            raise
    return msgspec.convert([with_whole_numbers(entry) for entry in entries], list[_Entry])  # ids may be written as 1.0


def _columns(source: str, entries: list[_Entry], annotations: Annotations) -> Results:
    count = len(entries)
    image_ids = np.fromiter((entry.image_id for entry in entries), np.int64, count)
    category_ids = np.fromiter((entry.category_id for entry in entries), np.int64, count)
    scores = np.fromiter((entry.score for entry in entries), np.float64, count)
    boxes = np.array([entry.bbox for entry in entries], np.float64).reshape(-1, 4)
    images, known_image = find_ids(image_ids, annotations.image_ids)
    labels, known_category = find_ids(category_ids, np.array(annotations.category_ids, np.int64))
    known = _first(annotations.category_ids)
    for name, values, wrong, what in (
        ("image_id", image_ids, ~known_image, f"is not an image of {annotations.path}"),
        ("category_id", category_ids, ~known_category, f"is not a category of {annotations.path}, which has {known}"),
        ("score", scores, ~np.isfinite(scores), "is not a finite number"),
        ("bbox", boxes, ~np.isfinite(boxes).all(axis=1), "has a coordinate that is not a finite number"),
    ):
        if wrong.any():
            given = ", ".join(f"[{i}].{name} {values[i].tolist()}" for i in np.flatnonzero(wrong)[:MAX_ERRORS])
            more = ", ..." if wrong.sum() > MAX_ERRORS else ""
            raise ResultsError(f"{source}: in {wrong.sum()} of {count} detections {name} {what}: {given}{more}")
    return Results(images, labels, boxes, scores)


def _refuse(path: Path, content: bytes, error: Exception) -> NoReturn:
    """Say what is wrong with a file that cannot be decoded."""
    number = re.search(rb"[\s:,\[](-?(?:NaN|Infinity))\b", content)
    if number is not None:
        line = content.count(b"\n", 0, number.start(1)) + 1
        place = _first_not_finite(content) or f"line {line}"
        raise ResultsError(f"{path}: {number[1].decode()} in {place}; scores and boxes must be finite numbers")
    if content.lstrip()[:1] == b"{":
        raise ResultsError(f"{path}: an object {{...}}, expected a list of detections (COCO's results format)")
    message = str(error).replace("`", "").replace(" - at $", " in entry ")
    raise ResultsError(
        f"{path}: {message}; expected a list of "
        '{"image_id": 1, "category_id": 1, "bbox": [x, y, width, height], "score": 0.5}'
    )


def _first_not_finite(content: bytes) -> str:
    """The field of the first entry with NaN or infinity, which Python's json reads; "" if there is none."""
    try:
        entries = json.loads(content)
    except ValueError:
        return ""
    for i, entry in enumerate(entries if isinstance(entries, list) else []):
        for name, value in entry.items() if isinstance(entry, dict) else []:
            numbers = value if isinstance(value, list) else [value]
            if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
                return f"[{i}].{name}"
    return ""


def _first(values: list[int]) -> str:
    return ", ".join(map(str, values[:10])) + (", ..." if len(values) > 10 else "")
