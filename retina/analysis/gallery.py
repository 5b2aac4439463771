"""The worst errors of a detector, drawn: the ones it is most sure of, and the largest objects that it missed."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from PIL import Image

from retina.analysis.errors import BACKGROUND, BOTH, CLASS, DUPLICATE, KINDS, LOCATION, MISSED
from retina.analysis.matches import Floats, Ints
from retina.analysis.report import Report
from retina.plots.boxes import draw_boxes
from retina.plots.detections import ReadImage
from retina.plots.document import Link, Picture, photo
from retina.plots.style import clean_text

EXAMPLES = 12  # of each kind
TILE = 480  # longest side of a drawn part of an image, pixels
CONTEXT = 0.75  # of the longest side of the box, shown on each side of it
MIN_SIDE = 96  # pixels of the image that are shown at least
MAX_BOXES = 40  # other boxes that are drawn
FAR = 1e6  # pixels; the largest coordinate that is drawn
MARGIN = 12  # pixels of the drawn part, more than the width of a line

TITLES = {
    "background": "Detections of nothing",
    "missed": "Missed objects",
    "class": "Wrong classes",
    "location": "Wrong boxes",
    "duplicate": "Duplicates",
}
KINDS_OF = {
    "background": (BACKGROUND, BOTH),
    "class": (CLASS,),
    "location": (LOCATION,),
    "duplicate": (DUPLICATE,),
}


class Example(NamedTuple):
    """One error. Rows are positions in the annotations and in the results."""

    gallery: str  # a key of TITLES
    kind: str  # of KINDS; the gallery of "background" has those of "both" as well
    image: int  # position in the annotations
    detection: int  # -1 for a missed object
    thing: int  # row of the object, -1 where there is none
    iou: float  # NaN for a missed object

    def row(self, report: Report) -> dict[str, Any]:
        """For the table of the gallery; boxes xywh in pixels."""
        file, results = report.annotations, report.results
        detected, thing = self.detection, self.thing
        return {
            "gallery": self.gallery,
            "kind": self.kind,
            "image_id": int(file.image_ids[self.image]),
            "file": str(file.file_names[self.image]),
            "detected": None if detected < 0 else report.names[results.labels[detected]],
            "score": None if detected < 0 else float(results.scores[detected]),
            "object": None if thing < 0 else report.names[file.labels[thing]],
            "annotation_id": None if thing < 0 else int(file.ids[thing]),
            "iou": self.iou,
            "detected_bbox": None if detected < 0 else results.boxes[detected].round(2).tolist(),
            "object_bbox": None if thing < 0 else file.boxes[thing].round(2).tolist(),
        }


def choose_examples(report: Report) -> dict[str, list[Example]]:
    """Up to EXAMPLES of each kind, by the keys of TITLES.

    Errors with the highest scores, and missed objects with the largest boxes.
    """
    errors, file = report.errors, report.annotations
    chosen: dict[str, list[Example]] = {}
    for kind in TITLES:
        if kind == KINDS[MISSED]:
            sizes = file.boxes[errors.missed, 2] * file.boxes[errors.missed, 3]
            rows = errors.missed[np.argsort(-sizes, kind="stable")[:EXAMPLES]].tolist()
            chosen[kind] = [Example(kind, kind, int(file.images[row]), -1, row, math.nan) for row in rows]
            continue
        which = np.flatnonzero(np.isin(errors.kinds, KINDS_OF[kind]) & ~errors.ignored)
        which = which[np.argsort(-errors.scores[which], kind="stable")[:EXAMPLES]]
        chosen[kind] = [
            Example(
                kind,
                KINDS[errors.kinds[i]],
                int(report.results.images[errors.rows[i]]),
                int(errors.rows[i]),
                int(errors.targets[i]),
                float(errors.ious[i]),
            )
            for i in which
        ]
    return chosen


def draw_example(report: Report, example: Example, images: Path, page: Path, read_image: ReadImage) -> Picture:
    """The part of the image around an error, with a caption and a link to the image file.

    Detections have solid outlines, objects dashed ones. A wrong detection is among the objects, a duplicate among the
    detections with higher scores, and a missed object among those that are kept at the recommended score.

    Args:
        report: the numbers.
        example: the error.
        images: the folder of the image files.
        page: the folder of the page, which the link is relative to.
        read_image: reads the pixels.

    Raises:
        ValueError: the image cannot be read (DataError).
    """
    file, results = report.annotations, report.results
    name = str(file.file_names[example.image])
    size = int(file.widths[example.image]), int(file.heights[example.image])
    image = Image.fromarray(read_image(images / name, size))
    boxes = [results.boxes[example.detection]] if example.detection >= 0 else []
    boxes += [file.boxes[example.thing]] if example.thing >= 0 else []
    part = _part(image.size, np.stack(boxes))
    scale = TILE / (part[2:] - part[:2]).max()

    names = [clean_text(text, 16) for text in report.names]
    if example.gallery in ("missed", "duplicate"):
        lowest = results.scores[example.detection] if example.detection >= 0 else report.score
        others = np.flatnonzero((results.images == example.image) & (results.scores >= lowest))
        other_boxes, labels = results.boxes[others], results.labels[others].tolist()
    else:
        others = np.flatnonzero((file.images == example.image) & ~file.crowd)
        other_boxes, labels = file.boxes[others], file.labels[others].tolist()
    dashed = example.gallery not in ("missed", "duplicate")
    drawn = _draw_others(
        image, part, scale, corners(other_boxes, scale, part[:2]), [names[label] for label in labels], dashed
    )
    if example.detection >= 0:
        box, label = results.boxes[[example.detection]], results.labels[example.detection]
        scores = [float(results.scores[example.detection])]
    else:
        box, label, scores = file.boxes[[example.thing]], file.labels[example.thing], None
    drawn = draw_boxes(
        drawn,
        corners(box, scale, part[:2]),
        [names[label]],
        scores,
        dashed=[example.detection < 0],
        text_size=TILE // 28,
        line_width=4,
    )
    target = quote(Path(os.path.relpath(images / name, page)).as_posix())
    return photo(drawn, f"{TITLES[example.gallery]}: {name}", TILE // 2, caption(report, example), Link(name, target))


def corners(xywh: Floats, scale: float, origin: Ints) -> Floats:
    """Boxes xyxy in pixels of a part of an image that begins at `origin` (x, y) and is drawn at `scale`."""
    xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    moved: Floats = (xyxy - np.tile(origin, 2)) * scale
    return moved.clip(-FAR, FAR)


def caption(report: Report, example: Example) -> str:
    """What is wrong, in a few words."""
    row = example.row(report)
    if example.gallery == "missed":
        w, h = row["object_bbox"][2:]
        return f"{row['object']}, {w:.0f} x {h:.0f} pixels"
    found = f"{row['detected']} {row['score']:.2f}"
    match example.gallery:
        case "class":
            return f"{found}, is {row['object']}"
        case "background":
            return f"{found}, nearest object: IoU {row['iou']:.2f}"
        case _:
            return f"{found}, IoU {row['iou']:.2f}"


def _part(image_size: tuple[int, int], boxes: Floats) -> Ints:
    """(x1, y1, x2, y2) of a part of the image around boxes xywh, in whole pixels."""
    size = np.array(image_size, np.float64)
    low = boxes[:, :2].clip(0, size).min(axis=0)
    high = (boxes[:, :2] + boxes[:, 2:]).clip(0, size).max(axis=0)
    side = max((high - low).max() * (1 + 2 * CONTEXT), MIN_SIDE)
    low = np.clip((low + high - side) / 2, 0, np.maximum(size - side, 0))
    return np.concatenate([np.floor(low), np.ceil(np.minimum(low + side, size))]).astype(np.int64)


def _draw_others(
    image: Image.Image,
    part: Ints,
    scale: float,
    boxes: Floats,
    names: list[str],
    dashed: bool,
) -> Image.Image:
    """The part of the image, with the boxes (xyxy in pixels of the drawn part) that reach into it.

    draw_boxes ends a box at the border of what it draws on. So it draws on a margin too, which is cut off again.
    """
    margin = math.ceil(MARGIN / scale)
    x1, y1, x2, y2 = part.tolist()
    wide = image.crop((x1 - margin, y1 - margin, x2 + margin, y2 + margin))
    edge = round(margin * scale)
    width, height = (max(1, round(side * scale)) for side in (x2 - x1, y2 - y1))
    wide = wide.resize((width + 2 * edge, height + 2 * edge), Image.Resampling.BICUBIC)
    inside = np.flatnonzero((boxes[:, 2:] > 0).all(axis=1) & (boxes[:, :2] < [width, height]).all(axis=1))[:MAX_BOXES]
    shown = [names[i] for i in inside]
    wide = draw_boxes(wide, boxes[inside] + edge, shown, dashed=[dashed] * len(shown), text_size=0)
    return wide.crop((edge, edge, edge + width, edge + height))
