"""A COCO-format data set: its images with their boxes and labels, and how an image file is read.

Boxes are converted here from the xywh of the JSON to xyxy, in pixels of the original image.

What happens to data that cannot be used as it is (`python tools/check_data.py` finds more, and says what to do):

1. Refused by `CocoDataset`, before training starts: a JSON file that is missing or that data/annotations.py refuses, a
   folder that is missing. The message of the DataError names the file and the places in it. A training also refuses
   the errors that `quick_check` in check/data_check.py finds.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

from retina.data.annotations import Annotations, DataError, read_annotations
from retina.exif import exif_orientation, upright

Boxes = NDArray[np.float32]


class Record(NamedTuple):
    """One image and its annotations. Boxes are in pixels of the original image."""

    image_id: int
    path: Path
    width: int
    height: int
    boxes: Boxes  # float32 (M, 4) xyxy
    labels: NDArray[np.int64]  # (M,), 0..K-1
    ignore: Boxes  # float32 (I, 4) xyxy: crowd regions


class Records(Sequence[Record]):
    """The records of a data set. They are made when they are asked for, from columns that all processes share.

    A list of records would have millions of Python objects. Each process that only reads them writes their reference
    counts, and so gets its own copy of the memory.

    Args:
        folder: that the file names are relative to.
        file: the columns of the file.
        crowd: "ignore" or "drop", for crowd boxes.

    Attributes:
        positions: of each record in the columns of the file, (B,).
        widths, heights: of each image in pixels, (B,).
    """

    def __init__(self, folder: Path, file: Annotations, crowd: Literal["ignore", "drop"]) -> None:
        self.folder = folder
        self._with_crowd = crowd == "ignore"
        width_height = np.stack([file.widths, file.heights], axis=1)[file.images]
        with np.errstate(over="ignore"):  # a box of 1e308 pixels ends at infinity and is clipped
            corners = np.concatenate([file.boxes[:, :2], file.boxes[:, :2] + file.boxes[:, 2:]], axis=1)
        inside = corners.clip(0, np.tile(width_height, 2)).astype(np.float32)
        has_area = (inside[:, 2:] > inside[:, :2]).all(axis=1)
        self.without_area = file.ids[~has_area]
        self.num_clipped = int((np.abs(inside - corners)[has_area] > 1).any(axis=1).sum())
        # By image, objects before crowd regions, otherwise in the order of the file.
        used = np.flatnonzero(has_area)
        used = used[np.lexsort((file.crowd[used], file.images[used]))]
        self._annotations, self._boxes, self._labels = used, inside[used], file.labels[used]
        positions = np.arange(len(file.image_ids))
        self._starts = np.searchsorted(file.images[used], positions)
        self._stops = np.searchsorted(file.images[used], positions, side="right")
        self._crowd_starts = self._stops - np.bincount(file.images[used][file.crowd[used]], minlength=len(positions))
        self._ids, self._names, self.widths, self.heights = file.image_ids, file.file_names, file.widths, file.heights
        self.positions = positions
        self._select(np.argsort(file.image_ids, kind="stable"))

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start, crowd, stop = self._starts[index], self._crowd_starts[index], self._stops[index]
        return Record(
            int(self._ids[index]),
            self.folder / self._names[index],
            int(self.widths[index]),
            int(self.heights[index]),
            self._boxes[start:crowd],
            self._labels[start:crowd].astype(np.int64),
            self._boxes[crowd : stop if self._with_crowd else crowd],
        )

    def annotations(self, index: int) -> NDArray[np.int64]:
        """The positions in the file of the objects of a record, (M,), in the order of its boxes."""
        return self._annotations[self._starts[index] : self._crowd_starts[index]]

    @property
    def image_ids(self) -> NDArray[np.int64]:
        """Of each record, (B,)."""
        return self._ids

    @property
    def num_objects(self) -> NDArray[np.int64]:
        """The number of objects of each record, (B,)."""
        return self._crowd_starts - self._starts

    def sizes(self) -> dict[int, tuple[int, int]]:
        """(height, width) of each image in pixels, by its id."""
        heights_widths = zip(self.heights.tolist(), self.widths.tolist(), strict=True)
        return dict(zip(self.image_ids.tolist(), heights_widths, strict=True))

    def object_labels(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For every object the position of its record and its label, in the order of the records."""
        counts = self.num_objects
        before = np.repeat(np.cumsum(counts) - counts, counts)  # objects of the records before it
        objects = np.repeat(self._starts, counts) + np.arange(len(before)) - before
        return np.repeat(np.arange(len(self)), counts), self._labels[objects].astype(np.int64)

    def take(self, indices: NDArray[np.int64]) -> Records:
        """The records at these positions. The boxes are shared, not copied."""
        subset = copy.copy(self)
        subset._select(indices)
        return subset

    def _select(self, indices: NDArray[np.int64]) -> None:
        for name in ("positions", "_ids", "_names", "widths", "heights", "_starts", "_crowd_starts", "_stops"):
            setattr(self, name, getattr(self, name)[indices])


class CocoDataset:
    """A COCO-format JSON and its folder of images.

    Args:
        annotations: path of the JSON file.
        images: the folder that each `file_name` is relative to.
        crowd: "ignore" keeps crowd boxes as `Record.ignore`, "drop" removes them.
        empty_images: "keep" keeps images without objects, "drop" removes them.
        file: the contents of the JSON, if they were read already.

    Attributes:
        annotations, folder: the two paths.
        file: the contents of the JSON.
        category_ids, names: of the categories. Index i belongs to label i; labels follow the order of the ids.
        records: one `Record` for each image that is used, in the order of the image ids.
        notes: sentences for the log about what was dropped or clipped; empty if nothing was.

    Raises:
        DataError: the folder is missing, `read_annotations` refuses the file, or no image is left.
    """

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path,
        *,
        crowd: Literal["ignore", "drop"] = "ignore",
        empty_images: Literal["keep", "drop"] = "keep",
        file: Annotations | None = None,
    ) -> None:
        self.annotations, self.folder = Path(annotations), Path(images)
        self.file = file or read_annotations(self.annotations)
        if not self.folder.is_dir():
            raise DataError(f"{self.folder}: no such folder of images (annotations: {self.annotations})")
        self.category_ids, self.names = self.file.category_ids, self.file.names
        self.records = Records(self.folder, self.file, crowd)
        self.notes: list[str] = []
        if count := len(self.records.without_area):
            ids = _first_ids(self.records.without_area)
            self.notes.append(f"{count} boxes without area dropped: annotations {ids}")
        if count := self.records.num_clipped:
            self.notes.append(f"{count} boxes reached more than a pixel outside of their image and were clipped")
        if empty_images == "drop":
            with_objects = np.flatnonzero(self.records.num_objects)
            if empty := len(self.records) - len(with_objects):
                self.notes.append(f"{empty} images without objects dropped (data.empty_images=drop)")
            self.records = self.records.take(with_objects)
        if not self.records:
            reason = (
                "none has objects (data.empty_images=drop)" if len(self.file.image_ids) else "its `images` is empty"
            )
            raise DataError(f"{self.annotations}: no images to use: {reason}")

    @property
    def num_classes(self) -> int:
        """K, the number of categories."""
        return len(self.names)

    @property
    def categories(self) -> list[tuple[int, str]]:
        """(id, name) of each label."""
        return list(zip(self.category_ids, self.names, strict=True))

    def evenly_spaced(self, count: int) -> CocoDataset:
        """A copy of the data set with at most `count` of its records, evenly spaced over them."""
        count = min(count, len(self.records))
        subset = copy.copy(self)
        subset.records = self.records.take(np.arange(count) * len(self.records) // count)
        return subset


def read_image(path: Path, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """Read any image file that PIL can read; uint8 RGB (H, W, 3).

    16-bit gray values are divided by 256, not clipped at 255. The common kind of JPEG is decoded by torchvision, which
    takes half of PIL's time and returns the same pixels: both use libjpeg-turbo.

    Args:
        path: of the image file.
        size: (width, height) in the JSON. If the image rotated by its EXIF tag has this size, that image is returned,
            because viewers and most annotation tools show it; otherwise the pixels as stored. None: the rotated image.

    Raises:
        DataError: the file is missing or cannot be decoded, or neither image has `size`.
    """
    try:
        if path.is_fifo():  # opening it would wait forever
            raise DataError(f"{path}: not readable as an image: it is a pipe")
        with path.open("rb") as file, Image.open(file) as image:  # reads no pixels yet
            stored = image.size
            if size is not None and size not in (stored, stored[::-1]):  # before decoding what may be a huge image
                raise _size_error(path, size, stored)
            is_upright = size in (None, stored) and exif_orientation(image) == 1
            if image.format == "JPEG" and image.mode == "RGB" and is_upright:
                file.seek(0)
                pixels = _decode_jpeg(file.read())
                if pixels is not None:
                    return pixels
            image.load()
            rotated = upright(image)
            chosen = rotated if size is None or rotated.size == size else image
            if size is not None and chosen.size != size:
                raise _size_error(path, size, stored)
            return np.array(to_rgb(chosen))  # a copy, because torch needs writable memory
    except DataError:
        raise
    except Exception as error:  # for damaged files the decoders raise almost anything, such as struct.error
        raise DataError(f"{path}: not readable as an image: {error}") from error


def _decode_jpeg(data: bytes) -> NDArray[np.uint8] | None:
    """uint8 RGB (H, W, 3); None if the file is damaged, or if torchvision was built without JPEG."""
    try:
        decoded = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    except RuntimeError:
        return None
    return np.ascontiguousarray(decoded.permute(1, 2, 0).numpy())


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB. Grays of 16 bits are divided by 256; floats are taken as 0 to 255. Raises ValueError for NaN."""
    if image.mode.startswith("I") or image.mode == "F":
        gray = np.asarray(image).astype(np.float64)
        if missing := np.isnan(gray).sum():
            raise ValueError(f"{missing:,} of {gray.size:,} pixels are not a number (NaN); set them to one, such as 0")
        image = Image.fromarray((gray / 256 if image.mode != "F" else gray).clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colors; PIL warns if it converts to RGB, and does not name the file
    return image.convert("RGB")


def _size_error(path: Path, size: tuple[int, int], stored: tuple[int, int]) -> DataError:
    return DataError(
        f"{path}: width x height is {size[0]}x{size[1]} in the JSON, {stored[0]}x{stored[1]} in the file; "
        "correct one of them"
    )


def _first_ids(ids: NDArray[np.int64]) -> str:
    return ", ".join(str(i) for i in ids[:10]) + (", ..." if len(ids) > 10 else "")
