"""Reads COCO-format annotations and images. Holds the class names and the map between category ids and labels.

Boxes are converted here from the xywh of the JSON to xyxy, in pixels of the original image.

What happens to data that cannot be used as it is:

1. Refused by `CocoDataset`, before training starts: a JSON file that is missing or is not COCO detection data, an
   unknown or repeated id, a box that is not four finite numbers, a `file_name` outside of the image folder. The
   message of the DataError names the file and the entry.
2. Clipped: a box that reaches outside of its image. A note counts those that reach out by more than a pixel.
3. Dropped: a box without area, also one that lies wholly outside of its image. A note counts them and
   lists the first ten annotation ids. An image that loses its last box this way stays, as an image without objects.
4. Ignored: a crowd box (`iscrowd: 1`) is never an object. It becomes a region in which negative anchors are excluded
   from the loss. With `data.crowd=drop` it is dropped. There is no note in either case.
5. Dropped with `data.empty_images=drop`: an image without objects. A note counts them. An image with crowd boxes alone
   has no objects. By default (`keep`) these images are used; none of their anchors is positive.
6. Never opened, without a note: an image file that the JSON does not list.
7. Not checked when the data set is opened: the image files. `read_image` raises DataError when the image is needed and
   its file is missing, cannot be decoded, or has another size than the JSON states. data/loader.py describes what
   happens then.

The notes are `CocoDataset.notes`. The training loop prints them when it starts, for both data sets. `data.crowd` and
`data.empty_images` apply to the training set only: evaluation uses every image. Its ground truth is the JSON itself, so
a box without area counts there as an object that was missed.
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
    """Annotations or an image file that cannot be used. The message names the file and, where there is one, the id."""


class Record(NamedTuple):
    """One image and its annotations. Boxes are in pixels of the original image."""

    image_id: int
    path: Path
    width: int
    height: int
    boxes: Boxes  # float32 (M, 4) xyxy
    labels: NDArray[np.int64]  # (M,), 0..K-1
    ignore: Boxes  # float32 (I, 4) xyxy: crowd regions


class CocoDataset:
    """A COCO-format JSON and its folder of images.

    Args:
        annotations: path of the JSON file.
        images: the folder that each `file_name` is relative to.
        crowd: "ignore" keeps crowd boxes as `Record.ignore`, "drop" removes them.
        empty_images: "keep" keeps images without objects, "drop" removes them.

    Attributes:
        annotations, folder: the two paths.
        category_ids, names: of the categories. Index i belongs to label i; labels follow the order of the ids.
        records: one `Record` for each image that is used, in the order of the image ids.
        notes: sentences for the log about what was dropped or clipped; empty if nothing was.

    Raises:
        DataError: the folder is missing, the file is not COCO detection data, an id is unknown or repeated, a box is
            not finite, a `file_name` is outside of the folder, or no image is left.
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
                f"{self.annotations}: categories: expected distinct ids and at least one, got {self.category_ids}"
            )
        self.notes: list[str] = []
        self.records = self._read(tree, crowd)
        if empty_images == "drop":
            kept = [record for record in self.records if len(record.boxes)]
            if empty := len(self.records) - len(kept):
                self.notes.append(f"{empty} images without objects dropped (data.empty_images=drop)")
            self.records = kept
        if not self.records:
            raise DataError(f"{self.annotations}: no images to use")

    @property
    def num_classes(self) -> int:
        """K, the number of categories."""
        return len(self.names)

    def evenly_spaced(self, count: int) -> CocoDataset:
        """A copy of the data set with at most `count` of its records, evenly spaced over them."""
        count = min(count, len(self.records))
        subset = copy.copy(self)
        subset.records = [self.records[i * len(self.records) // count] for i in range(count)]
        return subset

    def _read(self, tree: dict[str, Any], crowd: str) -> list[Record]:
        label_by_category = {category_id: label for label, category_id in enumerate(self.category_ids)}
        objects: dict[int, list[tuple[list[float], int, bool]]] = {int(image["id"]): [] for image in tree["images"]}
        sizes = {int(image["id"]): (int(image["width"]), int(image["height"])) for image in tree["images"]}
        if len(objects) < len(tree["images"]):
            raise DataError(f"{self.annotations}: images: two entries have the same id")
        without_area, clipped = [], 0
        for annotation in tree["annotations"]:
            where = f"{self.annotations}: annotation {annotation.get('id')}"
            image_id, category = int(annotation["image_id"]), int(annotation["category_id"])
            if image_id not in objects:
                raise DataError(f"{where}: image_id {image_id} is not among the images")
            if category not in label_by_category:
                raise DataError(f"{where}: category_id {category} is not among the categories {self.category_ids}")
            box = annotation["bbox"]
            if not np.isfinite(np.asarray(box, dtype=np.float64)).all():
                raise DataError(f"{where}: bbox {box}: expected four finite numbers [x, y, width, height]")
            width, height = sizes[image_id]
            x1, y1, x2, y2 = box[0], box[1], box[0] + box[2], box[1] + box[3]
            inside = [min(max(x1, 0), width), min(max(y1, 0), height), min(max(x2, 0), width), min(max(y2, 0), height)]
            if inside[2] <= inside[0] or inside[3] <= inside[1]:
                without_area.append(annotation.get("id"))
                continue
            clipped += max(abs(a - b) for a, b in zip(inside, (x1, y1, x2, y2), strict=True)) > 1
            is_crowd = bool(annotation.get("iscrowd", 0))
            objects[image_id].append((inside, label_by_category[category], is_crowd))
        if without_area:
            self.notes.append(f"{len(without_area)} boxes without area dropped: annotations {_first_ids(without_area)}")
        if clipped:
            self.notes.append(f"{clipped} boxes reached more than a pixel outside of their image and were clipped")
        return [self._record(image, objects[int(image["id"])], crowd) for image in _by_id(tree["images"])]

    def _record(self, image: dict[str, Any], objects: list[tuple[list[float], int, bool]], crowd: str) -> Record:
        name = str(image["file_name"])
        path = self.folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DataError(
                f"{self.annotations}: image {image['id']}: file_name {name!r} is outside of the folder {self.folder}"
            )
        boxes = np.array([box for box, _, is_crowd in objects if not is_crowd], dtype=np.float32).reshape(-1, 4)
        labels = np.array([label for _, label, is_crowd in objects if not is_crowd], dtype=np.int64)
        ignore = np.array([box for box, _, is_crowd in objects if is_crowd], dtype=np.float32).reshape(-1, 4)
        if crowd == "drop":
            ignore = ignore[:0]
        return Record(int(image["id"]), path, int(image["width"]), int(image["height"]), boxes, labels, ignore)


def read_annotations(path: Path) -> dict[str, Any]:
    """Read a COCO JSON file and check that it has the required lists and keys.

    An annotation without `id`, `iscrowd` or `area` gets its position from 1, 0, and the area of its box.

    Raises:
        DataError: the file is missing or not JSON, a list or a key is missing, or a `bbox` is not four numbers. The
            message names the entry.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such annotation file (see data/README.md for how to make or fetch each data set)")
    try:
        tree = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    if not isinstance(tree, dict):
        raise DataError(
            f"{path}: expected a COCO dict with images, annotations, categories; got a {type(tree).__name__}"
        )
    required = {
        "images": ("id", "file_name", "width", "height"),
        "annotations": ("image_id", "category_id", "bbox"),
        "categories": ("id", "name"),
    }
    for part, keys in required.items():
        if not isinstance(tree.get(part), list):
            raise DataError(f"{path}: no list {part!r}; expected images, annotations and categories")
        for i, entry in enumerate(tree[part]):
            if not isinstance(entry, dict):
                raise DataError(f"{path}: {part}[{i}]: expected a dict, got {entry!r}")
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
    """Read any image file that PIL can read; uint8 RGB (H, W, 3).

    16-bit gray values are divided by 256, not clipped at 255.

    Args:
        path: of the image file.
        size: (width, height) in the JSON. If the image rotated by its EXIF tag has this size, that image is returned,
            because viewers and most annotation tools show it; otherwise the pixels as stored. None: the rotated image.

    Raises:
        DataError: the file is missing or cannot be decoded, or neither image has `size`.
    """
    try:
        with Image.open(path) as image:
            stored = image.size
            upright = ImageOps.exif_transpose(image)
            chosen = upright if size is None or upright.size == size else image
            if size is not None and chosen.size != size:
                raise DataError(
                    f"{path}: width x height is {size[0]}x{size[1]} in the JSON, {stored[0]}x{stored[1]} in the file; "
                    "correct one of them"
                )
            if chosen.mode.startswith("I") or chosen.mode == "F":
                gray = np.asarray(chosen).astype(np.float64)
                chosen = Image.fromarray((gray / 256 if chosen.mode != "F" else gray).clip(0, 255).astype(np.uint8))
            return np.array(chosen.convert("RGB"))  # a copy, because torch needs writable memory
    except (OSError, SyntaxError, TypeError, LookupError, struct.error, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: not readable as an image: {error}") from error


def _by_id(images: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield from sorted(images, key=lambda image: int(image["id"]))


def _first_ids(ids: list[Any]) -> str:
    return ", ".join(str(i) for i in ids[:10]) + (", ..." if len(ids) > 10 else "")
