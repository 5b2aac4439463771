"""A finding: one kind of defect in a data set, with its first places.

codes.yaml has the texts of every code. box_checks.py, annotation_checks.py, image_checks.py and anchor_fit.py make the
findings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from retina.check.codes import CODES, SEVERITIES, Code, Severity
from retina.data.annotations import Annotations

MAX_EXAMPLES = 10
MAX_BOXES = 100  # of an example

Box = tuple[float, float, float, float]  # xyxy in pixels of the image


class Example(NamedTuple):
    """One place of a defect."""

    text: str
    image: Path | None = None
    boxes: tuple[Box, ...] = ()  # to be drawn, as in the file: they may lie outside of the image or not be finite
    names: tuple[str, ...] = ()  # the class of each box
    size: tuple[int, int] | None = None  # width and height of the image in the JSON


@dataclass(frozen=True)
class Finding:
    """A defect of one code in one split: how often, and the first ten places, the worst first where there is one."""

    code: str
    split: str  # "train", "val" or "train and val"
    count: int
    examples: list[Example]
    lowered: Severity | None = None  # where the defect is less serious than codes.yaml says

    @property
    def severity(self) -> Severity:
        """As in codes.yaml, or lower."""
        return self.lowered or self.texts.severity

    @property
    def texts(self) -> Code:
        """What codes.yaml says about the code."""
        return CODES[self.code]

    @property
    def num_more(self) -> int:
        """The number of places that are not among the examples; 0 where one example stands for all places."""
        return self.count - MAX_EXAMPLES if len(self.examples) == MAX_EXAMPLES else 0

    def __str__(self) -> str:
        places = "; ".join(example.text for example in self.examples)
        more = f"; ... and {self.num_more} more" if self.num_more else ""
        return f"{self.severity} {self.code} in {self.split}: {self.texts.title} ({self.count}): {places}{more}"


class Split(NamedTuple):
    """One of the two data sets as it is checked."""

    name: str  # "train" or "val"
    file: Annotations
    folder: Path

    def image_path(self, image: int) -> Path:
        """The file of an image by its index in `file`."""
        return self.folder / str(self.file.file_names[image])

    def example(self, text: str, image: int, annotations: Sequence[int] | NDArray[Any]) -> Example:
        """A place in an image, by its index in `file`, with the boxes of these annotations."""
        boxes = []
        for x, y, width, height in self.file.boxes[annotations].tolist():
            boxes.append((min(x, x + width), min(y, y + height), max(x, x + width), max(y, y + height)))
        names = tuple(self.file.names[label] for label in self.file.labels[annotations])
        size = int(self.file.widths[image]), int(self.file.heights[image])
        return Example(text, self.image_path(image), tuple(boxes), names, size)

    def image_text(self, image: int) -> str:
        """An image by its index in `file`, for messages."""
        return f"image {self.file.image_ids[image]} ({self.file.file_names[image]})"


def image_finding(
    code: str, split: Split, images: Sequence[int] | NDArray[Any], details: Sequence[str] = ()
) -> list[Finding]:
    """A finding about images, given by their indices; none without images. `details`: a text for each."""
    examples = [
        split.example(
            split.image_text(int(image)) + (f": {details[i]}" if len(details) and details[i] else ""),
            int(image),
            np.flatnonzero(split.file.images == image)[:MAX_BOXES],
        )
        for i, image in enumerate(images[:MAX_EXAMPLES])
    ]
    return [Finding(code, split.name, len(images), examples)] if len(images) else []


def box_finding(
    code: str, split: Split, annotations: Sequence[int] | NDArray[Any], details: Sequence[str] = ()
) -> list[Finding]:
    """A finding about boxes, given by the indices of their annotations; none without them. `details`: see above."""
    examples = []
    for place, index in enumerate(annotations[:MAX_EXAMPLES]):
        image = int(split.file.images[index])
        numbers = ", ".join(f"{value:.6g}" for value in split.file.boxes[index].tolist())
        text = f"annotation {split.file.ids[index]} of {split.image_text(image)}: bbox [{numbers}]"
        examples.append(split.example(text + (f", {details[place]}" if len(details) else ""), image, [index]))
    return [Finding(code, split.name, len(annotations), examples)] if len(annotations) else []


def name_finding(code: str, split: str, texts: Sequence[str]) -> list[Finding]:
    """A finding about categories or a whole file; none without texts."""
    return [Finding(code, split, len(texts), [Example(text) for text in texts[:MAX_EXAMPLES]])] if texts else []


def lower(findings: list[Finding], severity: Severity) -> list[Finding]:
    """The findings with another severity."""
    return [replace(finding, lowered=severity) for finding in findings]


def sort_findings(findings: list[Finding]) -> list[Finding]:
    """Errors first, then warnings, then notes, otherwise in the order of codes.yaml."""
    codes = list(CODES)
    return sorted(findings, key=lambda f: (SEVERITIES.index(f.severity), codes.index(f.code), f.split))
