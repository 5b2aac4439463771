"""Reader of COCO-format detection data; owner of the class names and of the map between category ids and labels.

What is wrong with a file is said when it is opened, with the id of the annotation, not hours later in a worker. Boxes
leave here as xyxy in pixels of the image; the JSON's xywh goes no further.
"""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

Boxes = NDArray[np.float32]


class DataError(ValueError):
    """Annotations or an image that cannot be used; the message names the file and the id."""


class Record(NamedTuple):
    """One image and what is on it; boxes in pixels of the image, labels 0..K-1."""

    image_id: int
    path: Path
    width: int
    height: int
    boxes: Boxes  # float32 (M, 4) xyxy
    labels: NDArray[np.int64]  # (M,)
    ignore: Boxes  # float32 (I, 4) xyxy: crowd regions


class CocoDataset:
    """A COCO-format JSON and its folder of images.

    Attributes: `names` and `category_ids`, both by label; `records`, by image id; `notes`, sentences about what was
    dropped or mended, for the log.

    Raises DataError for a file that is not COCO detection data, an unknown category or image id, a non-finite box, a
    `file_name` outside of the folder.
    """

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path,
        *,
        crowd: Literal["ignore", "drop"] = "ignore",
        empty_images: Literal["keep", "drop"] = "keep",
    ) -> None:
        self.annotations, self.folder = Path(annotations), Path(images)
        tree = read_annotations(self.annotations)
        if not self.folder.is_dir():
            raise DataError(f"{self.folder}: no such folder of images (annotations: {self.annotations})")
        categories = sorted(tree["categories"], key=lambda category: int(category["id"]))
        self.category_ids = [int(category["id"]) for category in categories]
        self.names = [str(category["name"]) for category in categories]
        if len(set(self.category_ids)) < len(self.category_ids) or not categories:
            raise DataError(
                f"{self.annotations}: categories: need distinct ids and at least one, have {self.category_ids}"
            )
        self.notes: list[str] = []
        self.records = self._read(tree, crowd)
        if empty_images == "drop":
            kept = [record for record in self.records if len(record.boxes)]
            self.notes.append(
                f"{len(self.records) - len(kept)} images without objects dropped (data.empty_images=drop)"
            )
            self.records = kept
        if not self.records:
            raise DataError(f"{self.annotations}: no images to use")

    @property
    def num_classes(self) -> int:
        """K, the number of categories."""
        return len(self.names)

    def evenly_spaced(self, count: int) -> CocoDataset:
        """The data set with at most `count` of its records, at even distances."""
        count = min(count, len(self.records))
        subset = copy.copy(self)
        subset.records = [self.records[i * len(self.records) // count] for i in range(count)]
        return subset

    def _read(self, tree: dict[str, Any], crowd: str) -> list[Record]:
        label_of = {category_id: label for label, category_id in enumerate(self.category_ids)}
        found: dict[int, list[tuple[list[float], int, bool]]] = {int(image["id"]): [] for image in tree["images"]}
        sizes = {int(image["id"]): (int(image["width"]), int(image["height"])) for image in tree["images"]}
        if len(found) < len(tree["images"]):
            raise DataError(f"{self.annotations}: images: the same id stands twice")
        degenerate, clipped = [], 0
        for annotation in tree["annotations"]:
            where = f"{self.annotations}: annotation {annotation.get('id')}"
            image_id, category = int(annotation["image_id"]), int(annotation["category_id"])
            if image_id not in found:
                raise DataError(f"{where}: image_id {image_id} is not among the images")
            if category not in label_of:
                raise DataError(f"{where}: category_id {category} is not among the categories {self.category_ids}")
            box = annotation["bbox"]
            if not np.isfinite(np.asarray(box, dtype=np.float64)).all():
                raise DataError(f"{where}: bbox {box}: expected four finite numbers [x, y, width, height]")
            width, height = sizes[image_id]
            x1, y1, x2, y2 = box[0], box[1], box[0] + box[2], box[1] + box[3]
            inside = [min(max(x1, 0), width), min(max(y1, 0), height), min(max(x2, 0), width), min(max(y2, 0), height)]
            clipped += max(abs(a - b) for a, b in zip(inside, (x1, y1, x2, y2), strict=True)) > 1
            if inside[2] <= inside[0] or inside[3] <= inside[1]:
                degenerate.append(annotation.get("id"))
                continue
            found[image_id].append((inside, label_of[category], bool(annotation.get("iscrowd", 0))))
        if degenerate:
            self.notes.append(f"{len(degenerate)} boxes without area dropped: annotations {_first_ids(degenerate)}")
        if clipped:
            self.notes.append(f"{clipped} boxes reached more than a pixel out of their image and were clipped")
        return [self._record(image, found[int(image["id"])], crowd) for image in _by_id(tree["images"])]

    def _record(self, image: dict[str, Any], objects: list[tuple[list[float], int, bool]], crowd: str) -> Record:
        name = str(image["file_name"])
        path = self.folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DataError(
                f"{self.annotations}: image {image['id']}: file_name {name!r} leaves the folder {self.folder}"
            )
        boxes = np.array([box for box, _, is_crowd in objects if not is_crowd], dtype=np.float32).reshape(-1, 4)
        labels = np.array([label for _, label, is_crowd in objects if not is_crowd], dtype=np.int64)
        ignore = np.array([box for box, _, is_crowd in objects if is_crowd], dtype=np.float32).reshape(-1, 4)
        if crowd == "drop":
            ignore = ignore[:0]
        return Record(int(image["id"]), path, int(image["width"]), int(image["height"]), boxes, labels, ignore)


def read_annotations(path: Path) -> dict[str, Any]:
    """The JSON's dict; DataError says what is missing. `area` and `iscrowd` are filled in where they are absent."""
    if not path.is_file():
        raise DataError(f"{path}: no such annotation file (see data/README.md for how to make or fetch each data set)")
    try:
        tree = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    if not isinstance(tree, dict):
        raise DataError(
            f"{path}: expected a COCO dict with images, annotations, categories; found a {type(tree).__name__}"
        )
    needed = {
        "images": ("id", "file_name", "width", "height"),
        "annotations": ("image_id", "category_id", "bbox"),
        "categories": ("id", "name"),
    }
    for part, keys in needed.items():
        if not isinstance(tree.get(part), list):
            raise DataError(f"{path}: no list {part!r}; expected images, annotations and categories")
        for i, entry in enumerate(tree[part]):
            if not isinstance(entry, dict):
                raise DataError(f"{path}: {part}[{i}]: expected a dict, found {entry!r}")
            missing = [key for key in keys if key not in entry]
            if missing:
                raise DataError(f"{path}: {part}[{i}] (id {entry.get('id')}): {', '.join(missing)} missing")
    for i, annotation in enumerate(tree["annotations"]):
        annotation.setdefault("id", i + 1)
        box = annotation["bbox"]
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(side, int | float) for side in box):
            raise DataError(f"{path}: annotation {annotation['id']}: bbox {box}: expected [x, y, width, height]")
        annotation.setdefault("iscrowd", 0)
        annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
    return tree


def read_image(path: Path, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """Any image file -> uint8 RGB (H, W, 3).

    `size` is the annotations' (width, height); it decides about EXIF rotation. The upright picture is taken where it
    has that size (all viewers and most annotation tools show that one), else the stored pixels; DataError if neither
    fits. 16-bit grey is divided by 256, not cut off at 255.
    """
    try:
        with Image.open(path) as image:
            stored = image.size
            upright = ImageOps.exif_transpose(image)
            picture = upright if size is None or upright.size == size else image
            if size is not None and picture.size != size:
                raise DataError(
                    f"{path}: the annotations say {size[0]}x{size[1]}, the file is {stored[0]}x{stored[1]}; "
                    "correct width and height in the JSON, or the file"
                )
            if picture.mode.startswith("I") or picture.mode == "F":
                grey = np.asarray(picture).astype(np.float64)
                picture = Image.fromarray((grey / 256 if picture.mode != "F" else grey).clip(0, 255).astype(np.uint8))
            return np.array(picture.convert("RGB"))  # a copy: torch wants to own what it may write to
    except (OSError, SyntaxError, TypeError, LookupError, struct.error, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: not readable as an image: {error}") from error


def _by_id(images: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield from sorted(images, key=lambda image: int(image["id"]))


def _first_ids(ids: list[Any]) -> str:
    return ", ".join(str(i) for i in ids[:10]) + (", ..." if len(ids) > 10 else "")
